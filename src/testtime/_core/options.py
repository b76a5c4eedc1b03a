"""Options are checked where they are given: of the right type, a number, and in range."""

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from testtime._core.errors import OptionError


def in_range(low: float, high: float = math.inf, /, **options: Any) -> None:
    """Refuses options that are no finite number from `low` to `high`.

    Example:
        >>> in_range(0, 1, momentum=0.9)
        >>> in_range(0, lr=-1.0)
        Traceback (most recent call last):
        testtime._core.errors.OptionError: lr is -1.0; expected a number, at least 0
    """
    for name, value in options.items():
        if not (_is_number(value) and math.isfinite(value) and low <= value <= high):
            bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise OptionError(f"{name} is {shown(value)}; expected a number, {bounds}")


def whole(low: int, /, **options: Any) -> None:
    """Refuses options that are no whole number of at least `low`, or one that 64 bits do not hold.

    Example:
        >>> whole(1, steps=1.5)
        Traceback (most recent call last):
        testtime._core.errors.OptionError: steps is 1.5; expected a whole number, at least 1
    """
    for name, value in options.items():
        if not (_fits(value, int) and value >= low):
            raise OptionError(f"{name} is {shown(value)}; expected a whole number, at least {low}")


def check_types(options: Mapping[str, Any], annotations: Mapping[str, Any]) -> None:
    """Refuses options that are not what their annotations say.

    NaN is no number, and no whole number is longer than 64 bits with its sign.
    """
    for name, value in options.items():
        kind = annotations[name]
        kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        if not any(_fits(value, kind) for kind in kinds):
            said = " or ".join(map(_say, kinds))
            raise OptionError(f"{name} is {shown(value)}; expected {said}")


def shown(value: Any) -> str:
    """The value as it is written; of a whole number that 64 bits do not hold, the length.

    Example:
        >>> shown(0.5), shown(2**63), shown([10**5000])
        ('0.5', 'too long a number (64 bits and a sign)', 'list too long to be shown')
    """
    if type(value) is int and not _in_64_bits(value):
        return f"too long a number ({value.bit_length()} bits and a sign)"
    try:  # Python writes out no whole number of more than 4300 digits
        return repr(value)
    except ValueError:
        return f"{type(value).__name__} too long to be shown"


def _in_64_bits(value: Any) -> bool:
    return -(2**63) <= value < 2**63


def _is_number(value: Any) -> bool:
    """Whether it is a real number, of a size that a float can have."""
    if type(value) is bool or not isinstance(value, Real):
        return False
    try:
        return not math.isnan(value)
    except OverflowError:
        return False


def _fits(value: Any, kind: Any) -> bool:
    origin = get_origin(kind)
    if kind is float:
        return _is_number(value)
    if kind is int:
        return type(value) is not bool and isinstance(value, Integral) and _in_64_bits(value)
    if kind is None:
        return value is None
    if origin is Literal:
        return value in get_args(kind)
    if kind is Callable or (origin is not None and origin is get_origin(Callable[..., Any])):
        return callable(value)
    plain = origin or kind
    return not isinstance(plain, type) or isinstance(value, plain)


def _say(kind: Any) -> str:
    names: dict[Any, str] = {float: "a number", int: "a whole number", NoneType: "None"}
    origin = get_origin(kind)
    if origin is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if origin is get_origin(Callable[..., Any]):
        return "a function"
    return names.get(kind) or getattr(kind, "__name__", str(kind))
