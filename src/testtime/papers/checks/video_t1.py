"""Video-T1: more sampling makes better sequences, and a tree that is pruned early needs less of it."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import fmean

import torch
from torch import Tensor

from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.decode.frames import at_least_median, linear_search, tree_of_frames
from testtime.decode.search import Path, Step
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Sequences of 16 frames of four numbers, each frame near the one before; quality is nearness of "
    "the first and last frame to a wanted one, less the mean jump; verifiers see it with noise of "
    "0.1. Mean quality of linear search grows from 1 to 2, 5, 10 and 20 samples; trees with 8 and "
    "with 16 first frames, pruned at the median of frames 4, 9 and 13 and branched in two after it, "
    "are better than linear search that makes as many frames."
)
RUNS = 300
FRAMES = 16
PRUNED = 4, 9, 13
NOISE = 0.1


@register("check", paper="video-t1", name="video-t1")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Linear search and Tree-of-Frames at equal numbers of frames."""
    return reproduce(
        "video-t1", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


class Studio:
    """A generator of frames and a verifier of sequences, with one source of chance."""

    def __init__(self, chance: torch.Generator) -> None:
        self.chance = chance

    def extend(self, paths: Sequence[Path[Tensor]]) -> list[Step[Tensor]]:
        """The next frame: 0.9 times the last one, and noise that keeps the variance at 1."""
        noise = torch.randn(len(paths), 4, generator=self.chance)
        if paths[0].steps:
            last = torch.stack([path.steps[-1].content for path in paths])
            noise = 0.9 * last + 0.19**0.5 * noise
        return [Step(frame) for frame in noise]

    def verify(self, paths: Sequence[Path[Tensor]]) -> list[float]:
        """Quality so far, with noise."""
        noise = NOISE * torch.randn(len(paths), generator=self.chance)
        return (quality(paths) + noise).tolist()


def quality(paths: Sequence[Path[Tensor]]) -> Tensor:
    """Nearness of first and last frame to the wanted one, less the mean jump."""
    frames = torch.stack([torch.stack([step.content for step in path.steps]) for path in paths])
    wanted = torch.tensor([1.0, 0.0, 0.0, 0.0])
    far = (frames[:, [0, -1]] - wanted).norm(dim=-1).mean(1)
    return -far - frames.diff(dim=1).norm(dim=-1).sum(1) / max(1, frames.shape[1] - 1)


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Mean quality over runs, and frames that were made."""
    for samples in (1, 2, 5, 10, 20):
        yield f"linear, {samples} samples", linear(seed, samples)
    for first in (8, 16):
        branches = [first] + [2 if depth - 1 in PRUNED else 1 for depth in range(1, FRAMES)]
        found, frames = [], 0
        for run in range(RUNS):
            studio = Studio(generator(seed, "video-t1", "tree", first, run))
            stage = studio.verify, at_least_median
            tree = tree_of_frames(
                studio.extend, studio.verify, units=FRAMES, branches=branches,
                stages=dict.fromkeys(PRUNED, stage),
            )  # fmt: skip
            found.append(float(quality([tree.best])))
            frames = max(frames, tree.spent.steps)
        yield f"tree, {first} first frames", fmean(found)
        yield f"tree, {first} first frames, frames", float(frames)
        yield f"linear, as many frames as with {first}", linear(seed, -(-frames // FRAMES))


def linear(seed: int, samples: int) -> float:
    """Mean quality of linear search."""
    found = []
    for run in range(RUNS):
        studio = Studio(generator(seed, "video-t1", "linear", samples, run))
        best = linear_search(studio.extend, studio.verify, samples=samples, units=FRAMES).best
        found.append(float(quality([best])))
    return fmean(found)


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    grown = [found[f"linear, {samples} samples"] for samples in (1, 2, 5, 10, 20)]
    return all(low < high for low, high in pairwise(grown)) and all(
        found[f"tree, {first} first frames"] > found[f"linear, as many frames as with {first}"]
        for first in (8, 16)
    )
