"""Mean-field Gaussians over a model's weights: their divergence, draws from them, their training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from testtime._core.arrays import at_least_single
from testtime._core.errors import ScopeError
from testtime.adaptation.outputs import read_logits, rows
from testtime.adaptation.parts.optimizer import Adam

if TYPE_CHECKING:
    from testtime.adaptation.engine import Engine
    from testtime.adaptation.fitting import SourceBatch

RHO = -4.0
"""Where every rho begins: a deviation of 0.018."""
PRIOR_RHO = 0.1
"""Of the zero-mean prior of the warm-up: a deviation of 0.744."""

Tensors = dict[str, Tensor]


class Gaussians(NamedTuple):
    """Mean-field Gaussians over a model's weights: means, and rho where a tensor has one."""

    means: Tensors
    rhos: Tensors


def kl_gaussians(ours: Gaussians, prior: Gaussians) -> Tensor:
    """KL(q || p), summed over all Gaussians, in nats.

        ln(s_p / s_q) - 1/2 + ( s_q^2 + (mu_q - mu_p)^2 ) / ( 2 s_p^2 ),    s = softplus(rho)

    Example:
        >>> ours = Gaussians({"w": torch.zeros(2)}, {"w": torch.zeros(2)})
        >>> kl_gaussians(ours, ours)
        tensor(0.)
    """
    terms: list[Tensor] = []
    for name, rho in ours.rhos.items():
        own, other = F.softplus(rho), F.softplus(prior.rhos[name])
        ratio, shift = own / other, (ours.means[name] - prior.means[name]) / other
        terms.append((0.5 * (ratio.square() + shift.square() - 1) - ratio.log()).sum())
    return torch.stack(terms).sum()


def draw(ours: Gaussians, generator: torch.Generator) -> Tensors:
    """The means with a sample of every Gaussian in its place; gradients flow to mu and rho."""
    drawn = dict(ours.means)
    for name, rho in ours.rhos.items():
        mean = ours.means[name]
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        drawn[name] = mean + noise * F.softplus(rho)
    return drawn


def gaussian_names(engine: "Engine") -> list[str]:
    """Names of what adapts in convolutions and linear layers.

    Raises:
        ScopeError: when nothing does.
    """
    model, canonical = engine.loan.model, engine.loan.canonical
    held = {
        canonical.get(name, name)
        for prefix, module in model.named_modules()
        if isinstance(module, _ConvNd | nn.Linear)
        for name in (f"{prefix}.{key}".lstrip(".") for key in module._parameters)
    }
    names = [name for name in engine.names if name in held]
    if not names:
        raise ScopeError(
            "vcotta makes Gaussians of the weights of convolutions and linear layers, but "
            f"{type(model).__name__} has none of torch's. Take cotta or tent."
        )
    return names


def pretrained(engine: "Engine") -> Gaussians:
    """Gaussians around the model's own weights, every rho at -4."""
    means = engine.source_tensors(engine.names)
    rhos = {name: torch.full_like(means[name], RHO) for name in gaussian_names(engine)}
    return Gaussians(means, rhos)


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """Variational training on source data: CE of drawn weights + weight * KL(q || prior).

    Starts at Gaussians around the pretrained weights. The prior is that of the code's layers,
    N(0, softplus(0.1)^2); rate, weight and number of passes are not published.

    Args:
        passes: over the labelled source data.
        lr: step size of Adam.
        weight: of the divergence.
    """

    passes: int
    lr: float = 1e-3
    weight: float = 1 / 500_000
    name: ClassVar[str] = "posterior"

    def add(self, total: dict[str, Any], batch: "SourceBatch") -> dict[str, Any]:
        """One step on a batch."""
        engine, optimizer = batch.engine, Adam(lr=self.lr)
        if not total:
            total = flat(pretrained(engine))
            total["optimizer"] = optimizer.init(list(total.values()))
        state = total.pop("optimizer")
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in total.items()}
        with torch.enable_grad():
            ours = unflat(leaves)
            prior = Gaussians(
                {name: torch.zeros_like(rho) for name, rho in ours.rhos.items()},
                {name: torch.full_like(rho, PRIOR_RHO) for name, rho in ours.rhos.items()},
            )
            drawn = draw(ours, engine.generator)
            output, _ = engine.run(batch.inputs, drawn)
            loss = F.cross_entropy(at_least_single(rows(read_logits(output))), batch.labels)
            loss = loss + self.weight * kl_gaussians(ours, prior)
        grads = engine.gradient(loss, leaves, samples=len(batch.inputs))
        moved, state = optimizer.step(state, list(total.values()), grads)
        return {**dict(zip(total, moved, strict=True)), "optimizer": state}

    def finish(self, total: dict[str, Any], *, samples: int, batches: int) -> Tensors:
        """The means and rhos where training ended."""
        return {name: value for name, value in total.items() if name != "optimizer"}


def flat(posterior: Gaussians) -> dict[str, Any]:
    """All tensors in one dictionary: mean/NAME and rho/NAME."""
    joined: dict[str, Any] = {f"mean/{name}": mean for name, mean in posterior.means.items()}
    return joined | {f"rho/{name}": rho for name, rho in posterior.rhos.items()}


def unflat(joined: Mapping[str, Tensor]) -> Gaussians:
    """The Gaussians that `flat` joined."""
    kinds = [
        {name.partition("/")[2]: t for name, t in joined.items() if name.startswith(kind)}
        for kind in ("mean/", "rho/")
    ]
    return Gaussians(*kinds)
