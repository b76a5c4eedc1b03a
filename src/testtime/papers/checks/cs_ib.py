"""The Cauchy-Schwarz bottleneck's claim: regression that outliers and attacks harm less."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from testtime._core.errors import MissingExtra
from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.measures.cauchy_schwarz import bottleneck_loss
from testtime.measures.information.networks import adam, mlp, training
from testtime.measures.information.variational import batches
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Diabetes data, 15 % of the training targets shifted by N(6, 2): the test error (RMSE) of the "
    "Cauchy-Schwarz loss, with and without the bottleneck of beta 0.01, is below 0.85 times that of "
    "the squared loss, on clean inputs and under FGSM of 0.3."
)
EPOCHS, BATCH, RADIUS = 60, 100, 0.3
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "squared": lambda x, y, z, told: (y - told).square().mean(),
    "divergence": lambda x, y, z, told: bottleneck_loss(x, y, z, told, beta=0),
    "bottleneck": lambda x, y, z, told: bottleneck_loss(x, y, z, told, beta=0.01),
}


@register("check", paper="cs-ib", name="cs-ib")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Tabular regression with wrong targets."""
    return reproduce(
        "cs-ib", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def diabetes(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training inputs and targets, 15 % of them shifted; test inputs and targets. Standardised."""
    try:
        from sklearn.datasets import load_diabetes  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("scikit-learn", "digits") from error
    random = generator(seed, "cs-ib", "data")
    x, y = (torch.from_numpy(part).float() for part in load_diabetes(return_X_y=True))
    order = torch.randperm(len(x), generator=random)
    x, y = x[order], y[order, None]
    train = int(0.8 * len(x))
    x, y = ((v - v[:train].mean(0)) / v[:train].std(0) for v in (x, y))
    wrong = torch.randperm(train, generator=random)[: int(0.15 * train)]
    known = y[:train].clone()
    known[wrong] += 6 + 2 * torch.randn(len(wrong), 1, generator=random)
    return x[:train], known, x[train:], y[train:]


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Root mean squared errors on test data."""
    x, y, test_x, test_y = diabetes(seed)
    for name, loss in LOSSES.items():
        random = generator(seed, "cs-ib", "training")
        encoder, decoder = mlp([x.shape[1], 64, 16], random), mlp([16, 1], random)
        both = nn.Sequential(encoder, decoder)
        with training():
            descend = adam(both, lr=2e-3)
            for index in batches(len(x), BATCH, EPOCHS * (len(x) // BATCH), random):
                z = encoder(x[index])
                descend(loss(x[index], y[index], z, decoder(z)))
            attacked = test_x.clone().requires_grad_()
            error = (both(attacked) - test_y).square().mean()
            (gradient,) = torch.autograd.grad(error, attacked)
        for what, inputs in (("clean", test_x), ("attacked", test_x + RADIUS * gradient.sign())):
            with torch.no_grad():
                yield f"{name}, {what}", float((both(inputs) - test_y).square().mean().sqrt())


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return all(
        found[f"{name}, {what}"] < 0.85 * found[f"squared, {what}"]
        for name in ("divergence", "bottleneck")
        for what in ("clean", "attacked")
    )
