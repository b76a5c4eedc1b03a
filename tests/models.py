"""Small networks that tests adapt."""

import copy
from functools import cache, partial

import torch
from torch import Tensor, nn


def norm_layer(kind: str, channels: int) -> nn.Module:
    return {
        "batch": lambda: nn.BatchNorm2d(channels),
        "sync": lambda: nn.SyncBatchNorm(channels),
        "group": lambda: nn.GroupNorm(2, channels),
        "instance": lambda: nn.InstanceNorm2d(channels, affine=True, track_running_stats=True),
        "layer": lambda: ChannelsLayerNorm(channels),
        "frozen": lambda: FrozenNorm(channels),
        "rms": lambda: ChannelsRMSNorm(channels),
    }[kind]()


class ChannelsLayerNorm(nn.LayerNorm):
    """Layer normalisation over the channels of images, as third parties subclass it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ChannelsRMSNorm(nn.Module):
    """A normalisation layer of nobody's: known by its structure alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean(1, keepdim=True) + self.variance_epsilon)
        return x * scale * self.weight.view(1, -1, 1, 1)


class FrozenNorm(nn.Module):
    """Batch normalisation whose scale and shift are buffers, as detection libraries freeze it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-5
        for name, value in (
            ("weight", 1.0),
            ("bias", 0.0),
            ("running_mean", 0.0),
            ("running_var", 1.0),
        ):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


class TinyNet(nn.Module):
    """Two convolutions with normalisation, dropout that must stay off, and a linear head."""

    def __init__(self, kind: str = "batch", classes: int = 5, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 3, padding=1, bias=False)
        self.norm1 = norm_layer(kind, 6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.norm2 = norm_layer(kind, 8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.head(self.drop(x.mean((2, 3))))


def tiny(
    kind: str = "batch", *, classes: int = 5, channels: int = 3, sharp: float = 6.0
) -> TinyNet:
    """A tiny network in eval mode, with statistics that fit its inputs and confident answers."""
    return copy.deepcopy(made(kind, classes, channels, sharp))


@cache
def made(kind: str, classes: int, channels: int, sharp: float) -> TinyNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TinyNet(kind, classes, channels)
        model.drop.eval()
        with torch.no_grad():
            for _ in range(20):
                model(torch.rand(64, channels, 8, 8))
            model.head.weight.mul_(sharp)
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.uniform_(-0.5, 0.5)
    return model.eval()


class TinyBlock(nn.Module):
    """Attention and two layers, each behind a normalisation, registered in another order."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.after, self.before = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.after(x))


class TinyViT(nn.Module):
    """A vision transformer of three blocks on four patches, with a class token."""

    def __init__(self, classes: int = 5, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.places = nn.Parameter(0.1 * torch.randn(1, 5, width))
        self.blocks = nn.ModuleList(TinyBlock(width) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def tiny_vit(width: int = 8) -> TinyViT:
    """A tiny transformer in eval mode, with confident answers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TinyViT(width=width)
        with torch.no_grad():
            model.head.weight.mul_(3)
            model.patches.weight.mul_(3)
    return model.eval()


def batches(count: int = 10, size: int = 16, *, channels: int = 3, seed: int = 1) -> list[Tensor]:
    """Batches of blobs in [0, 1], some bright, some dark, so that answers differ."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, size, channels, 8, 8, generator=generator)
    level = torch.rand(count, size, channels, 1, 1, generator=generator)
    return list((0.5 * x + 0.5 * level).unbind(0))


class Experts(nn.Module):
    """Three experts: a network that answers, one that is less sure, and one that disagrees."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.training = body, body.training

    def forward(self, x: Tensor) -> object:
        logits = self.body(x)
        if not isinstance(logits, Tensor):
            return logits
        return logits, 0.5 * logits, logits.roll(1, -1)


class Headed(nn.Module):
    """A network under a linear layer of its own, which says what the network says."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(5, 5)
        nn.init.eye_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        return self.head(self.body(x))


class Deep(nn.Module):
    """Eight equal blocks, registered backwards; by counting each is an eighth of the work."""

    def __init__(self, norm: type[nn.Module] | partial = nn.BatchNorm2d) -> None:
        super().__init__()
        for i in reversed(range(8)):
            setattr(self, f"conv{i}", nn.Conv2d(3, 3, 3, padding=1, bias=False))
            setattr(self, f"norm{i}", norm(3))

    def forward(self, x):
        for i in range(8):
            x = getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(x)).relu()
        return 9 * x.mean((2, 3))


def deep() -> Deep:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Deep().eval()
