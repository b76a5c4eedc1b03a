"""Which tensors may change?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from testtime._core.errors import ScopeError, unknown
from testtime.adaptation.layers import NormLayer, called, top_of

Scope = Callable[[nn.Module, Sequence[NormLayer]], list[str]]
"""Takes a model and its normalisation layers in order of execution, gives names of tensors."""


def nothing(model: nn.Module, norms: Sequence[NormLayer]) -> list[str]:
    """No tensor changes."""
    return []


def norm_affine(model: nn.Module, norms: Sequence[NormLayer]) -> list[str]:
    """Scales and shifts of all normalisation layers.

    Of one that a parametrisation makes (`torch.nn.utils.parametrize`), what it is made of.

    Raises:
        ScopeError: when the model has none.
    """
    names = [name for layer in norms for name in layer.tensors]
    if not names:
        kinds = sorted({type(m).__name__ for m in model.modules() if not any(m.children())})
        raise ScopeError(
            "norm_affine adapts the scales and shifts of normalisation layers, but "
            f"{type(model).__name__} has none (it is made of {', '.join(kinds)}). Pass a recipe "
            "with scope=all_parameters, or a method that adapts no tensor: lame, source."
        )
    return list(dict.fromkeys(names))


def norm_affine_below_top(model: nn.Module, norms: Sequence[NormLayer]) -> list[str]:
    """Scales and shifts of normalisation layers, the top of the network left out.

    The top is the last quarter of the blocks and all that runs after them (`layers.top_of`): the
    last stage of a ResNet, the last three of twelve transformer blocks and the final
    normalisation, as SAR and DeYO published it for those two.
    """
    top = top_of([layer.name for layer in norms])
    return norm_affine(model, [layer for layer in norms if layer.name not in top])


def all_parameters(model: nn.Module, norms: Sequence[NormLayer]) -> list[str]:
    """Every parameter of the model."""
    names = [name for name, _ in model.named_parameters()]
    if not names:
        raise ScopeError(f"{type(model).__name__} has no parameters; nothing can adapt.")
    return names


def weights_and_biases(model: nn.Module, norms: Sequence[NormLayer]) -> list[str]:
    """Every parameter that is called weight or bias: what CoTTA's code adapts and restores.

    Of one that a parametrisation makes (`torch.nn.utils.parametrize`), what it is made of.
    The class token and position embeddings of a transformer, for example, stay as they are.
    """
    names = [n for n in all_parameters(model, norms) if called(n) in ("weight", "bias")]
    return names or all_parameters(model, norms)


def all_but_classifier(
    model: nn.Module, norms: Sequence[NormLayer], head: nn.Module | None = None
) -> list[str]:
    """Every parameter but those of the classifier, the linear layer that runs last.

    Until the model was seen to run, the one that is registered last is taken for it.

    Raises:
        ScopeError: when there is no other parameter.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    classifier = head or (linear[-1] if linear else None)
    own = {id(p) for p in classifier.parameters()} if classifier is not None else set()
    names = [name for name, p in model.named_parameters() if id(p) not in own]
    if not names:
        raise ScopeError(
            f"all_but_classifier adapts what comes before the last linear layer, and "
            f"{type(model).__name__} has no parameters there. Pass a recipe with "
            "scope=all_parameters."
        )
    return names


def batchnorm_affine(model: nn.Module, norms: Sequence[NormLayer]) -> list[str]:
    """Scales and shifts of batch normalisation, where there is any; else of all normalisation."""
    batch = [layer for layer in norms if layer.kind == "batch" and layer.tensors]
    return norm_affine(model, batch or norms)


@dataclass(frozen=True)
class Only:
    """Just the tensors of these names, as `model.named_parameters()` calls them.

    Example:
        >>> Only("0.bias")(nn.Sequential(nn.Linear(2, 2)), [])
        ['0.bias']
    """

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        object.__setattr__(self, "names", names)

    def __call__(self, model: nn.Module, norms: Sequence[NormLayer]) -> list[str]:
        known = [name for name, _ in model.named_parameters()]
        for name in self.names:
            if name not in known:
                raise unknown("parameter", name, known)
        return list(self.names)
