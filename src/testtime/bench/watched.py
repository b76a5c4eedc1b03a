"""What a cell depends on that its record only names: images, weights and code, each by its hash."""

import hashlib
import inspect
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import testtime as tt
from testtime._core.errors import TesttimeError
from testtime._core.registry import find
from testtime.adaptation.knowledge import fingerprint
from testtime.bench.cells import Cell
from testtime.bench.code_hash import code_hash, files_hash
from testtime.bench.models import load_model
from testtime.bench.own import python_file
from testtime.streams.data import load_data
from testtime.streams.recorded import Recorded
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
        self._images, self._weights = cache(images_hash), cache(_weights_hash)
        self._model, self._method = cache(model_code_hash), cache(method_code_hash)
        self._stamps: dict[tuple[Any, ...], str | None] = {}

    def __call__(self, cell: Cell) -> dict[str, str | None]:
        """The hashes for a cell; None where a name stands for the same everywhere."""
        own = cell.model.startswith("file:")
        if (key := _images_of(cell)) not in self._stamps:  # before they are read
            self._stamps[key] = _stamp(cell)
        return {
            **({"weights_sha256": self._weights(cell.model)} if own else {}),
            "model_code_sha256": self._model(cell.model),
            "method_code_sha256": self._method(cell.method),
            **self.images(cell),
        }

    def moved(self, cell: Cell) -> bool:
        """Whether files of the images that a cell sees are others than when its hashes were asked for.

        Told by their names, sizes and times; of a folder whose files were touched the hash tells.
        """
        key, now = _images_of(cell), _stamp(cell)
        if self._stamps[key] == now:
            return False
        if not cell.data.startswith("folder:"):
            return True
        known = self.images(cell)
        train = images_hash(cell.data, "train") if _needs_source(cell) else None
        if list(known.values()) != [images_hash(cell.data, "test"), train]:
            return True
        self._stamps[key] = now
        return False

    def images(self, cell: Cell) -> dict[str, str | None]:
        """Those of the images, the training ones only for a method that sees them."""
        train = self._images(cell.data, "train") if _needs_source(cell) else None
        return {"data_sha256": self._images(cell.data, "test"), "source_data_sha256": train}


def _needs_source(cell: Cell) -> bool:
    return bool(find("method", cell.method).build(**json.loads(cell.options)).needs)


def _images_of(cell: Cell) -> tuple[Any, ...]:
    """What cells share that see the same files."""
    if cell.data.startswith("corrupted:"):
        return cell.data, cell.stream, cell.seed
    return cell.data, _needs_source(cell)


def _stamp(cell: Cell) -> str | None:
    """Hash of names, sizes and times of the files that images are read from; None where they are not."""
    total = hashlib.sha256()
    try:
        for path in sorted(set(_files(cell))):
            about = path.stat()
            told = f"{path}\0{about.st_size} {about.st_mtime_ns}\n"
            total.update(told.encode("utf-8", "surrogateescape"))
    except (TesttimeError, OSError):  # the cell will tell
        return None
    return total.hexdigest()


def _files(cell: Cell) -> Iterator[Path]:
    """The images of a folder, or those of a stream that were corrupted beforehand."""
    if cell.data.startswith("folder:"):
        for split in ("test", "train")[: 1 + _needs_source(cell)]:
            yield from (Path(path) for path, _ in load_data(cell.data, split=split).samples)  # pyright: ignore[reportAttributeAccessIssue]
    if cell.data.startswith("corrupted:"):
        found = load_data(cell.data)
        assert isinstance(found, Recorded)
        order = Scenario.from_toml(cell.stream).stream(found, seed=cell.seed).order()
        yield from (found.file(each.position, each.domain, each.severity) for each in order)


def images_hash(data: str, split: str) -> str | None:
    """Hash of the images of a folder and of their names; None for other data, and where there are none."""
    if not data.startswith("folder:"):
        return None
    try:
        found = load_data(data, split=split)
    except TesttimeError:  # the cell will tell
        return None
    return files_hash((Path(path) for path, _ in found.samples), Path(found.root))  # pyright: ignore[reportAttributeAccessIssue]


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
