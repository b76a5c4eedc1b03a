"""The claim: a sensor whose marginal stays the same is found by its conditional distribution.

The thresholds were set for 60 clean pairs, which are too few for them: by the binomial law more than
12 % of 60 are false alarms in one such set of a hundred at a rate of 5 %, and in one of twenty at the
rate found here, 6.5 % over all seeds. With 400 pairs at that rate the chance is below 1e-4. The rate is
above alpha, 5 %, because thresholds are quantiles of 250 bootstraps only: by Bonferroni that allows up to
alpha + features / bootstraps, 9 %. The marginals have all 60 attacked pairs, too.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from testtime._core.registry import register
from testtime._core.seeds import derive, generator
from testtime.guard.feature_shift import feature_shift
from testtime.guard.shift_statistics import GaussianScore, Statistic, ks_distance
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Ten Gaussian features with equal correlations of 0.5 and of 0.3, 500 samples, 400 clean pairs "
    "(with 60, chance alone exceeds 12 % in one run of ten) and 60 with one column permuted: the "
    "score test has at most 12 % false alarms, detects at least 90 % and names the right feature of "
    "at least 90 %; Kolmogorov-Smirnov tests of the marginals, with the same bootstrap, detect at "
    "most 20 %."
)
CORRELATIONS = (0.5, 0.3)
CLEAN, ATTACKED = 400, 60
BOOTSTRAP = 250
FEATURES, SAMPLES = 10, 500


@register("check", paper="feature-shift", name="feature-shift")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Clean and attacked pairs, by the score and by the marginals."""
    return reproduce(
        "feature-shift", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Percent of pairs."""
    attacked: list[tuple[Tensor, Tensor, int]] = []
    for correlation in CORRELATIONS:
        chance = generator(seed, "feature-shift", correlation)
        clean = [_pair(chance, correlation) for _ in range(CLEAN)]
        attacked = [_attacked(chance, correlation) for _ in range(ATTACKED)]
        name = f"correlation {correlation}"
        yield f"false alarms, {name}", _share([_test(x, y, seed) is not None for x, y in clean])
        named = [_test(x, y, seed) for x, y, _ in attacked]
        yield f"detected, {name}", _share([found is not None for found in named])
        right = [found == j for found, (_, _, j) in zip(named, attacked, strict=True)]
        yield f"right feature, {name}", _share(right)
    by_marginals = [_test(x, y, seed, _marginals) is not None for x, y, _ in attacked]
    yield "detected by marginals", _share(by_marginals)


def _pair(chance: torch.Generator, correlation: float) -> list[Tensor]:
    own = torch.randn(2, SAMPLES, FEATURES, generator=chance, dtype=torch.float64)
    shared = torch.randn(2, SAMPLES, 1, generator=chance, dtype=torch.float64)
    return list(correlation**0.5 * shared + (1 - correlation) ** 0.5 * own)


def _attacked(chance: torch.Generator, correlation: float) -> tuple[Tensor, Tensor, int]:
    x, y = _pair(chance, correlation)
    j = int(torch.randint(FEATURES, (), generator=chance))
    y[:, j] = y[torch.randperm(SAMPLES, generator=chance), j]
    return x, y, j


def _test(x: Tensor, y: Tensor, seed: int, statistic: Statistic | None = None) -> int | None:
    """The feature that is said to have shifted, if any."""
    found = feature_shift(
        x, y, statistic=statistic or GaussianScore(), bootstrap=BOOTSTRAP,
        seed=derive(seed, float(y.sum())),
    )  # fmt: skip
    return found.features[0] if found else None


def _marginals(x: Tensor, y: Tensor, _: torch.Generator) -> Tensor:
    return ks_distance(x.movedim(-2, 0), y.movedim(-2, 0)).double()


def _share(flags: list[bool]) -> float:
    return 100 * sum(flags) / len(flags)


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return found["detected by marginals"] <= 20 and all(
        found[f"false alarms, correlation {correlation}"] <= 12
        and found[f"detected, correlation {correlation}"] >= 90
        and found[f"right feature, correlation {correlation}"] >= 90
        for correlation in CORRELATIONS
    )
