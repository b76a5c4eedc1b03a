"""Calibration that knows of correctness (Liu et al., 2024): a temperature for each sample.

    given: a frozen classifier, logits z of held-out samples, z^v of V transformed copies of each
    features ← softmax(z^v) at the 4 largest classes of z, for each v                 # V · 4 numbers
    T ← 0.1 + softplus( g(features) ),    g: Linear(4 V, 5), ReLU, Linear(5, 1)
    minimise mean ( max_c softmax(z / T)_c - 1[argmax z = y] )²
    answer softmax(z / T)                                                  # no answer changes

Cross-entropy lowers T for a wrong sample whose label is a close second, and so makes it surer; this
loss raises T for every wrong sample. It helps where transformed copies tell wrong samples from right
ones; where they do not, one temperature for all does as well.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from testtime._core.arrays import at_least_single, check_tensors
from testtime._core.errors import InputError
from testtime._core.options import in_range, whole
from testtime._core.seeds import derive, generator, global_chance
from testtime.adaptation.outputs import read_logits
from testtime.guard.borrow import borrowed
from testtime.guard.misclassification import check_classified
from testtime.measures.information.networks import adam, single, training

Loss = Callable[[Tensor, Tensor], Tensor]
"""Calibrated logits (n, classes), labels (n,) -> a number."""


def correctness_loss(
    logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]
) -> Float[Tensor, ""]:
    """Mean squared distance of the confidence from 1 where the answer is right, from 0 where wrong.

        CA = mean_i ( max_c p_ic - 1[argmax z_i = y_i] )²

    Raises:
        InputError: no samples, NaN, or labels that do not fit.

    Example:
        >>> logits = torch.tensor([[2.0, 1.9, 0.0, 0.0, 0.0, -1.0]])   # narrowly wrong
        >>> t = torch.ones((), requires_grad=True)
        >>> torch.autograd.grad(correctness_loss(logits / t, torch.tensor([1])), t)[0]
        tensor(-0.1598)
    """
    check_classified(logits, labels)
    logits = at_least_single(logits)
    right = (logits.argmax(1) == labels).to(logits.dtype)
    return (logits.softmax(1).amax(1) - right).square().mean()


def balanced_correctness_loss(
    logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]
) -> Float[Tensor, ""]:
    """`correctness_loss` as the authors' code weighs it: right samples by 1 - acc, wrong ones by acc.

    The weights are not in the paper's formula.

    Raises:
        InputError: as `correctness_loss`.

    Example:
        >>> float(balanced_correctness_loss(torch.zeros(2, 2), torch.tensor([0, 1])))
        0.125
    """
    check_classified(logits, labels)
    logits = at_least_single(logits)
    right = (logits.argmax(1) == labels).to(logits.dtype)
    accuracy = right.mean()
    weight = right * (1 - accuracy) + (1 - right) * accuracy
    return (weight * (logits.softmax(1).amax(1) - right).square()).mean()


def view_logits(
    model: nn.Module,
    x: Tensor,
    transforms: Sequence[Callable[[Tensor], Tensor]],
    *,
    seed: int = 0,
) -> Float[Tensor, "views n classes"]:
    """Logits of transformed copies of a batch; model and random state stay as they were.

    Args:
        model: maps a batch to logits.
        x: a batch.
        transforms: batch to batch, e.g. rotation, greyscale and colour jitter of torchvision (paper).
        seed: of the random state that the transforms see.

    Raises:
        InputError: no transforms.

    Example:
        >>> view_logits(nn.Linear(4, 3), torch.rand(5, 4), [torch.neg, torch.square]).shape
        torch.Size([2, 5, 3])
    """
    if not transforms:
        raise InputError("no transforms were given; expected at least one.")
    with borrowed(model, seed=derive(seed, "views")):
        return torch.stack([read_logits(model(each(x))).detach() for each in transforms])


def consistency_features(
    logits: Float[Tensor, "n classes"], views: Float[Tensor, "views n classes"], *, top: int = 4
) -> Float[Tensor, "n features"]:
    """What transformed copies say of the largest classes of the original: (n, views · top).

    With fewer classes than `top` all are read.

    Raises:
        InputError: the views are not of the same samples and classes, or hold NaN or infinity, or
            the logits NaN.
        OptionError: top is below 1.

    Example:
        >>> logits = torch.tensor([[1.0, 3.0, 2.0]])
        >>> consistency_features(logits, torch.zeros(2, 1, 3), top=2)
        tensor([[0.3333, 0.3333, 0.3333, 0.3333]])
    """
    whole(1, top=top)
    check_tensors(logits=logits, views=views)
    if views.dim() != 3 or views.shape[1:] != logits.shape or len(views) == 0:
        raise InputError(
            f"views have the shape {tuple(views.shape)}; expected (views, {', '.join(map(str, logits.shape))})."
        )
    if not views.is_floating_point() or logits.is_complex() or logits.dtype == torch.bool:
        raise InputError(
            f"views are {views.dtype} and logits {logits.dtype}; expected floating point numbers."
        )
    if not bool(views.isfinite().all()) or bool(logits.isnan().any()):
        raise InputError(
            "views hold NaN or infinite values, or logits NaN; leave these samples out."
        )
    largest = logits.topk(min(top, logits.shape[1]), dim=1).indices
    read = views.softmax(-1).gather(2, largest.expand(len(views), -1, -1))
    return read.transpose(0, 1).flatten(1)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class CorrectnessCalibrator:
    """A temperature for each sample, from how a classifier treats transformed copies of it.

    Attributes:
        network: maps features (n, views · top) to (n, 1).
        top: classes that are read of each copy.

    Example:
        >>> chance = torch.Generator().manual_seed(0)
        >>> views = torch.randn(3, 200, 10, generator=chance)
        >>> logits, labels = views.mean(0), torch.arange(200) % 10
        >>> calibrator = CorrectnessCalibrator.fit(logits, views, labels, lr=1e-2)
        >>> calibrated = calibrator.calibrate(logits, views)
        >>> torch.equal(calibrated.argmax(1), logits.argmax(1))
        True

    Reference: Liu, Wang, Zou, Zou, Zheng, Optimizing Calibration by Gaining Aware of Prediction
    Correctness, 2024.
    """

    network: nn.Module
    top: int = 4

    @staticmethod
    def fit(
        logits: Float[Tensor, "n classes"],
        views: Float[Tensor, "views n classes"],
        labels: Int[Tensor, " n"],
        *,
        loss: Loss = correctness_loss,
        top: int = 4,
        hidden: int = 5,
        lr: float = 1e-4,
        epochs: int = 10,
        batch_size: int = 1000,
        seed: int = 0,
    ) -> "CorrectnessCalibrator":
        """Of held-out samples that the classifier was not trained on.

        The authors clamp T to [0.1, 10], which often starts where its gradient is 0; here T is
        0.1 + softplus, begins near 1 and has a gradient everywhere.

        Args:
            logits: (n, classes) of the originals.
            views: (views, n, classes) of transformed copies, see `view_logits`.
            labels: (n,).
            loss: of calibrated logits and labels.
            top: classes that are read of each copy; 4 (code).
            hidden: units; 5 (code).
            lr: of Adam; 1e-4 (code).
            epochs: 10 (code), on a set of the size of ImageNet's; small sets need more, or a higher lr.
            batch_size: 1000 (code).
            seed: of weights and order.

        Raises:
            InputError: shapes or labels that do not fit, or NaN.
            OptionError: an option is out of its range.
        """
        in_range(0, lr=lr)
        whole(1, top=top, hidden=hidden, epochs=epochs, batch_size=batch_size)
        check_classified(logits, labels)
        logits, views = logits.detach(), views.detach()
        features = consistency_features(logits, views, top=top).float()
        chance = generator(seed, "correctness")
        with global_chance(derive(seed, "correctness", "weights"), []), training():
            with torch.device("cpu"):
                last, first = (
                    nn.Linear(*widths, dtype=torch.float32)
                    for widths in ((hidden, 1), (features.shape[1], hidden))
                )
            nn.init.constant_(last.bias, math.log(math.expm1(0.9)))  # 0.1 + softplus of it is 1
            network = nn.Sequential(first, nn.ReLU(), last).to(features.device)
            descend = adam(network, lr=lr)
            for _ in range(epochs):
                order = torch.randperm(len(labels), generator=chance, device="cpu")
                for part in order.to(labels.device).split(batch_size):
                    scaled = logits[part].float() / _temperature(network, features[part])
                    descend(loss(scaled, labels[part]))
        return CorrectnessCalibrator(network=network.requires_grad_(False), top=top)

    def temperature(
        self, logits: Float[Tensor, "n classes"], views: Float[Tensor, "views n classes"]
    ) -> Float[Tensor, " n"]:
        """T of each sample, above 0.1."""
        features = consistency_features(logits, views, top=self.top)
        return _temperature(self.network, features.float())[:, 0]

    def calibrate(
        self, logits: Float[Tensor, "n classes"], views: Float[Tensor, "views n classes"]
    ) -> Float[Tensor, "n classes"]:
        """z / T, in float32 at least; the order of the classes stays.

        Raises:
            InputError: shapes that do not fit, or NaN.
        """
        temperature = self.temperature(logits, views)[:, None]
        single = at_least_single(logits)
        return single / temperature.to(single.dtype)


def _temperature(network: nn.Module, features: Tensor) -> Tensor:
    with single():
        return 0.1 + nn.functional.softplus(network(features))
