"""The classical ways to choose a token, as transformers has them.

greedy: the most probable token
else:   z <- z / T, then all but the plausible tokens are set to -inf, then one is drawn:
    top-k    the k most probable
    top-p    the fewest that together have at least the probability p
    typical  those whose surprise is nearest to the entropy, together at least `mass`
    epsilon  those with at least the probability epsilon
    eta      those with at least min(epsilon, sqrt(epsilon) exp(-H))
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from testtime._core.errors import MissingExtra, OptionError
from testtime._core.options import in_range, whole
from testtime._core.registry import register
from testtime.decode.decoding import Decoding, Step

COLDEST = 1e-6
"""Lowest temperature: there a difference of 0.001 between logits is as good as any."""


@dataclass(frozen=True)
class Warper:
    """A step that is a processor of transformers, by its name there, with its main option.

    Example:
        >>> import torch
        >>> Warper("TopKLogitsWarper", 1)(torch.tensor([[0]]), torch.tensor([[1.0, 2.0]]))
        tensor([[-inf, 2.]])
    """

    name: str
    value: float

    def __call__(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """Logits (rows, tokens) with -inf for what is left out."""
        return self._made(tokens, logits)

    @cached_property
    def _made(self) -> Callable[[Any, Any], Any]:
        try:
            import transformers  # noqa: PLC0415
        except ImportError as error:
            raise MissingExtra("transformers", "lm") from error
        return getattr(transformers, self.name)(self.value)


def heated(temperature: float) -> tuple[Step, ...]:
    """The step that divides logits by a temperature; none for 1."""
    in_range(0, temperature=temperature)
    if temperature < COLDEST:
        raise OptionError(
            f"temperature is {temperature}; expected at least {COLDEST}, below which logits "
            "overflow. Use the method 'greedy'."
        )
    return () if temperature == 1 else (Warper("TemperatureLogitsWarper", float(temperature)),)


def nucleus(top_p: float) -> tuple[Step, ...]:
    """The step that keeps the nucleus; none for 1."""
    in_range(0, 1, top_p=top_p)
    return () if top_p == 1 else (Warper("TopPLogitsWarper", float(top_p)),)


@register("decoding", paper="")
def greedy() -> Decoding:
    """Takes the most probable token.

    Example:
        >>> greedy().draw
        False
    """
    return Decoding(draw=False)


@register("decoding", paper="")
def sample(*, temperature: float = 1.0) -> Decoding:
    """Draws from the model's distribution, at a temperature.

    Example:
        >>> sample().steps
        ()
    """
    return Decoding(steps=heated(temperature))


@register("decoding", paper="")
def top_k(*, k: int = 50, temperature: float = 1.0) -> Decoding:
    """Draws from the k most probable tokens (50 as in transformers).

    Example:
        >>> top_k(k=5).steps
        (Warper(name='TopKLogitsWarper', value=5),)

    Reference: Fan, Lewis, Dauphin, Hierarchical Neural Story Generation, ACL 2018.
    """
    whole(1, k=k)
    return Decoding(steps=(*heated(temperature), Warper("TopKLogitsWarper", k)))


@register("decoding", paper="")
def top_p(*, p: float = 0.95, temperature: float = 1.0) -> Decoding:
    """Draws from the fewest tokens that together have the probability p.

    Example:
        >>> top_p(p=0.9).steps
        (Warper(name='TopPLogitsWarper', value=0.9),)

    Reference: Holtzman et al., The Curious Case of Neural Text Degeneration, ICLR 2020.
    """
    return Decoding(steps=heated(temperature) + nucleus(p))


@register("decoding", paper="")
def typical(*, mass: float = 0.95, temperature: float = 1.0) -> Decoding:
    """Draws from the tokens whose surprise is nearest to the entropy.

    Example:
        >>> typical().draw
        True

    Reference: Meister et al., Locally Typical Sampling, TACL 2023.
    """
    _inside(mass=mass)
    return Decoding(steps=(*heated(temperature), Warper("TypicalLogitsWarper", float(mass))))


@register("decoding", paper="")
def epsilon(*, cut: float = 3e-4, temperature: float = 1.0) -> Decoding:
    """Draws from the tokens that have at least a probability.

    Example:
        >>> epsilon().draw
        True

    Reference: Hewitt, Manning, Liang, Truncation Sampling as Language Model Desmoothing, 2022.
    """
    _inside(cut=cut)
    return Decoding(steps=(*heated(temperature), Warper("EpsilonLogitsWarper", float(cut))))


@register("decoding", paper="")
def eta(*, cut: float = 3e-4, temperature: float = 1.0) -> Decoding:
    """Draws from the tokens that have at least a probability, which falls with the entropy.

    Example:
        >>> eta().draw
        True

    Reference: Hewitt, Manning, Liang, Truncation Sampling as Language Model Desmoothing, 2022.
    """
    _inside(cut=cut)
    return Decoding(steps=(*heated(temperature), Warper("EtaLogitsWarper", float(cut))))


def _inside(**options: float) -> None:
    in_range(0, 1, **options)
    for name, value in options.items():
        if value in (0, 1):
            raise OptionError(f"{name} is {value}; expected a number between 0 and 1")
