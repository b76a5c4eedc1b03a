"""Statistical rules of training data: learnt from quantiles, readable, and counted where broken.

Two kinds. An interval says where a statistic lies for examples of a class: "for class k: lo <= s <=
hi", or nested, "for class k and s1 in its quartile q: lo <= s2 <= hi". A class rule says which class
examples have: "if s > t then class k", and how well that holds, as an interval of its F1 score.
Class rules are tables: dictionaries of tensors, one row a rule.
"""

import json
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from testtime._core.errors import InputError

CUTS = (5, 20, 35, 50, 65, 80, 95)
"""Percentiles at which a feature is cut into predicates; of the code for tabular data."""

SIZE = 4_000_000
"""Values that are looked at together, so that wide inputs fit into memory."""

COLUMNS = {"feature": int, "above": bool, "threshold": float, "label": int, "low": float,
           "high": float}  # fmt: skip
"""Columns of a table of class rules."""

Rules = dict[str, Tensor]
"""Class rules: `feature`, `above`, `threshold`, `label`, `low` and `high`, each (R,)."""


class Intervals(NamedTuple):
    """Where each feature lies for each class: low and high, both (C, F); NaN for unseen classes."""

    low: Float[Tensor, "classes features"]
    high: Float[Tensor, "classes features"]


def quantile_intervals(
    values: Float[Tensor, "n features"],
    labels: Int[Tensor, " n"],
    *,
    classes: int,
    coverage: float = 98.0,
) -> Intervals:
    """For each class the interval that holds the middle `coverage` percent of each feature.

    Example:
        >>> values, labels = torch.arange(101.0)[:, None], torch.zeros(101, dtype=torch.long)
        >>> [float(end) for end in quantile_intervals(values, labels, classes=1)]
        [1.0, 99.0]
    """
    tail = values.new_tensor([(100 - coverage) / 200, (100 + coverage) / 200])
    ends = values.new_full((2, classes, values.shape[1]), torch.nan)
    for label in labels.unique().tolist():
        own = values[labels == label]
        for part, place in _parts(own):
            ends[:, label, place] = part.quantile(tail, dim=0)
    return Intervals(ends[0], ends[1])


def outside(
    values: Float[Tensor, "n features"], labels: Int[Tensor, " n"], rules: Intervals
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """How many intervals of its class each example leaves, and by how much in all.

    Example:
        >>> rules = Intervals(torch.zeros(1, 2), torch.ones(1, 2))
        >>> outside(torch.tensor([[0.5, 3.0]]), torch.tensor([0]), rules)
        (tensor([1]), tensor([2.]))
    """
    low, high = rules.low[labels], rules.high[labels]
    distance = torch.maximum(low - values, values - high).nan_to_num(nan=0).clamp(min=0)
    return (distance > 0).sum(1), distance.sum(1)


def trusted(
    rules: Intervals, held: Intervals, *, overlap: float = 0.8, limit: int | None = None
) -> Intervals:
    """The intervals that a validation split confirms; the others are NaN, which nothing leaves.

    One is kept when its intersection with that of the validation split is longer than `overlap` of
    their union, and its width is between 0 and 1, as the paper's statistics are; of each class the
    `limit` that overlap most.

    Args:
        rules: of the training split.
        held: of the validation split, found alike.
        overlap: 0.8, and 0.6 for ImageNet-X (code).
        limit: rules of a class; None keeps all.

    Example:
        >>> one = Intervals(torch.zeros(1, 2), torch.tensor([[0.5, 0.5]]))
        >>> other = Intervals(torch.zeros(1, 2), torch.tensor([[0.45, 0.3]]))
        >>> trusted(one, other).high
        tensor([[0.5000,    nan]])
    """
    width = rules.high - rules.low
    shared = torch.minimum(rules.high, held.high) - torch.maximum(rules.low, held.low)
    union = torch.maximum(rules.high, held.high) - torch.minimum(rules.low, held.low)
    alike = (shared.clamp(min=0) / union).nan_to_num(nan=0)
    kept = (alike > overlap) & (width > 0) & (width < 1)
    if limit is not None:
        flat = torch.where(kept, alike, -1.0).flatten(1)
        best = flat.argsort(dim=1, descending=True, stable=True)[:, :limit]
        kept = kept & torch.zeros_like(flat).scatter(1, best, 1.0).bool().view_as(kept)
    return Intervals(*(end.masked_fill(~kept, torch.nan) for end in rules))


class Nested(NamedTuple):
    """Where features lie for each class and each quartile of another feature.

    Attributes:
        edges: between the quartiles of each feature, for each class, (3, C, F).
        rules: of each class, first feature, quartile of it, and second feature, (C, F, 4, F).
    """

    edges: Float[Tensor, "3 classes features"]
    rules: Intervals


def nested_intervals(
    values: Float[Tensor, "n features"],
    labels: Int[Tensor, " n"],
    *,
    classes: int,
    coverage: float = 98.0,
    edges: Tensor | None = None,
) -> Nested:
    """For each class and each quartile of a feature the interval of each other feature.

    Args:
        values: (n, F) features; the rules are 4 F as many as without nesting, so few features.
        labels: (n,) classes.
        classes: C.
        coverage: percent of the samples that an interval holds.
        edges: of the quartiles; None finds them. Give those of the training split for validation.
    """
    if edges is None:
        edges = values.new_full((3, classes, values.shape[1]), torch.nan)
        for label in labels.unique().tolist():
            quarters = values.new_tensor([0.25, 0.5, 0.75])
            edges[:, label] = values[labels == label].quantile(quarters, dim=0)
    place = _quartiles(values, labels, edges)
    found = [
        quantile_intervals(values, 4 * labels + own, classes=4 * classes, coverage=coverage)
        for own in place.unbind(1)
    ]
    low, high = (torch.stack([each[end] for each in found], 1) for end in (0, 1))
    shape = (classes, 4, *low.shape[1:])
    rules = Intervals(low.view(shape).transpose(1, 2), high.view(shape).transpose(1, 2))
    itself = torch.eye(values.shape[1], dtype=torch.bool, device=values.device)[None, :, None]
    return Nested(edges, Intervals(*(end.masked_fill(itself, torch.nan) for end in rules)))


def outside_nested(
    values: Float[Tensor, "n features"], labels: Int[Tensor, " n"], nested: Nested
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """How many nested intervals each example leaves, and by how much in all.

    Example:
        >>> values = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
        >>> labels = torch.zeros(4, dtype=torch.long)
        >>> nested = nested_intervals(values, labels, classes=1)
        >>> outside_nested(torch.tensor([[0.0, 3.0]]), labels[:1], nested)
        (tensor([2]), tensor([6.]))
    """
    place = _quartiles(values, labels, nested.edges)
    first = torch.arange(values.shape[1], device=values.device)
    own = Intervals(*(end[labels[:, None], first, place] for end in nested.rules))
    distance = torch.maximum(own.low - values[:, None], values[:, None] - own.high)
    distance = distance.nan_to_num(nan=0).clamp(min=0)
    return (distance > 0).sum((1, 2)), distance.sum((1, 2))


def _quartiles(values: Tensor, labels: Tensor, edges: Tensor) -> Tensor:
    """The quartile (n, F), from 0 to 3, of each value among those of its class."""
    return (values > edges[:, labels]).sum(0)


def class_rules(
    values: Float[Tensor, "n features"],
    labels: Int[Tensor, " n"],
    groups: Int[Tensor, " n"],
    validation: Bool[Tensor, " n"],
    *,
    purity: float,
    validated: float,
    limit: int,
    coverage: float = 98.0,
) -> Rules:
    """Rules "if s > t then class k" and "if s <= t then class k" that hold on both splits.

    Features are cut at the percentiles `CUTS` of the training split. A rule is kept when more than
    `purity` of the matching training samples, and more than `validated` of the matching validation
    samples, are of class k; of each class the `limit` that match most. `low` and `high` are the
    percentiles of the rule's F1 score over groups of samples.

    Args:
        values: (n, F) features.
        labels: (n,) classes.
        groups: (n,) group of each sample, from 0 on.
        validation: (n,) whether a sample is of the validation split.
        purity: share of class k among training samples that match.
        validated: the same share among validation samples.
        limit: rules of a class.
        coverage: percent of groups whose F1 score lies in [low, high].
    """
    classes = int(labels.max()) + 1
    onehot = torch.nn.functional.one_hot(labels, classes).to(values)
    rows: list[Tensor] = []
    for part, place in _parts(values):
        cuts = part[~validation].quantile(values.new_tensor(CUTS) / 100, dim=0)
        new = torch.cat([torch.ones_like(cuts[:1]), cuts.diff(dim=0)]) != 0
        for level, fresh in zip(cuts, new, strict=True):
            for above in (True, False):
                match = ((part > level) == above).to(values)
                train = match[~validation].T @ onehot[~validation]
                held = match[validation].T @ onehot[validation]
                own, label = train.max(1)
                share = held.gather(1, label[:, None])[:, 0] / held.sum(1)
                good = fresh & (own / train.sum(1) > purity) & (share > validated)
                kept = good.nonzero().flatten()
                columns = (kept + place.start, torch.full_like(kept, above), level[kept],
                           label[kept], own[kept])  # fmt: skip
                rows.append(torch.stack([column.double() for column in columns], 1))
    table = torch.cat(rows)
    table = table[table[:, 4].argsort(descending=True, stable=True)]
    best = [table[table[:, 3] == label][:limit] for label in range(classes)]
    table = torch.cat(best)
    rules = {
        "feature": table[:, 0].long(),
        "above": table[:, 1].bool(),
        "threshold": table[:, 2].to(values.dtype),
        "label": table[:, 3].long(),
    }
    scores = _scores_by_group(values, labels, groups, rules)
    low, high = ((100 - coverage) / 200, (100 + coverage) / 200)
    rules["low"], rules["high"] = scores[0], scores[0]
    if scores.numel():  # there is a rule
        rules["low"] = scores.nanquantile(low, dim=0)
        rules["high"] = scores.nanquantile(high, dim=0)
    return rules


def _parts(values: Tensor) -> list[tuple[Tensor, slice]]:
    """Some columns at a time."""
    width = max(SIZE // max(len(values), 1), 1)
    places = [slice(start, start + width) for start in range(0, values.shape[1], width)]
    return [(values[:, place], place) for place in places]


def _scores_by_group(values: Tensor, labels: Tensor, groups: Tensor, rules: Rules) -> Tensor:
    """The F1 score of each rule in each group (G, R); NaN where it matches nothing."""
    found: list[Tensor] = []
    for group in range(int(groups.max()) + 1):
        own = groups == group
        match = matches(values[own], rules).to(values)
        hit = (labels[own, None] == rules["label"]).to(values)
        right, all_ = (match * hit).sum(0), match.sum(0)
        found.append(2 * right / (right + all_))  # 2 tp / (2 tp + fn)
    return torch.stack(found)


def matches(values: Float[Tensor, "n features"], rules: Rules) -> Bool[Tensor, "n rules"]:
    """Which samples each rule speaks of."""
    return (values[:, rules["feature"]] > rules["threshold"]) == rules["above"]


def violations(
    values: Float[Tensor, "n features"], labels: Int[Tensor, " n"], rules: Rules
) -> Int[Tensor, " rules"]:
    """How many samples break each rule: it speaks of them, and they are of another class.

    Example:
        >>> rules = rules_from_json('[{"if feature": 0, "is above": 0.5, "then class": 1, '
        ...                         '"with F1 from": 0.9, "to": 1.0}]')
        >>> violations(torch.tensor([[0.9], [0.8], [0.1]]), torch.tensor([1, 0, 0]), rules)
        tensor([1])
    """
    return (matches(values, rules) & (labels[:, None] != rules["label"])).sum(0)


def rules_to_json(rules: Rules) -> str:
    """Class rules as JSON that people can read, one rule a line; `rules_from_json` reads it.

    Example:
        >>> rules = {"feature": torch.tensor([3]), "above": torch.tensor([False]),
        ...          "threshold": torch.tensor([0.5]), "label": torch.tensor([1]),
        ...          "low": torch.tensor([0.75]), "high": torch.tensor([1.0])}
        >>> print(rules_to_json(rules))
        [
         {"if feature": 3, "is at most": 0.5, "then class": 1, "with F1 from": 0.75, "to": 1.0}
        ]
    """
    columns = [rules[name].tolist() for name in COLUMNS]
    lines = [
        json.dumps(
            {
                "if feature": feature,
                "is above" if above else "is at most": threshold,
                "then class": label,
                "with F1 from": low,
                "to": high,
            }
        )
        for feature, above, threshold, label, low, high in zip(*columns, strict=True)
    ]
    return "[\n " + ",\n ".join(lines) + "\n]" if lines else "[]"


def rules_from_json(text: str) -> Rules:
    """The class rules that `rules_to_json` wrote.

    Raises:
        InputError: the text is no JSON, or a rule lacks something.
    """
    try:
        rows = [
            (
                rule["if feature"],
                "is above" in rule,
                rule["is above"] if "is above" in rule else rule["is at most"],
                rule["then class"],
                rule["with F1 from"],
                rule["to"],
            )
            for rule in json.loads(text)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"these are no rules: {error}. Expected JSON as rules_to_json writes it."
        ) from error
    kinds = {int: torch.long, bool: torch.bool, float: torch.float32}
    return {
        name: torch.tensor([row[place] for row in rows], dtype=kinds[kind], device="cpu")
        for place, (name, kind) in enumerate(COLUMNS.items())
    }
