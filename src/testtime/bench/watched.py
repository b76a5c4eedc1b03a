"""What a cell depends on that its record only names: images, weights and code, each by its hash."""

import hashlib
import inspect
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import testtime as tt
from testtime._core.errors import TesttimeError
from testtime._core.registry import find
from testtime.adaptation.knowledge import fingerprint
from testtime.bench.cells import Cell, shared
from testtime.bench.code_hash import code_hash, content_hash, files_hash
from testtime.bench.draws import CLEAN_SAMPLES, SOURCE_SAMPLES, drawn
from testtime.bench.models import load_model
from testtime.bench.own import python_file
from testtime.streams.data import load_data
from testtime.streams.open_set import held_out
from testtime.streams.recorded import CLEAN
from testtime.streams.scenarios import Scenario


class Watched:
    """The hashes of what cells depend on, each made once: column of their rows -> value.

    Example:
        >>> from testtime.bench.cells import plan
        >>> from testtime.streams.scenarios import Scenario
        >>> cells = plan(methods=["tent"], models=["embedded:batch"], streams=[Scenario()],
        ...              data="fashion-mnist:sample", seeds=1)
        >>> set(Watched()(cells[0]).values())
        {None}
    """

    def __init__(self) -> None:
        self._weights = cache(_weights_hash)
        self._model, self._method = cache(model_code_hash), cache(method_code_hash)
        self._stamps: dict[tuple[Any, ...], str | None] = {}
        self._images: dict[tuple[Any, ...], str | None] = {}
        self._contents: dict[tuple[Path, int, int], str] = {}

    def __call__(self, cell: Cell) -> dict[str, str | None]:
        """The hashes for a cell; None where a name stands for the same everywhere."""
        own = cell.model.startswith("file:")
        key = _images_of(cell), _needs_source(cell)
        if key not in self._stamps:  # before they are read
            self._stamps[key] = _stamp(cell)
        return {
            **({"weights_sha256": self._weights(cell.model)} if own else {}),
            "model_code_sha256": self._model(cell.model),
            "method_code_sha256": self._method(cell.method),
            **self.images(cell),
        }

    def moved(self, cell: Cell) -> bool:
        """Whether images that a cell sees are others than when its hashes were asked for.

        Read again are files whose size or time is another; those that were only touched are the same.
        """
        key, now = (_images_of(cell), _needs_source(cell)), _stamp(cell)
        if self._stamps[key] == now:
            return False
        if self.images(cell) != {
            name: images_hash(cell, split, self._content) for name, split in _splits(cell)
        }:
            return True
        self._stamps[key] = now
        return False

    def images(self, cell: Cell) -> dict[str, str | None]:
        """Those of the images, the training ones only for a method that sees them."""
        found: dict[str, str | None] = {}
        for name, split in _splits(cell):
            if (key := (_images_of(cell), split)) not in self._images:
                self._images[key] = images_hash(cell, split, self._content)
            found[name] = self._images[key]
        return found

    def _content(self, path: Path) -> str:
        """Hash of a file, which many streams may share: read once while it stays as it is."""
        about = path.stat()
        key = (path, about.st_size, about.st_mtime_ns)
        if key not in self._contents:
            self._contents[key] = content_hash(path)
        return self._contents[key]


def _needs_source(cell: Cell) -> bool:
    return bool(find("method", cell.method).build(**json.loads(cell.options)).needs)


def _splits(cell: Cell) -> list[tuple[str, str]]:
    """Columns of the rows, and the split of the data that each tells of; "" for one that is not seen."""
    return [
        ("data_sha256", "test"),
        ("source_data_sha256", "train" if _needs_source(cell) else ""),
    ]


def _images_of(cell: Cell) -> tuple[Any, ...]:
    """What cells share that see the same files of a split."""
    return shared("data_sha256", vars(cell))


def _stamp(cell: Cell) -> str | None:
    """Hash of names, sizes and times of the files that images are read from; None where they are not."""
    total = hashlib.sha256()
    try:
        for path in sorted({path for _, split in _splits(cell) for path in _files(cell, split)[1]}):
            about = path.stat()
            told = f"{path}\0{about.st_size} {about.st_mtime_ns}\n"
            total.update(told.encode("utf-8", "surrogateescape"))
    except (TesttimeError, OSError):  # the cell will tell
        return None
    return total.hexdigest()


def images_hash(cell: Cell, split: str, content: Callable[[Path], str]) -> str | None:
    """Hash of the images that a cell sees, and of their names; None for other data, and where none are."""
    try:
        root, files = _files(cell, split)
        return files_hash(files, root, content) if files else None
    except (TesttimeError, OSError):  # the cell will tell
        return None


def _files(cell: Cell, split: str) -> tuple[Path, set[Path]]:
    """A folder and the files of images in it: all of a folder of classes, of others what is drawn."""
    kind = cell.data.partition(":")[0]
    if not split or kind not in ("folder", "corrupted"):
        return Path(), set()
    found: Any = load_data(cell.data, split=split)
    if kind == "folder":
        return Path(found.root), {Path(path) for path, _ in found.samples}
    scenario = Scenario.from_toml(cell.stream)
    absent = held_out(scenario.unknown)
    if split == "train":
        chosen = drawn(found, SOURCE_SAMPLES, without=absent).tolist()
        return found.folder, {found.folder / found.names[each] for each in chosen}
    wanted = [each[:3] for each in scenario.stream(found, seed=cell.seed).order()]
    if found.has_clean:
        clean = drawn(found, CLEAN_SAMPLES, without=absent).tolist()
        wanted += [(each, CLEAN, 0) for each in clean]
    return found.root, {file for each in wanted for file in found.files(*each)}


def model_code_hash(model: str) -> str | None:
    """Hash of the code of a model: of a Python file, or of a folder that `hf:` names."""
    if (place := python_file(model)) is not None:
        return code_hash(place, place.parent)
    source, _, name = model.partition(":")
    if source == "hf" and (folder := Path(name)).is_dir():
        return files_hash((each for each in folder.iterdir() if each.is_file()), folder)
    return None


def method_code_hash(name: str) -> str | None:
    """Hash of the code of a method that is not the library's own; None where it has no file."""
    factory = inspect.unwrap(find("method", name).factory)
    try:
        place = Path(inspect.getfile(factory)).resolve()
    except TypeError:  # made by something else than def
        return None
    if not place.is_file() or place.is_relative_to(Path(tt.__file__).resolve().parent):
        return None
    depth = factory.__module__.count(".") + (place.name == "__init__.py")
    return code_hash(place, place.parents[min(depth, len(place.parents) - 1)])


def _weights_hash(model: str) -> str:
    return fingerprint(load_model(model))
