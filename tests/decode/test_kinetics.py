"""The cost model against sums over tokens, against counted FLOPs, and what it answers."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from reference import compute as reference
from testtime._core.errors import InputError, OptionError
from testtime.decode.allocation import Setting, Trials, best_within, frontier
from testtime.decode.allocation import settings as tried
from testtime.decode.kinetics import (
    QWEN3,
    Shape,
    block_top_k_cost,
    coverage,
    dense_cost,
    largest,
    top_k_cost,
)
from testtime.decode.sparse import sparse_attention_mask

tokens = st.integers(0, 60)


def plain(shape):
    return shape.parameters, shape.heads, shape.kv_heads, shape.head_dim * shape.layers


@settings(deadline=None)
@given(tokens, st.integers(1, 80), st.integers(1, 5), st.integers(1, 100), st.floats(0, 600))
def test_closed_forms_equal_sums_over_tokens(prompt, length, samples, budget, intensity):
    shape = Shape(parameters=1e3, layers=3, heads=6, kv_heads=2, head_dim=5)
    ask = {"prompt": prompt, "length": length, "samples": samples, "intensity": intensity}
    whole = reference.dense_cost(*plain(shape), prompt, length, samples, intensity)
    assert dense_cost(shape, **ask).total == pytest.approx(whole, rel=1e-12)
    part = reference.top_k_cost(*plain(shape), prompt, length, samples, intensity, budget)
    assert top_k_cost(shape, budget=budget, **ask).total == pytest.approx(part, rel=1e-12)


def test_hand_computed_values():
    # 8 parameters, one layer of two query heads and one key-value head of width 3; 2 samples of 4
    # tokens after 5: contexts 5.5, 6.5, 7.5, 8.5 sum to 28
    shape = Shape(parameters=8, layers=1, heads=2, kv_heads=1, head_dim=3)
    cost = dense_cost(shape, prompt=5, length=4, samples=2, intensity=10)
    assert cost.compute == 2 * (2 * 8 * 4 + 4 * 28 * 2 * 3)
    assert cost.traffic == 4 * 3 * (5 * 4 + 2 * 8)  # the prompt's 20 are read once for both
    assert cost.total == cost.compute + 10 * cost.traffic
    # a budget of 6: contexts 5.5, 6, 6, 6; but the 6.5 starts below, so the closed form has 23.5
    assert top_k_cost(shape, budget=6, prompt=5, length=4).traffic == 4 * 3 * 23.5
    attended = top_k_cost(QWEN3["32B"], budget=1024, prompt=200, length=8192).traffic
    assert attended == 4 * 8 * 128 * 64 * 8_049_120
    # blocks of 2, two kept: keys like a budget of 4, and (2 * 5 + 4) // 2 = 7 comparisons a token
    block = block_top_k_cost(shape, blocks=2, block=2, prompt=5, length=4)
    kept = top_k_cost(shape, budget=4, prompt=5, length=4)
    assert block.compute - kept.compute == 7 * 4 * 2 * 3
    assert block.traffic - kept.traffic == 7 * 4 * 1 * 3


class Decoder(nn.Module):
    """A transformer with grouped heads that reads one token at a time and keeps a cache."""

    def __init__(self, vocabulary, width, layers, heads, kv_heads, head_dim):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.embed = nn.Embedding(vocabulary, width)
        kinds = {"q": heads, "k": kv_heads, "v": kv_heads}
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {n: nn.Linear(width, h * head_dim, bias=False) for n, h in kinds.items()}
                | {"o": nn.Linear(heads * head_dim, width, bias=False),
                   "up": nn.Linear(width, 3 * width, bias=False),
                   "down": nn.Linear(3 * width, width, bias=False)}
            )
            for _ in range(layers)
        )  # fmt: skip
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, token, cache):
        x = self.embed(token)
        for i, block in enumerate(self.blocks):
            q, k, v = (block[n](x).unflatten(-1, (-1, self.head_dim)) for n in "qkv")
            cache.setdefault(i, []).append((k, v))
            k, v = (torch.stack(part, -3) for part in zip(*cache[i], strict=True))
            k, v = (p.repeat_interleave(self.heads // self.kv_heads, -2) for p in (k, v))
            weights = (q[:, :, None] @ k.permute(0, 2, 3, 1)).softmax(-1)
            seen = (weights @ v.transpose(1, 2)).flatten(1)
            x = x + block["o"](seen)
            x = x + block["down"](block["up"](x).relu())
        return self.head(x)


@pytest.mark.parametrize("samples", [1, 3])
def test_compute_equals_counted_flops(samples):
    model = Decoder(vocabulary=11, width=8, layers=2, heads=4, kv_heads=2, head_dim=3)
    multiplied = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("embed"))
    shape = Shape(parameters=multiplied, layers=2, heads=4, kv_heads=2, head_dim=3)
    prompt, length, cache = 5, 7, {}
    token = torch.zeros(samples, dtype=torch.long)
    for _ in range(prompt):
        model(token, cache)
    with FlopCounterMode(display=False) as counter:
        for _ in range(length):
            token = model(token, cache).argmax(-1)
    # a real token sees itself whole, where the closed form counts half of it
    halves = samples * length * 4 * 0.5 * shape.heads * shape.head_dim * shape.layers
    cost = dense_cost(shape, prompt=prompt, length=length, samples=samples)
    assert counter.get_total_flops() == cost.compute + halves
    read = sum(part[0].numel() * 2 for layer in cache.values() for part in layer) * 2  # 16 bits
    last = [dense_cost(shape, prompt=prompt, length=n, samples=samples).traffic for n in (6, 7)]
    shared = read - (samples - 1) * prompt * read / samples / 12  # of the prompt one copy is read
    half = samples * 2 * shape.kv_heads * shape.head_dim * shape.layers
    assert last[1] - last[0] == pytest.approx(shared - half)


def test_what_the_law_says_of_the_models_of_the_paper():
    long = {name: dense_cost(shape, prompt=200, length=32768) for name, shape in QWEN3.items()}
    for name, shape in QWEN3.items():
        assert 2 * shape.parameters * 32768 < 0.03 * long[name].total
    assert long["14B"].total / long["0.6B"].total == pytest.approx(1.46, abs=0.005)
    short = [dense_cost(QWEN3[n], prompt=200, length=1024).total for n in ("14B", "0.6B")]
    assert short[0] / short[1] == pytest.approx(2.0, abs=0.05)
    sparse = top_k_cost(QWEN3["32B"], budget=1024, prompt=200, length=32768)
    assert sparse.total < 0.1 * long["32B"].total


COSTS = [
    dense_cost,
    partial(top_k_cost, budget=64),
    partial(block_top_k_cost, blocks=4, local=8),
]


@pytest.mark.parametrize("cost", COSTS)
@settings(deadline=None)
@given(a=st.integers(1, 3000), b=st.integers(1, 3000), prompt=st.integers(0, 500))
def test_more_tokens_and_samples_never_cost_less(cost, a, b, prompt):
    few, many = sorted((a, b))
    shape = QWEN3["4B"]
    for name, other in (("length", "samples"), ("samples", "length")):
        low, high = (cost(shape, prompt=prompt, **{name: n, other: 7}).total for n in (few, many))
        assert low <= high


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 400))
def test_a_larger_budget_of_keys_costs_more_up_to_full_attention(a, b):
    few, many = sorted((a, b))
    ask = {"prompt": 50, "length": 200}
    low, high = (top_k_cost(QWEN3["4B"], budget=n, **ask).total for n in (few, many))
    assert low <= high <= dense_cost(QWEN3["4B"], **ask).total * (1 + 1e-12)


@settings(deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))
def test_coverage_equals_the_hypergeometric_form(a, b, c):
    right, samples, trials = sorted((a, b, c))[0], max(1, sorted((a, b, c))[1]), max(1, a, b, c)
    for k in {right, trials - right}:
        expected = 1 - stats.hypergeom.pmf(0, trials, k, samples)
        assert coverage(k, trials, samples) == pytest.approx(expected, abs=1e-12)
        if k > trials - samples:
            assert coverage(k, trials, samples) == 1.0


@settings(deadline=None)
@given(st.floats(1e12, 1e18), st.sampled_from(sorted(QWEN3)))
def test_the_largest_number_is_within_the_budget_and_one_more_is_not(budget, name):
    def cost(n):
        return dense_cost(QWEN3[name], prompt=300, length=n)

    n = largest(cost, budget=budget)
    assert n == 0 or cost(n).total <= budget
    assert cost(n + 1).total > budget


def trials(right=((1, 0, 0, 1), (0, 0, 1, 0)), model="4B", lengths=None):
    right = torch.tensor(right, dtype=torch.bool)
    lengths = torch.tensor(lengths or [[100, 200, 300, 400], [100, 200, 300, 400]])
    return Trials(model=model, shape=QWEN3[model], prompts=torch.tensor([10, 20]),
                  lengths=lengths, right=right)  # fmt: skip


def test_settings_cut_long_answers_and_average_over_questions():
    one, two, cut = tried(trials(), samples=(1, 2), lengths=(400,)) + tried(
        trials(), samples=(1,), lengths=(250,)
    )
    assert one.accuracy == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert two.accuracy == pytest.approx((5 / 6 + 3 / 6) / 2)
    assert cut.accuracy == pytest.approx((1 / 4 + 0) / 2)  # those of 300 and 400 tokens are lost
    expected = [
        dense_cost(QWEN3["4B"], prompt=c, length=min(n, 250)).total
        for c in (10, 20) for n in (100, 200, 300, 400)
    ]  # fmt: skip
    assert cut.cost == pytest.approx(sum(expected) / 8)


def test_a_budget_finds_model_samples_and_length():
    small = trials(((1, 0, 0, 1), (0, 0, 1, 0)), "0.6B")
    large = trials(((1, 1, 1, 1), (1, 0, 1, 1)), "32B")
    options = [
        each for model in (small, large)
        for each in tried(model, samples=(1, 2, 4), lengths=(250, 400))
    ]  # fmt: skip
    front = frontier(options)
    assert [e.cost for e in front] == sorted(e.cost for e in front)
    assert [e.accuracy for e in front] == sorted({e.accuracy for e in front})
    for option in options:
        best = best_within(option.cost, options)
        assert best.cost <= option.cost
        assert best.accuracy == max(e.accuracy for e in options if e.cost <= option.cost)
    assert best_within(1e30, options).accuracy == 1.0
    with pytest.raises(InputError, match="the cheapest costs"):
        best_within(1.0, options)
    with pytest.raises(InputError, match="none was given"):
        best_within(1.0, [])


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([(1, 1), (4, 2), (6, 3)]), st.integers(1, 40), st.integers(0, 6),
    st.integers(0, 6), st.integers(0, 5), st.sampled_from([1, 3, 4]), st.integers(0, 99),
)  # fmt: skip
def test_masks_equal_their_definition(shape, keys, local, top_k, sinks, block, seed):
    heads, kv_heads = shape
    scores = torch.randn(2, heads, keys, generator=torch.Generator().manual_seed(seed)).double()
    options = {"local": local, "top_k": top_k, "sinks": sinks, "block": block}
    kept = sparse_attention_mask(scores, kv_heads=kv_heads, **options)
    for found, row in zip(kept.tolist(), scores.tolist(), strict=True):
        assert found == reference.sparse_mask(row, kv_heads, **options)
    if block == 1:
        assert (kept.sum(-1) == min(keys, sinks + local + top_k)).all()


def test_bad_calls_are_refused():
    shape = QWEN3["4B"]
    for bad in ({"prompt": -1, "length": 1}, {"prompt": 1, "length": float("nan")},
                {"prompt": 1, "length": 1, "samples": 0}):  # fmt: skip
        with pytest.raises(OptionError):
            dense_cost(shape, **bad)
    with pytest.raises(OptionError, match="budget"):
        top_k_cost(shape, budget=0, prompt=1, length=1)
    with pytest.raises(OptionError, match="layers"):
        Shape(parameters=1e9, layers=0, heads=1, kv_heads=1, head_dim=1)
    with pytest.raises(InputError, match="3 of 2"):
        coverage(3, 2, 1)
    with pytest.raises(OptionError, match="positive"):
        largest(lambda n: dense_cost(shape, prompt=1, length=n), budget=0)
    with pytest.raises(OptionError, match="does not grow"):
        largest(lambda n: dense_cost(shape, prompt=0, length=0), budget=1)
    with pytest.raises(InputError, match="multiple"):
        sparse_attention_mask(torch.zeros(3, 4), kv_heads=2, local=0, top_k=1)
    with pytest.raises(InputError, match="shapes"):
        Trials(model="4B", shape=shape, prompts=torch.ones(2), lengths=torch.ones(1, 2),
               right=torch.ones(1, 2, dtype=torch.bool))  # fmt: skip
    with pytest.raises(InputError, match="without a token"):
        trials(lengths=[[0, 1, 1, 1], [1, 1, 1, 1]])
    assert Setting(model="m", samples=1, length=1, cost=1.0, accuracy=1.0).model == "m"
