"""USCD: where the model is unsure, subtract what it would say without the prompt's examples.

p, q = softmax of the logits after the prompt, and after the lame prompt, with the same answer so far
s^2  = variance of p over the V tokens (unbiased) = (sum p^2 - 1/V) / (V - 1)
if s > theta: score = ln p
else: M = {v: p_v >= f / V};  score = ln(p + w q) in M where that is positive, else -inf; w = -0.7
draw from softmax(score / T), and hand the token to both
"""

import re
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from testtime._core.arrays import at_least_single
from testtime._core.errors import InputError
from testtime._core.options import in_range
from testtime._core.registry import register
from testtime.decode.caching import Reader
from testtime.decode.decoding import Job, Step, through_generate
from testtime.decode.methods.classical import heated, nucleus


def unsure(logits: Float[Tensor, "*rows tokens"], *, collision: float) -> Bool[Tensor, "*rows"]:
    """Where two draws of a token agree with at most a probability: sum_v p_v^2 <= c.

    The paper's theta is theta^2 = (c - 1/V) / (V - 1), which for one theta means another certainty
    with every vocabulary; its 0.005 with 32,000 tokens is c = 0.8.

    Example:
        >>> unsure(torch.tensor([[0.0, 0.0], [9.0, 0.0]]), collision=0.8)
        tensor([ True, False])
    """
    return at_least_single(logits).softmax(-1).square().sum(-1) <= collision


def contrast(
    logits: Float[Tensor, "*rows tokens"],
    lame: Float[Tensor, "*rows tokens"],
    *,
    collision: float = 0.8,
    floor: float = 2 / 3,
    weight: float = -0.7,
) -> Float[Tensor, "*rows tokens"]:
    """Scores of tokens: sure rows as they are, unsure ones less what the lame prompt says.

    Where nothing would be left, the row stays as it is.

    Example:
        >>> z, lame = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[0.0, 2.0, 0.0]])
        >>> contrast(z, lame).softmax(-1)
        tensor([[1., 0., 0.]])
    """
    logits = at_least_single(logits)
    p, q = logits.softmax(-1), at_least_single(lame).softmax(-1)
    kept = (p >= floor / p.shape[-1]) & (p > 0)
    left = (p + weight * q).masked_fill(~kept, 0).clamp(min=0)
    changes = unsure(logits, collision=collision) & (left > 0).any(-1)
    return torch.where(changes[..., None], left.log(), logits)


def without_examples(prompt: str) -> str:
    """The lame prompt: a prompt without its examples of input and output.

    Left out are doctests (`>>>` with what follows it, to an empty line or the end of a docstring),
    lines of `assert`, and headings such as "Examples:" that stand alone.

    Example:
        >>> without_examples("def f(x):\\n    '''Twice.\\n    >>> f(1)\\n    2\\n    '''\\n")
        "def f(x):\\n    '''Twice.\\n    '''\\n"
    """
    kept, inside = [], False
    for line in prompt.splitlines(keepends=True):
        bare = line.strip()
        if bare.startswith(">>>"):
            inside = True
        elif inside and (not bare or bare.startswith(('"""', "'''"))):
            inside = False
        heading = re.fullmatch(r"(for )?examples?( usage)?:?", bare, re.IGNORECASE)
        if not (inside or heading or bare.startswith("assert ")):
            kept.append(line)
    return "".join(kept)


@dataclass(frozen=True, kw_only=True)
class Contrasting:
    """The method: a second stream reads the lame prompt and the same answer."""

    collision: float
    floor: float
    weight: float
    steps: tuple[Step, ...]

    def run(self, job: Job) -> None:
        """Writes with `generate`; the lame stream has a cache of its own.

        Raises:
            InputError: there is no lame prompt.
        """
        if job.lame is None:
            raise InputError("uscd needs lame prompts; give lame=, one for each prompt.")
        reader, begin = Reader(job.model, job.lame), job.prompts.ids.shape[1]

        def against(tokens: Tensor, logits: Tensor) -> Tensor:
            if tokens.shape[1] > begin:  # the token that both streams got
                reader.push(tokens[:, -1])
            return contrast(
                logits, reader.logits(),
                collision=self.collision, floor=self.floor, weight=self.weight,
            )  # fmt: skip

        through_generate(job, (against, *self.steps), draw=True)


@register("decoding", paper="uscd", needs=("lame",))
def uscd(
    *,
    collision: float = 0.8,
    floor: float = 2 / 3,
    weight: float = -0.7,
    temperature: float = 0.8,
    top_p: float = 0.95,
) -> Contrasting:
    """Where the model is unsure, subtracts what it would say without the prompt's examples.

    Args:
        collision: highest chance that two draws agree at which a token counts as unsure. 0.8 is the
            theta of the script for CodeLlama (0.005 of 32,000 tokens).
        floor: least probability of a token, as a part of 1/V (2/3 in that script).
        weight: of the lame prompt's distribution (-0.7 there).
        temperature: of the draw.
        top_p: nucleus that is kept.

    Example:
        >>> uscd().weight
        -0.7

    Reference: Wang et al., USCD: Improving Code Generation of LLMs by Uncertainty-Aware Selective
    Contrastive Decoding, 2024.
    """
    in_range(0, 1, collision=collision)
    in_range(0, floor=floor)
    in_range(-1, 0, weight=weight)
    steps = heated(temperature) + nucleus(top_p)
    return Contrasting(collision=collision, floor=floor, weight=weight, steps=steps)
