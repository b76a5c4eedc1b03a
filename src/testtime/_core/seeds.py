"""Chance is explicit: every random part owns a generator, derived from a seed and a purpose."""

import hashlib

import torch


def derive(seed: int, *purpose: object) -> int:
    """A seed of 63 bits that depends on `seed` and on every word of the purpose.

    Example:
        >>> derive(0, "fog") == derive(0, "fog"), derive(0, "fog") == derive(0, "snow")
        (True, False)
    """
    words = "\x1f".join([str(seed), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on `device` for one purpose."""
    return torch.Generator(device).manual_seed(derive(seed, *purpose))
