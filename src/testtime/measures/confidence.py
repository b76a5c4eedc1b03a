"""How sure a prediction is: its largest probability, and its lead over the runner-up.

Both take logits `(*batch, classes)`, of any scale, masked entries (-inf) included. Half precision
is computed, and answered, in float32. A sample whose logits hold NaN or +inf, or nothing but -inf, has
no prediction: its value is NaN, so that it can be counted and left out.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from testtime._core.errors import InputError
from testtime.measures.log_space import log_probs


def confidence(logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch"]:
    """Confidence of a prediction: the probability of its most probable class, in (0, 1].

        conf = max_c p_c

    Classes that tie share the gradient evenly.

    Raises:
        InputError: for a tensor without classes.

    Example:
        >>> confidence(torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
        tensor([0.7870, 0.3333])

    Reference: Hendrycks, Gimpel, A Baseline for Detecting Misclassified and Out-of-Distribution
    Examples in Neural Networks, ICLR 2017.
    """
    return log_probs(logits).amax(-1).exp()


def margin(logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch"]:
    """Margin of a prediction: how far its most probable class leads the next one, in [0, 1].

        margin = p_(1) - p_(2) = p_(1) ( 1 - exp( ln p_(2) - ln p_(1) ) )

    Raises:
        InputError: for fewer than two classes.

    Example:
        >>> margin(torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, -torch.inf]]))
        tensor([0.6805, 0.0000])

    Reference: Scheffer, Decomain, Wrobel, Active Hidden Markov Models for Information Extraction,
    2001.
    """
    log_p = log_probs(logits)
    if log_p.shape[-1] < 2:
        raise InputError(
            f"logits have the shape {tuple(logits.shape)}; a margin is the lead of one class over "
            "another, so the last dimension must have at least two."
        )
    first, second = log_p.topk(2, dim=-1).values.unbind(-1)
    return -first.exp() * torch.expm1(second - first)
