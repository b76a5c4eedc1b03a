"""What is measured of answers, from logits and labels gathered over a domain."""

from typing import Any

import torch
from torch import Tensor

BINS = 15


def score(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Error in percent, NLL in nats, Brier score, calibration error, and reliability bins.

    Args:
        logits: (n, classes).
        labels: (n,).

    Example:
        >>> score(torch.tensor([[9.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 1]))["error"]
        50.0
    """
    log_probs = logits.double().log_softmax(-1)
    probs = log_probs.exp()
    confidence, answer = probs.max(-1)
    hit = (answer == labels).double()
    chosen = log_probs.gather(1, labels[:, None])[:, 0]
    target = torch.nn.functional.one_hot(labels, probs.shape[1]).double()
    bins = reliability(confidence, hit)
    gap = sum(b["count"] * abs(b["accuracy"] - b["confidence"]) for b in bins)
    return {
        "samples": len(labels),
        "error": 100 * float(1 - hit.mean()),
        "nll": -float(chosen.clamp(min=-1e4).mean()),
        "brier": float((probs - target).square().sum(1).mean()),
        "ece": gap / len(labels),
        "reliability": bins,
    }


def reliability(confidence: Tensor, hit: Tensor) -> list[dict[str, Any]]:
    """Count, mean confidence and accuracy of fifteen bins of equal width, but for empty ones."""
    place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    count = torch.bincount(place, minlength=BINS)
    sure = torch.bincount(place, confidence, minlength=BINS)
    right = torch.bincount(place, hit, minlength=BINS)
    return [
        {"count": int(n), "confidence": float(s / n), "accuracy": float(r / n)}
        for n, s, r in zip(count, sure, right, strict=True)
        if n
    ]


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record for each method, model and stream: means over domains, then over seeds.

    `error_std` is the standard deviation over seeds of the mean over domains (0 for one seed).
    """
    groups: dict[tuple[str, ...], dict[int, list[dict[str, Any]]]] = {}
    for row in rows:
        key = (row["model"], row["stream"], row["method"], row["options"])
        groups.setdefault(key, {}).setdefault(row["seed"], []).append(row)
    names = ("error", "nll", "brier", "ece", "clean_error", "seconds_per_batch",
             "forwards_per_sample", "backwards_per_sample", "peak_memory_mb")  # fmt: skip
    table = []
    for (model, stream, method, options), seeds in groups.items():
        means = {
            name: torch.tensor(
                [sum(r[name] for r in own) / len(own) for own in seeds.values()], dtype=torch.double
            )
            for name in names
        }
        table.append(
            {"model": model, "stream": stream, "method": method, "options": options}
            | {name: float(value.mean()) for name, value in means.items()}
            | {"error_std": float(means["error"].std(correction=0)), "seeds": len(seeds)}
        )
    return table
