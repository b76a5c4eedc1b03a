"""EAD: a small and a large model take turns, by the rolling entropy of the next token.

window of the last w entropies (bits, before any temperature) of the model that writes
H = mean of the window
wanted = large if H > tau else small
switch if another is wanted and at least d tokens were written since the last switch;
    the model that takes over first reads the tokens that it missed
write a token of the model that is active; the decision counts for the next token

Before the first token the small model reads the prompt, and its entropy there decides who writes
that token, so that tau = 0 is the large model alone and tau = inf the small one alone.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from testtime._core.errors import InputError, OptionError
from testtime._core.options import check_types, whole
from testtime._core.registry import register
from testtime.decode.caching import Reader
from testtime.decode.decoding import Job, Step, change, evaluating, forbidden
from testtime.decode.drawing import Drawer
from testtime.decode.methods.classical import heated
from testtime.decode.models import vocabulary_size
from testtime.decode.prompts import Prompts
from testtime.measures.entropy import entropy

Signal = Literal["active", "small"]


@dataclass(kw_only=True)
class Switch:
    """Who writes the next token: options, the window, and tokens since the last switch.

    Example:
        >>> switch = Switch(threshold=1.0, window=2, dwell=0)
        >>> [switch.large_next(bits) for bits in (0.5, 2.0, 1.0, 0.1)]
        [False, True, True, False]
    """

    threshold: float
    window: int
    dwell: int
    large: bool = False

    def __post_init__(self) -> None:
        self._seen: deque[float] = deque(maxlen=self.window)
        self._since: float = math.inf

    def begin(self, bits: float) -> bool:
        """Whether the large model writes the first token, by the small model's entropy there."""
        self.large = self._wanted(bits)
        return self.large

    def large_next(self, bits: float) -> bool:
        """Takes the entropy that a token was written at; returns whether the large model is next."""
        self._seen.append(bits)
        self._since += 1
        wanted = self._wanted(sum(self._seen) / len(self._seen))
        if wanted != self.large and self._since >= self.dwell:
            self.large, self._since = wanted, 0
        return self.large

    def _wanted(self, mean: float) -> bool:
        # an entropy may be 0 to the last bit, and a threshold of 0 still means the large model
        return mean > self.threshold or self.threshold == 0


@dataclass(frozen=True, kw_only=True)
class Switching:
    """The method; rows are written one after another, since each switches by itself."""

    threshold: float
    window: int
    dwell: int
    signal: Signal
    steps: tuple[Step, ...]
    draw: bool

    def run(self, job: Job) -> None:
        """Writes all rows.

        Raises:
            InputError: there is no large model, or it reads other tokens.
        """
        if job.large is None:
            raise InputError("ead needs a second model; give large=, of the same tokenizer.")
        if job.large.device != job.model.device:
            raise InputError(
                f"the small model is on {job.model.device} and the large one on "
                f"{job.large.device}; move both to one device."
            )
        with torch.no_grad(), evaluating(job.model), evaluating(job.large):
            for row, seed in enumerate(job.seeds):
                kept = job.prompts.mask[row].bool()
                one = Prompts(
                    job.prompts.ids[row : row + 1, kept], job.prompts.mask[row : row + 1, kept]
                )
                self._write(job, row, one, Drawer([seed] if self.draw else None))

    def _write(self, job: Job, row: int, prompt: Prompts, drawer: Drawer) -> None:
        readers = {False: Reader(job.model, prompt), True: Reader(job.large, prompt)}
        both = min(vocabulary_size(job.model), vocabulary_size(job.large))
        never = {False: forbidden(job.model), True: forbidden(job.large)}
        switch = Switch(threshold=self.threshold, window=self.window, dwell=self.dwell)
        tokens, counts = prompt.ids, {"large": 0, "small": 0, "switches": 0, "caught up": 0}
        active = switch.begin(_bits(readers[False].logits()))
        while True:
            counts["large" if active else "small"] += 1
            counts["caught up"] += (
                max(0, readers[active].waiting - 1) if tokens is not prompt.ids else 0
            )
            logits = readers[active].logits()
            signal = logits if self.signal == "active" else readers[False].logits()
            allowed = logits.clone()
            allowed[:, never[active]] = -math.inf
            allowed[:, both:] = -math.inf  # rows that only pad the vocabulary of one of them
            token = drawer(change(self.steps, tokens, allowed))
            if job.writing.add(row, int(token)):
                break
            tokens = torch.cat([tokens, token[:, None]], 1)
            for reader in readers.values():
                reader.push(token)
            was, active = active, switch.large_next(_bits(signal))
            counts["switches"] += was != active
        written = counts["large"] + counts["small"]
        job.writing.rows[row].numbers |= {
            "share of the large model": counts["large"] / written,
            "switches": float(counts["switches"]),
            "tokens read to catch up": float(counts["caught up"]),
        }


def _bits(logits: Tensor) -> float:
    return float(entropy(logits)) / math.log(2)


@register("decoding", paper="entropy-adaptive-decoding", needs=("large",))
def ead(
    *,
    threshold: float = 0.8,
    window: int = 5,
    dwell: int = 0,
    signal: Signal = "active",
    temperature: float = 0.0,
) -> Switching:
    """Switches between a small and a large model of one tokenizer by the rolling entropy.

    Args:
        threshold: tau in bits. The paper tunes it to a wanted share of the large model; 0.8 is that
            of our small check. 0 is the large model alone, infinity the small one alone.
        window: w, entropies that are averaged.
        dwell: d, tokens that a model writes at least before the next switch; the paper names no
            value that we know.
        signal: `active` takes the entropy of the model that writes, `small` always the small one's,
            which then reads every token.
        temperature: of the draw; 0 takes the most probable token.

    Example:
        >>> ead(threshold=1.5).window
        5

    Reference: Simonds, Entropy Adaptive Decoding: Dynamic Model Switching for Efficient Inference,
    2025.
    """
    check_types({"threshold": threshold, "signal": signal}, {"threshold": float, "signal": Signal})
    if threshold < 0:
        raise OptionError(f"threshold is {threshold}; expected bits, at least 0")
    whole(1, window=window)
    whole(0, dwell=dwell)
    return Switching(
        threshold=threshold, window=window, dwell=dwell, signal=signal,
        steps=heated(temperature) if temperature else (), draw=temperature != 0,
    )  # fmt: skip
