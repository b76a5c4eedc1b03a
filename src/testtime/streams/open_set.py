"""Samples of classes that a model does not know: where they come from, and where they are mixed in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, Dataset

from testtime._core.errors import OptionError, unknown
from testtime._core.seeds import generator
from testtime.streams.batches import UNKNOWN, Segment
from testtime.streams.data import ImageSet, digits, stack

MADE = ("blobs", "noise", "digits")
"""Kinds of unknown samples that do not come from the data set itself."""

HELD_OUT = "class:"
"""Before the label of a class of the data set that counts as unknown."""

LONGEST = 18
"""Digits of a label at most."""

CYCLE = 100_000
"""Images of a kind that is drawn; after as many they are sent again."""


def check_kinds(kinds: Sequence[str]) -> None:
    """Refuses kinds of unknown samples that do not exist.

    Raises:
        UnknownName: no kind has that name.
        OptionError: one stands there twice, or a class is no whole number.

    Example:
        >>> check_kinds(["blobs", "class:8"])
        >>> check_kinds(["blob"])
        Traceback (most recent call last):
        testtime._core.errors.UnknownName: no kind of unknown samples is called 'blob'; ...
    """
    for kind in kinds:
        if isinstance(kind, str) and kind.startswith(HELD_OUT):
            label = kind.removeprefix(HELD_OUT)
            if not label.isdecimal() or len(label) > LONGEST or str(int(label)) != label:
                raise OptionError(
                    f"{kind!r} holds no class out; expected its label, as {HELD_OUT}8."
                )
        elif kind not in MADE:
            raise unknown("kind of unknown samples", str(kind), (*MADE, f"{HELD_OUT}N"))
    if len(set(kinds)) < len(kinds):
        raise OptionError(f"unknown names a kind twice: {', '.join(kinds)}. Keep one of each.")


def held_out(kinds: Sequence[str]) -> list[int]:
    """Labels of the classes that are held out.

    Example:
        >>> held_out(["blobs", "class:8", "class:3"])
        [8, 3]
    """
    return [int(kind.removeprefix(HELD_OUT)) for kind in kinds if kind.startswith(HELD_OUT)]


@final
@dataclass(frozen=True)
class Drawn(Dataset[tuple[Tensor, int]]):
    """Images that are drawn when they are asked for, each from the seed and its place.

    Args:
        kind: "blobs" or "noise".
        channels: of an image.
        height: of an image.
        width: of an image.
        seed: of all of them.
    """

    kind: str
    channels: int
    height: int
    width: int
    seed: int

    def __len__(self) -> int:
        return CYCLE

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        chance = generator(self.seed, "unknown", self.kind, index)
        if self.kind == "noise":
            return torch.rand(
                self.channels, self.height, self.width, generator=chance, device="cpu"
            ), UNKNOWN
        shape = blobs(1, self.height, self.width, generator=chance)[0]
        return shape.expand(self.channels, -1, -1), UNKNOWN


def blobs(
    count: int, height: int, width: int, *, generator: torch.Generator
) -> Float[Tensor, "count 1 height width"]:
    """White shapes on black: smooth random fields, cut at their 70th percentile.

    Example:
        >>> shapes = blobs(3, 20, 20, generator=torch.Generator().manual_seed(0))
        >>> shapes.unique().tolist(), float(shapes.mean())
        ([0.0, 1.0], 0.3)
    """
    coarse = torch.randn(count, 1, 5, 5, generator=generator, device="cpu")
    field = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    return (field > field.flatten(1).quantile(0.7, 1).view(-1, 1, 1, 1)).float()


def with_strangers(
    dataset: Dataset[Any], labels: Int[Tensor, " n"], kinds: Sequence[str], *, seed: int
) -> tuple[Dataset[Any], list[Int[Tensor, " positions"]]]:
    """The data set with unknown samples behind its own, and the positions of each kind.

    Raises:
        OptionError: a class is held out that the data set does not have, or no class is left.
        MissingExtra: "digits" without scikit-learn.
    """
    known = labels[
        ~torch.isin(labels, torch.tensor(held_out(kinds), dtype=torch.long, device="cpu"))
    ]
    if not len(known):
        raise OptionError(f"{', '.join(kinds)} hold every class of the data set out. Keep one.")
    channels, height, width = stack(dataset, [0])[0].shape[1:]
    parts, positions, size = [dataset], list[Tensor](), len(labels)
    for kind in kinds:
        if kind.startswith(HELD_OUT):
            own = (labels == int(kind.removeprefix(HELD_OUT))).nonzero().flatten()
            if not len(own):
                raise OptionError(
                    f"{kind} is no class of the data set; it has "
                    f"{', '.join(map(str, labels.unique().tolist()))}."
                )
            positions.append(own)
            continue
        if kind == "digits":
            part: Dataset[Any] = _digits(channels, height, width)
        else:
            part = Drawn(kind, channels, height, width, seed)
        parts.append(part)
        count = len(part)
        positions.append(torch.arange(size, size + count, device="cpu"))
        size += count
    return (ConcatDataset(parts) if len(parts) > 1 else dataset), positions


def _digits(channels: int, height: int, width: int) -> ImageSet:
    """The handwritten digits of the test split, at another size and in as many channels."""
    own = digits(split="test").images
    own = F.interpolate(own, (height, width), mode="bilinear", align_corners=False).clamp(0, 1)
    return ImageSet(
        own.expand(-1, channels, -1, -1), torch.full((len(own),), UNKNOWN, device="cpu")
    )


def choose_strangers(
    positions: Sequence[Int[Tensor, " positions"]], count: int, *, generator: torch.Generator
) -> Int[Tensor, " count"]:
    """`count` positions, as many of each kind; those of a kind are gone through before one repeats.

    Example:
        >>> pools = [torch.arange(3), torch.arange(100, 200)]
        >>> chosen = choose_strangers(pools, 8, generator=torch.Generator())
        >>> sorted(chosen[chosen < 3].tolist())
        [0, 1, 2, ...]
    """
    chosen: list[Tensor] = []
    for place, own in enumerate(positions):
        due = len(range(place, count, len(positions)))
        rounds = -(-due // len(own))
        orders = [
            torch.randperm(len(own), generator=generator, device="cpu") for _ in range(rounds)
        ]
        chosen.append(
            own[torch.cat([*orders, torch.zeros(0, dtype=torch.long, device="cpu")])[:due]]
        )
    return torch.cat(chosen)


def strangers_for(known: int, share: float) -> int:
    """How many unknown samples make up `share` of a stream beside `known` samples.

    Example:
        >>> strangers_for(300, 0.25)
        100
    """
    return round(known * share / (1 - share))


def weave(segment: Segment, strangers: Int[Tensor, " m"], *, generator: torch.Generator) -> Segment:
    """The segment with unknown samples among the known ones, whose order stays as it is.

    The stretch is cut into as many runs of equal length as there are unknown samples, and each run
    holds one of them at a random place. So any batch has the share of unknown samples that the
    stream has, give or take one at either end, whatever its size. Each has the domain and the
    severity of the known sample before it.
    """
    count = len(strangers)
    if not count:
        return segment
    total = len(segment.indices) + count
    ends = torch.arange(count + 1, device="cpu") * total // count
    place = torch.rand(count, dtype=torch.float64, generator=generator, device="cpu") * ends.diff()
    strange = torch.zeros(total, dtype=torch.bool, device="cpu")
    strange[ends[:-1] + place.long()] = True
    before = ((~strange).cumsum(0) - 1).clamp(min=0)
    indices = segment.indices[before]
    indices[strange] = strangers[torch.randperm(count, generator=generator, device="cpu")]
    return Segment(
        segment.names,
        segment.visit,
        indices,
        segment.domains[before],
        segment.severities[before],
        strange,
    )
