"""What a monitor is: a detector is a value, its state is apart, and few verbs hold the two together."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from testtime._core.arrays import check_dense
from testtime._core.errors import InputError, StateError

State = dict[str, Tensor]
"""Everything a detector remembers, by name. A step never writes to an old state."""

R_co = TypeVar("R_co", covariant=True)


@dataclass(frozen=True)
class Alarm:
    """What a monitor says after a batch.

    Attributes:
        raised: whether the wealth has ever reached 1 / alpha; it stays raised until `reset`.
        log_wealth: natural logarithm of the wealth now, an e-process: under the null hypothesis
            its mean is at most 1 at any stopping time.
        parts: log wealth of each part (signal, class, stream) that the wealth is the mean of.
    """

    raised: Tensor
    log_wealth: Tensor
    parts: Tensor

    def __bool__(self) -> bool:
        return bool(self.raised.any())


class Detector(Protocol[R_co]):
    """What `Monitor` runs: a frozen value with a first state and a step."""

    def init(self) -> State:
        """The state before any data."""
        ...

    @property
    def step(self) -> Callable[..., tuple[State, R_co]]:
        """Takes the state and a batch; gives the state after it, and what is to be said of it."""
        ...


class Monitor(Generic[R_co]):
    """Holds a detector and its state while a stream goes by.

    Args:
        detector: what is watched for, e.g. `Independence`, `Exchangeability`, `Risk`, `Collapse`.

    Example:
        >>> from testtime.guard.risk import Risk
        >>> monitor = Monitor(Risk(bound=0.2))
        >>> bool(monitor.update(torch.full((8,), 0.1))), bool(monitor.update(torch.ones(8)))
        (False, True)
        >>> monitor.reset()
        >>> bool(monitor.update(torch.full((8,), 0.1)))
        False
    """

    def __init__(self, detector: Detector[R_co]) -> None:
        self.detector = detector
        self._state = detector.init()
        self._step = inspect.signature(detector.step)

    def update(self, *data: Tensor) -> R_co:
        """Takes a batch and says whether there is an alarm.

        Args:
            data: what the detector's `step` reads, e.g. scores, or x and y.

        Raises:
            InputError: the batch cannot be used, or is not so many tensors; the state is what it was.
        """
        try:
            self._step.bind(self._state, *data)
        except TypeError as error:
            name, reads = type(self.detector).__name__, list(self._step.parameters)[1:]
            raise InputError(
                f"{name} was given {len(data)} tensors; expected {', '.join(reads)}. A gate is shown "
                "one, entropies over ln C, which Risk and Exchangeability read."
            ) from error
        self._state, said = self.detector.step(self._state, *data)
        return said

    def reset(self) -> None:
        """Forgets the stream."""
        self._state = self.detector.init()

    def state_dict(self) -> State:
        """A copy of everything that is remembered."""
        return {name: value.clone() for name, value in self._state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on where `state_dict` was taken.

        What the detector was fitted to is not in the state, and of the same shapes cannot be told from
        another's: keep the detector, or fit it again to the same data.

        Raises:
            StateError: the state is of a detector of other shapes, or holds numbers that no state has:
                NaN, +inf, a count below 0. The own one is unchanged.
        """
        own = self.detector.init()
        if set(state) != set(own):
            raise StateError(
                f"the state holds {', '.join(sorted(state))}; {type(self.detector).__name__} "
                f"expects {', '.join(sorted(own))}. Load it into the detector it was taken from."
            )
        for name, value in state.items():
            given = _damage(value)
            if given:
                raise StateError(f"{name} is {given}; expected what state_dict gave, as tensors.")
            first = own[name]
            # a memory grows: it is empty at first, and of points of a shape that may not be known yet
            grows = not first.numel() and (first.dim() == 1 or first.shape[1:] == value.shape[1:])
            fits = grows or first.shape == value.shape
            if not fits or first.dtype != value.dtype:
                raise StateError(
                    f"{name} is {tuple(value.shape)} of {value.dtype}; expected "
                    f"{tuple(own[name].shape)} of {own[name].dtype}. The options differ."
                )
        # read back for a model on another device, it lies there; detectors compute where they begin
        self._state = {n: value.to(own[n].device, copy=True) for n, value in state.items()}


def _damage(value: Any) -> str:
    """What a state's tensor must not be, or nothing. A wealth that is NaN would never raise an alarm."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.device.type == "meta":
        return "on the device meta"
    if bool((value.isnan() | value.isposinf()).any()):
        return "NaN or +inf"
    counts = not value.is_floating_point() and value.dtype != torch.bool
    return "below 0" if counts and bool((value < 0).any()) else ""


def log_mean(log_wealth: Tensor) -> Tensor:
    """Logarithm of the mean wealth over the last dimension: a mean of e-processes is one.

    Example:
        >>> log_mean(torch.tensor([0.0, -torch.inf]))
        tensor(-0.6931)
    """
    return torch.logsumexp(log_wealth, -1) - torch.log(
        torch.tensor(log_wealth.shape[-1], dtype=log_wealth.dtype, device=log_wealth.device)
    )


def finite(name: str, values: Tensor) -> Tensor:
    """The values as float64 on the CPU; refuses NaN and infinite ones, and an empty batch.

    Raises:
        InputError: also where they are no tensor of real numbers.

    Example:
        >>> finite("scores", torch.tensor([1, 2])).dtype
        torch.float64
    """
    check_real(name, values)
    if values.numel() == 0:
        raise InputError(f"{name} is empty, {tuple(values.shape)}; expected at least one sample.")
    values = values.detach().to("cpu", torch.float64)
    if not bool(values.isfinite().all()):
        raise InputError(
            f"{int((~values.isfinite()).sum())} of {values.numel()} values of {name} are NaN or "
            "infinite; expected finite numbers. Leave these samples out, and count them."
        )
    return values


def check_real(name: str, values: Any) -> None:
    """Refuses what is no tensor of dense numbers, or one of complex ones.

    Example:
        >>> check_real("scores", [0.5])
        Traceback (most recent call last):
        testtime._core.errors.InputError: scores is of type list; expected a tensor of real numbers...
    """
    if not isinstance(values, Tensor) or values.is_complex():
        given = values.dtype if isinstance(values, Tensor) else f"of type {type(values).__name__}"
        raise InputError(
            f"{name} is {given}; expected a tensor of real numbers: torch.as_tensor(...)."
        )
    check_dense(name, values)
