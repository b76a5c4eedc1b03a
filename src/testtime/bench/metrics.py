"""What is measured of answers: sums over a domain, in bounded memory, and means over a run."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from testtime.measures.calibration import (
    brier_score,
    check_labels,
    negative_log_likelihood,
    reliability,
)
from testtime.measures.confidence import confidence
from testtime.measures.detection import auroc, fpr_at_95_tpr
from testtime.measures.open_set import h_score, oscr

BINS = 15

ENOUGH = 50
"""Samples that a class or a domain needs to count as the worst: one standard error of its error is
then 7 points at most."""

OPEN_SET = ("auroc", "fpr95", "oscr", "h_score")
"""The numbers of a row that tell of unknown classes; None where the stream has none."""

NOT_PACED = {"paced_error": None, "paced_share": None}
"""The numbers of a row that tell of a stream that does not wait; None where none was run."""

NO_CLASS = {"worst_class": None, "worst_class_error": None}
"""What a row tells of the worst class where no class has `ENOUGH` samples."""

OPTIONAL = (*OPEN_SET, *NOT_PACED, "worst_class_error")
"""The numbers that only some runs have."""

METRICS = (
    "error", "nll", "brier", "ece", "clean_error", "seconds_per_batch", "forwards_per_sample",
    "backwards_per_sample", "peak_memory_mb", *OPTIONAL,
)  # fmt: skip
"""The numbers of a row."""


SETTING = ("model", "data", "scenario", "device", "threads", "paced")
"""What rows share that may be compared."""


class Score:
    """Error, also by class, NLL, Brier score and calibration of answers that come batch by batch.

    Only sums are kept, in float64, so that a stream of any length takes no more memory. A row
    without a softmax (NaN, +inf) counts as an error, and leaves the other metrics without a value;
    without a sample none has one.

    Example:
        >>> score = Score()
        >>> score.add(torch.tensor([[9.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 1]))
        50.0
        >>> score.result()["samples"], score.result()["error"]
        (2, 50.0)
    """

    def __init__(self) -> None:
        self.samples = self.wrong = 0
        self.nll = self.brier = 0.0
        self.bins = torch.zeros(3, BINS, dtype=torch.float64, device="cpu")
        self.classes = torch.zeros(2, 1, dtype=torch.long, device="cpu")  # samples, errors

    def add(self, logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> float:
        """Takes a batch in; gives its error in percent.

        Raises:
            InputError: a label that the model has no class for.
        """
        check_labels(logits, labels, "logits")
        logits = logits.detach().cpu().double()
        hit = logits.argmax(1) == labels
        broken = ~logits.logsumexp(1).isfinite()
        hit &= ~broken
        wrong = len(labels) - int(hit.sum())
        self.samples, self.wrong = self.samples + len(labels), self.wrong + wrong
        own = [each.bincount(minlength=logits.shape[1]) for each in (labels, labels[~hit])]
        self.classes = self.classes + torch.stack(own)
        if bool(broken.any()):
            self.nll = self.brier = math.nan
        else:
            self._weigh(logits, labels, hit)
        return 100 * wrong / len(labels)

    def _weigh(self, logits: Tensor, labels: Tensor, hit: Tensor) -> None:
        self.nll += len(labels) * float(negative_log_likelihood(logits, labels))
        self.brier += len(labels) * float(brier_score(logits.softmax(1), labels))
        own = reliability(confidence(logits), hit, bins=BINS)
        self.bins += own.count * torch.stack(
            [torch.ones(BINS, dtype=torch.float64, device="cpu"), own.confidence, own.accuracy]
        )

    def result(self) -> dict[str, Any]:
        """Error in percent, NLL in nats, Brier score, calibration error, and reliability bins."""
        count, sure, right = self.bins.tolist()
        gap = sum(abs(s - r) for s, r in zip(sure, right, strict=True))
        samples = self.samples or math.nan
        return {
            "samples": self.samples,
            "error": 100 * self.wrong / samples,
            "nll": self.nll / samples,
            "brier": self.brier / samples,
            "ece": gap / samples if math.isfinite(self.nll + self.brier) else math.nan,
            "reliability": [
                {"count": int(n), "confidence": s / n, "accuracy": r / n}
                for n, s, r in zip(count, sure, right, strict=True)
                if n
            ],
        }


def worst_class(scores: Iterable[Score], names: Sequence[str] = ()) -> dict[str, Any]:
    """The class with the highest error, all scores taken together, and this error in percent.

    Classes with fewer than `ENOUGH` samples are left out; where that is all, there are no values. Of
    equals the first is named.

    Args:
        scores: of one model, as those of the domains of a stream.
        names: of the classes; their numbers by default.

    Example:
        >>> first, second = Score(), Score()
        >>> answers = torch.eye(2).repeat_interleave(30, 0)  # 30 times class 0, 30 times class 1
        >>> first.add(answers, torch.zeros(60, dtype=torch.long))
        50.0
        >>> second.add(answers, torch.ones(60, dtype=torch.long))
        50.0
        >>> second.add(answers[:30], torch.ones(30, dtype=torch.long))
        100.0
        >>> worst_class([first, second])
        {'worst_class': '1', 'worst_class_error': 66.66...}
    """
    none = torch.zeros(2, 1, dtype=torch.long, device="cpu")  # as of a score without a batch
    samples, wrong = sum((score.classes for score in scores), none).tolist()
    errors = {
        label: 100 * missed / count
        for label, (count, missed) in enumerate(zip(samples, wrong, strict=True))
        if count >= ENOUGH
    }
    if not errors:
        return NO_CLASS
    label = max(errors, key=errors.__getitem__)
    return {
        "worst_class": str(names[label] if names else label),
        "worst_class_error": errors[label],
    }


class Recognition:
    """How well samples of unknown classes are told apart, of scores that come batch by batch.

    These measures rank the samples, so that a score of each is kept. Where a score is no number, or
    no sample is known, they have no value; where none is unknown, `oscr` and `h_score` are the
    accuracy, and the others have none. `fpr95` is the share of unknown samples that are taken
    for known ones by the threshold that accepts 95 % of the known ones.

    Example:
        >>> known = Recognition()
        >>> unknown = torch.tensor([False, False, True])
        >>> known.add(torch.tensor([0.1, 0.5, 0.9]), torch.tensor([True, False, False]), unknown)
        >>> known.result()
        {'auroc': 1.0, 'fpr95': 0.0, 'oscr': 0.5, 'h_score': 0.66...}
    """

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(
        self, scores: Float[Tensor, " n"], hit: Bool[Tensor, " n"], unknown: Bool[Tensor, " n"]
    ) -> None:
        """Takes a batch in: scores, higher for unknown samples, and whether answers are right."""
        self.parts.append((scores.detach().cpu().float(), hit, unknown))

    def result(self) -> dict[str, float | None]:
        """The measures by name."""
        scores, hit, unknown = map(torch.cat, zip(*self.parts, strict=True))
        found: dict[str, float | None] = dict.fromkeys(OPEN_SET)
        if bool(scores.isnan().any()) or bool(unknown.all()):
            return found
        scores = scores.double()
        if bool(unknown.any()):
            found["auroc"] = float(auroc(scores, unknown))
            found["fpr95"] = float(fpr_at_95_tpr(-scores, ~unknown))
        found["oscr"] = float(oscr(scores, hit, unknown))
        found["h_score"] = float(h_score(scores, hit, unknown))
        return found


def setting(row: dict[str, Any]) -> tuple[Any, ...]:
    """What rows share that may be compared: model, data, the whole stream, and how it was run."""
    return tuple(row.get(name) for name in SETTING)


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record for each method with its options in each setting: means over domains, then seeds.

    `error_std` is the standard deviation over seeds of the mean over domains (0 for one seed). What
    tells of the worst class or domain, of unknown classes, or of a stream that does not wait, is left
    out where no row has it. The worst class and domain are those of each seed, so that what one seed
    gives up is not hidden by others; `worst_class` names those of all seeds.
    """
    groups: dict[tuple[Any, ...], dict[int, list[dict[str, Any]]]] = {}
    for row in rows:
        key = (*setting(row), row["method"], row["options"])
        groups.setdefault(key, {}).setdefault(row["seed"], []).append(row)
    table: list[dict[str, Any]] = []
    for seeds in groups.values():
        first = next(iter(seeds.values()))[0]
        mine = [row for own in seeds.values() for row in own]
        absent = {
            name
            for kind in (OPEN_SET, tuple(NOT_PACED), ("worst_class_error",))
            if not any(math.isfinite(_number(r.get(name))) for r in mine for name in kind)
            for name in kind
        }
        means = {
            name: torch.tensor(
                [sum(_number(r.get(name)) for r in own) / len(own) for own in seeds.values()],
                dtype=torch.double,
                device="cpu",
            )
            for name in METRICS
            if name not in absent
        }
        domains = [_worst_domain(own) for own in seeds.values()]
        if any(map(math.isfinite, domains)):
            means["worst_domain_error"] = torch.tensor(domains, dtype=torch.double, device="cpu")
        worst = dict.fromkeys(row["worst_class"] for row in mine if row.get("worst_class"))
        same = (*SETTING, "stream", "method", "options")
        table.append(
            {name: first.get(name) for name in same}
            | {name: float(value.mean()) for name, value in means.items()}
            | {"error_std": float(means["error"].std(correction=0)), "seeds": len(seeds)}
            | {"worst_class": ", ".join(worst)}
        )
    return table


def _worst_domain(rows: Sequence[dict[str, Any]]) -> float:
    """The highest error of a domain with `ENOUGH` samples; NaN where there is one domain, or none has."""
    errors = [_number(row["error"]) for row in rows if row.get("samples", 0) >= ENOUGH]
    if len(rows) == 1 or not errors or any(map(math.isnan, errors)):
        return math.nan
    return max(errors)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def derived(record: dict[str, Any], source: dict[str, Any] | None) -> dict[str, Any]:
    """The record with `gain`, `relative` and `time` against the source; NaN where there is none."""
    if source is None:
        return record | {"gain": math.nan, "relative": math.nan, "time": math.nan}
    gain = source["error"] - record["error"]
    seconds = source["seconds_per_batch"]
    return record | {
        "gain": gain,
        "relative": gain / source["error"] if source["error"] > 0 else math.nan,
        "time": record["seconds_per_batch"] / seconds if seconds > 0 else math.nan,
    }


def ranked(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The records of each setting, the lowest error first, each `derived` from its source."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in summarise(rows):
        groups.setdefault(setting(record), []).append(record)
    tables: list[list[dict[str, Any]]] = []
    for records in groups.values():
        source = next((r for r in records if r["method"] == "source"), None)
        own = [derived(record, source) for record in records]
        tables.append(
            sorted(own, key=lambda r: r["error"] if math.isfinite(r["error"]) else math.inf)
        )
    return tables
