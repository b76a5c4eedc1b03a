"""Every run is the same: one thread, one terminal, and examples that depend on their test alone."""

import gc
import os
import sys

# a run starts dozens of processes: each would compile torch anew where no bytecode is kept
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from hypothesis.internal.conjecture.providers import HypothesisProvider  # noqa: E402
from hypothesis.internal.constants_ast import Constants  # noqa: E402

torch.set_num_threads(1)  # tests run side by side: more threads would only wait for each other

os.environ["COLUMNS"] = "80"  # what is printed has this width, and no colours, for whoever runs it
for name in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS", "TERMINAL_WIDTH", "TTY_COMPATIBLE"):
    os.environ.pop(name, None)

clockless = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True, database=None
)
settings.register_profile("same", clockless, derandomize=True)
settings.register_profile("search", clockless, derandomize=False)  # for --hypothesis-seed=N
settings.load_profile("same")


def pytest_sessionstart() -> None:
    """Keeps constants of loaded modules out of the examples, unless a search is on.

    Which modules are loaded depends on the tests that came before, and no setting leaves their
    constants out. `test_examples.py` tells when this is no longer the way.
    """
    if settings.default.derandomize:
        HypothesisProvider._local_constants = Constants()


def pytest_collection_finish() -> None:
    """What is loaded by now stays: the garbage collector need not look through it again."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Gives back what `freeze` kept, so that modules can take leave in order."""
    gc.unfreeze()
