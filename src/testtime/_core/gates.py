"""A gate says of each batch whether to learn from it; monitors of other rooms are gates."""

from typing import Any, Protocol

from torch import Tensor


class Gate(Protocol):
    """Watches what the source model answers, and says when an adapter should learn.

    The monitors of `testtime.guard` are gates, and whatever else has these four methods. A gate
    belongs to one adapter, which keeps its state in its own, so that it is saved and restored.
    """

    def update(self, values: Tensor, /) -> Any:
        """Takes a batch in; true: learn from it.

        Args:
            values: (n,) entropies of the source model's predictions over ln C, from 0 to 1.
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
