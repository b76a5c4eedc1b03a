"""What must be known of source data? Each need sums up batches of it, and is done in a pass.

A part that needs something lists it in `needs`; what was found is `known[need.name]` in the
evidence, a dictionary of tensors.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch.nn import functional as F

from testtime._core.arrays import at_least_single

if TYPE_CHECKING:
    from torch import Tensor

    from testtime.adaptation.knowledge import SourceBatch

    Known = dict[str, Tensor]
    """Tensors by name: sums while the pass goes on, afterwards what is known."""


class Need(Protocol):
    """Something to be known of source data, a frozen dataclass; equal needs are met once.

    A need that must see the data several times has an attribute `passes`.
    """

    @property
    def name(self) -> str:
        """What it is called in a file and in the evidence."""
        ...

    def add(self, total: "Known", batch: "SourceBatch") -> "Known":
        """The sums after one more batch; `total` is empty at first."""
        ...

    def finish(self, total: "Known", *, samples: int, batches: int) -> "Known":
        """What is known, from the sums over all batches of a pass."""
        ...


@dataclass(frozen=True)
class Fisher:
    """Fisher information of the tensors that adapt, from the model's own predictions.

        F_j = mean over batches of ( d/dtheta_j mean_i CE(argmax z_i, z_i) )^2

    Labels are not read. The squared gradient is that of the batch mean, as in EATA's code, so it
    depends on the batch size: use the stream's.

    Reference: Niu et al., Efficient Test-Time Model Adaptation without Forgetting, ICML 2022.
    """

    name: ClassVar[str] = "fisher"

    def add(self, total: "Known", batch: "SourceBatch") -> "Known":
        """Adds the squared gradients of a batch."""
        grads = batch.gradients(lambda z: F.cross_entropy(at_least_single(z), z.argmax(-1)))
        return {
            name: total[name] + grad.square() if name in total else grad.square()
            for name, grad in grads.items()
        }

    def finish(self, total: "Known", *, samples: int, batches: int) -> "Known":
        """Their mean over batches."""
        return {name: value / batches for name, value in total.items()}
