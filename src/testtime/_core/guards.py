"""A guard says whether what an adapter learnt may answer; monitors of other rooms are guards."""

from typing import Any, Protocol

from torch import Tensor


class Guard(Protocol):
    """Watches an adapted model beside its frozen source, and says when not to trust it.

    `testtime.guard.monitor.Monitor(Collapse(classes=...))` is a guard, and whatever else has these
    four methods. A guard belongs to one adapter, which keeps its state in its own, so that it is
    saved and restored. It is shown the samples for which both models' answers are numbers.
    """

    def update(self, adapted: Tensor, source: Tensor, /) -> Any:
        """Takes a batch in; true: the source model is to answer, and what was learnt is dropped.

        None: nobody knows yet; the source model is to answer, and the adapter goes on learning.

        Args:
            adapted: (n, C) logits of the adapted model.
            source: (n, C) logits of the source model for the same samples.
        """
        ...

    def reset(self) -> None:
        """Forgets the stream."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered: tensors, numbers and text by name, and lists and dictionaries of them."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Goes on where `state_dict` was taken; from a file, tensors come on the model's device."""
        ...
