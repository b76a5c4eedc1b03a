"""The small plots of the pages on measures and monitors, one a paper.

    python benchmarks/small_plots.py              all, about a minute on one core
    python benchmarks/small_plots.py tarp cs-ib   these

Writes `docs/images/SLUG.svg`. Most show what the small checks found, as `benchmarks/reproductions.json`
has it, each value the mean over seeds; the others are computed here, with seed 0.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from charts import bars, chart
from testtime._core.seeds import generator
from testtime.guard.feature_shift import feature_shift
from testtime.guard.predictive_uncertainty import predictive_uncertainty
from testtime.guard.rejection import Rejector
from testtime.guard.tarp import tarp
from testtime.measures.coupling import (
    greedy_bottleneck,
    refined_bottleneck,
    uniform_bottleneck,
)

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs/images"
FOUND = json.loads((ROOT / "benchmarks/reproductions.json").read_text())


def main() -> None:
    for slug in sys.argv[1:] or PLOTS:
        (IMAGES / f"{slug}.svg").write_text(PLOTS[slug]())


def mean(slug: str, name: str) -> float:
    """What a check found, over its seeds."""
    return fmean(FOUND[slug]["numbers"][name])


def bottleneck() -> str:
    """Information of three encoders by their rate."""
    chance = generator(0, "small plots", "bottleneck")
    laws = -torch.rand(20, 16, generator=chance, dtype=torch.float64).log()
    rates = [r / 8 for r in range(25)]
    encoders = {
        "refined": refined_bottleneck, "greedy": greedy_bottleneck, "uniform": uniform_bottleneck,
    }  # fmt: skip
    series = {
        name: [
            (rate, fmean(encoder(law / law.sum(), rate=rate).information for law in laws))
            for rate in rates
        ]
        for name, encoder in encoders.items()
    }
    series["the rate, or H(X)"] = [
        (rate, fmean(min(rate, greedy_bottleneck(law / law.sum(), rate=9).rate) for law in laws))
        for rate in rates
    ]
    return chart(series, x="rate R, bits", y="I(X; T), bits")


def symmetry() -> str:
    """Divergences of equal laws in the disk."""
    turns = (1, 4, 16, 64)
    found, regularised = (
        [(float(k), mean("group-divergence", f"{name}, {k} turns")) for k in turns]
        for name in ("W1", "D2")
    )
    rate = [(k, found[0][1] / math.sqrt(k)) for k, _ in found]
    return chart(
        {"W1 under turns": found, "D, alpha 2, under turns": regularised, "the rate, 1/√k": rate},
        x="turns k of the group", y="divergence of two samples of one law", log=(True, True),
        across=turns,
    )  # fmt: skip


def markov() -> str:
    """Error of an estimated row by the length of the path."""
    lengths = (100, 1000, 10000)
    series = {
        f"{row} state": [
            (float(n), mean("markov-learning", f"{row} row, {n} steps")) for n in lengths
        ]
        for row in ("rare", "frequent")
    }
    return chart(
        series, x="steps of the path", y="KL of a row, nats", log=(True, True), across=lengths
    )


def network_divergence() -> str:
    """Two scores of models that know their data by heart."""
    models = {
        "the generator": "generator", "3000 memorised": "3000 by heart", "300 memorised": "300 by heart",
    }  # fmt: skip
    return bars(
        {
            said: {
                "Fréchet distance": mean("nnd-gan-benchmark", f"{name}, Frechet distance"),
                "network divergence": mean("nnd-gan-benchmark", f"{name}, divergence"),
            }
            for name, said in models.items()
        },
        y="distance from fresh data",
    )


def regression() -> str:
    """Errors of regression with outliers in training."""
    losses = {
        "squared": "squared error",
        "divergence": "CS divergence",
        "bottleneck": "CS bottleneck",
    }
    return bars(
        {
            said: {
                "clean inputs": mean("cs-ib", f"{name}, clean"),
                "under FGSM": mean("cs-ib", f"{name}, attacked"),
            }
            for name, said in losses.items()
        },
        y="RMSE on test data", x="training loss",
    )  # fmt: skip


def compositional() -> str:
    """How flat two objectives are at their optimum."""
    series = {
        said: [
            (float(r), mean("unnormalized-compositional", f"{name}, curvature at {r}"))
            for r in (2, 4, 6, 8)
        ]
        for name, said in (("likelihood", "likelihood (MECO)"), ("nce", "NCE"))
    }
    series["the order exp(-R²/8)"] = [(float(r), math.exp(-(r**2) / 8)) for r in (2, 4, 6, 8)]
    return chart(
        series, x="distance R of data from noise", y="curvature at the optimum", log=(False, True)
    )


def nuclear_norm() -> str:
    """The proxy and the norm, where it follows and where not."""
    ranks, clusters = (1, 4, 16, 64, 256), (4, 16, 64, 256)
    series = {
        f"{said}, {kind}": [
            (float(n), mean("matrix-nuclear-norm", row.format(n) + ", " + name)) for n in sizes
        ]
        for kind, row, sizes in (
            ("dense", "rank {}", ranks),
            ("along axes", "{} clusters", clusters),
        )
        for name, said in (("matrix nuclear-norm", "proxy"), ("nuclear norm", "norm"))
    }
    return chart(series, x="rank, or clusters", y="value", log=(True, False), across=ranks)


def rejection_gradients() -> str:
    """Variance of three estimators of a gradient."""
    shapes = (1, 2, 5, 20)
    names = {"score": "score function", "raised by 0": "RSVI", "raised by 1": "RSVI, raised by 1"}
    series = {
        said: [
            (float(a), mean("reparam-rejection", f"shape {a}, {name}, variance")) for a in shapes
        ]
        for name, said in names.items()
    }
    return chart(
        series,
        x="shape of the gamma law",
        y="variance of the gradient",
        log=(True, True),
        across=shapes,
    )


def smile() -> str:
    """Deviation over batches of bounds with the best critic."""
    nats = (2, 6, 10)
    series = {
        name: [(float(i), mean("smile", f"{name}, deviation at {i} nats")) for i in nats]
        for name in ("NWJ", "DV", "SMILE 5", "SMILE 1", "InfoNCE")
    }
    return chart(series, x="true information, nats", y="deviation over batches, nats")


def localised() -> str:
    """Scores of all features where one column was permuted."""
    chance = generator(0, "small plots", "feature shift")
    kind = {"generator": chance, "dtype": torch.float64}
    x, y = 0.5**0.5 * (torch.randn(2, 500, 1, **kind) + torch.randn(2, 500, 10, **kind))
    y[:, 3] = y[torch.randperm(500, generator=chance), 3]
    found = feature_shift(x, y, seed=0)
    return bars(
        {
            str(j): {"score": float(found.statistic[j]), "threshold": float(found.threshold[j])}
            for j in range(10)
        },
        x=f"feature; column 3 was permuted, {', '.join(map(str, found.features)) or 'none'} is named",
        y="score statistic",
    )  # fmt: skip


def calibration() -> str:
    """ECE and AUROC of four calibrators."""
    names = {
        "uncalibrated": "none", "temperature": "temperature", "cross-entropy": "features, CE",
        "correctness": "features, CA",
    }  # fmt: skip
    return bars(
        {
            said: {
                what: mean("correctness-calibration", f"{what}, {name}")
                for what in ("ECE", "AUROC")
            }
            for name, said in names.items()
        },
        y="percent",
    )


def relative() -> str:
    """How well six scores find wrong answers."""
    names = {
        "largest probability": "MSP", "entropy": "entropy", "DOCTOR": "DOCTOR",
        "ODIN, temperature 2": "ODIN", "MLP": "MLP", "Rel-U": "Rel-U",
    }  # fmt: skip
    return bars(
        {
            said: {"AUROC": mean("relative-uncertainty", name)} for name, said in names.items()
        },
        y="AUROC of wrong answers, %",
    )  # fmt: skip


def independence() -> str:
    """Points until a rejection."""
    betas = (0.0, 0.3, 0.5, 1.0)
    found = [(b, mean("skit", f"points, beta {b}")) for b in betas]
    stream = [(b, 600.0) for b in betas]
    return chart(
        {"SKIT, alpha 0.05": found, "the whole stream": stream}, x="slope β of y on x",
        y="mean points used", across=betas,
    )  # fmt: skip


def rejector() -> str:
    """Error of what is accepted, by how much is, of a learned rule and of a threshold."""
    chance = generator(0, "small plots", "rejector")
    (x, good, confidence, _), (test, right, sure, eta) = _answers(chance), _answers(chance)
    train = torch.cat([x, confidence[:, None]], 1)
    fresh = torch.cat([test, sure[:, None]], 1)
    learned = []
    for cost in (0.05, 0.1, 0.2, 0.3, 0.45):
        rule = Rejector.fit(train, good, cost=cost, alpha=2.0, steps=300)
        learned.append(_point(rule.accepts(fresh), right))
    levels = torch.linspace(0.95, 0, 20)
    return chart(
        {
            "threshold on confidence": [_point(sure >= sure.quantile(q), right) for q in levels],
            "learned rejector": sorted(learned),
            "the best, Bayes' rule": [_point(eta >= eta.quantile(q), right) for q in levels],
        },
        x="accepted, %", y="wrong among these, %",
    )  # fmt: skip


def _answers(chance: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, whether the answer is good, how confident it is, and P(good)."""
    x = 2 * torch.rand(3000, 2, generator=chance) - 1
    eta = torch.sigmoid(12 * (0.6 - x[:, 0].abs()))
    good = torch.rand(3000, generator=chance) < eta
    return x, good, torch.sigmoid(2 * (0.7 - x[:, 0].abs()) + 3 * x[:, 1]), eta


def _point(accepted: Tensor, good: Tensor) -> tuple[float, float]:
    return 100 * float(accepted.float().mean()), 100 * float((~good[accepted]).float().mean())


def coverage() -> str:
    """Expected coverage of an exact sampler and of three faulty ones."""
    kind = {"generator": generator(0, "small plots", "tarp"), "dtype": torch.float64}
    center = 10 * torch.rand(500, 5, **kind) - 5
    width = (-1 - 4 * torch.rand(500, 5, **kind)).exp()
    truth = center + width * torch.randn(500, 5, **kind)
    noise = torch.randn(300, 500, 5, **kind)
    samplers = {
        "exact": noise,
        "half width": noise / 2,
        "double width": 2 * noise,
        "shifted": noise + 1,
    }
    series = {}
    for name, own in samplers.items():
        found = tarp(center + width * own, truth, seed=0)
        series[name] = list(zip(found.levels.tolist(), found.coverage.tolist(), strict=True))
    return chart(series | {"the level": [(0.0, 0.0), (1.0, 1.0)]}, x="level", y="expected coverage")


def uncertainty() -> str:
    """Two members that disagree ever more."""
    series = {name: [] for name in ("epistemic", "total", "entropy", "mutual_information")}
    for step in range(1, 25):
        p = 0.5 + 0.499 * step / 24
        found = predictive_uncertainty(torch.tensor([[p, 1 - p], [1 - p, p]]).log().double())
        for name, points in series.items():
            points.append((p, float(getattr(found, name))))
    said = {
        "total": "total, pairwise", "epistemic": "epistemic, pairwise",
        "entropy": "entropy of the mean", "mutual_information": "mutual information",
    }  # fmt: skip
    return chart(
        {said[name]: points for name, points in series.items()},
        x="probability that one member gives to a, the other to b", y="nats",
    )  # fmt: skip


def fingerprint() -> str:
    """Alarms and accuracy by the share of faulty weights."""
    rates = (0.0, 0.01, 0.05, 0.1)
    slug = "uncertainty-fingerprint"
    alarms = [mean(slug, "alarms, healthy"), *(mean(slug, f"alarms, rate {r}") for r in rates[1:])]
    right = [(r, mean(slug, f"accuracy, rate {r}")) for r in rates[1:]]
    return chart(
        {"alarms": list(zip(rates, alarms, strict=True)), "accuracy": right},
        x="share of faulty weights", y="percent", across=rates,
    )  # fmt: skip


PLOTS: dict[str, Callable[[], str]] = {
    "mec-bottleneck": bottleneck, "group-divergence": symmetry, "markov-learning": markov,
    "nnd-gan-benchmark": network_divergence, "cs-ib": regression,
    "unnormalized-compositional": compositional, "matrix-nuclear-norm": nuclear_norm,
    "reparam-rejection": rejection_gradients, "smile": smile, "feature-shift": localised,
    "correctness-calibration": calibration, "relative-uncertainty": relative,
    "skit": independence, "learning-to-reject": rejector, "tarp": coverage,
    "predictive-uncertainty": uncertainty, "uncertainty-fingerprint": fingerprint,
}  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
