"""The claim of coupling with a bottleneck: a greedy encoder is within a bit of the best."""

import math
from collections.abc import Iterator, Sequence
from statistics import fmean

import torch
from torch import Tensor

from testtime._core.registry import register
from testtime._core.seeds import derive
from testtime.measures.coupling import (
    coupling_with_bottleneck,
    entropy_bits,
    greedy_bottleneck,
    greedy_coupling,
    mutual_information_bits,
)
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "300 random laws of 3 to 7 symbols and rates: the greedy encoder never exceeds its rate and "
    "falls at most h(p_2) short of it. 200 random couplings: I(X;Y) >= I(X;T) + I(T;Y) - H(T). On "
    "laws of 16 symbols it keeps more information on average than a uniform quantiser of as many "
    "bits."
)
LAWS, COUPLINGS, QUANTISED = 300, 200, 100


@register("check", paper="mec-bottleneck", name="mec-bottleneck")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Greedy encoders of random laws."""
    return reproduce(
        "mec-bottleneck", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Violations, and what encoders keep."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "mec-bottleneck"))
        over, short = 0.0, -math.inf
        for number in range(LAWS):
            p = law(3 + number % 5, (0.3, 1.0, 5.0)[number % 3])
            rate = float(torch.rand(())) * entropy_bits(p)
            found = greedy_bottleneck(p, rate=rate).rate
            second = float(p.sort(descending=True).values[1])
            bound = entropy_bits(torch.tensor([second, 1 - second]))
            over, short = max(over, found - rate), max(short, rate - found - bound)
        yield "largest excess of the rate", over
        yield "largest shortfall beyond the bound", short
        worst = -math.inf
        for _ in range(COUPLINGS):
            p, q, rate = law(8, 1.0), law(8, 1.0), 3 * float(torch.rand(()))
            code = greedy_bottleneck(p, rate=rate)
            kept = mutual_information_bits(greedy_coupling(code.joint.sum(0), q))
            whole = mutual_information_bits(coupling_with_bottleneck(p, q, rate=rate))
            worst = max(worst, kept - whole)
        yield "largest breach of the decomposition", worst
        pairs: list[tuple[float, float]] = []
        for _ in range(QUANTISED):
            p, rate = law(16, 0.5), 1 + 2.5 * float(torch.rand(()))
            pairs.append((greedy_bottleneck(p, rate=rate).rate, entropy_bits(quantised(p, rate))))
        yield "greedy, bits", fmean(own for own, _ in pairs)
        yield "uniform quantiser, bits", fmean(other for _, other in pairs)


def law(symbols: int, concentration: float) -> Tensor:
    """A random law."""
    drawn = torch.distributions.Dirichlet(torch.full((symbols,), concentration).double()).sample()
    return drawn / drawn.sum()


def quantised(p: Tensor, rate: float) -> Tensor:
    """The law of a uniform quantiser with floor(2^rate) cells of consecutive symbols."""
    size = math.ceil(len(p) / math.floor(2**rate))
    return torch.stack([cell.sum() for cell in p.split(size)])


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return (
        found["largest excess of the rate"] <= 1e-9
        and found["largest shortfall beyond the bound"] <= 1e-9
        and found["largest breach of the decomposition"] <= 1e-9
        and found["greedy, bits"] > found["uniform quantiser, bits"]
    )
