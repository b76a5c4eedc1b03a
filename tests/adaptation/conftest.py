"""What several files of this room share."""

import pytest

from testtime.adaptation import budget
from testtime.adaptation.engine import Engine


@pytest.fixture
def costs(monkeypatch):
    """Seconds that a sample takes in plain inference and in a step, and that a step takes besides.

    The clock goes by them alone.
    """
    state = {"time": 0.0, "plain": 1.0, "step": 1.0, "fixed": 0.0}

    def spend(kind, run):
        def spending(engine, x, given):
            state["time"] += len(x) * state[kind] + (kind == "step") * state["fixed"]
            return run(engine, x, given)

        return spending

    monkeypatch.setattr(Engine, "steps", spend("step", Engine.steps))
    monkeypatch.setattr(Engine, "predict", spend("plain", Engine.predict))
    monkeypatch.setattr(budget, "clock", lambda: state["time"])
    return state
