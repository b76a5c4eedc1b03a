"""Methods that begin at the source with every batch, or image, and keep nothing."""

import copy
import math
import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as T

from textbook.parts import Step, View, entropy, replaced


def operation(x: Tensor) -> Tensor:
    """One of AugMix's operations, of a size drawn anew."""
    size = random.uniform(0.1, 1)
    signed = size * random.choice((-1, 1))
    turn, shear, shift = 0.0, [0.0, 0.0], [0, 0]
    match random.randrange(8):
        case 0:
            return T.autocontrast(x)
        case 1:
            return T.solarize(x, 1 - size / 10)
        case 2:
            return T.posterize(x, 4)
        case 3:
            turn = 3 * signed
        case 4:
            shear[0] = math.degrees(0.03 * signed)
        case 5:
            shear[1] = math.degrees(0.03 * signed)
        case 6:
            shift[0] = round(x.shape[-1] * signed / 30)
        case _:
            shift[1] = round(x.shape[-2] * signed / 30)
    bilinear = T.InterpolationMode.BILINEAR
    return T.affine(x, turn, shift, 1.0, shear, bilinear, fill=0.5)


def augmix(x: Tensor) -> Tensor:
    """A random crop, mirrored half of the times, mixed with three chains of operations on it."""
    x = v2.RandomHorizontalFlip()(v2.RandomResizedCrop(x.shape[-2:], antialias=True)(x))
    weights = torch.distributions.Dirichlet(torch.ones(3)).sample()
    mixture = torch.zeros_like(x)
    for weight in weights:
        chain = x
        for _ in range(random.randint(1, 3)):
            chain = operation(chain)
        mixture = mixture + weight * chain
    share = random.random()
    return share * x + (1 - share) * mixture


class MixedNorm(nn.Module):
    """Batch normalisation with (1 - a) source + a batch, as one factor and one summand a channel.

    So it keeps its input once, as does MEMO's code, where no gradient flows through the batch's
    share; here one does.
    """

    def __init__(self, layer: nn.Module, alpha: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps
        self.source, self.alpha = (layer.running_mean, layer.running_var), alpha

    def forward(self, x: Tensor) -> Tensor:
        now_var, now_mean = torch.var_mean(x, dim=[0, *range(2, x.dim())], unbiased=False)
        mean = (1 - self.alpha) * self.source[0] + self.alpha * now_mean
        var = (1 - self.alpha) * self.source[1] + self.alpha * now_var
        scale = self.weight / (var + self.eps).sqrt()
        shape = (1, -1, *[1] * (x.dim() - 2))
        return x * scale.view(shape) + (self.bias - mean * scale).view(shape)


def memo(
    model: nn.Module,
    *,
    lr: float = 2.5e-4,
    views: int = 64,
    prior: float = 16,
    augment: View = augmix,
) -> Step:
    model = copy.deepcopy(model).eval().requires_grad_(True)
    replaced(model, lambda layer: MixedNorm(layer, 1 / (prior + 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    kept = copy.deepcopy(model.state_dict())

    def answer(image: Tensor) -> Tensor:
        model.load_state_dict(kept)
        copies = torch.cat([augment(image) for _ in range(views)])
        log_p = model(copies).log_softmax(1).logsumexp(0) - math.log(views)
        (-(log_p.exp() * log_p).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            return model(image)

    def step(x: Tensor) -> Tensor:
        return torch.cat([answer(image) for image in x.split(1)])

    return step


class AdaMix(nn.Module):
    """Batch normalisation whose scale and shift take in, at its first batch, a mixture's."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps
        self.old_mean, self.old_var, self.folded = layer.running_mean, layer.running_var, False

    def fold(self, x: Tensor, mean: Tensor, var: Tensor) -> None:
        def apart(m: Tensor, v: Tensor, n: Tensor, w: Tensor) -> Tensor:
            return ((m - n) ** 2).mean(-1) + ((v.sqrt() - w.sqrt()) ** 2).mean(-1)

        own_var, own_mean = torch.var_mean(x.flatten(2), dim=2)
        shift = apart(mean, var, self.old_mean, self.old_var)
        others = apart(own_mean, own_var, self.old_mean, self.old_var)
        others = others + apart(own_mean, own_var, mean, var)
        old = (1 - shift / (shift + others)).clamp(0, 1).mean()
        mixed = old * self.old_var + (1 - old) * var
        self.weight *= ((var + self.eps) / (mixed + self.eps)).sqrt()
        self.bias += old * (mean - self.old_mean) / (var + self.eps).sqrt() * self.weight
        self.folded = True

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, dim=[0, *range(2, x.dim())])
        if not self.folded:
            with torch.no_grad():
                self.fold(x, mean, var)
        shape = (1, -1, *[1] * (x.dim() - 2))
        scale = self.weight / (var + self.eps).sqrt()
        return (x - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)


def domainadaptor(model: nn.Module, *, lr: float = 1e-3) -> Step:
    model = copy.deepcopy(model).eval().requires_grad_(False)
    replaced(model, AdaMix)
    layers = [module for module in model.modules() if isinstance(module, AdaMix)]
    learnt = [p.requires_grad_() for layer in layers for p in layer.parameters()]
    optimizer = torch.optim.SGD(learnt, lr=lr)
    kept = copy.deepcopy(model.state_dict())

    def step(x: Tensor) -> Tensor:
        model.load_state_dict(kept)
        for layer in layers:
            layer.folded = False
        z = model(x)
        centred = z - z.detach().mean(1, keepdim=True)
        temperature = 2 * z.detach().std(1, keepdim=True)
        (temperature[:, 0] ** 2 * entropy(centred / temperature)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            return model(x)

    return step


class OwnNorm(nn.Module):
    """Batch normalisation on source statistics, with a scale and a shift for each sample."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def begin(self, count: int) -> list[Tensor]:
        """The source's for all samples."""
        self.weight = self.layer.weight.repeat(count, 1).requires_grad_()
        self.bias = self.layer.bias.repeat(count, 1).requires_grad_()
        return [self.weight, self.bias]

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.layer.running_mean, self.layer.running_var, eps=self.layer.eps)
        shape = (*x.shape[:2], *[1] * (x.dim() - 2))
        return x * self.weight.view(shape) + self.bias.view(shape)


def adamod(learnt: list[Tensor], lr: float) -> Callable[[], None]:
    """Steps of AdaMod with the betas of DENT's code."""
    first, second, bound = ([torch.zeros_like(p) for p in learnt] for _ in range(3))
    number = 0

    @torch.no_grad()
    def step() -> None:
        nonlocal number
        number += 1
        scale = lr * (1 - 0.999**number) ** 0.5 / (1 - 0.99**number)
        for p, m, v, s in zip(learnt, first, second, bound, strict=True):
            m.mul_(0.99).add_(p.grad, alpha=1 - 0.99)
            v.mul_(0.999).addcmul_(p.grad, p.grad, value=1 - 0.999)
            rate = scale / (v.sqrt() + 1e-8)
            s.mul_(0.6).add_(rate, alpha=1 - 0.6)
            p.sub_(torch.minimum(rate, s) * m)
            p.grad = None

    return step


def dent(model: nn.Module, *, lr: float = 6e-3, steps: int = 6) -> Step:
    model = copy.deepcopy(model).eval().requires_grad_(False)
    replaced(model, OwnNorm)
    layers = [module for module in model.modules() if isinstance(module, OwnNorm)]

    def step(x: Tensor) -> Tensor:
        update = adamod([own for layer in layers for own in layer.begin(len(x))], lr)
        for _ in range(steps):
            z = model(x)
            mean = z.softmax(1).mean(0)
            (entropy(z).mean() + (mean * mean.log()).sum()).backward()
            update()
        with torch.no_grad():
            return model(x)

    return step
