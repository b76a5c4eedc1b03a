"""From a scenario to its segments: which sample is sent when, in which domain, how severe."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from testtime._core.seeds import generator
from testtime.streams.batches import Segment, visits
from testtime.streams.open_set import choose_strangers, held_out, strangers_for, weave
from testtime.streams.order import arrange, choose

if TYPE_CHECKING:
    from testtime.streams.scenarios import Scenario


def segments(
    scenario: "Scenario",
    labels: Int[Tensor, " n"],
    *,
    seed: int,
    strangers: Sequence[Int[Tensor, " positions"]] = (),
) -> list[Segment]:
    """The segments of a stream, from the labels of the data set alone.

    The samples are chosen once, so that all domains send the same images; their order is drawn anew
    for every visit.

    Args:
        scenario: the record.
        labels: (n,) of the data set.
        seed: of the choice and of the order.
        strangers: positions of the unknown samples of each kind.
    """
    known = ~torch.isin(
        labels, torch.tensor(held_out(scenario.unknown), dtype=torch.long, device="cpu")
    )
    chosen = _chosen(scenario, labels, known.nonzero().flatten(), seed=seed)
    if scenario.pattern == "mixed":
        closed = [
            _mixture(scenario, labels, chosen, visit=visit, seed=seed)
            for visit in range(scenario.rounds)
        ]
    else:
        names = scenario.domains * scenario.rounds
        closed = [
            _visit(scenario, labels, chosen, name, visit=visit, seed=seed)
            for name, visit in zip(names, visits(names), strict=True)
        ]
    if not strangers:
        return closed
    count = strangers_for(len(chosen), scenario.unknown_share)
    picked = choose_strangers(strangers, count, generator=generator(seed, "unknown", "choice"))
    return [_opened(segment, picked, len(chosen), seed=seed) for segment in closed]


def _opened(segment: Segment, picked: Tensor, known: int, *, seed: int) -> Segment:
    """A segment with the unknown samples in it, as often as the known ones come."""
    chance = generator(seed, "unknown", "order", *segment.names, segment.visit)
    return weave(segment, picked.repeat(len(segment.indices) // known), generator=chance)


def _chosen(scenario: "Scenario", labels: Tensor, known: Tensor, *, seed: int) -> Tensor:
    """Positions of the known samples that every domain sends."""
    own = choose(
        labels[known],
        distribution=scenario.distribution,
        ratio=scenario.ratio,
        samples=scenario.samples,
        generator=generator(seed, "choice"),
    )
    return known[own]


def severity_ramp(samples: int, *, peak: int) -> Int[Tensor, " samples"]:
    """Severities 1, 2, …, peak, …, 2, 1 along a domain, in 2 peak − 1 runs of nearly equal length.

    Example:
        >>> severity_ramp(10, peak=3).tolist()
        [1, 1, 2, 2, 3, 3, 2, 2, 1, 1]
    """
    step = torch.arange(samples, device="cpu") * (2 * peak - 1) // samples
    return peak - (step - (peak - 1)).abs()


def _visit(
    scenario: "Scenario", labels: Tensor, chosen: Tensor, name: str, *, visit: int, seed: int
) -> Segment:
    """One stay in one domain."""
    chance = generator(seed, "order", name, visit)
    order = arrange(labels[chosen], order=scenario.labels, delta=scenario.delta, generator=chance)
    severities = torch.full_like(chosen, scenario.severity)
    if scenario.pattern == "gradual":
        severities = severity_ramp(len(chosen), peak=scenario.severity)
    if name == "clean":
        severities = torch.zeros_like(chosen)
    return Segment((name,), visit, chosen[order], torch.zeros_like(chosen), severities)


def _mixture(
    scenario: "Scenario", labels: Tensor, chosen: Tensor, *, visit: int, seed: int
) -> Segment:
    """All domains at once: their samples are pooled, then ordered as one domain's would be."""
    count = len(scenario.domains)
    indices = chosen.repeat(count)
    domains = torch.arange(count, device="cpu").repeat_interleave(len(chosen))
    levels = [0 if name == "clean" else scenario.severity for name in scenario.domains]
    order = arrange(
        labels[indices],
        order=scenario.labels,
        delta=scenario.delta,
        generator=generator(seed, "order", "mixed", visit),
    )
    severities = torch.tensor(levels, device="cpu")[domains]
    return Segment(scenario.domains, visit, indices[order], domains[order], severities[order])
