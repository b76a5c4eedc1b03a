"""The bench of the small checks: real digits, networks trained in seconds, five corruptions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from testtime._core.errors import unknown
from testtime._core.seeds import derive, generator
from testtime.adaptation.outputs import read_logits
from testtime.measures.calibration import brier_score, negative_log_likelihood
from testtime.streams import data
from testtime.streams.order import dirichlet_order

Norm = Literal["batch", "group"]

CORRUPTIONS = ("noise", "contrast", "fog", "shot", "invertmix")
"""The five corruptions of the bench, in order."""


@dataclass(frozen=True)
class Images:
    """Images (n, 1, 16, 16) in [0, 1] and their labels (n,)."""

    images: Tensor
    labels: Tensor

    def __getitem__(self, index: Tensor | slice) -> "Images":
        return Images(self.images[index], self.labels[index])


def network(norm: Norm, classes: int) -> nn.Sequential:
    """Five convolutions of 16 or 32 channels, each with normalisation, and a linear layer."""

    def block(inside: int, outside: int) -> list[nn.Module]:
        layer = nn.BatchNorm2d(outside) if norm == "batch" else nn.GroupNorm(8, outside)
        return [nn.Conv2d(inside, outside, 3, padding=1), layer, nn.ReLU()]

    return nn.Sequential(
        *block(1, 16), *block(16, 16), nn.MaxPool2d(2),
        *block(16, 32), *block(32, 32), nn.MaxPool2d(2),
        *block(32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes),
    )  # fmt: skip


def train(
    data: Images,
    *,
    seed: int,
    norm: Norm = "batch",
    classes: int = 10,
    noise: float = 0.0,
    epochs: int = 25,
    harden: Callable[[nn.Module, Images], Tensor] | None = None,
) -> nn.Module:
    """A network trained with Adam, batches of 50 and a one-cycle rate up to 3e-3.

    Args:
        data: training images; each batch is rolled by at most one pixel.
        seed: of the weights and of the order of the samples.
        norm: kind of the normalisation layers.
        classes: number of classes.
        noise: standard deviation of noise that is added in training.
        epochs: how often each image is seen.
        harden: makes harder images of a batch, given the network in eval mode, e.g. an attack.
    """
    random = generator(seed, "digits", "training")
    with torch.random.fork_rng(devices=[]):  # layers draw their weights from the global generator
        torch.manual_seed(derive(seed, "digits", "weights"))
        model = network(norm, classes)
    size = 50
    steps = epochs * (len(data.labels) // size)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    with torch.enable_grad():
        for _ in range(epochs):
            for index in torch.randperm(len(data.labels), generator=random).split(size):
                if len(index) < size:
                    continue
                shift = torch.randint(-1, 2, (2,), generator=random).tolist()
                x = data.images[index].roll(shift, (2, 3))
                if noise:
                    x = (x + noise * _normal(x, random)).clamp(0, 1)
                if harden is not None:
                    x = harden(model.eval(), Images(x, data.labels[index]))
                    model.train()
                F.cross_entropy(model(x), data.labels[index]).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    return model.eval().requires_grad_(False)


@lru_cache(maxsize=8)
def digits(seed: int, split: str) -> Images:
    """The 1,000 training or 797 test digits of one random split, at 16 x 16 pixels."""
    held = data.digits(split=split, size=16, seed=seed)
    return Images(held.images, held.labels)


@lru_cache(maxsize=8)
def trained(seed: int, *, norm: Norm = "batch", noise: float = 0.0) -> nn.Module:
    """The network of a seed, trained once in a process; clean accuracy is about 99 %."""
    return train(digits(seed, "train"), seed=seed, norm=norm, noise=noise)


def corrupt(x: Tensor, name: str, random: torch.Generator) -> Tensor:
    """Images of one corruption.

        noise      x + 0.3 n                      contrast   0.3 x + 0.35 + 0.06 n
        fog        0.6 x + 0.4 u                  shot       Poisson(6 (x + 0.1)) / 6
        invertmix  0.5 x + 0.3 + 0.12 n           blur       Gaussian, sigma 1.6
        dim        0.8 x + 0.15 + 0.35 n

    n is standard normal, u a smooth field: 4 x 4 uniform numbers, bilinear. Clipped to [0, 1].

    Example:
        >>> float(corrupt(torch.zeros(9, 1, 16, 16), "contrast", generator(0)).mean())
        0.35
    """
    if name not in _FORMULAS:
        raise unknown("corruption of the digits", name, _FORMULAS)
    return _FORMULAS[name](x, random).clamp(0, 1)


def stream(
    held: Images, name: str, *, seed: int, visit: int = 0, repeats: int = 1, size: int = 64
) -> list[Images]:
    """Full batches of corrupted images, each image `repeats` times with fresh noise, shuffled.

    Args:
        held: clean images.
        name: of the corruption.
        seed: of noise and order.
        visit: how often this corruption came before; other noise and order.
        repeats: how often each image is sent.
        size: of a batch; a last one that is not full is left out.
    """
    random = generator(seed, "digits-C", name, visit)
    order = torch.randperm(repeats * len(held.labels), generator=random) % len(held.labels)
    return batches(held[order], name, random=random, size=size)


def batches(ordered: Images, name: str, *, random: torch.Generator, size: int = 64) -> list[Images]:
    """Full batches of corrupted images in the order given."""
    count = len(ordered.labels) // size
    changed = Images(corrupt(ordered.images, name, random), ordered.labels)
    return [changed[i * size : (i + 1) * size] for i in range(count)]


def correlated(held: Images, name: str, *, seed: int, delta: float) -> list[Images]:
    """Each image twice, its labels in RoTTA's Dirichlet order."""
    random = generator(seed, "digits-C", "correlated", name)
    order = torch.randperm(2 * len(held.labels), generator=random) % len(held.labels)
    order = order[dirichlet_order(held.labels[order], delta=delta, generator=random)]
    return batches(held[order], name, random=random)


def hits(answer: Callable[[Tensor], Any], sent: list[Images]) -> Iterator[Tensor]:
    """Whether each answer of each batch is right, while the stream goes by."""
    for batch in sent:
        yield read_logits(answer(batch.images)).argmax(1) == batch.labels


def accuracy(answer: Callable[[Tensor], Any], sent: list[Images]) -> float:
    """Share of right answers over a stream, in percent."""
    return 100 * float(torch.cat(list(hits(answer, sent))).double().mean())


def gentle_view(x: Tensor, random: torch.Generator) -> Tensor:
    """A changed copy that is still the same digit, one draw for a batch.

    Brightness, contrast and gamma as CoTTA draws them, a roll by at most one pixel as in training,
    noise of deviation 0.005. CoTTA's own transform mirrors half of the copies and turns them by up
    to 15 degrees: that is made for photographs, and no digit survives it.
    """

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=random))

    x = (x * draw(0.6, 1.4)).clamp(0, 1)
    mean, contrast = x.mean((1, 2, 3), keepdim=True), draw(0.7, 1.3)
    x = (mean + contrast * (x - mean)).clamp(1e-8, 1).pow(draw(0.7, 1.3))
    shift = torch.randint(-1, 2, (2,), generator=random).tolist()
    return (x.roll(shift, (2, 3)) + 0.005 * _normal(x, random)).clamp(0, 1)


def scores(answer: Callable[[Tensor], Any], sent: list[Images]) -> dict[str, float]:
    """Accuracy in percent, NLL in nats and Brier score of the answers over a stream."""
    logits = torch.cat([read_logits(answer(batch.images)) for batch in sent])
    labels = torch.cat([batch.labels for batch in sent])
    return {
        "accuracy": 100 * float((logits.argmax(1) == labels).double().mean()),
        "NLL": float(negative_log_likelihood(logits, labels)),
        "Brier score": float(brier_score(logits.softmax(1), labels)),
    }


def _normal(x: Tensor, random: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=random)


def _field(x: Tensor, random: torch.Generator) -> Tensor:
    coarse = torch.rand(len(x), 1, 4, 4, generator=random)
    return F.interpolate(coarse, x.shape[-2:], mode="bilinear", align_corners=False)


def _blur(x: Tensor, random: torch.Generator) -> Tensor:
    taps = torch.arange(-4.0, 5.0).div(1.6).square().mul(-0.5).exp()
    taps = taps / taps.sum()
    x = F.conv2d(F.pad(x, (4, 4, 0, 0), mode="replicate"), taps.view(1, 1, 1, -1))
    return F.conv2d(F.pad(x, (0, 0, 4, 4), mode="replicate"), taps.view(1, 1, -1, 1))


_FORMULAS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "noise": lambda x, g: x + 0.3 * _normal(x, g),
    "contrast": lambda x, g: 0.3 * x + 0.35 + 0.06 * _normal(x, g),
    "fog": lambda x, g: 0.6 * x + 0.4 * _field(x, g),
    "shot": lambda x, g: torch.poisson(6 * (x + 0.1), generator=g) / 6,
    "invertmix": lambda x, g: 0.5 * x + 0.3 + 0.12 * _normal(x, g),
    "blur": _blur,
    "dim": lambda x, g: 0.8 * x + 0.15 + 0.35 * _normal(x, g),
    "clean": lambda x, g: x,
}
