"""What an adapter is asked for as if it were a module, or a thing to copy: refused with the way out."""

from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from testtime._core.errors import StateError


class NoModule:
    """For what stands where a module stood: says what to call instead."""

    def __reduce__(self) -> Any:
        raise StateError(
            "an adapter is neither copied nor pickled. For a second stream of the same model call "
            "tt.adapt(model, adapter.recipe) and restore(adapter.snapshot()); for a file use save "
            "and load, and export for a plain model."
        )

    if not TYPE_CHECKING:  # a type checker would believe that every name is there

        def __getattr__(self, name: str) -> NoReturn:
            said = f"{type(self).__name__!r} object has no attribute {name!r}"
            if hasattr(nn.Module, name):
                said += (
                    f". It is no module: what it was given keeps its mode, device and weights. Call {name} "
                    "of the model before tt.adapt, or of adapter.export(), the module with what was "
                    "learnt; adapter.save and adapter.load are for what was learnt alone."
                )
            raise AttributeError(said)
