"""What each method does to logits, against references; in float64, with extreme rows."""

import itertools
import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import decode as reference
from testtime._core.errors import InputError, OptionError
from testtime._core.registry import entries
from testtime.decode.drawing import Drawer, check_logits, inverse_cdf
from testtime.decode.methods.adaptive_temperature import cooled
from testtime.decode.methods.ead import Switch
from testtime.decode.methods.edt import edt, entropy_temperature
from testtime.decode.methods.em_inf import LowerEntropy, lower_entropy
from testtime.decode.methods.min_p import min_p
from testtime.decode.methods.uscd import contrast, unsure, without_examples
from testtime.decode.watermark import Watermark, _green
from testtime.measures.entropy import entropy

NONE = torch.zeros(1, 0, dtype=torch.long)


def rows(vocabulary=300, seed=0):
    """Random rows of several scales, one-hot, uniform, masked, with one token left, with ties."""
    random = torch.Generator().manual_seed(seed)
    normal = torch.randn(6, vocabulary, generator=random, dtype=torch.float64)
    normal *= torch.tensor([0.01, 0.5, 1, 3, 8, 40], dtype=torch.float64)[:, None]
    one_hot = torch.zeros(2, vocabulary, dtype=torch.float64)
    one_hot[0, 3], one_hot[1, 5] = 1000, 20
    masked = normal[2:4].clone()
    masked[:, ::2] = -math.inf
    alone = torch.full((1, vocabulary), -math.inf, dtype=torch.float64)
    alone[0, 7] = -2
    ties = normal[4:5].round()
    return torch.cat([normal, one_hot, torch.zeros(1, vocabulary).double(), masked, alone, ties])


LARGE = pytest.param(262_144, id="large vocabulary", marks=pytest.mark.slow)


@pytest.mark.parametrize("vocabulary", [2, 300, LARGE])
@pytest.mark.parametrize(
    ("delta", "lr", "n", "weight"), [(0.3, 0.1, 5, 1e-3), (0.05, 0.01, 3, 0.05)]
)
def test_em_inf_is_adam_on_each_row(vocabulary, delta, lr, n, weight):
    z = rows(max(vocabulary, 10))[:, :vocabulary] if vocabulary > 10 else rows(10)[:8, :2]
    found = lower_entropy(z, threshold=delta, lr=lr, steps=n, anchor=weight)
    for row, out in zip(z, found, strict=True):
        torch.testing.assert_close(
            out, reference.adam_em_inf(row, delta, lr, n, weight), atol=1e-5, rtol=1e-5
        )


def test_em_inf_lowers_entropy_keeps_the_best_and_leaves_sure_rows():
    z = rows().float()
    before, found = entropy(z), lower_entropy(z)
    assert bool((entropy(found) <= before + 1e-6).all())
    uniform = 8
    keeps = [i for i in range(len(z)) if i != uniform]
    assert torch.equal(found.argmax(-1)[keeps], z.argmax(-1)[keeps])
    for i in (before < 0.3).nonzero().flatten().tolist():
        assert torch.equal(found[i], z[i])
    assert int((before < 0.3).sum()) >= 3
    one_by_one = torch.cat([lower_entropy(row[None]) for row in z])
    torch.testing.assert_close(found, one_by_one)


def test_em_inf_raises_what_is_above_the_entropy():
    z = torch.randn(1, 50, generator=torch.Generator().manual_seed(1)).double()
    found = lower_entropy(z, steps=1, anchor=0.0)
    p, h = z.softmax(-1), entropy(z)
    assert torch.equal(found > z, p > (-h).exp())


@pytest.mark.parametrize("vocabulary", [300, LARGE])
@pytest.mark.parametrize(("highest", "theta"), [(0.8, 1.0), (0.1, 5.0), (1.0, 0.1), (0.005, 1.0)])
def test_edt_follows_its_formula(vocabulary, highest, theta):
    z = rows(vocabulary)
    found = entropy_temperature(z, highest=highest, theta=theta)
    said = torch.tensor([reference.edt_temperature(row, highest, theta) for row in z])
    torch.testing.assert_close(found, said.double(), atol=1e-5, rtol=1e-5)
    step = edt(highest=highest, theta=theta).steps[0]
    torch.testing.assert_close(step(NONE, z), z / found[:, None])


@given(st.floats(0.05, 2), st.floats(0.01, 5), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_edt_rises_with_entropy_to_its_bound(highest, theta, seed):
    z = torch.randn(1, 20, generator=torch.Generator().manual_seed(seed)).double()
    z = z * torch.linspace(0, 50, 30).double()[:, None]
    h, t = entropy(z), entropy_temperature(z, highest=highest, theta=theta)
    order = h.argsort()
    assert bool((t[order].diff() >= -1e-9).all())
    assert bool((t <= highest).all())
    assert bool((t > 0).all())
    flat = entropy_temperature(z, highest=highest, theta=0.0)
    assert torch.equal(flat, torch.full_like(h, highest))


@pytest.mark.parametrize("vocabulary", [300, LARGE])
@pytest.mark.parametrize(
    ("ratio", "floor", "tolerance"), [(0.85, 1e-5, 0.1), (0.2, 1e-6, 0.1), (0.5, 0.2, 1e-3)]
)
def test_adaptive_temperature_bisects_each_row(vocabulary, ratio, floor, tolerance):
    z = rows(vocabulary)
    if vocabulary > 300:
        z = z[[1, 2, 3, 6, 9, 11]]  # a reference in plain Python takes its time
    found = cooled(z, ratio=ratio, floor=floor, tolerance=tolerance)
    for row, out in zip(z, found, strict=True):
        t = reference.adaptive_temperature(row, ratio, floor, tolerance)
        torch.testing.assert_close(out, row / t, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            cooled(row[None], ratio=ratio, floor=floor, tolerance=tolerance)[0], out
        )
    before, target = entropy(z), (ratio * entropy(z)).clamp(min=floor)
    reachable = (before > floor) & (entropy(z / 0.01) < target)  # ties cannot be cooled
    assert int(reachable.sum()) >= 3
    assert bool(((entropy(found) - target).abs() < tolerance)[reachable].all())
    assert torch.equal(found[before <= floor], z[before <= floor])


@pytest.mark.parametrize("vocabulary", [300, LARGE])
@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
@pytest.mark.parametrize("base", [0.0, 0.05, 0.1, 0.5, 1.0])
def test_min_p_is_that_of_transformers_and_of_the_formula(base, kind, vocabulary):
    z = rows(vocabulary).to(kind)
    found = min_p(p=base).steps[-1](NONE, z.clone())
    assert torch.equal(found, transformers.MinPLogitsWarper(base)(NONE, z.clone()))
    for row, out in zip(z, found, strict=True):
        kept = reference.min_p_kept(row, base) & row.isfinite()
        assert torch.equal(out.isfinite(), kept)
        assert torch.equal(out[kept], row[kept])
    shifted = min_p(p=base).steps[-1](NONE, z + 7)
    assert torch.equal(shifted.isfinite(), found.isfinite())


def test_min_p_takes_the_temperature_first_and_can_take_it_last():
    z, base, t = rows()[2:3], 0.1, 2.0
    method = min_p(p=base, temperature=t)
    first = method.steps[1](NONE, method.steps[0](NONE, z))
    assert torch.equal(first.isfinite(), z.max() - z <= t * math.log(1 / base))
    last = method.steps[0](NONE, method.steps[1](NONE, z))
    assert torch.equal(last.isfinite(), z.max() - z <= math.log(1 / base))
    assert int(last.isfinite().sum()) < int(first.isfinite().sum())


@pytest.mark.parametrize("vocabulary", [300, LARGE])
@pytest.mark.parametrize("c", [0.3, 0.8])
def test_uscd_is_the_papers_test_and_contrast(vocabulary, c):
    z, lame = rows(vocabulary), rows(vocabulary, seed=1).flip(0)
    found = contrast(z, lame, collision=c, floor=2 / 3, weight=-0.7).softmax(-1)
    for row, other, out in zip(z, lame, found, strict=True):
        said = reference.uscd_scores(row, other, c, 2 / 3, -0.7)
        torch.testing.assert_close(out, said, atol=1e-5, rtol=1e-5)
    sure = ~unsure(z, collision=c)
    assert torch.equal(contrast(z, lame, collision=c)[sure], z[sure])
    assert 0 < int(sure.sum()) < len(z)
    alone = contrast(z, lame, collision=1.0, weight=0.0).softmax(-1)
    p = z.softmax(-1)
    masked = p.masked_fill(p < 2 / 3 / vocabulary, 0)
    torch.testing.assert_close(alone, masked / masked.sum(-1, keepdim=True))


def test_uscd_keeps_the_row_where_nothing_would_be_left():
    z = torch.zeros(1, 4).double()
    assert torch.equal(contrast(z, z, weight=-1.0), z)


def test_a_lame_prompt_has_no_examples():
    prompt = (
        "def f(x):\n    '''Twice x.\n\n    Examples:\n    >>> f(1)\n    2\n    >>> f(2)\n    4\n    '''\n"
        "assert f(1) == 2\n"
    )
    assert without_examples(prompt) == "def f(x):\n    '''Twice x.\n\n    '''\n"
    assert without_examples("plain text\n\nof two lines") == "plain text\n\nof two lines"


@given(st.integers(0, 999), st.floats(0, 1, exclude_max=True))
@settings(max_examples=60, deadline=None)
def test_a_draw_is_the_part_of_the_interval_that_holds_the_number(seed, u):
    z = torch.randn(1, 9, generator=torch.Generator().manual_seed(seed)).double() * 4
    z[0, ::3] = -math.inf
    token = int(inverse_cdf(z, torch.tensor([u]).double()))
    p = z.softmax(-1)[0]
    assert p[token] > 0
    assert float(p[:token].sum()) <= u + 1e-9
    assert u <= float(p[: token + 1].sum()) + 1e-9


def test_draws_have_the_frequencies_of_the_distribution():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = inverse_cdf(p.log().expand(len(u), -1), u).bincount(minlength=5) / len(u)
    assert float((counts - p).abs().max()) < 0.015
    assert counts[4] == 0


def test_draws_of_a_row_are_its_own():
    z = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    batch, alone = Drawer([5, 6, 7]), Drawer([6])
    state = torch.random.get_rng_state()
    for _ in range(5):
        assert int(batch(z)[1]) == int(alone(z[1:2]))
    assert torch.equal(state, torch.random.get_rng_state())


def test_draws_and_green_lists_do_not_depend_on_the_default_device():
    logits, before = torch.zeros(2, 50), torch.full((2, 1), 3)
    mark = Watermark(vocabulary=50, tau=None)
    drawn, marked = Drawer([1, 2])(logits), mark(before, logits)
    _green.cache_clear()
    with torch.device("meta"):  # stands for any other device
        assert torch.equal(Drawer([1, 2])(logits), drawn)
        assert torch.equal(mark(before, logits), marked)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_nothing_can_be_chosen_from_are_refused(bad):
    z = torch.zeros(3, 5)
    check_logits(z)
    z[1, 2] = bad
    with pytest.raises(InputError, match="logits of row 1 hold NaN or"):
        check_logits(z)
    with pytest.raises(InputError, match="row 0"):
        check_logits(torch.full((1, 5), -math.inf))


def test_a_switch_waits_and_is_monotone_in_its_threshold():
    random = torch.Generator().manual_seed(0)
    stream = (torch.rand(300, generator=random) * 3).tolist()
    shares = []
    for tau in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, math.inf):
        switch = Switch(threshold=tau, window=5, dwell=0)
        switch.begin(stream[0])
        shares.append(sum(switch.large_next(bits) for bits in stream))
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 300
    assert shares[-1] == 0
    switch = Switch(threshold=1.5, window=1, dwell=4)
    who = [switch.large_next(bits) for bits in stream]
    changes = [i for i in range(1, 300) if who[i] != who[i - 1]]
    assert len(changes) > 10
    assert min(b - a for a, b in itertools.pairwise(changes)) >= 4


@pytest.mark.parametrize(
    ("name", "options"),
    [("em-inf", {"steps": -1}), ("em-inf", {"lr": math.inf}), ("min-p", {"p": 1.5}),
     ("min-p", {"temperature": 0.0}), ("min-p", {"temperature": 1e-300}),
     ("edt", {"highest": 0.0}), ("edt", {"highest": 1e-300}), ("edt", {"theta": -1.0}),
     ("uscd", {"weight": 0.5}), ("ead", {"threshold": -1.0}), ("ead", {"window": 0}),
     ("ead", {"signal": "big"}), ("top-k", {"k": 0}), ("top-p", {"p": 2.0}),
     ("adaptive-temperature", {"ratio": 1.5}), ("typical", {"mass": 1.0}), ("greedy", {"temperature": 1.0})],
)  # fmt: skip
def test_wrong_options_are_refused(name, options):
    with pytest.raises(OptionError):
        entries("decoding")[name].build(**options)


def test_a_step_is_a_processor_of_transformers(llama, tokenizer):
    ids = tokenizer("abc", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = llama.generate(
            ids, logits_processor=[LowerEntropy()], max_new_tokens=5, do_sample=False
        )
    assert out.shape[1] == ids.shape[1] + 5
