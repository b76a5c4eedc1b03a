"""What an adapter tells of its steps, and what it has cost."""

from collections import deque
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from testtime._core.outcomes import Outcome

MANY = 4096
"""Values of a measure that are kept of any step but the latest."""


class Counts(NamedTuple):
    """What an adapter has done since it was built.

    `forwards` and `backwards` count samples that went through the model, so that
    `forwards / samples` is the number of forward passes for each sample. `skipped` are batches that
    could teach nothing, `spared` those that were not asked to, `distrusted` those that the source
    model answered because a guard did not trust what was learnt, or did not know yet.
    """

    steps: int = 0
    samples: int = 0
    forwards: int = 0
    backwards: int = 0
    updates: int = 0
    skipped: int = 0
    resets: int = 0
    spared: int = 0
    distrusted: int = 0

    def after(
        self,
        outcome: Outcome,
        *,
        samples: int,
        forwards: int,
        backwards: int,
        restored: bool,
        distrusted: bool,
    ) -> "Counts":
        """The counts after one more step."""
        return Counts(
            steps=self.steps + 1,
            samples=self.samples + samples,
            forwards=self.forwards + forwards,
            backwards=self.backwards + backwards,
            updates=self.updates
            + (outcome in (Outcome.ADAPTED, Outcome.UNSURE, Outcome.RECOVERED)),
            skipped=self.skipped + (outcome in (Outcome.NOTHING_RELIABLE, Outcome.NON_FINITE)),
            resets=self.resets + (restored or outcome is Outcome.RECOVERED),
            spared=self.spared + (outcome in (Outcome.NOT_DUE, Outcome.LIKE_SOURCE)),
            distrusted=self.distrusted + (distrusted and outcome is not Outcome.LIKE_SOURCE),
        )


@dataclass(frozen=True)
class Event:
    """One step: what became of it.

    Attributes:
        step: batches since the adapter was built, from 1.
        outcome: how the step ended.
        samples: samples in the batch.
        measured: what the method measured, by name; of methods for open-set streams also "outlier",
            a score (B,) for each sample, higher for those that are likely of no known class; of dense
            logits (B * H * W,), one for each pixel. Of more than 4096 values an adapter keeps those of
            its last step alone.
    """

    step: int
    outcome: Outcome
    samples: int
    measured: dict[str, Tensor | float | int | None]

    @property
    def loss(self) -> float | None:
        """The loss that was minimised, or None."""
        return self._number("loss")

    @property
    def entropy(self) -> float | None:
        """Mean entropy of the answers, in nats."""
        return self._number("entropy")

    @property
    def used(self) -> int:
        """Samples that taught."""
        return int(self._number("used") or 0)

    def _number(self, name: str) -> float | None:
        # numbers stay on their device until somebody looks, so that steps need not wait for them
        value = self.measured.get(name)
        return None if value is None else float(value)


def thin(events: deque[Event]) -> None:
    """The last event loses what is larger than `MANY` values.

    Example:
        >>> import torch
        >>> large = {"outlier": torch.zeros(9999), "used": 3}
        >>> events = deque([Event(1, Outcome.ADAPTED, 1, large)])
        >>> thin(events)
        >>> list(events[0].measured)
        ['used']
    """
    if events:
        large = {
            name
            for name, value in events[-1].measured.items()
            if isinstance(value, Tensor) and value.numel() > MANY
        }
        if large:
            kept = {n: value for n, value in events[-1].measured.items() if n not in large}
            events[-1] = replace(events[-1], measured=kept)
