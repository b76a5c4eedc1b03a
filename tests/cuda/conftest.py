"""On a GPU: `pytest -m cuda`. Where there is none these tests fail; other runs leave them out.

`TESTTIME_DEVICE` names another device than `cuda`, the CPU as well.
"""

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # products that repeat themselves
DEVICE = torch.device(os.environ.get("TESTTIME_DEVICE", "cuda"))


@pytest.fixture
def device() -> torch.device:
    """The device that is tested."""
    return DEVICE


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """Kernels that give the same bits each time, in full float32."""
    before = torch.backends.cudnn.allow_tf32
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32 = before
