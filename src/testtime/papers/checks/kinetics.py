"""Kinetics: with the traffic of the cache counted, long answers of small models are not cheap."""

from collections.abc import Iterator, Sequence

import torch

from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.decode.kinetics import QWEN3, Shape, dense_cost, top_k_cost
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "The closed forms equal sums over tokens to 1e-12. For prompts of 200 tokens and Qwen3's six "
    "sizes, 32768 tokens spend less than 3 % of their cost on parameters; 14B costs 1.4 to 1.5 times "
    "what 0.6B costs, and 1.9 to 2.1 times at 1024 tokens; attention to 1024 keys costs 32B less "
    "than 10 % of full attention."
)
DRAWS = 20


@register("check", paper="kinetics", name="kinetics")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """The cost model on the models of the paper."""
    return reproduce(
        "kinetics", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Differences to sums over tokens at drawn sizes, and ratios of costs."""
    chance = generator(seed, "kinetics")
    gaps = {"dense": 0.0, "top-k": 0.0}
    for shape in QWEN3.values():
        for _ in range(DRAWS):
            prompt, length, samples, budget = (
                int(torch.randint(1, most, (), generator=chance)) for most in (3000, 9000, 50, 9000)
            )
            ask = {"prompt": prompt, "length": length, "samples": samples}
            exact = summed(shape, None, **ask)
            gaps["dense"] = max(gaps["dense"], abs(dense_cost(shape, **ask).total / exact - 1))
            exact = summed(shape, budget, **ask)
            sparse = top_k_cost(shape, budget=budget, **ask).total
            gaps["top-k"] = max(gaps["top-k"], abs(sparse / exact - 1))
    for name, gap in gaps.items():
        yield f"largest relative difference, {name}", gap
    long = {
        name: dense_cost(shape, prompt=200, length=32768).total for name, shape in QWEN3.items()
    }
    share = max(2 * shape.parameters * 32768 / long[name] for name, shape in QWEN3.items())
    yield "parameters, largest share in percent", 100 * share
    yield "14B to 0.6B, 32768 tokens", long["14B"] / long["0.6B"]
    large, small = (dense_cost(QWEN3[n], prompt=200, length=1024).total for n in ("14B", "0.6B"))
    yield "14B to 0.6B, 1024 tokens", large / small
    sparse = top_k_cost(QWEN3["32B"], budget=1024, prompt=200, length=32768).total
    yield "1024 keys, percent of full attention", 100 * sparse / long["32B"]


def summed(shape: Shape, budget: int | None, *, prompt: int, length: int, samples: int) -> float:
    """The cost, token by token."""
    own = torch.arange(length, dtype=torch.float64) + 0.5
    width = shape.head_dim * shape.layers
    seen = prompt + own if budget is None else (prompt + own).clamp(max=budget)
    # with a budget each sample reads keys of its own; without, the prompt's are read once
    read = prompt + samples * own if budget is None else samples * seen
    compute = samples * (2 * shape.parameters * length + 4 * seen.sum() * shape.heads * width)
    return float(compute + 562.5 * 4 * read.sum() * shape.kv_heads * width)


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return (
        found["largest relative difference, dense"] <= 1e-12
        and found["largest relative difference, top-k"] <= 1e-12
        and found["parameters, largest share in percent"] < 3
        and 1.4 <= found["14B to 0.6B, 32768 tokens"] <= 1.5
        and 1.9 <= found["14B to 0.6B, 1024 tokens"] <= 2.1
        and found["1024 keys, percent of full attention"] < 10
    )
