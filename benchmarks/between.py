"""Tables of measured figures in pages of the docs."""

from collections.abc import Sequence
from pathlib import Path


def write_between(path: Path, name: str, lines: Sequence[str]) -> None:
    """Puts lines between the marks of a page, in place of those that are there.

    Args:
        path: of the page, which holds `<!-- NAME: begin -->` and `<!-- NAME: end -->`.
        name: of the marks.
        lines: without line ends.
    """
    begin, end = (f"<!-- {name}: {what} -->" for what in ("begin", "end"))
    before, rest = path.read_text("utf-8").split(begin)
    after = rest.split(end)[1]
    path.write_text("\n".join([before + begin, *lines, end + after]), "utf-8")
