"""What Rel-U is compared with: scores of being wrong by the softmax alone, and a network that learns one.

    MSP       s = - max p,                    p = softmax(z)
    ODIN      s = - max p,                    p = softmax(z / T)
    DOCTOR    s = (1 - g) / g,  g = Σ p²,     p = softmax(z / T)
    MLP       s = P(wrong | z), trained on tuning samples with binary cross-entropy
    perturbed x ← x + ε sign( ∇_x ln |s(x)| ), then s again

Higher scores are more probably wrong. The perturbation is each method's own: it raises the score of
DOCTOR and of Rel-U, and the confidence that ODIN's is the negative of. The code takes the logarithm of
ODIN's negative score itself, which is NaN. MSP is `odin` with T = 1; Monte-Carlo dropout and ensembles
are in `predictive_uncertainty`.

References: DOCTOR: Granese, Romanelli, Gorla, Palamidessi, Piantanida, NeurIPS 2021. ODIN: Liang, Li,
Srikant, ICLR 2018. The network, and all as baselines: Dadalto Câmara Gomes et al., ICLR 2024.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from testtime._core.arrays import at_least_single, check_tensors
from testtime._core.errors import InputError
from testtime._core.options import in_range, whole
from testtime._core.seeds import derive, generator, global_chance
from testtime.adaptation.outputs import read_logits
from testtime.guard.borrow import borrowed
from testtime.measures.information.networks import adam, single, training

HIDDEN = 128
"""Units of each layer of the network (code)."""


def odin(logits: Float[Tensor, "n classes"], *, temperature: float = 1.0) -> Float[Tensor, " n"]:
    """Minus the largest probability at a temperature; at 1 this is the MSP baseline.

    Args:
        logits: (n, classes).
        temperature: T; the authors of Rel-U search 0.2 to 2, those of ODIN go up to 1000.

    Raises:
        InputError: the logits are not (n, classes), or NaN.
        OptionError: the temperature is not above 0.

    Example:
        >>> odin(torch.tensor([[0.0, 0.0], [5.0, 0.0]]))
        tensor([-0.5000, -0.9933])
    """
    return -_probs(logits, temperature).amax(1)


def doctor(logits: Float[Tensor, "n classes"], *, temperature: float = 1.0) -> Float[Tensor, " n"]:
    """The odds that two draws of the model's own answer differ.

    Args:
        logits: (n, classes).
        temperature: T; the authors of Rel-U search 0.2 to 2.

    Raises:
        InputError: the logits are not (n, classes), or NaN.
        OptionError: the temperature is not above 0.

    Example:
        >>> doctor(torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]))
        tensor([1., 0.])
    """
    probs = _probs(logits, temperature)
    top, place = probs.max(1, keepdim=True)
    others = probs.scatter(1, place, 0.0)
    # not 1 - Σ p², which is 0 in single precision for whoever is sure
    differ = (top * others + others * (1 - others)).sum(1)
    return differ / probs.square().sum(1)


def perturbed_score(
    model: nn.Module, x: Tensor, score: Callable[[Tensor], Tensor], *, epsilon: float
) -> Float[Tensor, " n"]:
    """A score after a small step of the input that makes it larger in size.

    Two forwards and a backward. The model's modes, flags, gradients and the random state are the
    same afterwards.

    Args:
        model: maps x to logits.
        x: a batch of floating-point inputs.
        score: maps logits to (n,): `odin`, `doctor`, the `score` of a fitted detector.
        epsilon: size of the step; 0 to 0.004 is what the authors of Rel-U search, for inputs in
            [0, 1].

    Raises:
        InputError: as `score`, and for an x that is not in floating point.
        OptionError: epsilon is negative.

    Example:
        >>> x = torch.tensor([[1.0, 0.0]])
        >>> bool(perturbed_score(nn.Identity(), x, doctor, epsilon=0.1) > doctor(x))
        True
        >>> bool(perturbed_score(nn.Identity(), x, odin, epsilon=0.1) < odin(x))
        True
    """
    in_range(0, epsilon=epsilon)
    direction = raising_direction(model, x, score)
    with borrowed(model):
        return score(read_logits(model(x + epsilon * direction))).detach()


def raising_direction(model: nn.Module, x: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Where each number of the input has to go for a score to grow in size: 1, -1, or 0; as x.

    Raises:
        InputError: x is no tensor of floating-point numbers, so there is no small step.

    Example:
        >>> raising_direction(nn.Identity(), torch.tensor([[1.0, 0.0]]), doctor)
        tensor([[-1.,  1.]])
    """
    check_tensors(x=x)
    if not x.is_floating_point():
        raise InputError(
            f"x is {x.dtype}; expected floating-point inputs, which a small step can change. Of "
            "tokens, take the embeddings, and a model that reads these."
        )
    with borrowed(model, keep_grad=True):
        leaf = x.detach().clone().requires_grad_()
        # the logarithm has the sign of the score's own gradient, without its underflow
        size = score(read_logits(model(leaf))).abs().clamp(min=1e-30).log()
        (slope,) = torch.autograd.grad(size.sum(), leaf)
    return slope.sign()


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class MisclassificationNetwork:
    """A small network that reads logits and says how probably the answer is wrong.

    Attributes:
        network: maps logits (n, classes) to (n, 1), the log odds of being wrong.

    Example:
        >>> logits = torch.tensor([[2.0, 1.9, 0.0], [2.0, 0.0, 1.9], [1.0, 3.0, 0.0]]).repeat(8, 1)
        >>> labels = torch.tensor([1, 0, 1]).repeat(8)       # 0 is confused with 1, never with 2
        >>> wrong, right, _ = MisclassificationNetwork.fit(logits, labels).score(logits[:3])
        >>> bool(wrong > right)
        True
    """

    network: nn.Module

    @staticmethod
    def fit(
        logits: Float[Tensor, "n classes"],
        labels: Int[Tensor, " n"],
        *,
        epochs: int = 100,
        batch_size: int = 64,
        lr: float = 1e-3,
        seed: int = 0,
    ) -> "MisclassificationNetwork":
        """Of tuning samples that the model was not trained on.

        Two hidden layers of 128 units behind the first; in the code both are one module, used twice.
        The code keeps the epoch with the lowest FPR at 95 % TPR on validation data; here it is the
        last.

        Args:
            logits: (n, classes), finite.
            labels: (n,).
            epochs: of training; 100 (code).
            batch_size: samples of a step; 64 (code).
            lr: of Adam; 0.001 (code).
            seed: of weights and order.

        Raises:
            InputError: no samples, fewer than two classes, NaN, or labels that do not fit.
            OptionError: an option is out of its range.
        """
        whole(1, epochs=epochs, batch_size=batch_size)
        in_range(0, lr=lr)
        check_classified(logits, labels)
        chance = generator(seed, "misclassification")
        with global_chance(derive(seed, "misclassification", "weights"), []), training():
            z = at_least_single(logits.detach().clone())
            wrong = (z.argmax(1) != labels).to(z.dtype)
            with torch.device("cpu"):
                network = _network(z.shape[1])
            descend = adam(network.to(z.device, z.dtype), lr=lr)
            for _ in range(epochs):
                order = torch.randperm(len(z), generator=chance, device="cpu").to(z.device)
                for part in order.split(batch_size):
                    odds = network(z[part]).squeeze(1)
                    descend(F.binary_cross_entropy_with_logits(odds, wrong[part]))
        return MisclassificationNetwork(network=network.eval().requires_grad_(False))

    def score(self, logits: Float[Tensor, "n classes"]) -> Float[Tensor, " n"]:
        """P(wrong) of each sample; gradients pass to the logits.

        Raises:
            InputError: the logits are not (n, classes) with the classes of the tuning data, or NaN.
        """
        check_tensors(logits=logits)
        first = next(self.network.parameters())
        if logits.dim() != 2 or logits.shape[1] != first.shape[1]:
            raise InputError(
                f"logits have the shape {tuple(logits.shape)}; expected (n, {first.shape[1]})."
            )
        read = logits.to(first.dtype)
        if not bool(read.isfinite().all()):
            raise InputError(
                f"logits hold NaN, infinite values, or numbers beyond {first.dtype}; leave these out, "
                "and count them."
            )
        with single():
            return self.network(read).squeeze(1).sigmoid()


def _network(classes: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(classes, HIDDEN, dtype=torch.float32), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Linear(HIDDEN, HIDDEN, dtype=torch.float32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(HIDDEN, 1, dtype=torch.float32))


def _probs(logits: Tensor, temperature: float) -> Tensor:
    in_range(1e-6, temperature=temperature)
    check_tensors(logits=logits)
    if logits.dim() != 2 or not logits.shape[1] or not logits.is_floating_point():
        raise InputError(
            f"logits have the shape {tuple(logits.shape)} and type {logits.dtype}; expected "
            "(n, classes) in floating point, with at least one class."
        )
    probs = (at_least_single(logits) / temperature).softmax(1)
    if bool(probs.isnan().any()):
        raise InputError("logits hold NaN or +inf; leave these samples out, and count them.")
    return probs


def check_classified(logits: Tensor, labels: Tensor) -> None:
    """Refuses logits that are not (n, classes) and finite, and labels that are not their classes.

    Example:
        >>> check_classified(torch.zeros(2, 3), torch.tensor([0, 3]))
        Traceback (most recent call last):
        testtime._core.errors.InputError: labels lie between 0 and 3; expected 0 to 2.
    """
    check_tensors(logits=logits, labels=labels)
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or len(logits) == 0:
        raise InputError(
            f"logits have the shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; "
            "expected (n, classes) and (n,), with at least one sample."
        )
    if logits.shape[1] < 2:
        raise InputError(f"logits have {logits.shape[1]} class; expected at least two.")
    if logits.is_complex() or not bool(logits.isfinite().all()):
        raise InputError("logits are complex, or hold NaN or infinite values; leave these out.")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"labels are {labels.dtype}; expected whole numbers, such as int64.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise InputError(
            f"labels lie between {low} and {high}; expected 0 to {logits.shape[1] - 1}."
        )
