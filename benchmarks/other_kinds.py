"""Small networks that differ from those a guard is mostly tried on, what they learn, and what they are sent."""

import ast
import importlib.util
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset, TensorDataset

from guard_streams import DOMAINS
from many_classes import garments
from testtime._core.seeds import generator
from testtime.streams.data import ImageSet
from testtime.streams.scenarios import Scenario

LENGTH, WORDS = 16, 4096
"""Words of a text, and numbers that words can have; 0 is none."""
EACH = 800
"""Passages of a package, to learn from and to be sent."""
PACKAGES = ("networkx", "numpy", "plotly", "scipy", "sklearn", "sympy", "timm", "torch")
EASY = (1, 3, 5, 7, 8)
"""Garments that are hardly taken for one another: trousers, dresses, sandals, sneakers and bags."""


WEATHER = {
    "impulse_noise": "replaced", "zoom_blur": "missing", "frost": "cut", "brightness": "moved",
    "glass_blur": "both", "contrast": "moved", "clean": "clean",
}  # fmt: skip
"""What images suffer -> what words suffer in its place."""
ALL = tuple(DOMAINS.removeprefix("domains=").split("+"))
STREAMS: dict[str, tuple[tuple[str, ...], str]] = {
    "clean": (("clean",), "stationary,samples=1000"),
    "noise": (("impulse_noise",), "stationary,samples=1000"),
    "contrast": (("contrast",), "stationary,samples=1000"),
    "continual": (ALL, "continual,samples=400"),
    "continual, 3": (ALL, "continual,samples=400,severity=3"),
    "continual, 16": (ALL, "continual,samples=250,batch_size=16"),
    "recurring": (("zoom_blur", "frost", "clean"), "recurring,samples=250"),
    "dirichlet": (ALL, "dirichlet,samples=400"),
    "sorted": (ALL, "sorted,samples=400"),
    "long-tailed": (ALL, "long-tailed,samples=500"),
    "single": (ALL, "single,samples=50"),
    "garbage": (ALL, "continual,samples=100,unknown=noise,unknown_share=0.9"),
    "two classes": (ALL, "continual,samples=250"),
    "one class": (ALL, "continual,samples=150"),
}
FEW = {"two classes": 2, "one class": 1}


class Convolutions(nn.Module):
    """A small residual network with batch normalisation, on patches of four pixels."""

    def __init__(self, classes: int, width: int = 48) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 4, 4, bias=False), nn.BatchNorm2d(width))
        self.first, self.second = (
            nn.Sequential(
                nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
            )
            for _ in range(2)
        )
        self.head = nn.Linear(width * 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem((x - 0.2860) / 0.3530)
        x = x + self.first(x)
        x = torch.relu(x + self.second(x))
        return self.head(F.adaptive_max_pool2d(x, 2).flatten(1))


class Block(nn.Module):
    """Attention and two layers, each behind a layer normalisation and beside a shortcut."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.layers = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        parts = self.mix(self.norm1(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(n, length, width)
        x = x + self.out(mixed)
        return x + self.layers(self.norm2(x))


class Transformer(nn.Module):
    """A transformer that reads patches of seven pixels, or words by number."""

    def __init__(
        self, classes: int, *, text: bool = False, width: int = 48, depth: int = 2
    ) -> None:
        super().__init__()
        self.text = text
        length = LENGTH if text else 16
        self.embed = nn.Embedding(WORDS, width) if text else nn.Conv2d(1, width, 7, 7)
        self.place = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        if self.text:
            x = self.embed(x.long())
        else:
            x = self.embed((x - 0.2860) / 0.3530).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x + self.place)).mean(1))


class Times(nn.Module):
    """A network whose logits are so many times as large."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.model(x)


@dataclass(frozen=True)
class Network:
    """How a network is made.

    Args:
        text: what it is, for the page.
        make: the module, for a number of classes.
        data: what it learns and is sent.
        learnt: how many samples it learns; None for all.
        steps: of training, of 64 samples each.
        smooth: label smoothing.
        decay: of weights.
        like: the network of that name, if it is the same but for the size of its logits.
        factor: by which its logits are multiplied afterwards.
    """

    text: str
    make: Callable[[int], nn.Module] = Convolutions
    data: str = "garments"
    learnt: int | None = None
    steps: int = 1500
    smooth: float = 0.0
    decay: float = 1e-2
    like: str = ""
    factor: float = 1.0


def reader(classes: int) -> nn.Module:
    """A transformer for words."""
    return Transformer(classes, text=True)


NETWORKS = {
    "conv": Network("convolutions with batch normalisation"),
    "conv x 3": Network("`conv`, its logits times three", like="conv", factor=3.0),
    "conv / 3": Network("`conv`, its logits divided by three", like="conv", factor=1 / 3),
    "overfit": Network("learnt from 2,000 images for 48 epochs", learnt=2000, decay=0.0),
    "smoothed": Network("learnt with a label smoothing of 0.3", smooth=0.3),
    "easy": Network("of five garments", data="easy", steps=700),
    "hard": Network("learnt from 30 images", learnt=30, steps=60),
    "vision": Network("a vision transformer", Transformer, steps=2500),
    "vision x 3": Network("`vision`, its logits times three", like="vision", factor=3.0),
    "vision / 3": Network("`vision`, its logits divided by three", like="vision", factor=1 / 3),
    "text": Network("a transformer that reads words", reader, data="words", steps=500),
}


def passages(path: Path) -> list[list[float]]:
    """Words by number of the documentation of what a file defines, up to five passages of each."""
    try:
        tree = ast.parse(path.read_text(errors="ignore"))
    except SyntaxError:  # a template
        return []
    found = list[list[float]]()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            words = (ast.get_docstring(node) or "").lower().split()
            numbers = [1.0 + zlib.crc32(word.encode()) % (WORDS - 1) for word in words]
            starts = range(0, min(len(numbers) - LENGTH + 1, 5 * LENGTH), LENGTH)
            found += [numbers[first : first + LENGTH] for first in starts]
    return found


@cache
def texts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Passages (n, length) and their package: of every other file, and of the others."""
    random = generator(0, "other", "texts")
    halves: tuple[list[tuple[list[float], int]], ...] = ([], [])
    for kind, package in enumerate(PACKAGES):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        files = sorted(Path(spec.origin).parent.rglob("*.py"))
        order = torch.randperm(len(files), generator=random).tolist()
        for half, found in enumerate(halves):
            each = list[list[float]]()
            for place in order[half::2]:
                if len(each) < EACH:
                    each += passages(files[place])
            found.extend((passage, kind) for passage in each[:EACH])
    (x, y), (others, kinds) = (zip(*found, strict=True) for found in halves)
    return torch.tensor(x), torch.tensor(y), torch.tensor(others), torch.tensor(kinds)


def misread(x: Tensor, how: str, random: torch.Generator) -> Tensor:
    """Words (n, length) by number, as a poor reader might give them."""
    drawn = torch.rand(x.shape, generator=random)
    if how in ("missing", "both"):
        x = torch.where(drawn < 0.4, 0.0, x)
    if how in ("replaced", "both"):
        other = torch.randint(1, WORDS, x.shape, generator=random).float()
        x = torch.where(drawn > 0.6, other, x)
    if how == "cut":
        return torch.where(torch.arange(LENGTH) < 6, x, 0.0)
    return x.roll(LENGTH // 2, 1) if how == "moved" else x


def learnable(data: str) -> tuple[Tensor, Tensor]:
    """Inputs and labels to learn from."""
    if data == "words":
        return texts()[:2]
    images, labels = garments("train")
    if data == "easy":
        images, labels = only(images, labels)
    return images.float() / 255, labels


def only(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The easy garments, numbered anew."""
    chosen = torch.isin(labels, torch.tensor(EASY))
    return images[chosen], torch.searchsorted(torch.tensor(EASY), labels[chosen])


@cache
def trained(name: str) -> nn.Module:
    """A network that has learnt."""
    how = NETWORKS[name]
    if how.like:
        return Times(trained(how.like), how.factor).eval()
    torch.manual_seed(0)
    x, y = learnable(how.data)
    x, y = x[: how.learnt], y[: how.learnt]
    model = how.make(int(y.max()) + 1)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=how.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, how.steps)
    for _ in range(how.steps):
        places = torch.randint(len(y), (64,))
        loss = F.cross_entropy(model(x[places]), y[places], label_smoothing=how.smooth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@cache
def sent(data: str, stream: str) -> list[tuple[Tensor, Tensor]]:
    """Inputs and labels of each batch."""
    domains, order = STREAMS[stream]
    if data == "words":
        *_, x, y = texts()
    else:
        images, y = garments("test")
        images, y = images[:3000], y[:3000]
        x, y = only(images, y) if data == "easy" else (images, y)
    places = torch.arange(len(y))
    if stream in FEW:
        kinds = torch.randperm(int(y.max()) + 1, generator=generator(0, "other", stream))
        places = torch.isin(y, kinds[: FEW[stream]]).nonzero()[:, 0]
    if data != "words":
        scenario = Scenario.parse(f"{order},domains={'+'.join(domains)}")
        held = Subset(ImageSet(x, y), places.tolist())
        return [(batch.inputs, batch.labels) for batch in scenario.stream(held, seed=3)]
    random, batches = generator(0, "other", stream), list[tuple[Tensor, Tensor]]()
    named = TensorDataset(torch.zeros(len(places), 1, 1, 1), y[places])
    for _ in range(3 if order.startswith("recurring") else 1):
        for number, how in enumerate(domains):
            scenario = Scenario.parse(f"{order.replace('recurring', 'continual')},domains=clean")
            drawn = [each.position for each in scenario.stream(named, seed=number).order()]
            for part in places[torch.tensor(drawn)].split(scenario.batch_size):
                batches.append((misread(x[part], WEATHER[how], random), y[part]))
    return batches
