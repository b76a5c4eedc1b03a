"""Runs a user's model and gives it back as it was."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn


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
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)), torch.inference_mode(False):
        try:
            model.eval()
            if seed is not None:  # not torch.manual_seed, which seeds other devices, too
                torch.random.default_generator.manual_seed(seed)
                for index in devices:
                    torch.cuda.default_generators[index].manual_seed(seed)
            with torch.set_grad_enabled(keep_grad):
                yield
        finally:
            for module, mode in modes.items():
                module.training = mode
