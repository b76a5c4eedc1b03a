"""What devices other than a CPU have besides tensors: streams of work, the wait for it, autocast."""

from typing import Any

import torch


def streams_of(device: torch.device) -> Any:
    """The module of torch that makes and tells streams of a device, as `torch.cuda`; None: it has none.

    Those of MPS do not count: their tensors cannot be marked as used in another stream.

    Example:
        >>> streams_of(torch.device("cpu")) is None, streams_of(torch.device("cuda")) is torch.cuda
        (True, True)
    """
    module = None if device.type in ("cpu", "mps") else getattr(torch, device.type, None)
    return module if hasattr(module, "current_stream") else None


def wait_for(device: torch.device) -> None:
    """Returns once the device has done all that it was given; on a CPU that is at once.

    Example:
        >>> wait_for(torch.device("cpu"))
    """
    there = torch.accelerator.is_available()
    found = torch.accelerator.current_accelerator() if there else None
    if found is not None and found.type == device.type:
        torch.accelerator.synchronize(device)


def is_autocasting(device: torch.device) -> bool:
    """Whether what runs on a device now is cast; of one that torch knows no autocast for it is not.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     is_autocasting(torch.device("cpu")), is_autocasting(torch.device("lazy"))
        (True, False)
    """
    known = torch.amp.is_autocast_available(device.type)
    return known and torch.is_autocast_enabled(device.type)
