"""Models by name: embedded ones, and those of timm, torchvision, Hugging Face and files."""

import math
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.parameter import is_lazy

from testtime._core.arrays import as_given
from testtime._core.errors import InputError, MissingExtra, TesttimeError, unknown
from testtime.bench.networks import Normalised, SmallResNet, group_norm
from testtime.bench.own import call_function
from testtime.streams.folder import folder_spec, read_spec, timm_config, timm_of

EMBEDDED = {"batch": nn.BatchNorm2d, "group": group_norm}
SPECS = ("embedded:batch", "embedded:group", "timm:NAME", "torchvision:NAME",
         "torchvision:NAME/WEIGHTS", "hf:NAME", "file:PATH@SPEC", "file:PATH.py@FUNCTION")  # fmt: skip


def load_model(spec: str) -> nn.Module:
    """A classifier in eval mode that takes pixels in [0, 1] and normalises them itself.

    Args:
        spec: `embedded:batch` or `embedded:group` (Fashion-MNIST, trained by
            benchmarks/train_embedded.py); `timm:NAME`, `torchvision:NAME` or `hf:NAME` with their
            published weights, which these libraries download, and the mean and standard deviation
            that were published with them; `torchvision:NAME/WEIGHTS` for other weights than the
            best, as `torchvision:resnet50/IMAGENET1K_V1` that most papers use; `file:PATH@SPEC`,
            weights from a `.safetensors` or `.pt` file (read with weights_only) in the architecture
            of SPEC; `file:PATH.py@FUNCTION`, what a function in a file of your own returns, see
            `call_function`; its module takes pixels in [0, 1] and normalises them itself.

    Raises:
        UnknownName: no such model.
        InputError: the weights cannot be had, or do not fit; or a file of your own makes no model.
        MissingExtra: the library is not installed.

    Example:
        >>> sum(p.numel() for p in load_model("embedded:batch").parameters())
        221010
    """
    return _build(spec, pretrained=True).eval()


def preprocessing(model: nn.Module) -> str:
    """What a model from `load_model` does to pixels before its first layer, in words.

    Example:
        >>> preprocessing(load_model("embedded:batch"))
        'pixels in [0, 1]; the model removes mean 0.286 and divides by 0.353'
    """
    mean, std = getattr(model, "mean", None), getattr(model, "std", None)
    if mean is None or std is None:
        return "pixels in [0, 1], as they are"
    numbers = [", ".join(f"{x:.4g}" for x in as_given(v).flatten().tolist()) for v in (mean, std)]
    return f"pixels in [0, 1]; the model removes mean {numbers[0]} and divides by {numbers[1]}"


def shown_to(model: str, data: str) -> str:
    """The name of a data set as a model sees it: images of a folder are prepared as it was published.

    That is so for models of timm, torchvision and Hugging Face; others, and those of Hugging Face whose
    images are prepared in more ways than one size, one part and one interpolation, see a folder as
    `load_data` gives it. A folder whose size is named keeps it.

    Args:
        model: as `load_model` takes it.
        data: as `load_data` takes it.

    Example:
        >>> shown_to("torchvision:inception_v3", "folder:photos")
        'folder:photos@299,342,bilinear'
        >>> shown_to("torchvision:inception_v3", "folder:photos@64")
        'folder:photos@64'
    """
    kind, _, rest = data.partition(":")
    if kind != "folder" or read_spec(rest)[1]:
        return data
    try:
        view = _view(model)
    except (TesttimeError, OSError, RuntimeError, ValueError):  # the cell will tell
        return data
    return data if view is None else folder_spec(rest, **view)


def _view(spec: str) -> dict[str, Any] | None:
    """How images are shown to a model, as options of `image_folder`; None where nothing says it."""
    source, _, name = spec.partition(":")
    if source == "file" and not (part := name.rpartition("@"))[0].endswith(".py"):
        return _view(part[2])
    if source == "torchvision":
        shown: Any = _torchvision_weights(name).transforms()
        way = shown.interpolation.value
        return {"crop": shown.crop_size[0], "resize": shown.resize_size[0], "interpolation": way}
    if source == "timm":
        return _timm_view(name)
    return _hugging_face_view(name) if source == "hf" else None


def _build(spec: str, *, pretrained: bool) -> nn.Module:
    source, _, name = spec.partition(":")
    path, _, own = name.rpartition("@")
    if source == "file" and path.endswith(".py"):
        return _from_python(path, own)  # where torch keeps what the file sets out of other defaults
    with torch.device("cpu"):
        if source == "embedded" and name in EMBEDDED:
            return _embedded(name)
        if source == "file" and path:
            return _from_file(path, own)
        return _from_library(spec, source, name, pretrained=pretrained)


def _from_library(spec: str, source: str, name: str, *, pretrained: bool) -> nn.Module:
    makers = {"timm": _timm, "torchvision": _torchvision, "hf": _hugging_face}
    if source not in makers or not name:
        raise unknown("model", spec, SPECS)
    try:
        return makers[source](name, pretrained)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"the weights of {spec} cannot be loaded: {error}. {source} downloads them; without a "
            "network give file:PATH@SPEC."
        ) from error


def _embedded(name: str) -> nn.Module:
    model = SmallResNet(EMBEDDED[name])
    weights = files("testtime.bench") / "embedded" / f"fashion_mnist_{name}.safetensors"
    with as_file(weights) as path:
        model.load_state_dict(load_file(path))
    return model


def _timm_view(name: str) -> dict[str, Any] | None:
    about = timm_config(name)
    channels, height, width = about["input_size"]
    if channels != 3:
        return None
    resize: int | None = math.floor(height / about["crop_pct"])
    if height != width or about["crop_mode"] != "center":
        if about["crop_mode"] != "squash" or not height == width == resize:
            return {"timm": name}  # in a way of timm's own
        resize = None
    return {"crop": height, "resize": resize, "interpolation": about["interpolation"]}


def _timm(name: str, pretrained: bool) -> nn.Module:
    timm = timm_of(name)
    model = timm.create_model(name, pretrained=pretrained)
    about: Any = model.pretrained_cfg
    return Normalised(model, about.get("mean"), about.get("std"))


def _torchvision_weights(name: str) -> Any:
    from torchvision import models  # noqa: PLC0415

    name, _, wanted = name.partition("/")
    if name not in models.list_models(module=models):
        raise unknown("model of torchvision", name, models.list_models(module=models))
    kinds = models.get_model_weights(name)
    if wanted and wanted not in kinds.__members__:
        raise unknown(f"weights of {name}", wanted, kinds.__members__)
    return kinds[wanted] if wanted else kinds.DEFAULT  # pyright: ignore[reportAttributeAccessIssue]


def _torchvision(name: str, pretrained: bool) -> nn.Module:
    from torchvision import models  # noqa: PLC0415

    weights = _torchvision_weights(name)
    shown = weights.transforms()
    model = models.get_model(name.partition("/")[0], weights=weights if pretrained else None)
    return Normalised(model, shown.mean, shown.std)


def _hugging_face(name: str, pretrained: bool) -> nn.Module:
    try:
        from transformers import (  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
            AutoConfig,
            AutoImageProcessor,
            AutoModelForImageClassification,
        )
    except ImportError as error:
        raise MissingExtra("transformers", "hf") from error
    if pretrained:
        model = AutoModelForImageClassification.from_pretrained(name, use_safetensors=True)
    else:
        model = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(name))
    shown = AutoImageProcessor.from_pretrained(name)
    wanted = getattr(shown, "do_normalize", True)
    return Normalised(model, *((shown.image_mean, shown.image_std) if wanted else (None, None)))


def _hugging_face_view(name: str) -> dict[str, Any] | None:
    try:
        from transformers import AutoImageProcessor  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtra("transformers", "hf") from error
    about: Any = AutoImageProcessor.from_pretrained(name).to_dict()
    size, crop = about.get("size") or {}, about.get("crop_size") or {}
    way = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}.get(about.get("resample"))
    plain = about.get("do_resize") and way and not about.get("crop_pct")
    if plain and about.get("do_center_crop") and set(size) == {"shortest_edge"}:
        resize, sides = size["shortest_edge"], crop
    elif plain and not about.get("do_center_crop"):
        resize, sides = None, size
    else:
        return None
    if set(sides) != {"height", "width"} or sides["height"] != sides["width"]:
        return None
    return {"crop": sides["height"], "resize": resize, "interpolation": way}


def _from_file(path: str, spec: str) -> nn.Module:
    model = _build(spec, pretrained=False)
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}; expected weights (.safetensors or .pt).")
    try:
        if path.endswith(".safetensors"):
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # readers of broken files raise errors of many kinds
        raise InputError(
            f"{path} cannot be read as weights ({type(error).__name__}): it is damaged, or holds more "
            "than tensors. Give what torch.save(model.state_dict(), FILE) wrote, or safetensors."
        ) from error
    try:
        (model.model if isinstance(model, Normalised) else model).load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"the weights in {path} do not fit {spec}: {error}") from error
    return model


def _from_python(path: str, name: str) -> nn.Module:
    """What a function in a user's file returns."""
    model = call_function(path, name)
    if not isinstance(model, nn.Module):
        raise InputError(f"{path}@{name} returned a {type(model).__name__}; expected a module.")
    if any(map(is_lazy, [*model.parameters(), *model.buffers()])):
        raise InputError(
            f"{path}@{name} has lazy layers whose weights are not made yet; run a batch through "
            f"the module in {name}(), or give its layers their sizes."
        )
    return model
