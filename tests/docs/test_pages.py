"""The pages: what is generated is whole and runs, and every block of Python that is shown runs."""

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import testtime as tt
from pages import commands, corruptions, methods, reference
from testtime._core.registry import entries
from testtime.cli.main import app
from testtime.streams.scenarios import known_domains

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
SECTIONS = "Options", "What it needs", "Cost", "Example", "Parts", "Reference"


def blocks(markdown: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", markdown, re.DOTALL)


@pytest.mark.filterwarnings("ignore:no single value")  # so small a batch holds no rule of sqrl
@pytest.mark.parametrize("name", sorted(tt.methods()))
def test_a_method_has_a_whole_page_whose_examples_run(name):
    page = methods.page(entries("method")[name], images=2)
    for section in SECTIONS:
        assert re.search(rf"^## {section}\n\n\S", page, re.MULTILINE), section
    # what the docstring says; the list is made from the recipe
    if "nputs are images in [0, 1]" in page:
        assert "\n- images in [0, 1], with normalisation" in page
    assert re.search(r"\*\*Use it when\*\* \w", page)
    assert re.search(r"\*\*Not when\*\* \w", page)
    for option in tt.methods()[name].options:
        assert re.search(rf"^\| `{option}` \| `[^|]+` \| .*\w", page, re.MULTILINE), option
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    examples = doctest.DocTestParser().get_doctest("\n".join(blocks(page)), {}, name, name, 0)
    assert len(examples.examples) >= 7
    assert doctest.DocTestRunner(optionflags=flags).run(examples).failed == 0


def test_every_method_is_in_the_table_and_the_navigation():
    for name in tt.methods():
        assert f"[`{name}`]({name}.md)" in methods.index()
        assert {name: f"methods/{name}.md"} in methods.nav()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_blocks_without_a_prompt_run_in_order(path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
    names = {"model": model.eval(), "x": torch.rand(8, 3, 8, 8)}
    for block in blocks(path.read_text("utf-8")):
        if not block.startswith(">>>"):
            exec(compile(block, str(path), "exec"), names)
            assert names["logits"].shape == (8, 5)


def test_every_room_and_every_top_level_name_is_in_the_reference():
    pages = reference.pages()
    packages = {
        ".".join(path.relative_to(ROOT / "src").parent.parts)
        for path in (ROOT / "src" / "testtime").glob("**/__init__.py")
    } - {"testtime", *reference.LEFT_OUT}
    assert {f"reference/{name.removeprefix('testtime.')}.md" for name in packages} <= set(pages)
    for name in tt.__all__:
        assert f"`tt.{name}`" in pages["reference/index.md"]


def test_every_public_symbol_has_a_module_that_the_reference_shows():
    shown = "\n".join(reference.pages().values())
    symbols = reference.public_symbols()
    assert "testtime.adaptation.adapter.Adapter.snapshot" in symbols
    for symbol in symbols:
        modules = {symbol.rsplit(".", dots)[0] for dots in (1, 2)}
        assert any(f"::: {module}\n" in f"{shown}\n" for module in modules), symbol


def test_the_command_line_page_has_every_command_and_option():
    page = commands.page()
    for command in app.registered_commands:
        assert f"## testtime {command.name}\n" in page
    assert "| `--methods` | required |" in page


def test_every_corruption_has_a_picture():
    pictures = corruptions.strips()
    for name in known_domains():
        if name != "clean":
            assert pictures[f"images/{name}.png"].startswith(b"\x89PNG")
            assert f"images/{name}.png" in corruptions.sheet()


def test_the_method_of_a_file_that_is_shown_is_known_by_its_entry_point(tmp_path):
    page = (ROOT / "docs" / "extending.md").read_text("utf-8")
    (tmp_path / "margin.py").write_text(re.findall(r"```py\n(.*?)```", page, re.DOTALL)[0], "utf-8")
    about = tmp_path / "margin-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: margin\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text("[testtime.method]\nmargin = margin\n")
    code = """
import torch, testtime as tt
from testtime.bench.cells import plan, label
from testtime.streams.scenarios import Scenario
model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).eval()
adapter = tt.adapt(model, "margin", lr=0.1)
adapter(torch.randn(8, 4))
cells = plan(methods=["margin(lr=0.01)"], models=["embedded:batch"], streams=[Scenario()],
             data="fashion-mnist:sample", seeds=1)
print(adapter.recipe.optimizer.lr, label(vars(cells[1])))
"""
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "0.1 margin(lr=0.01)"
