"""Files: writes that happen wholly or not at all, and the hash that tells whose one is."""

import hashlib
import os
import secrets
import stat
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """A hash of tensors, their names, types and values, and of a text.

    Example:
        >>> digest({"a": torch.zeros(2)}) == digest({"a": torch.zeros(2).half()})
        False
    """
    total = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        held = tensor.detach().cpu().resolve_conj().contiguous()
        total.update(f"{name}{tuple(held.shape)}{held.dtype}".encode())
        total.update(held.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


@contextmanager
def atomic(path: str | Path) -> Generator[Path, None, None]:
    """Gives a temporary path beside `path`; moves it there when the block ends well.

    The content is on disk before the move, so that after a crash `path` holds the old content or
    the new one, never a part. When the block raises, nothing changes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic(Path(folder, "a.txt")) as part:
        ...         _ = part.write_text("whole")
        ...     Path(folder, "a.txt").read_text()
        'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # known before it is made, so that an interrupt cannot leave it there
    part = path.parent / f".{path.name}.{secrets.token_hex(8)}.part"
    try:
        part.touch(exist_ok=False)
        mode = stat.S_IMODE(part.stat().st_mode)
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.chmod(mode)  # who wrote may have put a file of its owner's alone in its place
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
