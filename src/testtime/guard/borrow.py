"""Runs a user's model and gives it back as it was."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn

from testtime._core.seeds import global_chance


@contextmanager
def borrowed(
    model: nn.Module, *, keep_grad: bool = False, seed: int | None = None
) -> Generator[None, None, None]:
    """The model in eval mode and without gradients; then all flags and the random state as before.

    Args:
        model: of the user.
        keep_grad: record gradients, for those who perturb inputs.
        seed: of the random state inside; None: as it is outside.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
        >>> with borrowed(model):
        ...     model.training
        False
        >>> model.training, model[1].training
        (True, True)
    """
    modes = {module: module.training for module in model.modules()}
    devices = {p.device for p in model.parameters()}
    with global_chance(seed, devices), torch.inference_mode(False):
        try:
            model.eval()
            with torch.set_grad_enabled(keep_grad):
                yield
        finally:
            for module, mode in modes.items():
                module.training = mode
