"""What textbook forms share: losses, copies that adapt, features, layers, changed views."""

import copy
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as T

Step = Callable[[Tensor], Tensor]
View = Callable[[Tensor], Tensor]
Loader = Sequence[tuple[Tensor, Tensor]]
"""Batches of source data: inputs and labels."""
BATCH_NORMS = nn.modules.batchnorm._BatchNorm
NORMS = (BATCH_NORMS, nn.GroupNorm, nn.LayerNorm)
TOP = ("layer4", "blocks.9", "blocks.10", "blocks.11")
"""Of a ResNet and a ViT of twelve blocks, with the final `norm`: what SAR and DeYO leave alone."""


def entropy(z: Tensor) -> Tensor:
    return -(z.softmax(1) * z.log_softmax(1)).sum(1)


def cross_entropy(z: Tensor, teacher: Tensor) -> Tensor:
    return -(teacher.softmax(1) * z.log_softmax(1)).sum(1)


def symmetric(a: Tensor, b: Tensor) -> Tensor:
    return 0.5 * cross_entropy(a, b) + 0.5 * cross_entropy(b, a)


def configured(
    model: nn.Module, *, everything: bool = False, top: bool = True
) -> tuple[nn.Module, list[Tensor]]:
    """A copy of the model on batch statistics, and the parameters that learn."""
    model = copy.deepcopy(model).eval().requires_grad_(everything)
    learnt: list[Tensor] = []
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS):
            module.train()
            module.track_running_stats = False
            module.running_mean = module.running_var = None
        high = name.split(".")[-1] == "norm" or any(f"{part}." in f"{name}." for part in TOP)
        if isinstance(module, NORMS) and (top or not high):
            learnt += [p.requires_grad_() for p in module.parameters()]
    return model, list(model.parameters()) if everything else learnt


def taught(model: nn.Module, lr: float) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """A student that learns in all its weights, its teacher, and Adam."""
    model, learnt = configured(model, everything=True)
    return model, copy.deepcopy(model).requires_grad_(False), torch.optim.Adam(learnt, lr=lr)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    for a, b in zip(teacher.parameters(), student.parameters(), strict=True):
        a.copy_(momentum * a + (1 - momentum) * b)


@torch.no_grad()
def climb(learnt: list[Tensor], rho: float = 0.05) -> list[Tensor]:
    """Moves parameters to where the loss is highest nearby, as SAM does; gives what they were."""
    old = [p.detach().clone() for p in learnt]
    norm = torch.stack([p.grad.norm() for p in learnt if p.grad is not None]).norm()
    for p in learnt:
        if p.grad is not None:
            p.add_(rho * p.grad / (norm + 1e-12))
            p.grad = None
    return old


@torch.no_grad()
def put_back(learnt: list[Tensor], old: list[Tensor]) -> None:
    for p, was in zip(learnt, old, strict=True):
        p.copy_(was)


def watched(model: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Runs a model, of which there is no copy to be made any more; gives features and logits.

    Features are what goes into its last linear layer.
    """
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    seen: list[Tensor] = []
    head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        z = model(x)
        return seen.pop(), z

    return run


@torch.no_grad()
def gathered(model: nn.Module, source: Loader) -> tuple[Tensor, Tensor, int]:
    """Features and labels of source data, and how many classes there are."""
    run = watched(model)
    seen = [run(x) for x, _ in source]
    return torch.cat([g for g, _ in seen]), torch.cat([y for _, y in source]), seen[0][1].shape[1]


def information(model: nn.Module, learnt: list[Tensor], source: Loader) -> list[Tensor]:
    """Fisher information of source data, as EATA: of the model's own predictions, by batches."""
    total = [torch.zeros_like(p) for p in learnt]
    for x, _ in source:
        z = model(x)
        F.cross_entropy(z, z.argmax(1)).backward()
        total = [t + p.grad**2 / len(source) for t, p in zip(total, learnt, strict=True)]
        for p in learnt:
            p.grad = None
    return total


class BlendedNorm(nn.Module):
    """RoTTA's batch normalisation, as its code: it trains on (1 - a) old + a batch, the next old."""

    def __init__(self, layer: nn.Module, alpha: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps
        self.alpha = alpha
        self.register_buffer("mean", layer.running_mean.clone())
        self.register_buffer("var", layer.running_var.clone())

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.mean, self.var
        if self.training:
            sides = [0, *range(2, x.dim())]
            now_var, now_mean = torch.var_mean(x, dim=sides, unbiased=False)
            mean = (1 - self.alpha) * mean + self.alpha * now_mean
            var = (1 - self.alpha) * var + self.alpha * now_var
            self.mean, self.var = mean.detach().clone(), var.detach().clone()
        shape = (1, -1, *[1] * (x.dim() - 2))
        x = (x - mean.view(shape)) / (var.view(shape) + self.eps).sqrt()
        return x * self.weight.view(shape) + self.bias.view(shape)


def replaced(module: nn.Module, make: Callable[[nn.Module], nn.Module]) -> None:
    """Puts another layer in the place of each batch normalisation."""
    for name, child in module.named_children():
        if isinstance(child, BATCH_NORMS):
            setattr(module, name, make(child))
        else:
            replaced(child, make)


def view(x: Tensor, *, padding: str = "replicate", rough: bool = True) -> Tensor:
    """The transform of CoTTA's code, with torchvision's operations in its order, on square images."""
    for change in torch.randperm(5).tolist():
        if change == 0:
            x = T.adjust_brightness(x, random.uniform(0.6, 1.4))
        elif change == 1:
            x = T.adjust_contrast(x, random.uniform(0.7, 1.3))
        elif change == 2:
            x = T.adjust_saturation(x, random.uniform(0.5, 1.5))
        elif change == 3:
            x = T.adjust_hue(x, random.uniform(-0.06, 0.06))
        else:
            x = x.clamp(1e-8, 1).pow(random.uniform(0.7, 1.3))
    size = x.shape[-1]
    x = F.pad(x, [size // 2] * 4, mode=padding)
    far = x.shape[-1] / 16
    x = T.affine(
        x,
        angle=random.uniform(-15, 15),
        translate=[round(random.uniform(-far, far)), round(random.uniform(-far, far))],
        scale=random.uniform(0.9, 1.1),
        shear=[0.0, 0.0],
        interpolation=T.InterpolationMode.BILINEAR,
    )
    if rough:
        x = T.gaussian_blur(x, [5, 5], [random.uniform(0.001, 0.5)] * 2)
    x = T.center_crop(x, [size, size])
    if random.random() < 0.5:
        x = T.horizontal_flip(x)
    return (x + 0.005 * torch.randn_like(x) if rough else x).clamp(0, 1)
