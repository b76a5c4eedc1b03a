"""Folders of images: one folder per class, read from disk when an image is asked for."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from testtime._core.errors import InputError, MissingExtra, unknown
from testtime._core.options import whole

if TYPE_CHECKING:
    from PIL.Image import Image
    from torchvision.datasets import ImageFolder

SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val", "validation")}
"""Names that the folder of a split may have; the first that exists is read."""
SQUASH = "squash"
"""In place of a shorter side: height and width become those of what is kept, so that nothing is cut."""


def folder_spec(
    path: str, *, crop: int = 224, resize: int | None = 256, interpolation: str = "bilinear",
    timm: str | None = None,
) -> str:  # fmt: skip
    """The name of a folder and of what is done to its images, as `read_spec` reads it.

    Example:
        >>> folder_spec("photos", crop=299, resize=342, interpolation="bicubic")
        'folder:photos@299,342,bicubic'
        >>> folder_spec("photos", crop=224, resize=256, interpolation="bilinear")
        'folder:photos'
    """
    if timm is not None:
        return f"folder:{path}@timm:{timm}"
    if (crop, resize, interpolation) == (224, 256, "bilinear"):
        return f"folder:{path}"
    return f"folder:{path}@{crop},{resize or SQUASH},{interpolation}"


def read_spec(rest: str) -> tuple[str, dict[str, Any]]:
    """The path in `PATH`, `PATH@CROP`, `PATH@CROP,RESIZE,INTERPOLATION` or `PATH@timm:NAME`, and options
    of `image_folder`.

    Example:
        >>> read_spec("photos@32")
        ('photos', {'crop': 32, 'resize': 32})
        >>> read_spec("photos@timm:naflexvit_base_patch16_siglip")
        ('photos', {'timm': 'naflexvit_base_patch16_siglip'})
        >>> read_spec("me@home"), read_spec("me@32/")  # a path that ends like a size gets a slash
        (('me@home', {}), ('me@32/', {}))
    """
    path, at, name = rest.rpartition("@timm:")
    if at and re.fullmatch(r"[\w.-]+", name):
        return path, {"timm": name}
    found = re.fullmatch(rf"(.+)@(\d+)(?:,(\d+|{SQUASH}),([\w-]+))?", rest, re.DOTALL)
    if found is None:
        return rest, {}
    path, crop, resize, interpolation = found.groups()
    if resize is None:
        return path, {"crop": int(crop), "resize": int(crop)}
    side = None if resize == SQUASH else int(resize)
    return path, {"crop": int(crop), "resize": side, "interpolation": interpolation}


def image_folder(
    path: str | Path, *, split: str = "test", resize: int | None = 256, crop: int = 224,
    interpolation: str = "bilinear", timm: str | None = None,
) -> Dataset[Any]:  # fmt: skip
    """Images of any size in one folder per class, as float (3, crop, crop) in [0, 1].

    The shorter side is resized to `resize` (antialiased) and the centre cropped to `crop`: what
    torchvision's ImageNet models expect, without their normalisation, which belongs into the model.
    Grey, palette and transparent images become RGB; those of 16 or 32 bits are
    refused. Labels are the places of the class folders in sorted order; where all are numbers, as in
    ImageNet-V2, in order of the numbers.

    Args:
        path: the folder with the classes, which is then the test split; or one with a folder
            "train" and a folder "test", "val" or "validation", each with the classes.
        split: "train" or "test".
        resize: length of the shorter side in pixels; None: each image becomes (crop, crop), whatever
            its shape.
        crop: height and width of what is kept.
        interpolation: one of torchvision's: "bilinear", "bicubic", "lanczos", "nearest", "box", ...
        timm: name of a model of timm: images are shown as timm shows them to it, without the
            normalisation, and the three lengths and ways above have no effect.

    Raises:
        MissingExtra: timm is named and not installed.
        OptionError: a length is no whole number of at least 1.
        UnknownName: no interpolation, or no model of timm, has this name.
        InputError: `path` is no folder, has no class folders with images, or not this split. A file
            that cannot be read as an image raises one that names it, when it is asked for.
    """
    from torchvision import transforms  # noqa: PLC0415
    from torchvision.datasets import ImageFolder  # noqa: PLC0415

    whole(1, crop=crop, resize=crop if resize is None else resize)
    ways = [way.value for way in transforms.InterpolationMode]
    if interpolation not in ways:
        raise unknown("interpolation", interpolation, ways)
    root = split_folder(Path(path).expanduser(), split)
    side = (crop, crop) if resize is None else resize
    resized = transforms.Resize(side, transforms.InterpolationMode(interpolation))
    steps = [resized, transforms.CenterCrop(crop), transforms.ToTensor()]
    shown = transforms.Compose(steps) if timm is None else _as_timm(timm)
    try:
        found = ImageFolder(str(root), shown, loader=open_image)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"{root} is not a folder of images ({error}). "
            "Expected one folder per class with images in it."
        ) from error
    if all(name.isdecimal() for name in found.classes):
        _in_order_of_numbers(found)
    return found


def timm_of(name: str) -> Any:
    """The package timm, which has this model."""
    try:
        import timm  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtra("timm", "timm") from error
    if not timm.is_model(name.partition(".")[0]):
        raise unknown("model of timm", name, timm.list_models())
    return timm


def timm_config(name: str) -> dict[str, Any]:
    """How timm shows images to a model, as it says itself."""
    timm = timm_of(name)
    return timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())


def _as_timm(name: str) -> Any:
    """timm's own transform for a model, without the normalisation, whose mean is what it pads with."""
    from torchvision import transforms  # noqa: PLC0415

    shown = timm_of(name).data.create_transform(**timm_config(name), normalize=False)
    return transforms.Compose([shown, transforms.ConvertImageDtype(torch.float32)])


def _in_order_of_numbers(found: "ImageFolder") -> None:
    """Labels by number instead of by letter, where 10 comes before 2."""
    classes = sorted(found.classes, key=int)
    place = {found.class_to_idx[name]: number for number, name in enumerate(classes)}
    found.samples = found.imgs = [(path, place[label]) for path, label in found.samples]
    found.targets = [label for _, label in found.samples]
    found.classes, found.class_to_idx = classes, {n: p for p, n in enumerate(classes)}


def split_folder(root: Path, split: str) -> Path:
    """Where the classes of a split lie: never another split's, and no class taken for a split."""
    for name in SPLIT_FOLDERS[split]:
        if _holds_folders(root / name):
            return root / name
    others = [name for names in SPLIT_FOLDERS.values() for name in names]
    others = [name for name in others if _holds_folders(root / name)]
    if others:
        raise InputError(
            f"{root} has {', '.join(others)}, but none of {', '.join(SPLIT_FOLDERS[split])}, which "
            f"the {split} split is read from. Add that folder, or give the path of its classes."
        )
    if split == "train" and root.is_dir():
        raise InputError(
            f"{root} has no folder train with one folder per class in it, so there are no training "
            f"images apart from what is tested on. Put them into {root / 'train'}, and the others "
            f"into {root / 'test'}."
        )
    return root


def _holds_folders(folder: Path) -> bool:
    return folder.is_dir() and any(child.is_dir() for child in folder.iterdir())


def open_image(path: str) -> "Image":
    """The image in a file, as RGB; an `InputError` names one that cannot be read."""
    from PIL import Image  # noqa: PLC0415

    try:
        with Path(path).open("rb") as file:
            image = Image.open(file)
            if image.mode[0] in "IF":  # Pillow would cut all that is beyond 255
                raise ValueError(f"its mode is {image.mode}, whose range of values is not known")
            return image.convert("RGB")
    except Exception as error:  # decoders of broken files raise errors of many kinds
        raise InputError(
            f"{path} cannot be read as an image: {error}. Get the file again, make it one of 8 "
            "bits, or remove it."
        ) from error
