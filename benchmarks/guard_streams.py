"""What the guard is tried on: source models, streams by name, and the methods of each."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Subset

from testtime.bench.models import load_model
from testtime.papers.digits import CORRUPTIONS, correlated, digits, trained
from testtime.papers.digits import stream as shuffled
from testtime.streams.data import labels_of, load_data
from testtime.streams.scenarios import Scenario

DOMAINS = "domains=impulse_noise+zoom_blur+frost+brightness+glass_blur+clean"
STREAMS = {
    "clean": "stationary,domains=clean,samples=1000",
    "stationary": "stationary,domains=impulse_noise,samples=1000",
    "reset": f"reset,{DOMAINS},samples=500",
    "continual": f"continual,{DOMAINS},samples=500",
    "continual, 16": f"continual,{DOMAINS},samples=300,batch_size=16",
    "gradual": "gradual,domains=impulse_noise+frost,samples=200",
    "recurring": "recurring,domains=zoom_blur+frost+clean,samples=300",
    "mixed": f"mixed,{DOMAINS},samples=500",
    "dirichlet": f"dirichlet,{DOMAINS},samples=500",
    "sorted": f"sorted,{DOMAINS},samples=500",
    "sorted, 16": f"sorted,{DOMAINS},samples=300,batch_size=16",
    "long-tailed": f"long-tailed,{DOMAINS},samples=500",
    "inverse": f"inverse,{DOMAINS},samples=500",
    "single": f"single,{DOMAINS},samples=60",
    "open-set": f"open-set,{DOMAINS},samples=300",
    "garbage": f"continual,{DOMAINS},samples=100,unknown=noise,unknown_share=0.9",
    "fog": "stationary,domains=fog,samples=1000",
    "contrast": "stationary,domains=contrast,samples=1000",
    "three classes": f"continual,{DOMAINS},samples=300",
    "two classes": f"continual,{DOMAINS},samples=300",
    "one class": f"continual,{DOMAINS},samples=150",
}
CLASSES = {"three classes": (2, 5, 7), "two classes": (4, 7), "one class": (3,)}
"""Stream -> the classes that come; all where none are named."""
DIGITS = {
    **{name: (name,) for name in CORRUPTIONS},
    "continual": CORRUPTIONS,
    "dirichlet": ("contrast", "fog", "invertmix"),
}
"""Stream of the digits -> its corruptions, one after the other."""
METHODS = {
    "embedded:batch": ("bn-adapt", "tent", "tent 10x", "sar", "deyo", "rotta", "lame"),
    "embedded:group": ("tent", "tent 10x", "sar", "deyo", "lame"),
    "digits:batch": ("bn-adapt", "tent", "tent 10x", "sar", "rotta", "lame"),
    "digits:group": ("tent", "tent 10x", "sar", "lame"),
}
OPTIONS: dict[str, dict[str, Any]] = {"tent 10x": {"lr": 1e-2}}


def streams_of(model: str) -> Sequence[str]:
    """Names of the streams that a model is sent."""
    return list(DIGITS if model.startswith("digits:") else STREAMS)


def source_of(model: str) -> torch.nn.Module:
    """The source model of that name."""
    norm = model.removeprefix("digits:")
    return load_model(model) if norm == model else trained(0, norm=norm)


def sent(model: str, stream: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, bool]]:
    """Inputs and labels of each batch, and whether the adapter is reset before it."""
    if not model.startswith("digits:"):
        data = load_data("fashion-mnist:sample")
        if stream in CLASSES:
            chosen = torch.isin(labels_of(data), torch.tensor(CLASSES[stream]))
            data = Subset(data, chosen.nonzero()[:, 0].tolist())
        for batch in Scenario.parse(STREAMS[stream]).stream(data, seed=2):
            yield batch.inputs, batch.labels, batch.reset
        return
    held = digits(0, "test")
    for name in DIGITS[stream]:
        ordered = (
            correlated(held, name, seed=0, delta=0.1)
            if stream == "dirichlet"
            else shuffled(held, name, seed=0, repeats=2)
        )
        for part in ordered:
            yield part.images, part.labels, False
