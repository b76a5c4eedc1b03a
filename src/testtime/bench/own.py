"""Python files of a user's own: what a function in one returns, and the modules beside it."""

import os
import random
import runpy
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from testtime._core.errors import InputError
from testtime._core.seeds import global_chance
from testtime.bench.code_hash import INSTALLED

_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (random.getstate, random.setstate),
    (np.random.get_state, np.random.set_state),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (Path.cwd, os.chdir),
)
"""What a file may set for the whole process: what tells it, and what sets it."""

_home: list[Path] = []
"""The folder whose modules are found now, if any."""


def python_file(model: str) -> Path | None:
    """The file of a model that is called `file:PATH.py@FUNCTION`; None for another name.

    Example:
        >>> python_file("file:/nets/a.py@build"), python_file("file:/nets/a.pt@timm:resnet18")
        (PosixPath('/nets/a.py'), None)
    """
    source, _, name = model.partition(":")
    path, at, _ = name.rpartition("@")
    mine = source == "file" and at and path.endswith(".py")
    return Path(path).expanduser().resolve() if mine else None


def call_function(path: str, name: str) -> Any:
    """What a function in a Python file returns, called without arguments.

    The file may import those beside it, which come before installed ones, as in a script. Random
    states are those of seed 0, and left as they were, with defaults of torch, modules and the
    current folder. What is printed goes to standard error.

    Raises:
        InputError: there is no such file or function, or it fails.
    """
    place = Path(path).expanduser().resolve()
    if not place.is_file():
        raise InputError(f"there is no file {path}; expected Python with a function {name}.")
    try:
        with at_home(place.parent), _settings_kept(), redirect_stdout(sys.stderr):
            sys.path.insert(0, str(place.parent))
            return runpy.run_path(str(place))[name]()
    except (Exception, SystemExit) as error:  # code of others fails in ways of its own
        raise InputError(
            f"{path}@{name} made no model: {type(error).__name__}: {error}. Expected a function "
            f"{name}() in that file, which returns a module."
        ) from error


@contextmanager
def at_home(folder: Path | None) -> Generator[None, None, None]:
    """Inside, modules of a folder are found, after installed ones; in the end they are forgotten.

    They are read again by each block, so that none is an old one, or that of another folder.
    """
    if folder is None or folder in _home:
        yield
        return
    hidden = _loaded(lambda name, module: _lies_in(folder, module) or _hides(folder, name, module))
    for name in hidden:
        del sys.modules[name]
    paths = list(sys.path)
    _home.append(folder)
    try:
        sys.path.append(str(folder))
        yield
    finally:
        _home.remove(folder)
        sys.path[:] = paths
        for name in _loaded(lambda _, module: _lies_in(folder, module)):
            del sys.modules[name]
        sys.modules.update(hidden)


@contextmanager
def _settings_kept() -> Generator[None, None, None]:
    """What is set inside for the whole process is put back; random states inside are those of seed 0."""
    before = [(put, tell()) for tell, put in _SETTINGS]
    paths, cached, device = list(sys.path), sys.dont_write_bytecode, _default_device()
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    sys.dont_write_bytecode = True  # Python tells old ones by their time and size alone
    try:
        torch.set_default_device("cpu")
        with global_chance(0, [torch.device("cpu")]):
            yield
    finally:
        sys.path[:], sys.dont_write_bytecode = paths, cached
        torch.set_default_device(None if device is None else device.device)
        if device is None:  # torch 2.8 and before fail to tell a default that was taken back
            vars(torch._GLOBAL_DEVICE_CONTEXT).pop("device_context", None)
        for put, value in before:
            put(value)


def _default_device() -> Any:
    return getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)


def _loaded(asked: Callable[[str, ModuleType], bool]) -> dict[str, ModuleType]:
    """The modules and packages, with all in them, that are a user's own and for which that holds."""
    modules = {name: module for name, module in sys.modules.items() if module is not None}
    tops = {
        name
        for name, module in modules.items()
        if "." not in name and name not in ("testtime", "torch") and asked(name, module)
        if not any(INSTALLED & set(place.parts) for place in _places(module))
    }
    return {name: module for name, module in modules.items() if name.partition(".")[0] in tops}


def _lies_in(folder: Path, module: ModuleType) -> bool:
    return any(place.resolve().parent == folder for place in _places(module))


def _hides(folder: Path, name: str, module: ModuleType) -> bool:
    """Whether a module of a folder has the name of one from elsewhere, not of one of Python's."""
    found = (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file()
    return found and name not in sys.stdlib_module_names and any(_places(module))


def _places(module: ModuleType) -> Iterator[Path]:
    """Where a module lies: its folders if it is a package, else its file, if that has its name."""
    folders = getattr(module, "__path__", None)
    file = getattr(module, "__file__", None)
    if folders is not None:
        yield from map(Path, folders)
    elif file is not None and Path(file).name.partition(".")[0] == module.__name__:
        yield Path(file)
