"""How many directions a representation uses: matrix entropy, effective rank, two nuclear norms.

    Z = features (L, d), the column means subtracted, each row divided by its length
    s_1 >= s_2 >= ... singular values of Z, c_j the length of its column j

    nuclear norm            sum_i s_i
    matrix nuclear-norm     sum of the min(L, d) largest c_j
    matrix entropy          - sum_i p_i ln p_i / ln d,   p_i = s_i^2 / sum s^2
    effective rank          exp( - sum_i q_i ln q_i ),   q_i = s_i / sum s

The matrix nuclear-norm needs no singular values, is an upper bound of the nuclear norm where
L >= d, and equals it just when the columns are orthogonal. It depends on the basis: of features
that are dense in theirs it is nearly the same for any rank. So `spectrum` gives both.
"""

# torch leaves some types open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from testtime._core.arrays import at_least_single, check_tensors, magnitude
from testtime._core.errors import InputError
from testtime._core.options import whole


@dataclass(frozen=True)
class Spectrum:
    """Measures of one matrix of features.

    Attributes:
        matrix_nuclear_norm: without singular values.
        nuclear_norm: with them.
        matrix_entropy: in [0, 1].
        effective_rank: from 1 to min(L, d); 0 for rows that are all the same.
    """

    matrix_nuclear_norm: float
    nuclear_norm: float
    matrix_entropy: float
    effective_rank: float


def spectrum(features: Float[Tensor, "rows features"]) -> Spectrum:
    """All four measures of one matrix of features, with one singular value decomposition.

    Raises:
        InputError: as `normalised_rows`.

    Example:
        >>> found = spectrum(torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]))
        >>> round(found.matrix_nuclear_norm, 4), round(found.nuclear_norm, 4)
        (2.8284, 2.8284)
        >>> round(found.effective_rank, 4), round(found.matrix_entropy, 4)
        (2.0, 1.0)

    References: Li et al., Large Language Model Evaluation via Matrix Nuclear-Norm, 2024. Wei et al.,
        Diff-eRank, 2024. Roy, Vetterli, The Effective Rank, 2007.
    """
    check_tensors(features=features)
    z = normalised_rows(features.detach())
    values = torch.linalg.svdvals(z)
    total = float(values.sum())
    entropy = float(_entropy(values.square())) / math.log(max(2, z.shape[1]))
    rank = math.exp(float(_entropy(values))) if total > 0 else 0.0
    return Spectrum(float(_column_norm(z)), total, entropy, rank)


def matrix_nuclear_norm(features: Float[Tensor, "rows features"]) -> Float[Tensor, ""]:
    """Sum of the min(L, d) longest columns of the normalised features.

    Changes with a rotation of the features; the order of rows makes no difference. It grows like
    sqrt(L min(L, d)), so that texts of different length cannot be compared by it.

    Raises:
        InputError: as `normalised_rows`.

    Example:
        >>> matrix_nuclear_norm(torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]))
        tensor(2.8284)

    Reference: Li et al., Large Language Model Evaluation via Matrix Nuclear-Norm, 2024.
    """
    return _column_norm(normalised_rows(features))


def matrix_entropy(features: Float[Tensor, "rows features"]) -> Float[Tensor, ""]:
    """Entropy of the normalised features' spectrum, as a share of ln d: 0 to 1.

    Rows that are all the same have 0.

    Raises:
        InputError: as `normalised_rows`.

    Example:
        >>> matrix_entropy(torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]))
        tensor(1.0000)

    Reference: Wei et al., Diff-eRank, 2024.
    """
    z = normalised_rows(features)
    return _entropy(torch.linalg.svdvals(z).square()) / math.log(max(2, z.shape[1]))


def normalised_rows(features: Float[Tensor, "rows features"]) -> Float[Tensor, "rows features"]:
    """The column means subtracted, then each row divided by its length; rows at the mean stay 0.

    Raises:
        InputError: for another shape, fewer than two rows, NaN or infinity.

    Example:
        >>> normalised_rows(torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
        tensor([[ 1.,  0.],
                [-1.,  0.]])
    """
    check_tensors(features=features)
    if features.ndim != 2 or len(features) < 2 or features.shape[1] == 0:
        raise InputError(
            f"features have the shape {tuple(features.shape)}; expected (rows, features) with at "
            "least two rows: one for each token or sample."
        )
    if features.is_complex():
        raise InputError("features are complex; expected real numbers")
    features = at_least_single(features)
    largest = features.detach().abs().amax()
    if not largest.isfinite():
        raise InputError("features hold NaN or infinity; expected finite numbers")
    scale = magnitude(largest)  # squares of large numbers overflow
    features = features / scale
    centred = features - features.mean(0)
    # what rounding leaves of equal rows is no direction
    noise = 8 * torch.finfo(centred.dtype).eps * largest / scale
    length = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    apart = length > noise
    return centred * torch.where(apart, 1 / torch.where(apart, length, 1), 0)


def matrix_nuclear_norm_of_texts(
    model: Any, tokenizer: Any, texts: Iterable[str], *, max_tokens: int = 2048
) -> float:
    """Mean over texts of the matrix nuclear-norm of the last hidden state, per token.

    Texts of fewer than two tokens are left out. Less is read as better compression by the paper;
    texts of different length weigh differently, see `matrix_nuclear_norm`.

    Args:
        model: of transformers, without a head (`AutoModel`), or anything that is called with
            `input_ids` (1, L) and answers with `.last_hidden_state` (1, L, d).
        tokenizer: called with a text, answers with `["input_ids"]`, a list.
        texts: any number.
        max_tokens: a longer text is cut, at 2048 (code).

    Raises:
        InputError: when no text has two tokens, or hidden states are not finite.
        OptionError: for fewer than two `max_tokens`.

    Example:
        >>> from types import SimpleNamespace
        >>> table = torch.eye(256)
        >>> model = lambda input_ids: SimpleNamespace(last_hidden_state=table[input_ids])
        >>> tokenizer = lambda text: {"input_ids": list(text.encode())}
        >>> round(matrix_nuclear_norm_of_texts(model, tokenizer, ["abcd", "a"]), 4)
        1.0

    Reference: Li et al., Large Language Model Evaluation via Matrix Nuclear-Norm, 2024.
    """
    whole(2, max_tokens=max_tokens)
    device = getattr(model, "device", "cpu")
    found: list[float] = []
    with torch.no_grad():
        for text in texts:
            tokens = list(tokenizer(text)["input_ids"])[:max_tokens]
            if len(tokens) >= 2:
                hidden = model(input_ids=torch.tensor([tokens], device=device)).last_hidden_state
                found.append(float(matrix_nuclear_norm(hidden[0])) / len(tokens))
    if not found:
        raise InputError("no text has two tokens; expected at least one that has")
    return fmean(found)


def _column_norm(z: Tensor) -> Tensor:
    lengths = torch.linalg.vector_norm(z.mT.contiguous(), dim=1)  # faster than along columns
    return lengths.topk(min(z.shape)).values.sum()


def _entropy(weights: Tensor) -> Tensor:
    p = weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
    return torch.special.entr(torch.where(p > 0, p, 1)).sum()  # the slope at 0 is infinite
