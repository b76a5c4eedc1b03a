"""testtime makes a trained model better while it is being used, without labels.

import testtime as tt
adapter = tt.adapt(model, "tent")
logits = adapter(x)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataclasses import replace

    from testtime import decode
    from testtime._core.errors import TesttimeError
    from testtime._core.registry import register
    from testtime.adaptation.adapter import Adapter
    from testtime.adaptation.api import adapt, methods
    from testtime.adaptation.events import Event
    from testtime.adaptation.fitting import fit_source
    from testtime.adaptation.knowledge import SourceKnowledge
    from testtime.adaptation.recipe import Recipe

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "Event",
    "Recipe",
    "SourceKnowledge",
    "TesttimeError",
    "adapt",
    "decode",
    "fit_source",
    "methods",
    "register",
    "replace",
]

_HOMES = {
    "Adapter": "testtime.adaptation.adapter",
    "Event": "testtime.adaptation.events",
    "Recipe": "testtime.adaptation.recipe",
    "SourceKnowledge": "testtime.adaptation.knowledge",
    "TesttimeError": "testtime._core.errors",
    "adapt": "testtime.adaptation.api",
    "decode": "testtime.decode",
    "fit_source": "testtime.adaptation.fitting",
    "methods": "testtime.adaptation.api",
    "register": "testtime._core.registry",
    "replace": "dataclasses",
}


def __getattr__(name: str) -> Any:
    # names are loaded when they are used, so that the command line's help need not load torch
    if name not in _HOMES:
        raise AttributeError(f"module 'testtime' has no attribute {name!r}")
    home = import_module(_HOMES[name])
    return home if _HOMES[name] == f"testtime.{name}" else getattr(home, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
