"""Training of CodePromptZip's compressor, on code that is shortened by kind of token.

    pairs      <task><ratio>r</ratio><compressed>code</compressed>  ->  the code without a share r
    loss       mean_t -ln P(y_t), P of `testtime.decode.code_copy`
    AdamW, rate up over the first steps and down to 0 at the end; stop when the loss on
    held-out pairs has not fallen for some epochs, and keep the weights of the best

Reference: CodePromptZip: Code-specific Prompt Compression for Retrieval-Augmented Generation in
Coding Tasks with LMs, 2025.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from testtime._core.errors import InputError, WorkFailed
from testtime._core.options import in_range, whole
from testtime._core.seeds import derive, generator, global_chance
from testtime.decode.code_copy import (
    LONGEST,
    TASK,
    CopyModel,
    compressor_input,
    padded_right,
    read_code,
)
from testtime.decode.code_prompts import ORDER, Kind, compress_code
from testtime.decode.models import end_tokens

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

Pair = tuple[str, str]
"""What the compressor reads, and what it is to write."""
Row = tuple[list[int], list[int]]
"""The same as tokens."""


def compression_pairs(
    codes: Sequence[str],
    *,
    ratios: Sequence[float] = RATIOS,
    task: str = TASK,
    order: Sequence[Kind] = ORDER,
) -> list[Pair]:
    """Pairs to learn from: each code at each ratio, shortened by kind of token.

    Args:
        codes: Python codes.
        ratios: 0.1 to 0.9 (paper).
        task: name that stands in front; the order of kinds depends on it.
        order: of removal, see `testtime.decode.code_prompts.rank_kinds`.

    Raises:
        InputError: a code is not Python.

    Example:
        >>> compression_pairs(["a = f(b)"], ratios=[0.5])
        [('<Suggestion><ratio>0.5</ratio><compressed>a = f(b)</compressed>', 'a f b')]

    Reference: CodePromptZip, 2025.
    """
    return [
        (compressor_input(code, ratio, task=task), compress_code(code, ratio, order=order))
        for code in codes
        for ratio in ratios
    ]


def copy_loss(
    probs: Float[Tensor, "rows steps tokens"],
    targets: Int[Tensor, "rows steps"],
    counts: Bool[Tensor, "rows steps"],
) -> Float[Tensor, ""]:
    """Mean of -ln P of the target tokens that count.

    Example:
        >>> probs = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]])
        >>> copy_loss(probs, torch.tensor([[0, 1]]), torch.tensor([[True, False]]))
        tensor(0.6931)
    """
    own = probs.gather(-1, targets[..., None]).squeeze(-1)
    return -own[counts].clamp(min=torch.finfo(own.dtype).tiny).log().mean()


@dataclass(frozen=True, kw_only=True)
class Training:
    """How training went.

    Attributes:
        losses: mean of each epoch.
        validation: loss after each epoch.
        best: the epoch whose weights were kept, from 0.
        left_out: pairs that were too long.
    """

    losses: tuple[float, ...]
    validation: tuple[float, ...]
    best: int
    left_out: int


def train_copy_model(
    model: CopyModel,
    tokenizer: Any,
    pairs: Sequence[Pair],
    validation: Sequence[Pair],
    *,
    epochs: int = 15,
    batch_size: int = 8,
    lr: float = 5e-5,
    warmup: int = 1000,
    patience: int = 3,
    longest: tuple[int, int] = LONGEST,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Training:
    """Trains a copy model on pairs, and leaves it with the weights of its best epoch, in eval mode.

    AdamW without decay of weights; the rate rises over the first `warmup` steps and falls to 0 at
    the end of the last epoch. Defaults are those of the authors' notebook. It cuts what is too long;
    here such a pair is left out, for its end would teach to stop early.

    Args:
        model: is changed.
        tokenizer: of its encoder-decoder. The marks of `compressor_input` are spelled as it can.
        pairs: of `compression_pairs`.
        validation: others, to stop by.
        epochs: at most.
        batch_size: pairs of one step.
        lr: highest rate.
        warmup: steps.
        patience: epochs without a better validation loss after which training stops.
        longest: tokens of a source and of its target.
        seed: of the order and of dropout; the global random state stays as it is.
        on_progress: called with steps done and all.

    Raises:
        OptionError: an option out of its range.
        InputError: no pair, or none that is short enough, to learn from or to validate with.

    Reference: CodePromptZip, 2025.
    """
    whole(1, epochs=epochs, batch_size=batch_size, patience=patience)
    whole(0, warmup=warmup)
    in_range(0, lr=lr)
    known, held = (_tokens(model, tokenizer, some, longest) for some in (pairs, validation))
    if not known or not held:
        raise InputError(
            f"{len(pairs)} pairs and {len(validation)} for validation, of which {len(known)} and "
            f"{len(held)} have at most {longest} tokens; expected one of each at least"
        )
    steps = epochs * math.ceil(len(known) / batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: _rate(at, warmup, steps))
    losses: list[float] = []
    checked: list[float] = []
    best: dict[str, Tensor] = {}
    device = model.model.device
    with global_chance(derive(seed, "copy", "dropout"), [device]):
        draw = generator(seed, "copy", "order")
        while len(losses) < epochs and len(losses) - _first_best(checked) <= patience:
            model.train()
            order = torch.randperm(len(known), generator=draw, device="cpu").tolist()
            total = 0.0
            for at in range(0, len(order), batch_size):
                batch = [known[place] for place in order[at : at + batch_size]]
                loss = _loss(model, batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += float(loss.detach()) * len(batch)
                if on_progress is not None:
                    on_progress(schedule.last_epoch, steps)
            losses.append(total / len(known))
            model.eval()
            checked.append(_validation(model, held, batch_size))
            if _first_best(checked) == len(checked) - 1:
                best = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(best)
    left_out = len(pairs) + len(validation) - len(known) - len(held)
    return Training(
        losses=tuple(losses),
        validation=tuple(checked),
        best=_first_best(checked),
        left_out=left_out,
    )


def _tokens(
    model: CopyModel, tokenizer: Any, pairs: Sequence[Pair], longest: tuple[int, int]
) -> list[Row]:
    """Pairs as tokens, each target with an end, without those that are too long."""
    ends = end_tokens(model.model, tokenizer)
    rows = [(read_code(model, tokenizer, a), read_code(model, tokenizer, b)) for a, b in pairs]
    rows = [(a, b if b and b[-1] in ends else [*b, *ends[:1]]) for a, b in rows]
    return [row for row in rows if all(map(_fits, row, longest))]


def _fits(tokens: list[int], most: int) -> bool:
    return 0 < len(tokens) <= most


def _loss(model: CopyModel, batch: Sequence[Row]) -> Float[Tensor, ""]:
    device, pad = model.model.device, model.model.config.pad_token_id or 0
    source, mask = padded_right([row for row, _ in batch], pad=pad, device=device)
    targets, counts = padded_right([row for _, row in batch], pad=pad, device=device)
    begin = torch.full_like(targets[:, :1], model.start)
    probs, _ = model(source, mask, torch.cat([begin, targets[:, :-1]], 1))
    loss = copy_loss(probs, targets, counts.bool())
    if not bool(loss.isfinite()):
        raise WorkFailed("the loss is not finite: training has diverged. Give a smaller lr.")
    return loss


@torch.no_grad()
def _validation(model: CopyModel, held: Sequence[Row], batch_size: int) -> float:
    parts = [held[at : at + batch_size] for at in range(0, len(held), batch_size)]
    return sum(float(_loss(model, part)) * len(part) for part in parts) / len(held)


def _rate(at: int, warmup: int, steps: int) -> float:
    """The share of the rate at a step: up over the first, down to 0 at the last."""
    if at < warmup:
        return at / warmup
    return max(0.0, (steps - at) / max(1, steps - warmup))


def _first_best(losses: Sequence[float]) -> int:
    return min(range(len(losses)), key=losses.__getitem__, default=0)
