"""What methods need to know of the source data, computed once where the data is, and saved."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from testtime._core.arrays import at_least_single
from testtime._core.errors import InputError, StateError
from testtime._core.files import atomic, digest
from testtime._core.registry import find
from testtime.adaptation.checks import check_input
from testtime.adaptation.engine import Engine, gradients
from testtime.adaptation.evidence import Evidence
from testtime.adaptation.layers import norm_layers
from testtime.adaptation.ranks import Ranks

FORMAT = "testtime-source-1"


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's tensors, names and values: whose state a file is."""
    return digest({k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)})


@dataclass(frozen=True)
class SourceKnowledge:
    """What is known of the source data, for one model.

    Attributes:
        model: fingerprint of the model.
        samples: source samples that were read.
        fisher: Fisher information by name of tensor.
    """

    model: str
    samples: int
    fisher: dict[str, Tensor]

    def save(self, path: str | Path) -> None:
        """Writes it as safetensors, wholly or not at all."""
        tensors = {f"fisher/{k}": v.cpu().contiguous() for k, v in self.fisher.items()}
        about = {"format": FORMAT, "about": json.dumps([self.model, self.samples])}
        with atomic(path) as part:
            save_file(tensors, part, about)

    @staticmethod
    def load(path: str | Path) -> "SourceKnowledge":
        """Reads what `save` wrote.

        Raises:
            StateError: when the file is truncated or something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT:
                    raise StateError(f"{path} is not what SourceKnowledge.save() wrote.")
                model, samples = json.loads(about["about"])
                names = list(file.keys())
                fisher = {name.removeprefix("fisher/"): file.get_tensor(name) for name in names}
        except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
            raise StateError(
                f"{path} cannot be read: {error}. Make it anew with fit_source."
            ) from error
        return SourceKnowledge(model, samples, fisher)


def fit_source(
    model: nn.Module, loader: Iterable[Any], *, methods: str | Sequence[str] = ("eata",)
) -> SourceKnowledge:
    """Computes in one pass over source data what methods need to know of it.

        F_j = mean over batches of ( d/dtheta_j mean_i CE(argmax z_i, z_i) )^2

    Fisher information of the tensors that the methods adapt, from the model's own predictions;
    labels are not read. The squared gradient is that of the batch mean, as in EATA's code, so it
    depends on the batch size: use the stream's.

    Args:
        model: the source model; left as it is.
        loader: batches of inputs, or of tuples that begin with them; about 2000 samples (EATA).
        methods: name or names of the methods that will use it.

    Raises:
        InputError: when the loader gives no batch, or one that is not fit for the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        >>> known = fit_source(model, [torch.randn(8, 4)], methods=["eata"])
        >>> sorted(known.fisher), known.samples
        (['1.bias', '1.weight'], 8)

    Reference: Niu et al., Efficient Test-Time Model Adaptation without Forgetting, ICML 2022.
    """
    if isinstance(methods, str):
        methods = (methods,)
    recipes = [find("method", name).build() for name in methods]
    scopes = {recipe.scope: recipe for recipe in recipes if "fisher" in recipe.needs}
    norms = norm_layers(model)
    total: dict[str, Tensor] = {}
    samples = batches = 0
    engines = [Engine(model, recipe, norms, ranks=Ranks()) for recipe in scopes.values()]
    for batch in loader:
        x = batch[0] if isinstance(batch, tuple | list) else batch
        for engine in engines:
            check_input(x.to(engine.device), model, engine.recipe, engine.device)
        samples, batches = samples + len(x), batches + 1
        with torch.inference_mode(False), torch.enable_grad():
            for engine in engines:
                state = engine.fresh()
                seen = Evidence(engine, state, engine.leaves(state), x.to(engine.device))
                loss = F.cross_entropy(at_least_single(seen.logits), seen.logits.argmax(-1))
                grads = gradients(loss, seen.tensors)
                for name, grad in zip(seen.tensors, grads, strict=True):
                    total[name] = total.get(name, torch.zeros_like(grad)) + grad.square()
    if not batches:
        raise InputError("the loader gave no batch; expected about 2000 source samples.")
    return SourceKnowledge(
        fingerprint(model), samples, {name: value / batches for name, value in total.items()}
    )
