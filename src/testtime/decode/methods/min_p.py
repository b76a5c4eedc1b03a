"""Min-p: keep what has at least a share of the top token's probability.

p = softmax(z / T)
keep v where p_v >= p_base max_u p_u       (the best token always)
draw from p over what is kept
"""

from testtime._core.options import in_range
from testtime._core.registry import register
from testtime.decode.decoding import Decoding
from testtime.decode.methods.classical import Warper, heated


@register("decoding", paper="min-p")
def min_p(*, p: float = 0.1, temperature: float = 1.0) -> Decoding:
    """Draws from the tokens that have at least a share of the top token's probability.

    The cut is that of transformers.

    Args:
        p: that share; 0.05 to 0.1 are typical (code). 0 keeps all, 1 the best alone.
        temperature: applied before the cut, as in the paper's runs. To cut first, reverse the
            steps: `replace(method, steps=method.steps[::-1])`.

    Example:
        >>> min_p(p=0.1, temperature=2.0).steps
        (Warper(name='TemperatureLogitsWarper', value=2.0), Warper(name='MinPLogitsWarper', value=0.1))

    Reference: Nguyen et al., Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM
    Outputs, ICLR 2025.
    """
    in_range(0, 1, p=p)
    return Decoding(steps=(*heated(temperature), Warper("MinPLogitsWarper", float(p))))
