"""A guard that says what it was told to say, and what is asked of an adapter under one."""

import torch
from torch import Tensor

import testtime as tt
from testtime._core.outcomes import Outcome


class Says:
    """A guard that says what it was told to say, and then repeats the last."""

    def __init__(self, *words: bool | None) -> None:
        self.words = words
        self.reset()

    def update(self, adapted: Tensor, source: Tensor) -> bool | None:
        assert adapted.shape == source.shape
        self.asked += 1
        return self.words[min(self.asked, len(self.words)) - 1]

    def reset(self) -> None:
        self.asked = 0

    def state_dict(self) -> dict[str, int]:
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.asked = state["asked"]


def outcomes(adapter: tt.Adapter, xs: list[Tensor]) -> list[Outcome]:
    return [(adapter(x), adapter.events[-1].outcome)[1] for x in xs]


def same_state(one: tt.Adapter, two: tt.Adapter) -> bool:
    a, b = one.snapshot(), two.snapshot()
    return all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
