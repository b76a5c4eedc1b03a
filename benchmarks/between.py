"""What was measured, in files of numbers and in pages of the docs: written wholly or not at all."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from testtime._core.files import atomic


def write_json(path: Path, numbers: Any) -> None:
    """Writes a file of numbers."""
    with atomic(path) as part:
        part.write_text(json.dumps(numbers, indent=1) + "\n", "utf-8")


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
    with atomic(path) as part:
        part.write_text("\n".join([before + begin, *lines, end + after]), "utf-8")
