"""The small checks of papers."""

import importlib
import inspect
import math
from functools import partial

import pytest
import torch
from torch import nn

from edges import assert_edge
from testtime._core.errors import OptionError
from testtime._core.registry import entries
from testtime.papers.catalogue import catalogue, record, search
from testtime.papers.digits import Images, accuracy, corrupt, stream, train
from testtime.papers.reproduction import reproduce

METHODS = {entry.paper for entry in entries("method").values() if entry.name != "source"}
CHECKS = {
    entry.paper: entry for entry in entries("check").values() if entry.paper in METHODS
}  # those of other rooms are tested beside this file

# numbers for which the claim just holds, and changes of one or two of them for which it does not
EDGES = {
    "tent": (
        {"source": 50.0, "bn-adapt": 80.0, "tent": 80.5},
        [{"source": 50.1}, {"tent": 80.4}],
    ),
    "bn-adapt": (
        {"source": 50.0, "bn-adapt, alpha 0.5": 60.0, "bn-adapt": 80.0,
         "bn-adapt, three shuffled": 80.0, "bn-adapt, three correlated": 54.9},
        [{"source": 50.1}, {"bn-adapt, alpha 0.5": 50.0}, {"bn-adapt, alpha 0.5": 80.0},
         {"bn-adapt, three correlated": 55.0}],
    ),
    "memo": (
        {"source": 90.0, "memo": 88.5, "entropy fell": 95.1, "largest change by order": 0.0},
        [{"memo": 88.4}, {"memo": 91.6}, {"entropy fell": 95.0},
         {"largest change by order": 1e-6}],
    ),
    "rdumb": (
        {"rdumb, least lead": 0.1, "rdumb, clean afterwards": 90.0, "tent, clean afterwards": 90.0},
        [{"rdumb, least lead": 0.0}, {"tent, clean afterwards": 90.1}],
    ),
    "eata": (
        {"eata": 80.0, "tent": 80.0, "eata, clean afterwards": 90.0, "tent, clean afterwards": 90.0,
         "eata, samples used": 99.0, "eata, Fisher distance": 1.0, "eta, Fisher distance": 1.1},
        [{"tent": 80.1}, {"tent, clean afterwards": 90.1}, {"eata, samples used": 100.0},
         {"eta, Fisher distance": 1.0}],
    ),
    "sar": (
        {"source": 70.0, "tent": 10.0, "eta without redundancy": 12.0, "sar without recovery": 12.0, "sar": 30.0,
         "source, one pass": 70.0, "tent at 1e-2, one pass": 69.9},
        [{"eta without redundancy": 12.1}, {"sar without recovery": 12.1}, {"tent": 12.1, "sar": 40.0}, {"sar": 29.9},
         {"sar": 70.0}, {"tent at 1e-2, one pass": 70.0}],
    ),
    "deyo": (
        {f"{name} at {rate}, {what}": 80.0 + (name == "deyo")
         for name in ("tent", "deyo") for rate in ("0.001", "0.005")
         for what in ("average", "worst group")},
        [{f"deyo at {rate}, {what}": 80.0} for rate in ("0.001", "0.005")
         for what in ("average", "worst group")],
    ),
    "ostta": (
        {"known, selected": 80.1, "known, rejected": 80.0, "ostta, last domain": 80.0,
         "tent, last domain": 80.0},
        [{"known, rejected": 80.1}, {"tent, last domain": 80.1}],
    ),
    "dent": (
        {"static, clean": 95.0, "dent, clean": 94.0, "static, attacked": 40.0,
         "dent, attacked through last forward": 40.1},
        [{"dent, clean": 93.9}, {"dent, clean": 96.1}, {"static, attacked": 40.1}],
    ),
    "domainadaptor": (
        {"source": 50.0, "mixture": 80.0, "mixture, clean": 90.0, "bn-adapt, clean": 90.0,
         "largest error of the fold": 9e-5, "gradient of entropy, sure": 1.0,
         "gradient of generalised entropy, sure": 1.1},
        [{"source": 50.1}, {"bn-adapt, clean": 90.1}, {"largest error of the fold": 1e-4},
         {"gradient of entropy, sure": 1.1}],
    ),
    "stamp": (
        {"stamp at 0.25, unknown in memory": 0.24, "stamp at 0.25, AUROC": 80.1,
         "bn-adapt, AUROC": 80.0, "tent, AUROC": 80.0, "stamp at 0.5, last domain": 78.0,
         "tent, last domain": 80.0},
        [{"stamp at 0.25, unknown in memory": 0.25}, {"bn-adapt, AUROC": 80.1},
         {"tent, AUROC": 80.1}, {"tent, last domain": 80.1}],
    ),
    "lerm": (
        {"blobs, entropy": 39.9, "blobs, entropy, spread": 0.59, "blobs, lerm": 75.1,
         "blobs, lerm, spread": 0.91, "tent, batches of 16": 80.0, "lerm, batches of 16": 80.0,
         "tent, batches of 64": 80.0, "lerm, batches of 64": 80.0},
        [{"blobs, entropy": 40.0}, {"blobs, entropy, spread": 0.6}, {"blobs, lerm": 75.0},
         {"blobs, lerm, spread": 0.9}, {"tent, batches of 16": 80.1},
         {"tent, batches of 64": 80.1}],
    ),
    "lame": (
        {f"{name}, {order} {domain}": 80.0 + 3 * (name == "lame")
         for name in ("source", "lame") for order in ("correlated", "shuffled")
         for domain in ("fog", "blur")},
        [{"lame, correlated fog": 82.9, "lame, correlated blur": 90.0},
         {"lame, correlated blur": 82.9}, {"lame, shuffled fog": 83.1},
         {"lame, shuffled blur": 76.9}],
    ),
    "cotta": (
        {"cotta": 80.1, "bn-adapt": 80.0, "cotta, clean afterwards": 98.5, "source, clean": 99.0,
         "distance, restoration 0.01": 1.0, "distance, restoration 0": 1.1},
        [{"cotta": 80.0}, {"cotta, clean afterwards": 98.4}, {"distance, restoration 0": 1.0}],
    ),
    "roid": ({"roid": 82.1, "bn-adapt": 80.0}, [{"roid": 82.0}]),
    "rmt": (
        {"rmt": 82.1, "bn-adapt": 80.0, "rmt without contrast": 82.0},
        [{"bn-adapt": 80.1}, {"rmt without contrast": 82.1}],
    ),
    "psmt": (
        {"psmt, accuracy": 82.1, "cotta, accuracy": 81.0, "psmt, NLL": 0.3, "cotta, NLL": 0.4,
         "psmt, Brier score": 0.1, "cotta, Brier score": 0.2},
        [{"psmt, accuracy": 82.0}, {"psmt, NLL": 0.4}, {"psmt, Brier score": 0.2}],
    ),
    "petal": (
        {"petal, accuracy": 80.5, "cotta, accuracy": 81.0, "petal, NLL": 0.4, "cotta, NLL": 0.385,
         "returned, percent": 3.0},
        [{"petal, accuracy": 80.4}, {"petal, NLL": 0.401}, {"returned, percent": 3.2},
         {"returned, percent": 2.8}],
    ),
    "sade": (
        {"forward, sade": 82.0, "forward, equal weights": 80.0, "forward, expert 1": 0.5,
         "forward, expert 3": 0.1, "backward, sade": 79.0, "backward, equal weights": 80.0,
         "backward, expert 1": 0.1, "backward, expert 3": 0.5, "uniform, sade": 79.0,
         "uniform, equal weights": 80.0, "uniform, expert 1": 0.3, "uniform, expert 3": 0.3},
        [{"forward, sade": 81.9}, {"uniform, sade": 78.9}, {"backward, sade": 78.9},
         {"forward, expert 1": 0.3}, {"forward, expert 3": 0.5}, {"backward, expert 3": 0.4}],
    ),
    "sqrl": (
        {"violations before": 100.0, "violations after": 39.9, "accuracy before": 90.0,
         "accuracy after": 90.0},
        [{"violations after": 40.0}, {"accuracy after": 89.9}],
    ),
    "rotta": (
        {"source": 60.0, "bn-adapt": 60.0, "tent": 60.0, "cotta": 60.0, "rotta": 70.0},
        [{name: 60.1} for name in ("source", "bn-adapt", "tent", "cotta")],
    ),
    "cafa": (
        {"bn-adapt": 80.0, "tent": 81.5, "cafa": 80.8, "cafa, of the batch": 82.5},
        [{"cafa": 80.7}, {"cafa, of the batch": 80.7, "tent": 81.0}, {"tent": 81.4},
         {"tent": 81.9}],
    ),
    "adanpc": (
        {"adanpc": 45.0, "adanpc, source memory": 40.0},
        [{"adanpc, source memory": 40.1}],
    ),
    "foa": (
        {f"{what}, {domain}": value for domain in ("noise", "fog", "shot")
         for what, value in (("source", 60.0), ("shift alone", 62.0), ("foa", 63.0), ("fall", 0.1))}
        | {"backward passes": 0.0},
        [{"shift alone, fog": 61.9}, {"foa, shot": 62.9}, {"fall, noise": 0.0},
         {"backward passes": 1.0}],
    ),
    "simatta": (
        {"simatta, rotated": 70.0, "tent, rotated": 60.0, "simatta, labels": 89.0,
         "simatta, clean afterwards": 95.0, "random queries, clean afterwards": 94.9},
        [{"tent, rotated": 60.1}, {"simatta, labels": 90.0}, {"simatta, clean afterwards": 94.9}],
    ),
    "vcotta": (
        {"vcotta": 80.0, "cotta": 80.0, "vcotta, Brier score": 0.2, "cotta, Brier score": 0.2,
         "vcotta, nats from the source": 9.0,
         "vcotta without divergence, nats from the source": 9.1},
        [{"cotta": 80.1}, {"cotta, Brier score": 0.19}, {"vcotta, nats from the source": 9.1}],
    ),
    "tesla": (
        {"tent": 80.0, "tesla": 80.1, "tesla, mu 0.99": 80.0, "tesla, mu 0.99, not flipped": 80.0,
         "tesla, mu 0.99, calibration error": 5.0,
         "tesla, mu 0.99, not flipped, calibration error": 5.1,
         "tesla, entropy of hard images": 0.6, "tesla, entropy of plain images": 0.5},
        [{"tesla": 80.0}, {"tesla, mu 0.99": 79.9}, {"tesla, mu 0.99, calibration error": 5.1},
         {"tesla, entropy of hard images": 0.5}],
    ),
}  # fmt: skip


def test_the_catalogue_names_each_paper_once():
    slugs = [r.slug for r in catalogue()]
    assert len(slugs) == len(set(slugs)) > 200
    assert record("sar").symbols == ("testtime.adaptation.methods.sar.sar",)
    assert [r.slug for r in search("dynamic wild world")] == ["sar"]


def test_every_paper_of_a_method_has_a_check():
    assert set(CHECKS) == METHODS == set(EDGES)
    assert {r.slug for r in catalogue() if r.check} == {e.paper for e in entries("check").values()}


def test_what_a_record_names_exists():
    for each in catalogue():
        for symbol in each.symbols:
            module, _, name = symbol.rpartition(".")
            assert callable(getattr(importlib.import_module(module), name)), symbol


@pytest.fixture
def small(monkeypatch):
    """Tiny untrained networks, few random images, one round: what is left of a check is its plumbing."""

    def images(seed, split):
        random = torch.Generator().manual_seed(seed)
        return Images(torch.rand(64, 1, 16, 16, generator=random), torch.arange(64) % 10)

    def untrained(*_, norm="batch", classes=10, **__):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            layer = nn.BatchNorm2d if norm == "batch" else partial(nn.GroupNorm, 2)
            net = nn.Sequential(
                nn.Conv2d(1, 8, 3, 2, 1), layer(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), layer(8),
                nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
            )  # fmt: skip
            return net.eval().requires_grad_(False)

    stand_ins = {"digits": images, "trained": untrained, "train": untrained, "ROUNDS": 1,
                 "PASSES": 1, "STEPS": 2, "IMAGES": 6, "EPOCHS": 1, "TEST_LARGEST": 60}  # fmt: skip
    for entry in CHECKS.values():
        module = inspect.getmodule(entry.factory)
        for name, value in stand_ins.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize("slug", CHECKS)
def test_a_check_gives_the_numbers_that_its_claim_reads(slug, small):
    told = []
    found = CHECKS[slug].factory(seeds=(3,), on_progress=lambda *steps: told.append(steps))
    assert (found.slug, found.seeds) == (slug, [3])
    assert found.held == all(found.numbers["claim held"])
    assert set(EDGES[slug][0]) <= set(found.numbers)
    for values in found.numbers.values():
        assert len(values) == 1
        assert math.isfinite(values[0])
    assert told == [(i, None) for i in range(1, len(found.numbers))]  # all but `claim held`


@pytest.mark.parametrize("slug", CHECKS)
def test_a_claim_holds_up_to_its_thresholds(slug):
    assert_edge(slug, *EDGES[slug])


def test_a_claim_that_fails_with_one_seed_does_not_hold():
    told = []
    found = reproduce(
        "x", "n < 2", measure=lambda seed: iter([("n", float(seed))]),
        holds=lambda n: n["n"] < 2, seeds=(0, 1, 2), on_progress=lambda *steps: told.append(steps),
    )  # fmt: skip
    assert not found.held
    assert found.numbers["claim held"] == [1.0, 1.0, 0.0]
    assert told == [(1, None), (2, 3), (3, 3)]
    with pytest.raises(OptionError, match="no seed"):
        reproduce("x", "", measure=lambda _: iter(()), holds=bool, seeds=())


def test_the_corruptions_follow_their_formulas():
    x = torch.full((400, 1, 16, 16), 0.5)
    n = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    for name, formula in {
        "noise": x + 0.3 * n, "contrast": 0.3 * x + 0.35 + 0.06 * n,
        "invertmix": 0.5 * x + 0.3 + 0.12 * n, "dim": 0.8 * x + 0.15 + 0.35 * n,
    }.items():  # fmt: skip
        changed = corrupt(x, name, torch.Generator().manual_seed(0))
        torch.testing.assert_close(changed, formula.clamp(0, 1))
    shot = corrupt(x, "shot", torch.Generator().manual_seed(0))
    whole = 6 * shot[shot < 1]
    torch.testing.assert_close(whole, whole.round())
    assert float(shot.mean()) == pytest.approx(0.5868, abs=0.01)  # E min(Poisson(3.6), 6) / 6
    fog = corrupt(x, "fog", torch.Generator().manual_seed(0))
    assert 0.3 <= float(fog.min()) < float(fog.max()) <= 0.7
    assert float((fog[:, :, 1:] - fog[:, :, :-1]).abs().max()) <= 0.4 / 4 + 1e-6  # smooth


def test_a_stream_sends_each_image_as_often_as_asked_and_differs_by_visit():
    held = Images(torch.rand(64, 1, 16, 16), torch.arange(64))
    sent = stream(held, "clean", seed=0, repeats=2)
    assert [len(batch.labels) for batch in sent] == [64, 64]
    assert torch.cat([b.labels for b in sent]).bincount().tolist() == [2] * 64
    for batch in sent:
        assert torch.equal(batch.images, held.images[batch.labels])
    again, later = (stream(held, "noise", seed=0, visit=visit)[0] for visit in (0, 1))
    assert torch.equal(again.images, stream(held, "noise", seed=0)[0].images)
    assert not torch.equal(again.labels, later.labels)


def test_training_learns_and_repeats():
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    held = Images(
        torch.rand(200, 1, 16, 16, generator=random) * 0.4 + 0.5 * labels[:, None, None, None],
        labels,
    )
    before = torch.random.get_rng_state()
    model, again = (train(held, seed=1, norm="group", classes=2, epochs=4) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert accuracy(model, [held]) > 90
    for one, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("slug", ["tent", "bn-adapt"])
def test_the_claim_holds_on_one_seed(slug):
    found = CHECKS[slug].factory(seeds=(0,))
    assert found.held, found.numbers


@pytest.mark.parametrize("slug", ["em-llm", "edt"])
def test_defaults_of_torch_change_no_check(slug):
    check = next(e for e in entries("check").values() if e.paper == slug).factory
    expected = check(seeds=[0])
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        assert check(seeds=[0]) == expected
        assert torch.zeros(1).dtype == torch.float64
        assert torch.zeros(1).is_meta
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
