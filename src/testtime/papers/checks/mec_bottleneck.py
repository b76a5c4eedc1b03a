"""The claim of coupling with a bottleneck: a greedy encoder is within a bit of the best."""

import math
from collections.abc import Iterator, Sequence
from statistics import fmean

import torch
from torch import Tensor

from testtime._core.registry import register
from testtime._core.seeds import derive, generator
from testtime.measures.coupling import (
    coupling_with_bottleneck,
    entropy_bits,
    greedy_bottleneck,
    greedy_coupling,
    mutual_information_bits,
    refined_bottleneck,
    uniform_bottleneck,
)
from testtime.papers.coding_game import grid_world, play, soft_policy
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "300 random laws of 3 to 7 symbols and rates: the greedy encoder never exceeds its rate and "
    "falls at most h(p_2) short of it. 200 random couplings: I(X;Y) >= I(X;T) + I(T;Y) - H(T). On "
    "laws of 16 symbols it keeps more information on average than a uniform quantiser of as many "
    "bits. Refined near its rate, it keeps to it, and falls short of it by less on average. In the "
    "Markov coding game, 64 messages at a quarter of their bits, more of them arrive than with the "
    "uniform quantiser."
)
LAWS, COUPLINGS, QUANTISED, EPISODES = 300, 200, 100, 100
MESSAGES, BITS, BETA = 64, 1.5, math.exp(-6)


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
        gaps: list[tuple[float, float]] = []
        for number in range(LAWS):
            p = law(3 + number % 5, (0.3, 1.0, 5.0)[number % 3])
            rate = float(torch.rand(())) * entropy_bits(p)
            found = greedy_bottleneck(p, rate=rate).rate
            second = float(p.sort(descending=True).values[1])
            bound = entropy_bits(torch.tensor([second, 1 - second]))
            refined = refined_bottleneck(p, rate=rate)
            over, short = max(over, found - rate), max(short, rate - found - bound)
            over = max(over, refined.rate - rate)
            gaps.append((rate - found, rate - refined.information))
        yield "largest excess of the rate", over
        yield "mean shortfall, greedy", fmean(own for own, _ in gaps)
        yield "mean shortfall, refined", fmean(other for _, other in gaps)
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
            quantised = uniform_bottleneck(p, rate=rate).information
            pairs.append((greedy_bottleneck(p, rate=rate).information, quantised))
        yield "greedy, bits", fmean(own for own, _ in pairs)
        yield "uniform quantiser, bits", fmean(other for _, other in pairs)
    yield from _games(seed)


def _games(seed: int) -> Iterator[tuple[str, float]]:
    """Messages that arrive, in percent, and the reward of who tells them."""
    grid = grid_world()
    policy = soft_policy(grid, beta=BETA)
    for name, encoder in (("greedy", greedy_bottleneck), ("uniform", uniform_bottleneck)):
        told, rewards = 0, 0.0
        for number in range(EPISODES):
            chance = generator(seed, "coding game", number)
            message = int(torch.randint(MESSAGES, (), generator=chance))
            episode = play(
                grid, policy, message=message, messages=MESSAGES, rate=BITS, encoder=encoder,
                chance=chance,
            )  # fmt: skip
            told += int(episode.belief.argmax()) == message
            rewards += episode.reward
        yield f"messages told, {name}", 100 * told / EPISODES
        yield f"reward, {name}", rewards / EPISODES


def law(symbols: int, concentration: float) -> Tensor:
    """A random law."""
    drawn = torch.distributions.Dirichlet(torch.full((symbols,), concentration).double()).sample()
    return drawn / drawn.sum()


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return (
        found["largest excess of the rate"] <= 1e-9
        and found["largest shortfall beyond the bound"] <= 1e-9
        and found["largest breach of the decomposition"] <= 1e-9
        and found["greedy, bits"] > found["uniform quantiser, bits"]
        and found["mean shortfall, refined"] < found["mean shortfall, greedy"]
        and found["messages told, greedy"] > found["messages told, uniform"]
    )
