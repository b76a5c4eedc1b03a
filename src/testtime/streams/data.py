"""Data sets by name, and the two questions asked of any data set: its labels, and a batch of it."""

from collections.abc import Iterable, Sequence
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from testtime._core.arrays import as_given
from testtime._core.errors import InputError, MissingExtra, OptionError, unknown
from testtime._core.seeds import generator
from testtime.streams import fashion_mnist
from testtime.streams.folder import image_folder, read_spec
from testtime.streams.recorded import Recorded
from testtime.streams.severity import in_range

DATA = (
    "fashion-mnist:sample",
    "fashion-mnist",
    "digits",
    "digits:16",
    "folder:PATH",
    "folder:PATH@SIZE",
    "corrupted:PATH",
)
"""What `load_data` understands."""

SPLITS = ("train", "test")


@final
class ImageSet(Dataset[tuple[Tensor, int]]):
    """Images in memory: bytes stay bytes until a batch of them is asked for.

    Args:
        images: (n, channels, height, width), uint8 in 0..255 or float in [0, 1].
        labels: (n,) long.
        indices: (n,) long, where each image stands in the set it was taken from; by default 0..n-1.

    Example:
        >>> data = ImageSet(torch.full((2, 1, 4, 4), 255, dtype=torch.uint8), torch.tensor([3, 1]))
        >>> image, label = data[1]
        >>> image.shape, image.max().item(), label
        (torch.Size([1, 4, 4]), 1.0, 1)
    """

    def __init__(self, images: Tensor, labels: Tensor, *, indices: Tensor | None = None) -> None:
        if images.ndim != 4 or labels.shape != images.shape[:1]:
            raise InputError(
                f"images have shape {tuple(images.shape)} and labels {tuple(labels.shape)}; "
                "expected (n, channels, height, width) and (n,)."
            )
        self.images = images
        self.labels = labels.long()
        self.indices = (
            torch.arange(len(images), device="cpu") if indices is None else indices.long()
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return _as_float(self.images[index]), int(self.labels[index])


def load_data(spec: str, *, split: str = "test") -> Dataset[Any]:
    """The data set of that name; items are (float image (C, H, W) in [0, 1], int label).

    Args:
        spec: `fashion-mnist:sample` (embedded: 2,000 test and 1,000 training images),
            `fashion-mnist` (whole; from $TESTTIME_DATA, the cache folder or the Debian package
            `dataset-fashion-mnist`, else downloaded), `digits` (scikit-learn, 8x8) or `digits:16`
            (the same, bilinear to 16x16), `folder:PATH` (one folder of images per class, 224 pixels
            wide and high; see `image_folder`), `folder:PATH@SIZE` (the same, of whose shorter
            side SIZE pixels are made, and the middle is kept), `folder:PATH@timm:NAME` (as timm
            shows them to that model) or `corrupted:PATH` (images that were corrupted beforehand,
            as ImageNet-C; see `Recorded`).
        split: "test", or "train" for what may be learnt from (source statistics, Fisher
            information).

    Raises:
        UnknownName: no data set has this name.
        OptionError: no split has this name.
        InputError: files are missing or broken.
        RunError: the download failed.
        MissingExtra: `digits` without scikit-learn, `@timm:` without timm.

    Example:
        >>> image, label = load_data("fashion-mnist:sample")[0]
        >>> image.shape, image.dtype, label
        (torch.Size([1, 28, 28]), torch.float32, ...)
    """
    if split not in SPLITS:
        raise OptionError(f"split is {split!r}; expected one of {', '.join(SPLITS)}.")
    kind, _, rest = spec.partition(":")
    if spec == "fashion-mnist:sample":
        images, labels, indices = map(torch.from_numpy, fashion_mnist.read_sample(split))
        return ImageSet(images[:, None], labels, indices=indices)
    if spec == "fashion-mnist":
        pair = fashion_mnist.read_split(fashion_mnist.locate(split), split)
        images, labels = (torch.tensor(array, device="cpu") for array in pair)
        return ImageSet(images[:, None], labels)
    if spec in ("digits", "digits:8", "digits:16"):
        return digits(split=split, size=int(rest or 8))
    if kind == "folder" and rest:
        path, shown = read_spec(rest)
        return image_folder(path, split=split, **shown)
    if kind == "corrupted" and rest:
        found = Recorded(rest)
        return found if split == "test" else found.train()
    raise unknown("data set", spec, DATA)


def digits(*, split: str = "test", size: int = 8, seed: int = 0) -> ImageSet:
    """The 1,797 handwritten digits of scikit-learn, 1,000 of them for training.

    Args:
        split: "train" (1,000) or "test" (797), drawn at random with `seed`.
        size: 8 as published, or another height and width, interpolated bilinearly.
        seed: of the split.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("scikit-learn", "digits") from error
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
    if size != 8:
        images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    order = torch.randperm(len(images), generator=generator(seed, "digits", "split"), device="cpu")
    chosen = order[:1000] if split == "train" else order[1000:]
    return ImageSet(images[chosen], torch.from_numpy(labels)[chosen], indices=chosen)


def labels_of(dataset: Dataset[Any]) -> Int[Tensor, " n"]:
    """Labels (n,) of a whole data set, without reading its images where that can be.

    Looks for `.targets`, `.labels` or `.y` (with `.target_transform` applied if there is one), at
    the last tensor of a `TensorDataset` and through `Subset` and `ConcatDataset`; else reads every
    item.

    Raises:
        InputError: the set is empty, or its labels are not one whole number per item.

    Example:
        >>> labels_of(TensorDataset(torch.rand(2, 1, 4, 4), torch.tensor([5, 6])))
        tensor([5, 6])
    """
    size = length(dataset)
    if isinstance(dataset, Subset):
        return labels_of(dataset.dataset)[as_given(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        return torch.cat([labels_of(part) for part in dataset.datasets])
    if isinstance(dataset, TensorDataset):
        return _whole_numbers(dataset.tensors[-1], size)
    for name in ("targets", "labels", "y"):
        found = getattr(dataset, name, None)
        if found is not None and not callable(found):
            change = getattr(dataset, "target_transform", None)
            return _whole_numbers(found if change is None else [change(x) for x in found], size)
    return _whole_numbers([_pair(dataset, i)[1] for i in range(size)], size)


def length(dataset: Dataset[Any]) -> int:
    """Number of items; a set without a length or without items is an `InputError`."""
    if not hasattr(dataset, "__getitem__") and hasattr(dataset, "dataset"):
        raise InputError(
            f"a {type(dataset).__name__} gives batches in an order of its own; expected the data set "
            "behind it, since the scenario makes the batches. Use its .dataset."
        )
    try:
        size = len(dataset)  # pyright: ignore[reportArgumentType]
    except TypeError as error:
        raise InputError(
            f"{type(dataset).__name__} has no length; expected a map-style data set with __len__ "
            "and __getitem__. Read an iterable one into a TensorDataset first."
        ) from error
    if size == 0:
        raise InputError(f"the data set ({type(dataset).__name__}) is empty.")
    return size


def stack(
    dataset: Dataset[Any], indices: Sequence[int] | Tensor
) -> tuple[Float[Tensor, "batch channels height width"], Int[Tensor, " batch"]]:
    """Images (B, C, H, W) in [0, 1] and labels (B,) of the items at `indices`.

    The images are a copy. Bytes (uint8) and Pillow images become floats. Sets that hold tensors
    (`ImageSet`, `TensorDataset`, a `Subset` or `ConcatDataset` of these) are indexed at once; of others the items
    are read one by one.

    Raises:
        InputError: images that are neither float tensors (C, H, W) in [0, 1], nor bytes or Pillow
            images; or that differ in shape.

    Example:
        >>> images, labels = stack(load_data("fashion-mnist:sample"), [0, 7, 7])
        >>> images.shape, labels.shape
        (torch.Size([3, 1, 28, 28]), torch.Size([3]))
    """
    where = as_given(indices).long()
    if isinstance(dataset, Subset):
        return stack(dataset.dataset, as_given(dataset.indices)[where])
    if isinstance(dataset, ConcatDataset):
        return _of_parts(dataset, where)
    if isinstance(dataset, ImageSet):
        images, labels = _as_float(dataset.images[where]), dataset.labels[where]
    elif isinstance(dataset, TensorDataset):
        images, labels = _as_float(dataset.tensors[0][where]), dataset.tensors[-1][where]
    else:
        images, labels = _one_by_one(dataset, where.tolist())
    return _checked(images), _whole_numbers(labels, len(where))


def _of_parts(dataset: ConcatDataset[Any], where: Tensor) -> tuple[Tensor, Tensor]:
    """Images and labels of data sets that are joined, on the device of the first part asked for."""
    ends = torch.tensor(dataset.cumulative_sizes, device="cpu")
    part = torch.searchsorted(ends, where, right=True)
    images, labels, order = list[Tensor](), list[Tensor](), list[Tensor]()
    for number in part.unique().tolist():
        mine = (part == number).nonzero().flatten()
        start = dataset.cumulative_sizes[number - 1] if number else 0
        own = stack(dataset.datasets[number], where[mine] - start)
        images.append(own[0])
        labels.append(own[1])
        order.append(mine)
    shapes = {tuple(each.shape[1:]) for each in images}
    if len(shapes) > 1:
        raise InputError(
            f"the joined data sets hold images of shapes {', '.join(map(str, sorted(shapes)))}; "
            "expected one shape."
        )
    back, device = torch.cat(order).argsort(), images[0].device
    joined = [torch.cat([each.to(device) for each in own]) for own in (images, labels)]
    return joined[0][back.to(device)], joined[1][back.to(device)]


def _one_by_one(dataset: Dataset[Any], indices: Iterable[int]) -> tuple[Tensor, list[Any]]:
    """Images and labels of a set that can only be read item by item."""
    pairs = [_pair(dataset, i) for i in indices]
    images = [_tensor(image) for image, _ in pairs]
    for image in images:
        if not isinstance(image, Tensor) or image.shape != images[0].shape:
            raise InputError(
                f"the data set gave {_describe(images[0])} and {_describe(image)}; expected float "
                "tensors (C, H, W) of one shape. Give it a transform that resizes and ends in "
                "ToTensor()."
            )
    return torch.stack(images), [label for _, label in pairs]


def _pair(dataset: Dataset[Any], index: int) -> tuple[Any, Any]:
    """Image and label of one item, which may hold more than these two."""
    item = dataset[index]
    if not isinstance(item, tuple | list) or len(item) < 2:
        raise InputError(
            f"item {index} of {type(dataset).__name__} is {_describe(item)}; "
            "expected a pair (image, label)."
        )
    return item[0], item[1]


def _describe(thing: object) -> str:
    """Type, and shape if there is one."""
    if isinstance(thing, Tensor):
        return f"a Tensor of shape {tuple(thing.shape)}"
    return f"an object of type {type(thing).__name__}"


def _tensor(image: Any) -> Any:
    """Bytes and Pillow images as float (C, H, W) in [0, 1]; whatever else is left as it is."""
    if isinstance(image, Tensor):
        return _as_float(image)
    if not hasattr(image, "getbands"):  # Pillow's; asked like this, Pillow need not be imported
        return image
    if image.mode[0] in "IF":
        raise InputError(
            f"the data set gave a Pillow image of mode {image.mode}, whose range of values is not "
            "known. Give it a transform that ends in a float tensor (C, H, W) in [0, 1]."
        )
    pixels = torch.from_numpy(np.array(image.convert("L" if image.mode in ("1", "L") else "RGB")))
    return pixels.reshape(image.height, image.width, -1).permute(2, 0, 1).float() / 255


def _as_float(images: Tensor) -> Tensor:
    """Bytes become floats in [0, 1]; floats stay."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def _checked(images: Tensor) -> Tensor:
    """The same images, unless corruptions and models cannot work on them."""
    if images.ndim != 4 or not images.is_floating_point():
        raise InputError(
            f"images of the data set have shape {tuple(images.shape[1:])} and type {images.dtype}; "
            "expected float tensors (C, H, W) in [0, 1], or bytes (uint8)."
        )
    if (settled := in_range(images)) is None:
        low, high = images.aminmax()
        raise InputError(
            f"pixels of the data set go from {low:.4g} to {high:.4g}; expected [0, 1]. "
            "Leave normalisation out of the data set and put it into the model."
        )
    return settled


def _whole_numbers(labels: Any, size: int) -> Tensor:
    """Labels as a long tensor (size,)."""
    try:
        found = as_given(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"labels cannot be read as numbers: {error}. Expected integers."
        ) from error
    if found.is_floating_point() or found.is_complex() or found.shape != (size,):
        raise InputError(
            f"labels have shape {tuple(found.shape)} and type {found.dtype}; expected {size} whole "
            "numbers, one per item."
        )
    return found.long()
