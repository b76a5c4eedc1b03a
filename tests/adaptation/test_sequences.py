"""Models that answer each place of a sequence: every place is a sample of its own."""

import pytest
import torch
from torch import Tensor, nn

import testtime as tt
from testtime._core.errors import InputError
from testtime._core.registry import find

DENSE = sorted(n for n in tt.methods() if find("method", n).build().dense)
PLACES = [name for name in DENSE if name not in ("cotta", "petal")]
"""Those that make no views of images."""


class Tagger(nn.Module):
    """Convolutions with normalisation, an answer for each place."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        made = (lambda n: nn.GroupNorm(2, n)) if norm is nn.GroupNorm else norm
        self.net = nn.Sequential(
            nn.Conv1d(3, 6, 3, padding=1, bias=False), made(6), nn.ReLU(), nn.Conv1d(6, 5, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class AsImage(nn.Module):
    """The same, with logits as of images one pixel high."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[:, :, None]


class Words(nn.Module):
    """Tokens with layer normalisation; classes last, as taggers of words give them, or not."""

    def __init__(self, *, last: bool) -> None:
        super().__init__()
        self.net, self.last = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 5)), last

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return logits if self.last else logits.movedim(-1, 1)


def tagger(norm: type[nn.Module] = nn.BatchNorm1d) -> Tagger:
    torch.manual_seed(0)
    model = Tagger(norm)
    with torch.no_grad():
        model.net[-1].weight.mul_(4)
        for _ in range(20):
            model(torch.rand(8, 3, 20))
    return model.eval()


def sequences(count: int = 4) -> list[Tensor]:
    noise = torch.rand(count, 6, 3, 20, generator=torch.Generator().manual_seed(3))
    return list(noise * torch.linspace(0.2, 1, 20))


def adapters(name: str, model: nn.Module, **more) -> list[tt.Adapter]:
    made = []
    for each, labels in ((model, (6, 20)), (AsImage(model), (6, 1, 20))):
        loader = [(x, torch.arange(120).view(labels) % 5) for x in sequences(2)]
        needs = tt.methods()[name].needs or more.get("gate")
        source = tt.fit_source(each, loader, methods=[name], gate="gate" in more) if needs else None
        made.append(tt.adapt(each, name, source=source, **more))
    return made


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.GroupNorm])
@pytest.mark.parametrize("name", PLACES)
def test_places_are_samples_as_pixels_are(name, norm):
    if name == "bn-adapt" and norm is nn.GroupNorm:
        return
    own, image = adapters(name, tagger(norm))
    for x in sequences():
        answer = own(x)
        assert answer.shape == (6, 5, 20)
        torch.testing.assert_close(answer[:, :, None], image(x))
        torch.testing.assert_close(own.predict(x)[:, :, None], image.predict(x))
    torch.testing.assert_close(own.events[-1].entropy, image.events[-1].entropy)
    assert own.counts == image.counts


@pytest.mark.parametrize(
    "more", [{"guard": True}, {"gate": True}, {"deferred": True}, {"budget": 1e6}]
)
def test_places_are_samples_whatever_is_around(more):
    own, image = adapters("tent", tagger(), lr=0.01, **more)
    for x in sequences(8):
        torch.testing.assert_close(own(x)[:, :, None], image(x))
    assert own.counts == image.counts


@pytest.mark.parametrize("name", ["cotta", "petal", "memo", "lame"])
def test_other_methods_say_that_they_take_none(name):
    with pytest.raises(InputError, match=r"images|one prediction for each sample"):
        adapters(name, tagger())[0](sequences()[0])


def test_sequences_of_other_lengths():
    adapter = tt.adapt(tagger(), "tent")
    for length in (20, 7, 1):
        assert adapter(torch.rand(6, 3, length)).shape == (6, 5, length)


def test_classes_that_come_last_are_not_taken_for_places():
    x = torch.rand(6, 20, 3)
    with pytest.raises(InputError, match=r"\(batch, 20, 5\).*logits\.movedim\(-1, 1\)"):
        tt.adapt(Words(last=True), "tent")(x)
    assert tt.adapt(Words(last=False), "tent")(x).shape == (6, 5, 20)
