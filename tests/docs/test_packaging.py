"""What is installed: pins that fit the ranges, and an import that loads nothing it need not."""

import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
OPTIONAL = "torchvision", "pandas", "matplotlib", "plotly", "pyarrow", "typer", "sklearn", "scipy"


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    texts = chain(project["dependencies"], *project["optional-dependencies"].values())
    return [r for r in map(Requirement, texts) if r.name != "testtime"]


def test_every_dependency_is_pinned_within_its_range():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in pairs}
    assert len(pins) == len(pairs)
    for requirement in requirements():
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])


def test_every_dependency_has_its_reason():
    page = (ROOT / "docs" / "dependencies.md").read_text("utf-8")
    named = set(re.findall(r"[\w-]+", page))
    plugins = {"pytest-cov", "pytest-xdist"}
    assert {r.name for r in requirements()} - plugins <= named


@pytest.mark.parametrize("used", ["testtime", "testtime; testtime.adapt; testtime.methods()"])
def test_the_import_loads_nothing_optional(used):
    unwanted = {*OPTIONAL} if "adapt" in used else {*OPTIONAL, "torch", "numpy"}
    code = f"import testtime, sys; {used}; print(*({unwanted!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
