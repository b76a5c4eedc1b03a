"""OSTTA: the wisdom of crowds in entropy minimisation.

for each batch x:
    p_o = softmax(f_source(x)),  c_i = argmax p_o,i
    p_a = softmax(f_theta(x))
    S = {i : p_a,i[c_i] >= p_o,i[c_i]}
    theta <- theta - lr * d/dtheta ( mean_S H(p_a,i) - lam H(mean_i p_a,i) )
    return f_theta(x)
"""

from dataclasses import replace

from torch import Tensor

from testtime._core.arrays import at_least_single
from testtime._core.errors import OptionError
from testtime._core.registry import register
from testtime.adaptation.methods.tent import tent
from testtime.adaptation.parts.objective import Diversity
from testtime.adaptation.parts.prediction import unsure
from testtime.adaptation.recipe import Recipe


def confidence_rose(logits: Tensor, source: Tensor) -> Tensor:
    """1 for samples whose probability of the source model's class has not fallen, else 0."""
    before = at_least_single(source).softmax(-1)
    after = at_least_single(logits.detach()).softmax(-1)
    chosen = before.argmax(-1, keepdim=True)
    return (after.gather(-1, chosen) >= before.gather(-1, chosen))[..., 0].float()


@register("method", paper="ostta")
def ostta(*, base: Recipe | None = None, lr: float = 1e-3, diversity: float = 0.5) -> Recipe:
    """Learns from samples whose confidence has risen under adaptation; for open-set streams.

    `adapter.events[-1].measured["outlier"]` scores how likely each sample of the last batch is of
    no known class: 1 - its highest probability.

    Use when: the stream is long and holds things of no known class.

    Not when: a second forward, that of the source model, is too dear.

    Args:
        base: the entropy-minimising method that is filtered; None is `tent(lr=lr)`. Its own
            selection stays: samples must pass both.
        lr: step size of Adam when there is no base; 1e-3 (code of UniEnt).
        diversity: lam, weight of the entropy of the batch's mean prediction, over all samples; 0.5
            (code of UniEnt). With 0 only the filter is left. When no sample passes the filter the
            step is taken on this term alone.

    Raises:
        OptionError: when the base minimises nothing for each sample, or has a term for the batch.

    Example:
        >>> from testtime.adaptation.methods.sar import sar
        >>> len(ostta(base=sar()).selections)
        2

    Reference: Lee et al., Towards Open-Set Test-Time Adaptation Utilizing the Wisdom of Crowds in
        Entropy Minimization, ICCV 2023.
    """
    recipe = tent(lr=lr) if base is None else base
    filters = isinstance(recipe, Recipe) and recipe.objective is not None
    if not filters or recipe.batch_objective is not None:
        raise OptionError(
            "ostta filters the samples of an entropy-minimising method; give base=tent(), eta(), "
            "eata(), sar() or deyo()"
        )
    return replace(
        recipe,
        selection=(*recipe.selections, confidence_rose),
        batch_objective=Diversity(weight=diversity) if diversity else None,
        outlier=unsure,
    )
