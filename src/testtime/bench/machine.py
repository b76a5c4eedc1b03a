"""The machine that a cell runs on: what it is, and how much of its memory the cell takes."""

import os
import platform
import resource
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch

from testtime._core.errors import InputError


def check_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        InputError: there is none here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).tolist()  # which meta cannot
    except Exception as error:  # a backend that is not there raises what it likes
        said = str(error).partition("\n")[0]
        known = "cpu, or cuda" if torch.cuda.is_available() else "cpu"
        raise InputError(f"there is no device {name!r} here: {said}. Give {known}.") from error
    return device


def describe_machine(device: torch.device) -> str:
    """Processor or GPU in words, for those who read timings later."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {platform.system()}"
    return f"{_processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


@contextmanager
def torch_threads(count: int) -> Generator[None, None, None]:
    """So many threads inside of the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class PeakMemory:
    """The most memory that was held since this was made, in megabytes: model, data, all.

    On CUDA what the allocator of torch held at its peak. On the CPU the peak of the process beyond
    what it held at first, code that was read in since left out where the system tells (Linux). It
    is that of a cell only in a process where nothing ran before: `run` gives each cell its own.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.first = 0.0
        else:
            self.first = _status("RssAnon") or _peak()

    def megabytes(self) -> float:
        """The peak until now."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return max(0.0, _peak() - _status("RssFile") - self.first)


def _peak() -> float:
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (2**20 if sys.platform == "darwin" else 2**10)


def _status(name: str) -> float:
    """A size that Linux tells of this process; 0 elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 2**10
