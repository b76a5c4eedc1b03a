"""Images at other scales and mirrored, whose answers for pixels are brought back to their places."""

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from testtime._core.arrays import at_least_single
from testtime._core.errors import InputError
from testtime.adaptation.outputs import read_logits, with_logits

if TYPE_CHECKING:
    from testtime.adaptation.evidence import Evidence

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
"""Of CoTTA's segmentation experiments; each view is there plain and mirrored."""
MODES = {3: "linear", 4: "bilinear", 5: "trilinear"}
"""How arrays are resized, by their number of dimensions."""


def resized(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """The same of another size, linearly between the middles of pixels; itself at its own size.

    Example:
        >>> resized(torch.tensor([[[0.0, 1.0]]]), (4,))
        tensor([[[0.0000, 0.2500, 0.7500, 1.0000]]])
    """
    if tuple(x.shape[2:]) == size:
        return x
    return F.interpolate(x, size, mode=MODES[x.dim()], align_corners=False)


def scaled_size(size: tuple[int, ...], scale: float) -> tuple[int, ...]:
    """A size at another scale, rounded up so that a power of two, up to 32, that halves a side does so
    there: what a network's strides divided, they divide again.

    Example:
        >>> scaled_size((540, 960), 0.75), scaled_size((64, 33), 0.5)
        ((408, 736), (32, 17))
    """
    steps = [math.gcd(side, 32) for side in size]
    return tuple(
        step * math.ceil(scale * side / step) for side, step in zip(size, steps, strict=True)
    )


def views_of(x: Tensor) -> Iterator[tuple[Tensor, bool]]:
    """The images at all scales, plain and mirrored, but for themselves; and whether mirrored."""
    size = tuple(x.shape[2:])
    for scale in SCALES:
        view = resized(x, scaled_size(size, scale))
        if scale != 1:
            yield view, False
        yield view.flip(-1), True


def averaged_pixels(
    evidence: "Evidence", teach: Callable[[Tensor], Any], *, threshold: float
) -> Any:
    """The teacher's output, with a mean over views for pixels of which the source model is not sure.

        p = softmax(teacher(x))                                     where max softmax(source(x)) >= p_th
        p = mean over scales s, plain and mirrored, of softmax(back(teacher(view_s(x))))       elsewhere

    Views are made only where a pixel of the batch is unsure.

    Args:
        evidence: of the batch.
        teach: runs the teacher.
        threshold: p_th, of a pixel's confidence; 1 and above averages all pixels.

    Raises:
        InputError: the batch holds no images, or the model takes them in one size alone.
    """
    x, output = evidence.inputs, teach(evidence.inputs)
    logits = read_logits(output)
    if x.dim() != logits.dim():
        raise InputError(
            f"images are scaled and mirrored for dense logits, and the batch of shape "
            f"{tuple(x.shape)} is answered with {tuple(logits.shape)}. threshold=0 makes no views."
        )
    unsure = torch.ones_like(logits[:, 0], dtype=torch.bool)
    if threshold < 1:
        confidence = at_least_single(evidence.source).softmax(-1).amax(-1)
        unsure = (confidence < threshold).view_as(unsure)
        if not float(evidence.ranks.sum(unsure.sum().float())):
            return output
    place = tuple(logits.shape[2:])
    total, count = at_least_single(logits).log_softmax(1), 1
    for view, mirrored in views_of(x):
        told = at_least_single(read_logits(_taught(teach, view, like=x)))
        back = resized(told.flip(-1) if mirrored else told, place)
        total, count = torch.logaddexp(total, back.log_softmax(1)), count + 1
    mean = (total - math.log(count)).to(logits.dtype)
    return with_logits(output, torch.where(unsure[:, None], mean, logits))


def _taught(teach: Callable[[Tensor], Any], view: Tensor, *, like: Tensor) -> Any:
    try:
        return teach(view)
    except (RuntimeError, ValueError, AssertionError) as error:
        if view.shape == like.shape:
            raise
        raise InputError(
            f"dense logits are averaged over images of several sizes, and the model, which takes "
            f"{tuple(like.shape)}, does not take {tuple(view.shape)}: {error}. threshold=0 makes no "
            "views; or let the model resize what it is given, and its answer back."
        ) from error
