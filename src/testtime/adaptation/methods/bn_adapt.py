"""Test-time batch statistics.

for each layer with statistics (m_s, v_s) from training, and (m_t, v_t) of the batch:
    m, v = m_t, v_t                                                   alpha = 1
    m, v = (1 - a) m_s + a m_t, (1 - a) v_s + a v_t                   alpha, or a = n / (N + n)
    m, v <- (1 - a) m + a m_t, (1 - a) v + a v_t                      momentum
return f(x)
"""

from testtime._core.errors import OptionError
from testtime._core.options import in_range
from testtime._core.registry import register
from testtime.adaptation.parts.statistics import (
    BatchStatistics,
    MixedStatistics,
    RunningStatistics,
    Statistics,
)
from testtime.adaptation.recipe import Recipe


@register("method", paper="bn-adapt")
def bn_adapt(
    *,
    alpha: float = 1.0,
    prior: float | None = None,
    momentum: float | None = None,
    unbiased: bool = False,
) -> Recipe:
    """Replaces or blends the statistics stored in training by those of the test batch.

    Use when: a network with BatchNorm meets another camera, noise or weather. Nothing is learnt by
    gradient, so nothing can drift; most of what the others gain on such networks is this.

    Not when: batches are small or hold few classes; then give `prior=16`, or use `rotta`. A network
    that stores no statistics (LayerNorm, GroupNorm) is refused.

    Args:
        alpha: weight of the batch; 1 (Nado et al.) uses the batch alone, with its biased variance.
        prior: instead of alpha, strength of the source in samples, alpha = n / (prior + n)
            (Schneider et al.; 16 is common).
        momentum: instead, a moving average with this step (0.1 is torch's); costs two forwards,
            one to update the average and one to answer.
        unbiased: mix in the unbiased variance, as code does that reads it from torch's running
            statistics. A moving average does so always.

    Raises:
        ScopeError: from `adapt`, when the model has no layers that store statistics.
        OptionError: when two of alpha, prior and momentum are set, or one is out of range.

    Example:
        >>> bn_adapt(prior=16).statistics
        MixedStatistics(alpha=None, prior=16, unbiased=False)

    Reference: Nado et al., Evaluating Prediction-Time Batch Normalization, 2020; Schneider et al.,
        NeurIPS 2020; You et al., Test-time Batch Statistics Calibration, 2021.
    """
    chosen = [
        f"{name}={value}"
        for name, value, default in (
            ("alpha", alpha, 1.0), ("prior", prior, None), ("momentum", momentum, None)
        )
        if value != default
    ]  # fmt: skip
    if len(chosen) > 1:
        raise OptionError(
            f"bn-adapt takes one of alpha, prior, momentum; given {', '.join(chosen)}"
        )
    in_range(0, 1, alpha=alpha)
    statistics: Statistics = BatchStatistics()
    if momentum is not None:
        statistics = RunningStatistics(momentum=momentum)
    elif prior is not None:
        statistics = MixedStatistics(prior=prior, unbiased=unbiased)
    elif alpha != 1 or unbiased:
        statistics = MixedStatistics(alpha=alpha, unbiased=unbiased)
    return Recipe(statistics=statistics)
