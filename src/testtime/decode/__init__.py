"""Language models at test time: sampling, decoding, watermarks, search, compression."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from testtime.decode.api import decodings, generate, stream
    from testtime.decode.models import load_language_model

__all__ = ["decodings", "generate", "load_language_model", "stream"]

_HOMES = {
    "decodings": "testtime.decode.api",
    "generate": "testtime.decode.api",
    "load_language_model": "testtime.decode.models",
    "stream": "testtime.decode.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'testtime.decode' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
