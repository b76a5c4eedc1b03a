"""Models by name: embedded ones, and those of timm, torchvision, Hugging Face and files."""

from importlib.resources import as_file, files
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from testtime._core.errors import InputError, MissingExtra, unknown
from testtime.bench.networks import SmallResNet, group_norm

EMBEDDED = {"batch": nn.BatchNorm2d, "group": group_norm}
SPECS = ("embedded:batch", "embedded:group", "timm:NAME", "torchvision:NAME", "hf:NAME",
         "file:PATH@SPEC")  # fmt: skip


def load_model(spec: str) -> nn.Module:
    """A classifier in eval mode.

    Args:
        spec: `embedded:batch` or `embedded:group` (Fashion-MNIST, trained by
            benchmarks/train_embedded.py); `timm:NAME`, `torchvision:NAME` or `hf:NAME` with their
            published weights, which these libraries download; `file:PATH@SPEC`, weights from a
            `.safetensors` or `.pt` file (read with weights_only) in the architecture of SPEC.

    Raises:
        UnknownName: no such model.
        InputError: the weights cannot be had, or do not fit.
        MissingExtra: the library is not installed.

    Example:
        >>> sum(p.numel() for p in load_model("embedded:batch").parameters())
        221010
    """
    return _build(spec, pretrained=True).eval()


def _build(spec: str, *, pretrained: bool) -> nn.Module:
    source, _, name = spec.partition(":")
    if source == "embedded" and name in EMBEDDED:
        return _embedded(name)
    if source == "file" and "@" in name:
        return _from_file(*name.rsplit("@", 1))
    makers = {"timm": _timm, "torchvision": _torchvision, "hf": _hugging_face}
    if source not in makers or not name:
        raise unknown("model", spec, SPECS)
    try:
        return makers[source](name, pretrained)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"the weights of {spec} cannot be had: {error}. They are downloaded by {source}; "
            "without a network give file:PATH@SPEC."
        ) from error


def _embedded(name: str) -> nn.Module:
    model = SmallResNet(EMBEDDED[name])
    weights = files("testtime.bench") / "embedded" / f"fashion_mnist_{name}.safetensors"
    with as_file(weights) as path:
        model.load_state_dict(load_file(path))
    return model


def _timm(name: str, pretrained: bool) -> nn.Module:
    try:
        import timm  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtra("timm", "timm") from error
    if not timm.is_model(name.partition(".")[0]):
        raise unknown("model of timm", name, timm.list_models())
    return timm.create_model(name, pretrained=pretrained)


def _torchvision(name: str, pretrained: bool) -> nn.Module:
    from torchvision import models  # noqa: PLC0415

    if name not in models.list_models(module=models):
        raise unknown("model of torchvision", name, models.list_models(module=models))
    return models.get_model(name, weights="DEFAULT" if pretrained else None)


def _hugging_face(name: str, pretrained: bool) -> nn.Module:
    try:
        from transformers import (  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
            AutoConfig,
            AutoModelForImageClassification,
        )
    except ImportError as error:
        raise MissingExtra("transformers", "hf") from error
    if pretrained:
        return AutoModelForImageClassification.from_pretrained(name, use_safetensors=True)
    return AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(name))


def _from_file(path: str, spec: str) -> nn.Module:
    model = _build(spec, pretrained=False)
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}; expected weights (.safetensors or .pt).")
    if path.endswith(".safetensors"):
        weights = load_file(path)
    else:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"the weights in {path} do not fit {spec}: {error}") from error
    return model
