"""Uncertainty of an ensemble by expected pairs (Schweighofer et al., NeurIPS 2023 workshop).

    given: probabilities p_w of S posterior samples w (ensemble, Monte-Carlo dropout), p̄ their mean
    total     = E_w E_w' CE(p_w, p_w') = -Σ_k p̄_k E_w' ln p_w'k
    aleatoric = E_w H(p_w)
    epistemic = total - aleatoric = E_w E_w' KL(p_w || p_w')
              = [ H(p̄) - E_w H(p_w) ] + E_w KL(p̄ || p_w)

The first bracket is the mutual information, which is at most ln S and ln C; the second term is not
bounded, so that members who are sure of different classes count for more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from testtime._core.arrays import check_tensors
from testtime._core.errors import InputError, OptionError, ScopeError
from testtime._core.options import whole
from testtime._core.seeds import derive
from testtime.adaptation.outputs import read_logits
from testtime.guard.borrow import borrowed
from testtime.measures.divergence import kl_divergence
from testtime.measures.entropy import entropy, marginal_entropy, mutual_information
from testtime.measures.log_space import log_mean_prob, log_probs


@dataclass(frozen=True)
class Uncertainty:
    """Parts of the uncertainty of each prediction, in nats, each (*batch).

    Attributes:
        total: expected cross-entropy between two members.
        aleatoric: expected entropy of a member.
        epistemic: expected divergence of two members: total - aleatoric.
        entropy: of the mean prediction, the total of the older measure.
        mutual_information: the epistemic part of the older measure, entropy - aleatoric.
    """

    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    entropy: Tensor
    mutual_information: Tensor


def predictive_uncertainty(
    logits: Float[Tensor, "members *batch classes"], *, pairs: str = "all"
) -> Uncertainty:
    """The expected pairwise measure, and the older one beside it.

    Log-probabilities may be given for logits. Masked classes (-inf) count nothing where all members
    mask them; where only some do, total and epistemic are infinite.

    Args:
        logits: (members, *batch, classes), of at least one member.
        pairs: "all" averages over all S² pairs, a member with itself included, as in the code, which
            is lower by the factor (S - 1) / S; "different" over pairs of two members, without that
            bias.

    Raises:
        InputError: no members or classes, NaN, +inf, nothing but -inf, or one member and "different" pairs.
        OptionError: pairs is something else.

    Example:
        >>> p = torch.tensor([[0.999, 0.001], [0.001, 0.999]])
        >>> found = predictive_uncertainty(p.log())
        >>> found.total, found.epistemic, found.mutual_information
        (tensor(3.4544), tensor(3.4465), tensor(0.6852))

    References: Schweighofer, Aichberger, Ielanskyi, Hochreiter, Introducing an Improved
    Information-Theoretic Measure of Predictive Uncertainty, NeurIPS 2023 workshop M3L. The same
    authors, On Information-Theoretic Measures of Predictive Uncertainty, UAI 2025 (cell C3).
    """
    if pairs not in ("all", "different"):
        raise OptionError(f"pairs is {pairs!r}; expected 'all' or 'different'.")
    exact, members = _checked(logits), len(logits)
    if pairs == "different" and members == 1:
        raise InputError("one member has no different one; expected at least two.")
    aleatoric, between = entropy(exact).mean(0), mutual_information(exact)
    # both parts are means of divergences and so keep their digits where the members agree
    mean = log_mean_prob(log_probs(exact)).expand_as(exact)
    epistemic = between + kl_divergence(mean, exact).mean(0)
    if pairs == "different":
        epistemic = epistemic * members / (members - 1)
    parts = aleatoric + epistemic, aleatoric, epistemic, marginal_entropy(exact), between
    kind = torch.promote_types(logits.dtype, torch.float32)
    return Uncertainty(*(part.to(kind) for part in parts))


class Cell(NamedTuple):
    """A total uncertainty and its two parts, in nats, each (*batch).

    Attributes:
        total: cross-entropy of predicting model and truth.
        aleatoric: entropy of the predicting model.
        epistemic: divergence of the truth from the predicting model.
    """

    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor


Model = Literal["single", "average", "expected"]


def uncertainty_cell(
    logits: Float[Tensor, "members *batch classes"], *, predicting: Model, truth: Model
) -> Cell:
    """One of the authors' nine measures: by which model predicts, and what stands for the true one.

    Of "expected" and "expected" it is that of `predictive_uncertainty` with all pairs; of "expected"
    and "average" the epistemic part is the mutual information, of "average" and "expected" its
    reverse.

    Args:
        logits: (members, *batch, classes), as there.
        predicting: the first member, the mean of all, or the expectation over them.
        truth: the last member, the mean of all, or the expectation over them.

    Raises:
        InputError: as `predictive_uncertainty`.
        OptionError: predicting or truth is something else.

    Example:
        >>> p = torch.tensor([[0.999, 0.001], [0.001, 0.999]])
        >>> uncertainty_cell(p.log(), predicting="expected", truth="average").epistemic
        tensor(0.6852)

    Reference: Schweighofer, Aichberger, Ielanskyi, Hochreiter, On Information-Theoretic Measures of
    Predictive Uncertainty, UAI 2025, Table 1: A, B, C are what predicts, 1, 2, 3 the truth.
    """
    for name, value in (("predicting", predicting), ("truth", truth)):
        if value not in ("single", "average", "expected"):
            raise OptionError(f"{name} is {value!r}; expected 'single', 'average' or 'expected'.")
    if predicting == truth == "expected":
        found = predictive_uncertainty(logits)
        return Cell(found.total, found.aleatoric, found.epistemic)
    members = log_probs(_checked(logits))
    mean = log_mean_prob(members)[None]
    p = {"single": members[:1], "average": mean, "expected": members}[predicting]
    q = {"single": members[-1:], "average": mean, "expected": members}[truth]
    aleatoric = entropy(p).mean(0)
    shape = torch.broadcast_shapes(p.shape, q.shape)
    epistemic = kl_divergence(p.expand(shape), q.expand(shape)).mean(0)
    kind = torch.promote_types(logits.dtype, torch.float32)
    return Cell(*(part.to(kind) for part in (aleatoric + epistemic, aleatoric, epistemic)))


def _checked(logits: Tensor) -> Tensor:
    """In double precision, if there are members, classes, and no NaN."""
    check_tensors(logits=logits)
    if logits.dim() < 2 or logits.numel() == 0:
        raise InputError(
            f"logits have the shape {tuple(logits.shape)}; expected (members, *batch, classes)."
        )
    if logits.is_complex() or not bool(logits.detach().double().amax(-1).isfinite().all()):
        raise InputError(
            "logits hold NaN, +inf, or nothing but -inf for a sample; leave these samples out, and "
            "count them."
        )
    return logits.double()


def ensemble_logits(models: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Logits (members, *batch, classes) of an ensemble, in eval mode; the models stay as they were.

    Raises:
        InputError: no models.

    Example:
        >>> ensemble_logits([nn.Linear(2, 3), nn.Linear(2, 3)], torch.zeros(5, 2)).shape
        torch.Size([2, 5, 3])
    """
    if not models:
        raise InputError("no models were given; expected at least one.")

    def answer(model: nn.Module) -> Tensor:
        with borrowed(model):
            return read_logits(model(x)).detach()

    return torch.stack([answer(model) for model in models])


def dropout_logits(model: nn.Module, x: Tensor, *, samples: int = 10, seed: int = 0) -> Tensor:
    """Logits (samples, *batch, classes) with dropout on and all other layers in eval mode.

    Dropout layers are those of torch and their subclasses; dropout that a module does by itself, by
    its training flag, is left off. Flags and the random state are the same afterwards.

    Args:
        model: maps x to logits.
        x: a batch.
        samples: of Monte-Carlo dropout; 10.
        seed: of the dropped units.

    Raises:
        ScopeError: the model has no dropout layer with a positive rate.

    Example:
        >>> model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)).eval()
        >>> logits = dropout_logits(model, torch.ones(2, 4))
        >>> logits.shape, model[0].training, bool((logits[0] != logits[1]).any())
        (torch.Size([10, 2, 3]), False, True)

    Reference: Gal, Ghahramani, Dropout as a Bayesian Approximation, ICML 2016.
    """
    whole(1, samples=samples)
    layers = [m for m in model.modules() if isinstance(m, _DropoutNd) and m.p > 0]
    if not layers:
        raise ScopeError(
            "the model has no dropout layer with a positive rate; use ensemble_logits with several "
            "models."
        )
    with borrowed(model, seed=derive(seed, "dropout")):
        for layer in layers:
            layer.training = True
        return torch.stack([read_logits(model(x)).detach() for _ in range(samples)])
