"""STAMP against its reference; its memory, its scores, and the parts that it brought."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import testtime as tt
from models import batches, tiny
from reference.stamp import Stamp
from testtime._core.errors import InputError
from testtime._core.outcomes import Outcome
from testtime._core.seeds import generator
from testtime.adaptation.methods.ostta import ostta
from testtime.adaptation.methods.stamp import CertainFirst, doubt, makes_room
from testtime.adaptation.parts.optimizer import SGD, Adam, CosineAnnealed
from testtime.adaptation.parts.views import crop_and_flip, plain
from testtime.measures.entropy import entropy

LOGITS = torch.tensor([[2, 0, 0], [1, 0.5, 0], [0, 3, 0], [0.2, 0.1, 0]])
OPTIONS = {"lr": 0.02, "margin": 0.8, "views": 2, "capacity": 24, "period": 4}


def darker(x, generator):
    return 0.8 * x


def chance(batch: int) -> torch.Generator:
    return generator(0, "stamp", batch)


@pytest.mark.parametrize("kind", ["batch", "group"])
def test_stamp_step_by_step(kind):
    other = Stamp(tiny(kind), classes=5, chance=chance, **OPTIONS)
    adapter = tt.adapt(tiny(kind), "stamp", augment=darker, **OPTIONS)
    for x in batches():
        p, score = other(x)
        torch.testing.assert_close(adapter(x).softmax(1), p, rtol=0, atol=1e-4)
        found = adapter.events[-1].measured["outlier"]
        torch.testing.assert_close(found, score, rtol=0, atol=1e-4)
        memory = adapter.snapshot().memory
        assert memory["counts"] == pytest.approx(other.counts)
        for label, own in enumerate(other.memory):
            mine = [i for i, name in enumerate(memory["labels"]) if name == label]
            assert torch.equal(memory["images"][mine], torch.stack(own) if own else x[:0])
    assert other.evictions > 20
    learnt, source = dict(other.model.named_parameters()), dict(tiny(kind).named_parameters())
    moved = 0.0
    for name, value in adapter.snapshot().tensors.items():
        torch.testing.assert_close(value, learnt[name].detach(), rtol=0, atol=1e-4)
        moved = max(moved, float((value - source[name].detach()).abs().max()))
    assert moved > 1e-2


def test_a_scripted_memory():
    random = torch.Generator().manual_seed(0)
    # the largest count wins although another class holds more; without items it takes no part
    assert makes_room([0, 1, 0, 0, 1], [1.0, 2.0, 9.0], random) == 1
    assert makes_room([0, 0, 0], [1.0, 2.0, 9.0], random) == 0
    drawn = {makes_room([2, 1, 2, 0], [1.0, 5.0, 5.0], random) for _ in range(50)}
    assert drawn == {0, 1}  # the oldest of either of two, and never of the third


@given(st.lists(st.integers(0, 3), max_size=200), st.integers(1, 8))
def test_what_leaves_is_always_the_oldest_of_its_class(labels, capacity):
    random, held = torch.Generator().manual_seed(0), []
    for place, label in enumerate(labels):
        if len(held) == capacity:
            names = [name for _, name in held]
            gone = makes_room(names, [0.0] * 4, random)
            assert names[gone] not in names[:gone]
            held.pop(gone)
        held.append((place, label))
    assert held == sorted(held)
    assert len(held) == min(capacity, len(labels))


def test_doubt_of_one_who_is_certain_is_what_keeps_the_logarithm_finite():
    sure = torch.tensor([[900.0, 0.0, 0.0]], dtype=torch.float64)
    assert float(doubt(sure)) == pytest.approx(-math.log(1 + 1e-5), rel=1e-6)


def test_recorded_weights():
    h = entropy(LOGITS)
    expected = torch.tensor([17.294415, 12.131010, 23.321189, 11.253386])
    torch.testing.assert_close(CertainFirst(total=64)(h) / h, expected, rtol=0, atol=1e-4)


def test_a_reset_empties_the_memory_and_begins_the_schedule_anew():
    adapter = tt.adapt(tiny(), "stamp", augment=darker, **OPTIONS)
    xs = batches(5)
    first = [adapter(x) for x in xs]
    assert adapter.snapshot().optimizer["steps"] == 5
    adapter.reset()
    assert adapter.snapshot().memory is None
    assert adapter.snapshot().optimizer["steps"] == 0
    assert all(torch.equal(adapter(x), y) for x, y in zip(xs, first, strict=True))


def test_nothing_is_learnt_while_nothing_is_trusted():
    adapter = tt.adapt(tiny(), "stamp", margin=0.0, views=1)
    mark = adapter.snapshot().tensors
    for x in batches(2):
        adapter(x)
    assert {event.outcome for event in adapter.events} == {Outcome.NOTHING_RELIABLE}
    assert all(torch.equal(v, mark[n]) for n, v in adapter.snapshot().tensors.items())
    assert adapter.counts.forwards == 2 * 2 * 16  # the source model is not even asked


def test_disagreement_with_the_source_keeps_out():
    options = {**OPTIONS, "margin": 1.0, "capacity": 999, "lr": 0.5}
    sizes = []
    for agreement in (True, False):
        adapter = tt.adapt(tiny(), "stamp", agreement=agreement, augment=plain, **options)
        for x in batches(4):
            adapter(x)
        sizes.append(len(adapter.snapshot().memory["labels"]))
    assert 16 <= sizes[0] < sizes[1] == 64


@pytest.mark.parametrize("base", [SGD(lr=0.1), SGD(lr=0.1, momentum=0.9), Adam(lr=0.1)])
def test_the_cosine_is_torch_s(base):
    torch.manual_seed(0)
    tensors = [torch.ones(3), torch.ones(2, 2)]
    own = [t.clone().requires_grad_() for t in tensors]
    if isinstance(base, Adam):
        other = torch.optim.Adam(own, lr=0.1)
    else:
        other = torch.optim.SGD(own, lr=0.1, momentum=base.momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(other, 4)
    part = CosineAnnealed(base=base, period=4)
    state = part.init(tensors)
    for step in range(10):
        grads = [torch.sin(step + t.detach()) for t in own]
        for t, g in zip(own, grads, strict=True):
            t.grad = g
        other.step()
        schedule.step()
        tensors, state = part.step(state, tensors, grads)
        torch.testing.assert_close(tensors, [t.detach() for t in own])


def test_crops_are_parts_of_the_padded_image_each_of_its_own():
    x = torch.rand(300, 3, 6, 5, generator=torch.Generator().manual_seed(1)) + 1
    changed = crop_and_flip(x, torch.Generator().manual_seed(2))
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    seen = set()
    for i in range(len(x)):
        found = [
            (a, b, flip)
            for a in range(9)
            for b in range(9)
            for flip in (False, True)
            if torch.equal(
                changed[i].flip(-1) if flip else changed[i], padded[i, :, a : a + 6, b : b + 5]
            )
        ]
        assert found
        seen.update(found[:1])
    assert len(seen) > 100
    with pytest.raises(InputError, match="images"):
        crop_and_flip(torch.rand(2, 3), torch.Generator())


def test_scores_are_of_the_answers_and_leave_them_alone():
    adapter = tt.adapt(tiny(), "stamp", views=3)
    other = tt.adapt(tiny(), ostta(lr=1e-2))
    for x in batches(3):
        answer, sure = adapter(x), other(x)
        assert torch.equal(adapter.events[-1].measured["outlier"], doubt(answer))
        torch.testing.assert_close(
            other.events[-1].measured["outlier"], 1 - sure.softmax(1).amax(1)
        )
