"""Every method against its reference, step by step over ten batches."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import testtime as tt
from models import batches, tiny, tiny_vit
from reference import methods as reference
from testtime._core.errors import OptionError
from testtime.adaptation.methods.deyo import shuffle_patches
from testtime.adaptation.methods.eata import eata
from testtime.adaptation.methods.ostta import ostta
from testtime.adaptation.methods.sar import sar
from testtime.adaptation.methods.source import source
from testtime.adaptation.methods.tent import tent
from testtime.adaptation.parts.selection import ReliableAndNew
from testtime.adaptation.parts.views import plain
from testtime.adaptation.ranks import Ranks
from testtime.measures.entropy import entropy

LN = math.log(5)


def assert_follows(adapter, other, model, xs) -> None:
    """Answers and adapted tensors agree over all batches, and something has moved."""
    for x in xs:
        torch.testing.assert_close(adapter(x), other(x), rtol=0, atol=1e-4)
    learnt = dict(model.named_parameters())
    source = dict(adapter.model.named_parameters())
    moved = 0.0
    for name, value in adapter.snapshot().tensors.items():
        torch.testing.assert_close(value, learnt[name].detach(), rtol=0, atol=1e-4)
        moved = max(moved, float((value - source[name].detach()).abs().max()))
    assert moved > 1e-3


@pytest.mark.parametrize("kind", ["batch", "group", "layer"])
def test_tent(kind):
    other = reference.Tent(tiny(kind), lr=1e-2)
    assert_follows(tt.adapt(tiny(kind), "tent", lr=1e-2), other, other.model, batches())


@pytest.mark.parametrize("kind", ["batch", "group"])
def test_eta(kind):
    other = reference.Eata(tiny(kind), 1e-2, 0.4 * LN, 0.6, None, 0)
    adapter = tt.adapt(tiny(kind), "eta", lr=1e-2, redundancy=0.6)
    assert_follows(adapter, other, other.model, batches())
    assert [event.used for event in adapter.events] == other.taught
    assert 0 < sum(other.taught) < 160


def test_eata_and_its_fisher_information():
    model, loader = tiny(), batches(3, seed=5)
    known = tt.fit_source(model, loader)
    expected = reference.fisher(model, loader)
    assert known["fisher"].keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(known["fisher"][name], value)
    other = reference.Eata(tiny(), 1e-2, 0.4 * LN, 0.6, expected, 50.0)
    adapter = tt.adapt(model, "eata", lr=1e-2, redundancy=0.6, beta=50.0, source=known)
    assert_follows(adapter, other, other.model, batches())


def test_eata_without_penalty_is_eta():
    known = tt.fit_source(tiny(), batches(1))
    with_zero = tt.adapt(tiny(), "eata", beta=0.0, source=known)
    eta = tt.adapt(tiny(), "eta")
    for x in batches(4):
        assert torch.equal(with_zero(x), eta(x))


def test_eata_penalty_keeps_closer_to_the_source():
    model = tiny()
    known = tt.fit_source(model, batches(2))

    def distance(beta: float) -> float:
        adapter = tt.adapt(model, "eata", lr=1e-3, redundancy=1.0, beta=beta, source=known)
        for x in batches():
            adapter(x)
        source = dict(model.named_parameters())
        state = adapter.snapshot().tensors
        return sum(
            float((f * (state[n] - source[n].detach()).square()).sum())
            for n, f in known["fisher"].items()
        )

    assert distance(20.0) < distance(0.0)


@pytest.mark.parametrize("kind", ["batch", "group"])
@pytest.mark.parametrize("recover", [0.0, 0.75])
def test_sar(kind, recover):
    other = reference.Sar(tiny(kind), 1e-2, 0.6 * LN, 0.05, recover)
    adapter = tt.adapt(tiny(kind), "sar", lr=1e-2, margin=0.6, recover_below=recover)
    xs = batches()
    if recover:
        for x in xs:
            torch.testing.assert_close(adapter(x), other(x), rtol=0, atol=1e-4)
        assert adapter.counts.resets == other.resets > 0
    else:
        assert_follows(adapter, other, other.model, xs)


@pytest.mark.parametrize("kind", ["batch", "group"])
def test_deyo(kind):
    adapter = tt.adapt(tiny(kind), "deyo", lr=1e-2, entropy_margin=0.8, drop_margin=0.01)
    draws = torch.Generator().set_state(adapter.snapshot().generator.clone())
    other = reference.Deyo(tiny(kind), 1e-2, 0.8 * LN, 0.01, 0.4 * LN, draws)
    assert_follows(adapter, other, other.model, batches())


def test_ostta():
    other = reference.Ostta(tiny(), 1e-2, 0.5)
    adapter = tt.adapt(tiny(), "ostta", lr=1e-2)
    assert_follows(adapter, other, other.model, batches())
    used = [event.used for event in adapter.events]
    assert used[0] == 16
    assert 0 < sum(used[1:]) < 9 * 16


def test_ostta_filters_any_entropy_method():
    known = tt.fit_source(tiny(), batches(1))
    for base in (tent(), sar(margin=0.9), eata(redundancy=1.0)):
        adapter = tt.adapt(tiny(), ostta(base=base), source=known)
        alone = tt.adapt(tiny(), base, source=known)
        for x in batches(5):
            adapter(x)
            alone(x)
        assert sum(e.used for e in adapter.events) <= sum(e.used for e in alone.events)
        assert adapter.counts.updates > 0


@pytest.mark.parametrize("base", ["tent", tent, source()])
def test_ostta_refuses_what_has_nothing_to_filter(base):
    with pytest.raises(OptionError, match=r"give base=tent\(\)"):
        ostta(base=base)


def darker(x: Tensor, generator: torch.Generator) -> Tensor:
    return 0.8 * x


def test_cotta_without_chance():
    # views differ from the batch: else teacher and student agree, and Adam steps on rounding noise
    other = reference.Cotta(tiny(), 1e-3, 0.999, view=lambda x: 0.8 * x)
    adapter = tt.adapt(tiny(), "cotta", threshold=1.0, restore=0.0, views=2, augment=darker)
    xs = batches()
    for x in xs:
        torch.testing.assert_close(adapter(x), other(x), rtol=0, atol=1e-4)
    state = adapter.snapshot()
    for name, value in other.model.named_parameters():
        if name == "conv2.bias":  # normalisation removes it: its gradient is rounding noise
            continue
        torch.testing.assert_close(state.tensors[name], value.detach(), rtol=0, atol=1e-4)
    for name, value in other.teacher.named_parameters():
        torch.testing.assert_close(state.teacher[name], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("width", "size"), [(8, 16), (48, 2)])
def test_cotta_on_a_transformer_to_the_last_bit(width, size):
    # the biases of keys have no gradient but rounding, of which Adam makes whole steps; in small
    # batches torch multiplies by a wide weight otherwise where that asks for a gradient
    model = tiny_vit(width)
    adapter = tt.adapt(model, "cotta", threshold=0.0, restore=0.0)
    student = copy.deepcopy(model).train()  # so that attention takes no short cut
    teacher = copy.deepcopy(student).requires_grad_(False)
    everything = [name for name, _ in model.named_parameters()]
    learnt = [name for name in everything if name.rpartition(".")[2] in ("weight", "bias")]
    assert len(learnt) < len(everything)  # tokens and positions do not learn, and are averaged
    optimizer = torch.optim.Adam([student.get_parameter(name) for name in learnt], lr=1e-3)
    for x in batches(8, size):
        s, t = student(x), teacher(x)
        optimizer.zero_grad()
        (-(t.softmax(1) * s.log_softmax(1)).sum(1)).mean().backward()
        optimizer.step()
        with torch.no_grad():
            for a, b in zip(teacher.parameters(), student.parameters(), strict=True):
                a.copy_(0.999 * a + (1 - 0.999) * b)
        assert torch.equal(adapter(x), t)
    state = adapter.snapshot()
    assert all(torch.equal(value, student.get_parameter(n)) for n, value in state.tensors.items())
    assert state.teacher.keys() == set(everything)
    assert all(torch.equal(value, teacher.get_parameter(n)) for n, value in state.teacher.items())


def test_cotta_restores_about_the_share_it_says():
    model = tiny()
    adapter = tt.adapt(model, "cotta", threshold=0.0, restore=0.3)
    adapter(batches(1)[0])
    source = dict(model.named_parameters())
    same = [value == source[name] for name, value in adapter.snapshot().tensors.items()]
    assert 0.2 < torch.cat([s.flatten() for s in same]).float().mean() < 0.45


def test_cotta_makes_views_only_when_its_anchor_is_unsure():
    x = batches(1)[0]
    for threshold, views in ((0.0, 1), (1.0, 3)):
        adapter = tt.adapt(tiny(), "cotta", threshold=threshold, views=3, augment=plain)
        adapter(x)
        assert adapter.counts.forwards == (1 + views) * len(x)


def test_rotta():
    other = reference.Rotta(tiny(), 5, 1e-2, 0.05, 0.01, 24)
    adapter = tt.adapt(tiny(), "rotta", lr=1e-2, nu=0.01, capacity=24, every=24, augment=darker)
    assert_follows(adapter, other, other.student, batches(12, 13))
    kept = sorted(item[1] for own in other.memory for item in own)
    torch.testing.assert_close(
        torch.tensor(sorted(adapter.snapshot().memory["uncertainty"])), torch.tensor(kept)
    )
    assert adapter.counts.updates > 0
    assert other.count // 24 == 12 * 13 // 24


@pytest.mark.parametrize("size", [1, 7, 64, 130])
def test_rotta_steps_do_not_depend_on_the_batch_size(size):
    x = torch.cat(batches(20, 13))[:256]
    adapter = tt.adapt(tiny(), "rotta", augment=plain)
    backwards = 0
    for part in x.split(size):
        adapter(part)
        backwards = adapter.counts.backwards
    assert backwards > 0
    assert int(adapter.snapshot().optimizer["steps"]) == 256 // 64


def test_rdumb_goes_back_to_the_source():
    x = batches(12)
    adapter = tt.adapt(tiny(), "rdumb", lr=1e-2, margin=0.6, redundancy=1.0, reset_every=4)
    eta = tt.adapt(tiny(), "eta", lr=1e-2, margin=0.6, redundancy=1.0)
    for step, batch in enumerate(x):
        if step % 4 == 0:
            eta.reset()
        assert torch.equal(adapter(batch), eta(batch))
    assert adapter.counts.resets == 2


def test_episodic_tent_forgets():
    first, second = batches(2)
    adapter = tt.adapt(tiny(), "tent", lr=0.1, episodic=True)
    alone = tt.adapt(tiny(), "tent", lr=0.1)(second)
    adapter(first)
    assert torch.equal(adapter(second), alone)


@pytest.mark.parametrize("steps", [1, 3])
def test_an_answer_after_the_last_step_is_of_the_model_that_took_it(steps):
    after = tt.adapt(tiny(), replace(tent(lr=1e-2, steps=steps), answer_after=True))
    before = tt.adapt(tiny(), tent(lr=1e-2, steps=steps))
    for x in batches(3):
        before(x)
        answer = after(x)
        assert torch.equal(answer, before.predict(x))
        event = after.events[-1]
        assert event.entropy == pytest.approx(float(entropy(answer).mean()), rel=1e-5)


def double() -> torch.nn.Module:
    return tiny().double()


def double_eata():
    model, loader = double(), [x.double() for x in batches(3, seed=5)]
    known = tt.fit_source(model, loader)
    other = reference.Eata(double(), 1e-2, 0.4 * LN, 0.6, reference.fisher(double(), loader), 50.0)
    adapter = tt.adapt(model, "eata", lr=1e-2, redundancy=0.6, beta=50.0, source=known)
    return adapter, other, other.model


def double_deyo():
    adapter = tt.adapt(double(), "deyo", lr=1e-2, entropy_margin=0.8, drop_margin=0.01)
    draws = torch.Generator().set_state(adapter.snapshot().generator.clone())
    other = reference.Deyo(double(), 1e-2, 0.8 * LN, 0.01, 0.4 * LN, draws)
    return adapter, other, other.model


def double_ostta():
    other = reference.Ostta(double(), 1e-2, 0.5)
    return tt.adapt(double(), "ostta", lr=1e-2), other, other.model


def double_cotta():
    other = reference.Cotta(double(), 1e-3, 0.999, view=lambda x: 0.8 * x)
    adapter = tt.adapt(double(), "cotta", threshold=1.0, restore=0.0, views=2, augment=darker)
    return adapter, other, other.model


def double_rotta():
    other = reference.Rotta(double(), 5, 1e-2, 0.05, 0.01, 24)
    adapter = tt.adapt(double(), "rotta", lr=1e-2, nu=0.01, capacity=24, every=24, augment=darker)
    return adapter, other, other.student


@pytest.mark.parametrize(
    "pair", [double_eata, double_deyo, double_ostta, double_cotta, double_rotta]
)
def test_a_model_in_double_precision_is_adapted_in_it(pair):
    adapter, other, model = pair()
    for x in batches(10, 13):
        torch.testing.assert_close(adapter(x.double()), other(x.double()), rtol=0, atol=1e-8)
    learnt = dict(model.named_parameters())
    for name, value in adapter.snapshot().tensors.items():
        if name != "conv2.bias":  # normalisation removes it: its gradient is rounding noise
            torch.testing.assert_close(value, learnt[name].detach(), rtol=0, atol=1e-8)


def test_samples_weigh_what_published_code_gives_them_to_the_last_bit():
    logits = 4 * torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    limit = 0.4 * math.log(10)
    uncertainty = entropy(logits)
    part = ReliableAndNew(margin=0.4, redundancy=1.0)
    weights, _ = part(logits, uncertainty, 10, Ranks(), part.init())
    chosen = uncertainty < limit
    assert 0 < chosen.sum() < 64
    assert torch.equal(weights[chosen], 1 / torch.exp(uncertainty[chosen] - limit))
    assert not weights[~chosen].any()


def test_inputs_are_free_where_no_picture_is_changed():
    x = 4 * batches(1, 6)[0] - 2
    for name, options in (("cotta", {"views": 2}), ("rotta", {}), ("memo", {"views": 2})):
        assert tt.adapt(tiny(), name, augment=plain, **options)(x).isfinite().all()


@pytest.mark.parametrize(("width", "size"), [(8, 16), (48, 2)])
def test_what_parts_forward_takes_no_short_cut_in_attention(width, size):
    model, seen = tiny_vit(width), []

    def alike(inputs, logits, forward):
        seen.append(torch.equal(forward(inputs), logits))
        return torch.ones(len(logits))

    adapter = tt.adapt(model, replace(tent(), selection=alike))
    for x in batches(3, size):
        adapter(x)
    assert all(seen)


def test_what_taught_before_is_kept_while_nothing_is_reliable():
    part, flat, sure = ReliableAndNew(margin=0.4, redundancy=0.6), torch.zeros(4, 5), torch.eye(5)

    def part_of(z, state):
        return part(z, entropy(z), 5, Ranks(), state)

    sure = 9 * sure[:2]
    _, state = part_of(flat, part.init())
    assert state == {"mean": None}
    _, state = part_of(sure, state)
    torch.testing.assert_close(state["mean"], sure.softmax(1).mean(0))
    weights, after = part_of(flat, state)
    assert not weights.any()
    assert torch.equal(after["mean"], state["mean"])
    assert not part_of(sure, state)[0].any()  # sure, and not new


@pytest.mark.parametrize(("classes", "new"), [(10, [True, False]), (100, [False, False])])
def test_how_new_a_sample_must_be_depends_on_the_number_of_classes(classes, new):
    part, seen = ReliableAndNew(margin=0.4, redundancy=None), torch.zeros(classes)
    seen[0] = 1
    probs = torch.full((2, classes), 1e-9)
    probs[:, :2] = torch.tensor([[0.2, 0.8], [0.4, 0.6]])  # cosines of 0.24 and 0.55
    logits = probs.log()
    weights, _ = part(logits, entropy(logits), classes, Ranks(), {"mean": seen})
    assert (weights > 0).tolist() == new


def test_tiles_of_an_image_that_they_do_not_divide():
    x, (one, two) = batches(1, 3)[0][..., :7], (torch.Generator().manual_seed(0) for _ in range(2))
    scaled = partial(F.interpolate, mode="bilinear", antialias=True, align_corners=False)
    other = reference.Deyo(tiny(), 0.0, 0.0, 0.0, 0.0, two)
    expected = scaled(other.shuffled(scaled(x, (6, 6)), 3), (8, 7))
    torch.testing.assert_close(shuffle_patches(x, patches=3, generator=one), expected)
