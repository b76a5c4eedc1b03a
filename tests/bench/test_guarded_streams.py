"""The guard of `guard=True` on images: few classes, a source of one answer, both in one stream."""

import pytest
import torch
from torch.utils.data import Subset

import testtime as tt
from testtime._core.outcomes import Outcome
from testtime.bench.models import load_model
from testtime.streams.data import labels_of, load_data
from testtime.streams.scenarios import Scenario

Stream = list[tuple[torch.Tensor, torch.Tensor]]


def sent(domain: str, classes: tuple[int, ...] = tuple(range(10)), samples: int = 384) -> Stream:
    data = load_data("fashion-mnist:sample")
    chosen = torch.isin(labels_of(data), torch.tensor(classes)).nonzero()[:, 0].tolist()
    scenario = Scenario.parse(f"stationary,domains={domain},samples={samples}")
    batches = scenario.stream(Subset(data, chosen), seed=2)
    return [(batch.inputs, batch.labels) for batch in batches]


def wrong(method: str, stream: Stream, *, guard: bool | None = None) -> float:
    """Share of wrong answers."""
    adapter = tt.adapt(load_model("embedded:batch"), method, guard=guard)
    return float(torch.cat([adapter(x).argmax(1) != y for x, y in stream]).double().mean())


@pytest.mark.parametrize("classes", [(4, 7), (2, 5, 7), (8, 1)], ids=str)
def test_answers_that_statistics_of_few_classes_spread_are_taken_back(classes):
    stream = sent("clean", classes)
    frozen = wrong("source", stream)
    assert wrong("bn-adapt", stream) > frozen + 0.15
    assert wrong("bn-adapt", stream, guard=True) <= frozen + 0.01


@pytest.mark.parametrize("domain", ["contrast", "brightness"])
def test_a_source_that_gives_one_answer_is_mended(domain):
    stream = sent(domain, samples=768)
    frozen, plain = wrong("source", stream), wrong("tent", stream)
    assert plain < frozen - 0.3
    assert frozen - wrong("tent", stream, guard=True) > 0.8 * (frozen - plain)


def test_what_mended_all_classes_is_taken_back_when_few_come():
    stream = [*sent("brightness"), *sent("clean", (4, 7))]
    frozen = wrong("source", stream[6:])
    adapter = tt.adapt(load_model("embedded:batch"), "tent", guard=True)
    answers = [adapter(x).argmax(1) for x, _ in stream]
    late = [(a != y).double().mean() for a, (_, y) in zip(answers, stream, strict=True)][-3:]
    assert adapter.events[5].outcome is Outcome.ADAPTED
    assert float(torch.stack(late).mean()) <= frozen + 0.02
