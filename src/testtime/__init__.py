"""testtime makes a trained model better while it is being used, without labels.

import testtime as tt
adapter = tt.adapt(model, "tent")
logits = adapter(x)
"""

from dataclasses import replace

from testtime._core.errors import TesttimeError
from testtime.adaptation.adapter import Adapter
from testtime.adaptation.api import adapt, methods
from testtime.adaptation.events import Event
from testtime.adaptation.knowledge import SourceKnowledge, fit_source
from testtime.adaptation.recipe import Recipe

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "Event",
    "Recipe",
    "SourceKnowledge",
    "TesttimeError",
    "adapt",
    "fit_source",
    "methods",
    "replace",
]
