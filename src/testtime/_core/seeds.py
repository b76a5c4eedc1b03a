"""Chance is explicit: every random part owns a generator, derived from a seed and a purpose."""

import hashlib
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from numbers import Integral

import torch

from testtime._core.errors import InputError, OptionError


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


def check_seed(seed: object) -> None:
    """Refuses what is no whole number; None, too, would be one seed and not chance.

    Example:
        >>> check_seed(None)
        Traceback (most recent call last):
        testtime._core.errors.OptionError: seed is None; expected a whole number.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise OptionError(f"seed is {seed!r:.60}; expected a whole number.")


def check_generator(generator: object) -> None:
    """Refuses what is no generator; None would draw from the global random state.

    Example:
        >>> check_generator(0)
        Traceback (most recent call last):
        testtime._core.errors.InputError: generator is 0; expected torch.Generator().manual_seed(...).
    """
    if not isinstance(generator, torch.Generator):
        raise InputError(
            f"generator is {generator!r}; expected torch.Generator().manual_seed(...)."
        )


@contextmanager
def global_chance(seed: int | None, devices: Iterable[torch.device]) -> Generator[None, None, None]:
    """For what draws from the global random state: it is put back after.

    Args:
        seed: of the state inside; None: as it is outside.
        devices: whose state it is besides that of the CPU; others are not touched, as
            `torch.manual_seed` would.

    Example:
        >>> before = torch.get_rng_state()
        >>> with global_chance(0, [torch.device("cpu")]):
        ...     _ = torch.rand(1)
        >>> torch.equal(torch.get_rng_state(), before)
        True
    """
    each = {"cpu": torch.default_generator}
    for device in devices:
        known = getattr(getattr(torch, device.type, None), "default_generators", ())
        if known:
            each[str(device)] = known[device.index or 0]
    before = {name: own.get_state() for name, own in each.items()}
    try:
        for own in each.values():
            if seed is not None:
                own.manual_seed(seed)
        yield
    finally:
        for name, state in before.items():
            each[name].set_state(state)
