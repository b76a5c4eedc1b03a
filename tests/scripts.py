"""The scripts of `benchmarks/`, as modules."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def script(name):
    """A script of `benchmarks/` that finds its neighbours as it does when Python runs it."""
    spec = spec_from_file_location(f"script_{name}", BENCHMARKS / f"{name}.py")
    module = module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module
