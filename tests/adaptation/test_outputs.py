"""An adapter answers with what its model answers with, and refuses what holds no logits."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import testtime as tt
from battery import ALL, LEARNING, WEIGHING, adapter_of, each, recipe_of
from models import batches, tiny
from testtime._core.errors import InputError, ScopeError
from testtime.adaptation.outputs import read_logits


class Wrapped(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = tiny(), kind

    def forward(self, x):
        logits = self.net(x)
        if self.kind == "tuple":
            return logits, x.mean((1, 2, 3))
        if self.kind == "dense":
            return logits[..., None, None] + x.mean(1, keepdim=True)
        return OUTPUTS[self.kind](logits, logits.sum(1))


class Plain:
    """An object of nobody's, with logits."""

    def __init__(self, logits: Tensor, more: Tensor) -> None:
        self.logits, self.more = logits, {"deep": [more, None]}


@dataclass(frozen=True)
class Frozen:
    logits: Tensor
    more: tuple[Tensor, ...]


class Named(NamedTuple):
    logits: Tensor
    more: Tensor


OUTPUTS = {
    "object": Plain,
    "dataclass": lambda logits, more: Frozen(logits, (more, more)),
    "named tuple": Named,
    "list": lambda logits, more: [logits, more],
    "nested": lambda logits, more: (logits, None, {"deep": [more, "kept"]}, more.sum()),
    "dictionary": lambda logits, more: {"more": more, "logits": logits},
    "segmentation": lambda logits, more: OrderedDict(out=logits, aux=more),
}


def tensors_of(output) -> list[Tensor]:
    """All tensors in an output."""
    if isinstance(output, Tensor):
        return [output]
    parts = output if isinstance(output, tuple | list) else getattr(output, "__dict__", output)
    if isinstance(parts, dict) and not isinstance(output, list):
        parts = parts.values()
    return [t for part in parts for t in tensors_of(part)] if parts not in (None, "kept") else []


@pytest.mark.parametrize("name", [name for name in ALL if name not in WEIGHING])
@pytest.mark.parametrize("kind", ["tuple", *OUTPUTS])
def test_outputs_keep_their_kind(name, kind):
    model, x = Wrapped(kind).eval(), batches(1)[0]
    adapter, expected = adapter_of(name, model), adapter_of(name)(x)
    told, answer, plain = adapter.predict(x), adapter(x), model(x)
    torch.testing.assert_close(read_logits(answer), expected)
    for given in (told, answer):
        assert type(given) is type(plain)
        assert [t.shape for t in tensors_of(given)] == [t.shape for t in tensors_of(plain)]
        assert not any(t.requires_grad for t in tensors_of(given))


@pytest.mark.parametrize("name", ["source", "bn-adapt", "tent", "eta", "eata", "sar", "ostta"])
def test_dense_logits(name):
    adapter = adapter_of(name, Wrapped("dense").eval())
    for x in batches(2):
        assert adapter(x).shape == (16, 5, 8, 8)


@pytest.mark.parametrize("name", [n for n in ALL if not recipe_of(n).dense and n not in WEIGHING])
def test_dense_logits_are_refused_where_a_sample_has_one_answer(name):
    with pytest.raises(InputError, match="dense"):
        adapter_of(name, Wrapped("dense").eval())(batches(1)[0])


@each
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda logits: logits[:1], "one prediction for each sample"),
        (lambda logits: logits.argmax(1, keepdim=True), "floating point"),
        (lambda logits: logits[:, 0], "expected logits"),
        (lambda logits: {"scores": logits}, "dictionary"),
    ],
    ids=["batch", "labels", "rank", "keys"],
)
def test_what_is_no_logits_is_refused(name, spoil, says):
    model = Spoilt(spoil if not tt.methods()[name].needs else lambda logits: logits).eval()
    adapter = adapter_of(name, model)
    model.spoil = spoil
    with pytest.raises((InputError, ScopeError), match=says):
        adapter(batches(1)[0])
    assert adapter.counts.steps == 0


class Spoilt(nn.Module):
    def __init__(self, spoil) -> None:
        super().__init__()
        self.net, self.spoil = tiny(), spoil

    def forward(self, x):
        return self.spoil(self.net(x))


@pytest.mark.parametrize("name", [*LEARNING, "lame"])
def test_one_class_is_refused_where_probabilities_matter(name):
    model = Spoilt(lambda logits: logits).eval()
    adapter = adapter_of(name, model)
    model.spoil = lambda logits: logits[:, :1]
    with pytest.raises(InputError, match="two logits"):
        adapter(batches(1)[0])


@pytest.mark.parametrize("name", ["tent", "cotta", "ostta", "memo"])
def test_a_model_that_carries_no_gradient_is_refused(name):
    model = Spoilt(lambda logits: logits.detach()).eval()
    with pytest.raises(ScopeError, match="no gradient"):
        adapter_of(name, model)(batches(1)[0])


def test_single_numbers_of_parts_are_averaged_where_they_can_be():
    def told(logits):
        return {"logits": logits, "mean": logits.mean(), "whole": torch.tensor(3)}

    answer = adapter_of("memo", Spoilt(told).eval())(batches(1)[0])
    assert answer["whole"] == 3
    torch.testing.assert_close(answer["mean"], answer["logits"].mean())
