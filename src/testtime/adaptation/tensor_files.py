"""Files of tensors, and what is said where one cannot be written or read."""

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from testtime._core.errors import StateError
from testtime._core.files import atomic


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], about: dict[str, str]) -> None:
    """Writes tensors, and texts about them, as safetensors, wholly or not at all.

    Raises:
        StateError: when nothing can be written there.

    Example:
        >>> write_tensors("", {}, {})
        Traceback (most recent call last):
        testtime._core.errors.StateError: the path is ''; expected the name of a file.
    """
    try:
        with atomic(_file(path)) as part:
            save_file(dict(tensors), part, about)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise StateError(f"{path} cannot be written: {why}. Give another path.") from error


@contextmanager
def open_tensors(path: str | Path, *, wrote: str, way: str) -> Generator[Any, None, None]:
    """The file that `write_tensors` wrote, open for reading.

    Args:
        path: of the file.
        wrote: the call that writes such files, in words.
        way: what to do where it is damaged, as the end of a sentence.

    Raises:
        StateError: when there is no such file, or it is damaged.
    """
    try:
        with _file(path).open("rb"):  # tells more than safetensors of a file that it may not open
            pass
        with torch.inference_mode(False), safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise StateError(f"there is no file {path}; expected what {wrote} wrote.") from error
    except OSError as error:
        why = error.strerror or error
        raise StateError(f"{path} cannot be read: {why}. Give what {wrote} wrote.") from error
    except SafetensorError as error:
        raise StateError(
            f"{path} cannot be read: {error}. It is truncated or not a safetensors file; {way}."
        ) from error


def _file(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike) or not str(path) or "\0" in str(path):
        raise StateError(f"the path is {path!r:.60}; expected the name of a file.")
    if Path(path).is_dir():
        raise StateError(f"{path} is a folder; expected the name of a file.")
    return Path(path)
