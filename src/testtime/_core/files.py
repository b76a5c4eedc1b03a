"""Writes that happen wholly or not at all."""

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: str | Path) -> Generator[Path, None, None]:
    """Gives a temporary path beside `path`; moves it there when the block ends well.

    The content is on disk before the move, so that after a crash `path` holds the old content or
    the new one, never a part. When the block raises, nothing changes.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic(Path(folder, "a.txt")) as part:
        ...         _ = part.write_text("whole")
        ...     Path(folder, "a.txt").read_text()
        'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    mask = os.umask(0)
    os.umask(mask)
    part = Path(name)
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.chmod(0o666 & ~mask)  # mkstemp keeps a file to its owner
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
