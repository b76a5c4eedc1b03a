"""The small checks of the papers on measures: their plumbing on tiny sizes, and their thresholds."""

import inspect
import math

import pytest

from edges import assert_edge
from testtime._core.registry import entries

TINY = {"SAMPLES": 64, "STEPS": 3, "ROUNDS": 3, "SHAPE": (64, 128), "EPOCHS": 1, "LENGTH": 800,
        "PATHS": 5, "LAWS": 10, "COUPLINGS": 5, "QUANTISED": 5, "REPEATS": 2, "CUBE": (20, 30),
        "DISK": 20, "KERNEL": 20, "STREAMS": 1, "DRAWS": 2, "MOMENTS": 50, "SHORT": 3, "EPISODES": 1}  # fmt: skip

# numbers for which the claim just holds, and changes of one or two of them for which it does not
EDGES = {
    "mine": (
        {"gaussian, 0.0 nats": 0.03, "gaussian, 0.5 nats": 0.46, "gaussian, 1.5 nats": 1.64,
         "cubed, 0.5 nats": 0.40},
        [{"gaussian, 0.0 nats": -0.031}, {"gaussian, 0.5 nats": 0.44}, {"gaussian, 1.5 nats": 1.66},
         {"cubed, 0.5 nats": 0.38}],
    ),
    "smile": (
        {f"{name}, deviation at {t} nats": value for t in (2, 6, 10)
         for name, value in (("NWJ", 0.4 if t == 2 else 2.1), ("DV", 0.4), ("SMILE 5", 0.3), ("SMILE 1", 0.2))}
        | {f"InfoNCE, largest at {t} nats": 4.15 for t in (2, 6, 10)},
        [{"NWJ, deviation at 10 nats": 2.0}, {"DV, deviation at 6 nats": 0.3},
         {"SMILE 1, deviation at 10 nats": 0.3}, {"InfoNCE, largest at 2 nats": 4.16}],
    ),
    "matrix-nuclear-norm": (
        {"times faster than entropy": 10.0}
        | {f"{n} clusters, {norm}": 20.0 + n for n in (4, 16, 64, 256)
           for norm in ("matrix nuclear-norm", "nuclear norm")}
        | {f"rank {r}, matrix nuclear-norm": 200 + r / 5 for r in (1, 4, 16, 64, 256)}
        | {f"rank {r}, nuclear norm": 15.0 + r for r in (1, 4, 16, 64, 256)},
        [{"times faster than entropy": 9.9}, {"16 clusters, matrix nuclear-norm": 23.0},
         {"64 clusters, nuclear norm": 84.1}, {"rank 256, matrix nuclear-norm": 261.0},
         {"rank 64, nuclear norm": 30.0}],
    ),
    "cs-ib": (
        {"squared, clean": 1.0, "squared, attacked": 2.0}
        | {f"{name}, {what}": value for name in ("divergence", "bottleneck")
           for what, value in (("clean", 0.84), ("attacked", 1.69))},
        [{"divergence, clean": 0.85}, {"bottleneck, attacked": 1.7}],
    ),
    "reparam-rejection": (
        {f"shape {a}, {what}": value for a in (1, 2, 5, 20)
         for what, value in (("raised by 0, standard errors off", 4.0), ("score, variance", 10.0),
                             ("raised by 1, standard errors off", 4.0), ("raised by 1, variance", 3.9))},
        [{"shape 1, raised by 0, standard errors off": 4.1}, {"shape 5, raised by 1, variance": 4.0},
         {"shape 20, raised by 1, standard errors off": 4.1}],
    ),
    "markov-learning": (
        {f"{kind} of row {i}, scaled": value for kind, values in
         (("kl", (1.36, 1.5, 1.64, 1.5)), ("chi-squared", (3.0, 2.71, 3.0, 3.29)))
         for i, value in enumerate(values, start=1)}
        | {f"{row} row, {n} steps": value for row, values in (("rare", (0.11, 0.29, 0.2)), ("frequent", (0.3, 0.2, 0.1)))
           for n, value in zip((100, 1000, 10000), values, strict=True)},
        [{"kl of row 3, scaled": 1.66}, {"chi-squared of row 2, scaled": 2.69}, {"kl of row 1, scaled": 1.34},
         {"rare row, 1000 steps": 0.31},
         {"rare row, 10000 steps": 0.09}, {"frequent row, 10000 steps": 0.25}],
    ),
    "mec-bottleneck": (
        {"largest excess of the rate": 0.0, "largest shortfall beyond the bound": -0.1,
         "largest breach of the decomposition": 0.0, "greedy, bits": 1.51, "uniform quantiser, bits": 1.5,
         "mean shortfall, greedy": 0.2, "mean shortfall, refined": 0.19,
         "messages told, greedy": 51.0, "messages told, uniform": 50.0},
        [{"mean shortfall, refined": 0.2}, {"messages told, uniform": 51.0}, {"largest excess of the rate": 1e-6}, {"largest shortfall beyond the bound": 1e-6},
         {"largest breach of the decomposition": 1e-6}, {"greedy, bits": 1.5}],
    ),
    "unnormalized-compositional": (
        {f"likelihood, curvature at {r}": 1.0 for r in (2, 4, 6, 8)}
        | {f"nce, curvature at {r}": min(0.49, 2.9 * math.exp(-(r**2) / 8)) for r in (2, 4, 6, 8)}
        | {"no memory, error": 1.0, "moving average, error": 0.29, "storm, error": 0.29},
        [{"likelihood, curvature at 8": 0.99}, {"nce, curvature at 2": 0.51},
         {"nce, curvature at 8": 1.1e-3}, {"moving average, error": 0.31}, {"storm, error": 0.31}],
    ),
    "minde": (
        {"2 coordinates": 1.14, "2 coordinates, truth": 1.0, "5 coordinates": 0.86,
         "5 coordinates, truth": 1.0, "independent": 0.049},
        [{"2 coordinates": 1.16}, {"5 coordinates": 0.84}, {"independent": 0.05}],
    ),
    "group-divergence": (
        {"W1, 200 points": 1.61, "W1, 800 points": 2.39, "D2, 200 points": 1.61}
        | {f"{name}, {k} turns": value for name in ("W1", "D2")
           for k, value in ((1, 0.4), (4, 0.3), (16, 0.2), (64, 0.1))}
        | {f"MMD of width {width}, {k} turns": 0.1 / k**0.5 for width in (0.05, 5.0) for k in (1, 4, 16)},
        [{"W1, 200 points": 1.59}, {"W1, 800 points": 2.41}, {"D2, 200 points": 2.41},
         {"MMD of width 0.05, 4 turns": 0.07}, {"W1, 64 turns": 0.2}, {"D2, 4 turns": 0.4}],
    ),
    "nnd-gan-benchmark": (
        {"3000 memorised, Frechet distance": 0.019, "the generator, Frechet distance": 0.02,
         "300 memorised, divergence": 0.22, "3000 memorised, divergence": 0.21,
         "the generator, divergence": 0.2, "the law, divergence": -0.049},
        [{"3000 memorised, Frechet distance": 0.02}, {"300 memorised, divergence": 0.21},
         {"the generator, divergence": 0.21}, {"the law, divergence": -0.05},
         {"the law, divergence": 0.05}],
    ),
}  # fmt: skip

CHECKS = {each.paper: each for each in entries("check").values() if each.paper in EDGES}


def test_every_edge_has_a_check():
    assert set(CHECKS) == set(EDGES)


@pytest.mark.parametrize("slug", CHECKS)
def test_a_check_gives_the_numbers_that_its_claim_reads(slug, monkeypatch):
    module = inspect.getmodule(CHECKS[slug].factory)
    for name, value in TINY.items():
        if hasattr(module, name):
            monkeypatch.setattr(module, name, value)
    found = CHECKS[slug].factory(seeds=(3,))
    assert (found.slug, found.seeds) == (slug, [3])
    sized = "LENGTH" in vars(module) or "CUBE" in vars(module)  # then sizes stand in the names
    assert sized or set(EDGES[slug][0]) <= set(found.numbers)
    assert len(EDGES[slug][0]) <= len(found.numbers)
    for name, values in found.numbers.items():
        assert len(values) == 1
        assert math.isfinite(values[0]), name


@pytest.mark.parametrize("slug", CHECKS)
def test_a_claim_holds_up_to_its_thresholds(slug):
    assert_edge(slug, *EDGES[slug])
