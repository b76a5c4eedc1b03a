"""A decoding method as a value: steps that change the logits in order, then a token is chosen."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from testtime._core.errors import MissingExtra
from testtime.decode.drawing import Drawer, check_logits
from testtime.decode.prompts import Prompts
from testtime.decode.writing import Writing

Step = Callable[[Tensor, Tensor], Tensor]
"""Called as transformers calls its processors: tokens so far (rows, length), logits (rows, tokens)."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a method needs to write: models, prompts, and where the text goes.

    Attributes:
        model: that writes; for `ead` the small one.
        prompts: of all rows.
        seeds: one for each row.
        ends: tokens that end a text.
        limit: of new tokens.
        writing: takes the tokens.
        large: the large model, for methods that switch.
        lame: the prompts without their examples, for methods that contrast.
    """

    model: Any
    prompts: Prompts
    seeds: list[int]
    ends: list[int]
    limit: int
    writing: Writing
    large: Any = None
    lame: Prompts | None = None


class Method(Protocol):
    """What `generate` runs."""

    def run(self, job: Job) -> None:
        """Writes all rows to their end."""
        ...


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Steps that change the logits in order; then the best token, or one drawn from their softmax.

    Attributes:
        steps: each also works as a logits processor of transformers.
        draw: whether the token is drawn; else it is the most probable one.
    """

    steps: tuple[Step, ...] = ()
    draw: bool = True

    def run(self, job: Job) -> None:
        """Writes with `generate` of transformers."""
        through_generate(job, self.steps, draw=self.draw)


def change(steps: tuple[Step, ...], tokens: Tensor, logits: Tensor) -> Tensor:
    """Logits after all steps.

    Raises:
        InputError: no token can be chosen from the model's logits.
    """
    check_logits(logits)
    for step in steps:
        logits = step(tokens, logits)
    return logits


def through_generate(job: Job, steps: tuple[Step, ...], *, draw: bool) -> None:
    """Writes all rows with `generate` of transformers, its key-value cache and our steps.

    Of the model's own settings of generation only the tokens that it forbids are kept, and the
    global random state is neither read nor changed: the token that a row's own generator chose is
    the only one left possible, so that the most probable token is that one.
    """

    def stopping(tokens: Tensor, logits: Any, **_: Any) -> Tensor:
        ended = [job.writing.add(row, token) for row, token in enumerate(tokens[:, -1].tolist())]
        return torch.tensor(ended, device=tokens.device)

    with torch.no_grad(), evaluating(job.model):
        borrowed(job.model).generate(
            inputs=job.prompts.ids,
            attention_mask=job.prompts.mask,
            logits_processor=[choosing(steps, Drawer(job.seeds if draw else None))],
            stopping_criteria=[stopping],
            do_sample=False,
            max_new_tokens=job.limit,
            use_cache=True,
            eos_token_id=job.ends or None,
            pad_token_id=(job.ends or [0])[0],
        )


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in eval mode, and afterwards as it was."""
    training = {module: module.training for module in model.modules() if module.training}
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def choosing(steps: tuple[Step, ...], drawer: Drawer) -> Step:
    """A processor for the greedy search of transformers: only the token that was chosen is left."""

    def choose(tokens: Tensor, logits: Tensor) -> Tensor:
        changed = change(steps, tokens, logits)
        return torch.full_like(changed, -torch.inf).scatter_(-1, drawer(changed)[:, None], 0)

    return choose


def borrowed(model: Any) -> Any:
    """A model that shares all with another but its settings of generation.

    Of these only the tokens that are forbidden are taken. The other model is left alone, so that
    several threads can write with it.
    """
    try:
        from transformers import GenerationConfig  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("transformers", "lm") from error
    own = copy.copy(getattr(model, "_orig_mod", model))  # a compiled model hands on what it is told
    names = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
    kept = {name: getattr(model.generation_config, name, None) for name in names}
    own.generation_config = GenerationConfig(**kept)
    return own


def forbidden(model: Any) -> list[int]:
    """Single tokens that a model's own settings forbid."""
    said = model.generation_config
    words = getattr(said, "bad_words_ids", None) or []
    tokens = [word[0] for word in words if len(word) == 1]
    return sorted({*tokens, *(getattr(said, "suppress_tokens", None) or [])})
