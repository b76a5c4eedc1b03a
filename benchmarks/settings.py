"""What a method works on: experts where it weighs them, labels where it asks, source data."""

from typing import Any

import torch
from torch import Tensor, nn

import testtime as tt


class Heads(nn.Module):
    """A network with three experts on what it answers, for methods that weigh experts."""

    def __init__(self, model: nn.Module, classes: int) -> None:
        super().__init__()
        self.model = model
        self.heads = nn.ModuleList(nn.Linear(classes, classes) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        logits = self.model(x)
        return tuple(head(logits) for head in self.heads)


def setting(
    name: str, model: nn.Module, x: Tensor, size: int
) -> tuple[nn.Module, list[tuple[Tensor, Tensor]], dict[str, Any]]:
    """The model that a method takes, source data if it needs some, and options without a default.

    Args:
        name: of the method.
        model: a classifier.
        x: what serves as source data, with the model's predictions for labels.
        size: of its batches.
    """
    with torch.no_grad():
        logits = model(x)
    if name == "sade":
        torch.manual_seed(0)
        model = Heads(model, logits.shape[1]).eval()
    labels = logits.argmax(1)
    options: dict[str, Any] = {}
    if name == "simatta":
        options["oracle"] = lambda places, _: labels[places % len(labels)]
    needs = tt.methods()[name].needs
    pairs = zip(x.split(size), labels.split(size), strict=True)
    return model, list(pairs) if needs else [], options
