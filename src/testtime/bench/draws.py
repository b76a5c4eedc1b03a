"""Which samples are drawn from a data set: the same, in the same order, for every cell."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from testtime._core.seeds import generator
from testtime.streams.data import labels_of, stack

CLEAN_SAMPLES = 2000
"""Clean samples that the error after the stream is measured on, at most."""

SOURCE_SAMPLES = 2000
"""Source samples that a method may see before the stream, at most; 2000 as in EATA."""


def drawn(dataset: Dataset[Any], limit: int, *, without: Sequence[int] = ()) -> Tensor:
    """Positions of samples drawn over the whole set, none of the classes that are left out.

    Example:
        >>> from testtime.streams.data import load_data
        >>> drawn(load_data("fashion-mnist:sample"), 3).shape
        torch.Size([3])
    """
    labels = labels_of(dataset).cpu()
    index = torch.randperm(len(labels), generator=generator(0, "bench", "draw"), device="cpu")
    gone = torch.tensor(without, dtype=torch.long, device="cpu")
    return index[~torch.isin(labels[index], gone)][:limit]


def draw(
    dataset: Dataset[Any], limit: int, *, size: int, without: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """These samples in batches of a size."""
    index = drawn(dataset, limit, without=without)
    return (stack(dataset, part) for part in index.split(size))
