"""The stream itself: batches made on the fly, in bounded memory, repeatable to the bit."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from testtime._core.seeds import generator
from testtime.streams.corruptions import corrupt
from testtime.streams.data import stack
from testtime.streams.recorded import Recorded

UNKNOWN = -1
"""Label of a sample whose class the model does not know."""

BLOCK = 128
"""Images that are corrupted at once; noise belongs to a block, so batch size does not change it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What arrives at once.

    Attributes:
        inputs: (B, C, H, W) float in [0, 1].
        labels: (B,) long, for scoring only; -1 (`UNKNOWN`) where the class is an unknown one.
        domains: B names, one per sample.
        indices: (B,) long, position of each sample in the data set; unknown samples that are not
            of the data set have positions behind its own.
        reset: the scenario starts afresh here; who runs the stream then calls `adapter.reset()`.
    """

    inputs: Float[Tensor, "batch channels height width"]
    labels: Int[Tensor, " batch"]
    domains: tuple[str, ...]
    indices: Int[Tensor, " batch"]
    reset: bool = False


class Sample(NamedTuple):
    """Position in the data set, domain, severity (0 for "clean"), and whether it is unknown."""

    position: int
    domain: str
    severity: int
    unknown: bool = False


class Segment(NamedTuple):
    """A stretch of the stream that batches do not cross: one visit to a domain, or a mixture.

    `visit` counts how often its domains came before; `domains` holds places in `names`; `strange`
    marks samples of unknown classes, None for none.
    """

    names: tuple[str, ...]
    visit: int
    indices: Int[Tensor, " n"]
    domains: Int[Tensor, " n"]
    severities: Int[Tensor, " n"]
    strange: Bool[Tensor, " n"] | None = None


@final
class Stream:
    """The batches of a scenario on a data set; every iteration starts anew and gives the same.

    Images are read and corrupted in blocks of 128 positions when their batch comes, with noise that
    depends on seed, domain, severity, visit and block: memory is bounded, and the same image at the
    same place is the same to the bit whatever the batch size. `len` is the number of batches; the
    last batch of a segment may be smaller.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        segments: Sequence[Segment],
        *,
        batch_size: int,
        seed: int,
        resets: bool,
    ) -> None:
        self._dataset = dataset
        self._segments = tuple(segments)
        self._batch_size = batch_size
        self._seed = seed
        self._resets = resets

    def __len__(self) -> int:
        return sum(-(-len(s.indices) // self._batch_size) for s in self._segments)

    def __iter__(self) -> Iterator[Batch]:
        for segment in self._segments:
            yield from self._batches(segment)

    def order(self) -> list[Sample]:
        """Every sample in the order in which it is sent; no image is read."""
        return [
            Sample(position, segment.names[domain], severity, strange)
            for segment in self._segments
            for position, domain, severity, strange in zip(
                segment.indices.tolist(),
                segment.domains.tolist(),
                segment.severities.tolist(),
                _strange(segment).tolist(),
                strict=True,
            )
        ]

    def _batches(self, segment: Segment) -> Iterator[Batch]:
        held, images, labels = -1, torch.empty(0, device="cpu"), torch.empty(0, device="cpu")
        for start in range(0, len(segment.indices), self._batch_size):
            stop = min(start + self._batch_size, len(segment.indices))
            parts: list[tuple[Tensor, Tensor]] = []
            for block in range(start // BLOCK, (stop - 1) // BLOCK + 1):
                if block != held:
                    held, (images, labels) = block, self._block(segment, block)
                cut = slice(max(start - block * BLOCK, 0), stop - block * BLOCK)
                parts.append((images[cut], labels[cut]))
            yield Batch(
                inputs=torch.cat([part[0] for part in parts]),
                labels=torch.cat([part[1] for part in parts]),
                domains=tuple(segment.names[d] for d in segment.domains[start:stop].tolist()),
                indices=segment.indices[start:stop].clone(),
                reset=self._resets and start == 0,
            )

    def _block(self, segment: Segment, block: int) -> tuple[Tensor, Tensor]:
        """Corrupted images and labels of positions [128 block, 128 (block + 1))."""
        cut = slice(block * BLOCK, (block + 1) * BLOCK)
        kinds = torch.stack([segment.domains[cut], segment.severities[cut]])
        if isinstance(self._dataset, Recorded):
            images, labels = self._recorded(self._dataset, segment, segment.indices[cut], kinds)
        else:
            images, labels = stack(self._dataset, segment.indices[cut])
            self._corrupt(images, segment, kinds, block)
        return images, labels.masked_fill(_strange(segment)[cut].to(labels.device), UNKNOWN)

    def _corrupt(self, images: Tensor, segment: Segment, kinds: Tensor, block: int) -> None:
        """Corrupts images in place, each by its domain and severity."""
        for domain, severity in kinds.unique(dim=1).T.tolist():
            name = segment.names[domain]
            if name == "clean":
                continue
            mine = (kinds == kinds.new_tensor([[domain], [severity]])).all(dim=0)
            mine = mine.to(images.device)
            key = (self._seed, "noise", name, severity, segment.visit, block)
            noise = generator(*key, device=images.device)
            images[mine] = corrupt(images[mine], name, severity, generator=noise)

    @staticmethod
    def _recorded(
        dataset: Recorded, segment: Segment, indices: Tensor, kinds: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Images that were corrupted beforehand, each from where its domain and severity lie."""
        images, labels, order = list[Tensor](), list[Tensor](), list[Tensor]()
        for domain, severity in kinds.unique(dim=1).T.tolist():
            mine = (kinds == kinds.new_tensor([[domain], [severity]])).all(dim=0).nonzero()[:, 0]
            own = stack(dataset.at(segment.names[domain], severity), indices[mine])
            images.append(own[0])
            labels.append(own[1])
            order.append(mine)
        back = torch.cat(order).argsort()
        return torch.cat(images)[back], torch.cat(labels)[back]


def _strange(segment: Segment) -> Tensor:
    """Which samples are of unknown classes."""
    if segment.strange is None:
        return torch.zeros_like(segment.indices, dtype=torch.bool)
    return segment.strange


def kinds_of(segments: Sequence[Segment]) -> list[tuple[str, int]]:
    """Each domain with each of its severities, once."""
    found: dict[tuple[str, int], None] = {}
    for segment in segments:
        pairs = torch.stack([segment.domains, segment.severities]).unique(dim=1).T.tolist()
        found.update({(segment.names[domain], severity): None for domain, severity in pairs})
    return list(found)


def visits(names: Sequence[str]) -> list[int]:
    """How often each name came before.

    Example:
        >>> visits(["fog", "snow", "fog"])
        [0, 0, 1]
    """
    seen: Counter[str] = Counter()
    counts: list[int] = []
    for name in names:
        counts.append(seen[name])
        seen[name] += 1
    return counts
