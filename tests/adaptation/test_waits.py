"""How often a step makes the host wait for the device, and that no other step does so more often."""

from pathlib import Path

import pytest
import torch

import testtime as tt
from elsewhere import WAITS, There, elsewhere, send
from models import batches, tiny
from testtime._core.outcomes import Outcome

PAGE = Path(__file__, "../../../docs/performance.md").resolve()
OPTIONS = {"eta": {"margin": 0.9, "redundancy": 0.99}, "rotta": {"capacity": 16, "every": 16}}
OPTIONS |= {"eata": OPTIONS["eta"], "sar": {"margin": 0.9}, "memo": {"views": 2}}
OPTIONS |= {"deyo": {"entropy_margin": 0.9, "drop_margin": -1.0}, "roid": {}}


def table() -> dict[str, int]:
    """The page's own numbers."""
    lines = (
        PAGE.read_text("utf-8").split("<!-- waits: begin -->")[1].split("<!-- waits: end -->")[0]
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines.splitlines()]
    rows = [row for row in rows if len(row) == 3][2:]
    return {row[0].split("`")[1]: int(row[1]) for row in rows}


@pytest.mark.parametrize(("method", "expected"), table().items())
def test_a_step_waits_for_the_device_as_often_as_the_page_says(method, expected, monkeypatch):
    with elsewhere(monkeypatch):
        model, xs = send(tiny()), [There(x) for x in batches(4)]
        pairs = [(x, There(torch.arange(16) % 5)) for x in xs]
        needs = tt.methods()[method].needs
        source = tt.fit_source(model, pairs, methods=[method]) if needs else None
        adapter = tt.adapt(model, method, source=source, **OPTIONS.get(method, {}))
        for x in xs[:-1]:
            adapter(x)
        WAITS.clear()
        adapter(xs[-1])
        found = list(WAITS)
        done = Outcome.ADAPTED if adapter.recipe.learns else Outcome.ANSWERED
        assert adapter.events[-1].outcome is done
        assert len(found) == expected, found


def test_a_loaded_state_waits_no_more_often(tmp_path, monkeypatch):
    with elsewhere(monkeypatch):
        adapter = tt.adapt(send(tiny()), "rotta", **OPTIONS["rotta"])
        waits = []
        for x in batches(4):
            WAITS.clear()
            adapter(There(x))
            waits.append(len(WAITS))
            if len(waits) == 2:
                adapter.save(tmp_path / "state")
                adapter.load(tmp_path / "state")
        assert waits[3] == waits[1]


def test_a_guard_and_a_gate_wait_for_the_device_once_a_question(monkeypatch):
    with elsewhere(monkeypatch):
        x = There(batches(1)[0])
        waits = {}
        for name, more in {"plain": {}, "gate": {"gate": True}, "guard": {"guard": True}}.items():
            adapter = tt.adapt(send(tiny()), "tent", **more)
            adapter(x)
            WAITS.clear()
            adapter(x)
            waits[name] = len(WAITS)
        assert waits["gate"] <= waits["plain"] + 1
        assert waits["guard"] <= waits["plain"] + 2  # is there an answer to all, and which


def test_few_that_teach_are_found_in_one_wait(monkeypatch):
    """Of many samples few teach: those go through again, and are looked for once."""
    with elsewhere(monkeypatch):
        monkeypatch.setattr("testtime.adaptation.shortcuts.WORTH", 1)
        adapter = tt.adapt(send(tiny("group")), "eta", margin=0.65, redundancy=1.0)
        for x in batches(3):
            WAITS.clear()
            adapter(There(x))
        found = list(WAITS)
        assert adapter.events[-1].outcome is Outcome.ADAPTED
        assert 0 < adapter.events[-1].used < 16
        assert len(found) == 4, found  # the batch, who teaches, how many, and whether all is finite
