"""What is known of the source data, for one model: told, kept and saved."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from testtime._core.errors import StateError
from testtime._core.files import digest
from testtime.adaptation.tensor_files import open_tensors, write_tensors

FORMAT = "testtime-source-3"


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's tensors, names and values: whose state a file is."""
    return digest({k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)})


@dataclass(frozen=True)
class SourceKnowledge:
    """What is known of the source data, for one model; printed, it says what and how large.

    Attributes:
        model: fingerprint of the model.
        samples: source samples that were read.
        entries: what was needed -> tensors by name.
        methods: method -> what it needs of the entries.
        features: name of the layer whose input are the features; None where there is none.
    """

    model: str
    samples: int
    entries: dict[str, dict[str, Tensor]]
    methods: dict[str, tuple[str, ...]] = field(default_factory=dict)
    features: str | None = None

    def __getitem__(self, need: str) -> dict[str, Tensor]:
        return self.entries[need]

    def __contains__(self, need: object) -> bool:
        return need in self.entries

    def __str__(self) -> str:
        spoken_for = {need for needs in self.methods.values() for need in needs}
        beside = tuple(need for need in self.entries if need not in spoken_for)
        whole = sum(map(_bytes, self.entries.values()))
        lines = [f"of {self.samples} source samples, {_size(whole)}:"]
        for method, needs in {**self.methods, **({"gate=True": beside} if beside else {})}.items():
            parts = [f"{need} ({_contents(self.entries[need])})" for need in needs]
            lines.append(f"  {method}: {', '.join(parts) or 'needs nothing'}")
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Writes it as safetensors, wholly or not at all.

        Raises:
            StateError: when nothing can be written there.
        """
        tensors = {
            f"{need}/{name}": tensor.cpu().contiguous()
            for need, own in self.entries.items()
            for name, tensor in own.items()
        }
        plain = [self.model, self.samples, list(self.entries), self.methods, self.features]
        write_tensors(path, tensors, {"format": FORMAT, "about": json.dumps(plain)})

    @staticmethod
    def load(path: str | Path) -> "SourceKnowledge":
        """Reads what `save` wrote.

        Raises:
            StateError: when there is no file, or it is truncated or something else.
        """
        way = "make it anew with fit_source"
        with open_tensors(path, wrote="SourceKnowledge.save()", way=way) as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise StateError(
                    f"{path} is not what SourceKnowledge.save() of this version wrote. Make it "
                    "anew with fit_source."
                )
            model, samples, needs, methods, features = json.loads(about["about"])
            entries: dict[str, dict[str, Tensor]] = {need: {} for need in needs}
            for full in file.keys():  # noqa: SIM118
                need, _, name = full.partition("/")
                entries[need][name] = file.get_tensor(full).clone()  # begins where torch would
        methods = {k: tuple(v) for k, v in methods.items()}
        return SourceKnowledge(model, samples, entries, methods, features)


def _bytes(own: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in own.values())


def _size(count: int) -> str:
    for power, unit in ((2, "MB"), (1, "KB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.1f} {unit}"
    return f"{count} bytes"


def _contents(own: Mapping[str, Tensor]) -> str:
    """Tensors with their shapes, or how many where they are many; and their size."""
    few = [f"{name} {' x '.join(map(str, t.shape)) or 'a number'}" for name, t in own.items()]
    return f"{', '.join(few) if len(few) <= 4 else f'{len(few)} tensors'}; {_size(_bytes(own))}"
