"""What a cell depends on that its record only names: images, weights and code, each by its hash."""

import inspect
import json
from functools import cache
from pathlib import Path

import testtime as tt
from testtime._core.errors import TesttimeError
from testtime._core.registry import find
from testtime.adaptation.knowledge import fingerprint
from testtime.bench.cells import Cell
from testtime.bench.code_hash import code_hash, files_hash
from testtime.bench.models import load_model
from testtime.bench.own import python_file
from testtime.streams.data import load_data


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

    def __call__(self, cell: Cell) -> dict[str, str | None]:
        """The hashes for a cell; None where a name stands for the same everywhere."""
        own = cell.model.startswith("file:")
        return {
            **({"weights_sha256": self._weights(cell.model)} if own else {}),
            "model_code_sha256": self._model(cell.model),
            "method_code_sha256": self._method(cell.method),
            **self.images(cell),
        }

    def images(self, cell: Cell) -> dict[str, str | None]:
        """Those of the images, the training ones only for a method that sees them."""
        recipe = find("method", cell.method).build(**json.loads(cell.options))
        return {
            "data_sha256": self._images(cell.data, "test"),
            "source_data_sha256": self._images(cell.data, "train") if recipe.needs else None,
        }


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
