"""Models of samples of several lengths: torch runs these in nested tensors where nothing learns."""

import pytest
import torch
from torch import Tensor, nn

import testtime as tt
from battery import LEARNING, SMALL, WEIGHING, alike
from following import darker
from reference.methods import Tent
from testtime._core.errors import ScopeError
from testtime.guard.signals import read_signals

pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors", "ignore:Full backward hook")

IMAGES = ("deyo", "tesla")
"""Methods that change images, not sequences."""
AUGMENTING = ("cotta", "memo", "petal", "psmt", "rmt", "roid", "rotta", "stamp", "vcotta")


class Padded(nn.Module):
    """An encoder whose shorter samples end in padding, and are read at their first place."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.first, self.head = nn.Linear(7, 8), nn.Linear(8, 5)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[::2, -3:] = True
        return self.head(self.encoder(self.first(x), src_key_padding_mask=padding)[:, 0])


class Ragged(nn.Module):
    """Makes nested tensors itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(7, 8), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        parts = [sample[: 4 + place % 3] for place, sample in enumerate(x)]
        h = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
        h = self.norm(self.first(h))
        return self.head(torch.stack([sample.mean(0) for sample in h.unbind()]))


def sequences() -> list[Tensor]:
    return list(torch.rand(3, 6, 9, 7, generator=torch.Generator().manual_seed(0)))


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


both = pytest.mark.parametrize("kind", [Padded, Ragged])


@both
def test_they_adapt_as_a_plain_loop_adapts_them(kind):
    model = made(kind)
    adapter, other = tt.adapt(model, "tent", lr=1e-2), Tent(model, 1e-2)
    for x in sequences():
        torch.testing.assert_close(adapter(x), other(x), rtol=0, atol=1e-5)
    with torch.no_grad():
        assert alike(adapter.export()(x), adapter.predict(x))


@both
@pytest.mark.parametrize("name", [n for n in LEARNING if n not in (*IMAGES, *WEIGHING)])
def test_each_method_learns_from_them(name, kind):
    model, xs = made(kind), sequences()
    loader = [(x, torch.arange(6) % 5) for x in xs]
    needs = tt.methods()[name].needs
    source = tt.fit_source(model, loader, methods=[name]) if needs else None
    more = {"augment": darker} if name in AUGMENTING else {}
    adapter = tt.adapt(model, name, source=source, **{**SMALL.get(name, {}), **more})
    for x in xs:
        assert adapter(x).isfinite().all()


@both
@pytest.mark.parametrize("how", ["budget", "gate", "guard"])
def test_they_are_watched(how, kind):
    model, xs = made(kind), sequences()
    source = tt.fit_source(model, xs, methods=[], gate=True) if how == "gate" else None
    adapter = tt.adapt(model, "tent", source=source, **{how: 0.2 if how == "budget" else True})
    for x in xs:
        adapter(x)
    assert adapter.counts.steps == 3


@both
def test_signals_of_a_sample_are_those_it_has_alone(kind):
    model, (x, *_) = made(kind), sequences()
    found, alone = read_signals(model, x), read_signals(model, x[:1])
    assert found.keys() == alone.keys()
    for name, values in found.items():
        torch.testing.assert_close(values[:1], alone[name], rtol=1e-4, atol=1e-5)


def test_writing_to_what_a_backward_hook_has_seen_says_so():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(216, 5),
    ).eval()
    model[1].register_full_backward_hook(lambda *_: None)
    adapter = tt.adapt(model, "tent")
    with pytest.raises(ScopeError, match="being modified inplace"):
        adapter(torch.rand(4, 3, 8, 8))
    assert adapter.counts.steps == 0
    model[2].inplace = False
    assert tt.adapt(model, "tent")(torch.rand(4, 3, 8, 8)).isfinite().all()


def test_foa_says_what_it_takes():
    with pytest.raises(ScopeError, match="vision transformer"):
        tt.fit_source(made(Padded), sequences(), methods=["foa"])
