"""The textbook forms are the methods: fed with the same draws, they answer alike."""

import random
import re

import pytest
import torch
from torch import nn

import testtime as tt
from models import Experts, batches, tiny, tiny_vit
from scripts import BENCHMARKS, script

TEXTBOOK = script("cost").TEXTBOOK
BOTH, BATCH = ("batch", "group"), ("batch",)


def darker(x, generator=None):
    return 0.8 * x


def noisy(x, generator=None):
    return x + 0.2 * torch.randn(x.shape, generator=generator, dtype=x.dtype)


def oracle(places, inputs):
    return places % 5


SEEN = {"augment": darker}
CASES = {
    "bn-adapt": [(BATCH, {})],
    "tent": [(BOTH, {"lr": 1e-2})],
    "eta": [(BOTH, {"lr": 1e-2, "margin": 0.5, "redundancy": 0.9})],
    "eata": [(BOTH, {"lr": 1e-3, "margin": 0.5, "redundancy": 0.9, "beta": 20.0})],
    "rdumb": [(BOTH, {"lr": 1e-1, "margin": 0.5, "redundancy": 0.9, "reset_every": 2})],
    "sar": [(BOTH, {"lr": 1e-1, "margin": 0.5, "recover_below": low}) for low in (0.0, 0.3)],
    "deyo": [(BOTH, {"lr": 1e-1, "entropy_margin": 0.7, "drop_margin": 0.02})],
    "ostta": [(BOTH, {"lr": 1e-2})],
    "lerm": [(BOTH, {"lr": 1e-2})],
    "roid": [(BOTH, {"lr": 1e-2, "momentum": 0.9, **SEEN})],
    "cotta": [(BOTH, {"momentum": 0.9, "restore": 0.1, "views": 2, **SEEN})],
    "rmt": [(BOTH, {"momentum": 0.9, **SEEN})],
    "psmt": [(BOTH, {"momentum": 0.9, "share": 0.2, "views": 2, **SEEN})],
    "petal": [(BOTH, {"momentum": 0.9, "share": 0.2, "rho": 1e-4, "views": 2, **SEEN})],
    "vcotta": [(BOTH, {"lr": 1e-2, "momentum": 0.9, "views": 2, "weight": 1e-3, **more, **SEEN})
               for more in ({}, {"margin": 0.01, "temperature": 0.02})],
    "rotta": [(BOTH, {"lr": 1e-2, "capacity": 20, "every": 8, **SEEN})],
    "stamp": [(BOTH, {"margin": 0.7, "views": 2, "capacity": 20, "period": 5, **SEEN})],
    "lame": [(BOTH, {}), (BOTH, {"neighbours": 2})],
    "cafa": [(BOTH, {"lr": 1e-2})],
    "adanpc": [(BOTH, {"k": 5, "beta": 0.22})],
    "memo": [(BOTH, {"lr": 1e-1, "views": 3, **SEEN})],
    "domainadaptor": [(BATCH, {"lr": 1e-1})],
    "dent": [(BATCH, {"lr": 1e-1, "steps": 3})],
    "tesla": [(BOTH, {"lr": 1e-2, "momentum": 0.9, "views": 2, **SEEN})],
    "sade": [(BOTH, {"augment": noisy})],
    "sqrl": [(BOTH, {"lr": 1e-2})],
    "simatta": [(BOTH, {"lr": 1e-1, "oracle": oracle, "budget": budget, "clusters": 3,
                        "e_high": 0.3, "e_low": 0.1, "steps": 6}) for budget in (4, 30)],
    "foa": [(("vit",), {"prompts": 2, "population": 6})],
}  # fmt: skip
"""Method -> kinds of normalisation, and options under which all that it does happens."""

ALONE = ("bn-adapt", "lame", "memo", "domainadaptor", "dent")
"""Methods that keep nothing between batches."""
SURE = ("cotta", "psmt", "petal")
"""Methods that make no views where the source model is sure."""


def test_every_textbook_form_is_held_to_its_method():
    assert set(CASES) == set(TEXTBOOK)
    for path in (BENCHMARKS / "textbook").glob("*.py"):
        assert not re.search(r"^ *(import|from) testtime", path.read_text(), re.MULTILINE)


@pytest.mark.filterwarnings("ignore::testtime._core.errors.TesttimeWarning")  # a spent budget
@pytest.mark.parametrize(
    ("name", "kind", "options", "sharp"),
    [
        (name, kind, more, sharp)
        for name, cases in CASES.items()
        for kinds, more in cases
        for kind in kinds
        for sharp in ((6.0, 60.0) if name in SURE else (6.0,))
    ],
)
def test_a_textbook_form_answers_as_the_method(name, kind, options, sharp, monkeypatch):
    if name == "deyo":  # the method's way to draw an order
        monkeypatch.setattr(torch, "randperm", lambda count: torch.rand(count).argsort())
    monkeypatch.setattr(random, "choice", alone)
    model = tiny_vit() if kind == "vit" else tiny(kind, sharp=sharp)
    model = (Experts(model) if name == "sade" else model).double()
    *stream, one, two = [x.double() for x in batches(5)]
    data, source = {}, None
    if tt.methods()[name].needs:
        data = {"source": [(x, model(x + 0.1).argmax(1)) for x in (one, two)]}
        if name == "sqrl":  # a pixel tells the class
            data = {"source": [(x, (x[:, 0, 0, 0] > 0.5).long()) for x in (one, two)]}
        source = tt.fit_source(model, data["source"], methods=[name])
    adapter = tt.adapt(model, name, source=source, **options)

    def form():
        more = {"projector": projector(adapter)} if name == "rmt" else {}
        more |= {"first": "before"} if kind == "vit" else {}
        return TEXTBOOK[name](model, **more, **data, **options)

    other, answers = form(), []
    with torch.random.fork_rng():
        torch.set_rng_state(adapter.snapshot().generator)
        for x in stream:
            answers.append(other(x).log_softmax(1))
            torch.testing.assert_close(adapter(x).log_softmax(1), answers[-1], rtol=0, atol=1e-6)
    if sharp < 10:  # CoTTA's teacher agrees with its student where there are no views
        fresh = model if name in ALONE else form()  # has not learnt from the first batch, or any
        assert (fresh(stream[1]).log_softmax(1) - answers[1]).abs().max() > 1e-5


@pytest.mark.parametrize("kind", BOTH)
def test_cotta_rounds_as_its_textbook_form(kind):
    """To the last bit, with many views: Adam makes whole steps of rounding where a gradient is zero."""
    options = {"views": 8, "augment": darker}
    adapter, form = (
        tt.adapt(tiny(kind), "cotta", **options),
        TEXTBOOK["cotta"](tiny(kind), **options),
    )
    with torch.random.fork_rng():
        torch.set_rng_state(adapter.snapshot().generator)
        for x in batches(10):
            assert torch.equal(adapter(x), form(x))


def alone(values):
    """The one there is: where there were several, the draws of method and form would differ."""
    assert len(values) == 1
    return values[0]


def projector(adapter):
    """RMT's, with the weights that the method drew."""
    beside = adapter.snapshot().beside
    first, second = (
        {key: beside[f"projector/{layer}.{key}"] for key in ("weight", "bias")}
        for layer in ("first", "second")
    )
    layers = [nn.Linear(*own["weight"].shape[::-1]).double() for own in (first, second)]
    for layer, own in zip(layers, (first, second), strict=True):
        layer.load_state_dict(own)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])
