"""Images that were corrupted beforehand, as ImageNet-C and CIFAR-10-C are, from where they lie."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from testtime._core.errors import InputError
from testtime.streams.corruptions import SEVERITIES
from testtime.streams.folder import SPLIT_FOLDERS, image_folder, open_image, split_folder

if TYPE_CHECKING:
    from PIL.Image import Image

CLEAN = "clean"


@final
class Recorded(Dataset[tuple[Any, int]]):
    """The same images in several domains that were made beforehand; its own items are the clean ones.

    Read in one of two layouts, an image at a time, when it is asked for:

    - Arrays, as CIFAR-10-C and CIFAR-100-C are published: `DOMAIN.npy` of bytes (5 n, height, width,
      channels), the n images at severity 1, then at 2, up to 5, beside `labels.npy` of n or 5 n
      whole numbers. Clean images, which are not published with them, are read from a `clean.npy`
      of n images.
    - Folders, as ImageNet-C is: `DOMAIN/SEVERITY/CLASS/IMAGE`, with or without a folder for each
      group of domains (`noise/gaussian_noise/...`). The images are taken as they are, at their own
      size. Clean ones, under the same names, are read from `clean/CLASS/IMAGE`, and resized and
      cropped as `image_folder` does where their size is another; a link to the validation images
      will do. Labels are those of `image_folder`.

    Nothing that is read can run code: arrays of objects are refused.

    Args:
        path: the folder.

    Attributes:
        domains: names of the domains that there are, without "clean".
        labels: (n,) long.
        classes: names of the folders of classes; none for arrays.

    Raises:
        InputError: there is no domain at `path`, or its arrays do not fit one another.
    """

    def __init__(self, path: str | Path) -> None:
        self.root = Path(path).expanduser()
        arrays = (self.root / "labels.npy").is_file()
        self._files = _arrays(self.root) if arrays else _folders(self.root)
        self.domains = tuple(sorted(name for name in self._files if name != CLEAN))
        if not self.domains:
            raise InputError(
                f"{self.root} holds no corrupted images. Expected DOMAIN.npy and labels.npy, as of "
                "CIFAR-10-C, or folders DOMAIN/SEVERITY/CLASS with images, as of ImageNet-C."
            )
        if arrays:
            self._names, self.classes = list[str](), list[str]()
            self.labels = _read_labels(self.root / "labels.npy", self._array(self.domains[0]))
        else:
            folder = next(iter(self._levels(self.domains[0]).values()))
            self._names, self.labels, self.classes = _samples(folder)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.at(CLEAN, 0)[index]

    @property
    def has_clean(self) -> bool:
        """Whether there are clean images."""
        return CLEAN in self._files

    def at(self, domain: str, severity: int) -> Dataset[Any]:
        """The images in a domain at a severity, under the same positions.

        Raises:
            InputError: there are none.
        """
        if domain not in self._files:
            raise InputError(
                f"{self.root} has no images of the domain {domain}; it has "
                f"{', '.join(self._files)}. {_advice(domain, self.domains)}"
            )
        if not self._names:
            array, start = self._array(domain), max(severity - 1, 0) * len(self)
            return _Arrays(array, self.labels, start)
        if domain == CLEAN:
            return _Files(self._files[CLEAN], self._names, self.labels, self._size())
        levels = self._levels(domain)
        if severity not in levels:
            raise InputError(
                f"{self._files[domain]} has no severity {severity}; it has "
                f"{', '.join(map(str, levels))}. Give severity= one of these."
            )
        return _Files(levels[severity], self._names, self.labels, None)

    def files(self, position: int, domain: str, severity: int) -> tuple[Path, ...]:
        """Where an image of `at` and its label are read from; of arrays those of them all."""
        folder = self._files[domain]
        if not self._names:
            return folder, self.root / "labels.npy"
        return ((folder if domain == CLEAN else folder / str(severity)) / self._names[position],)

    def some(self) -> Dataset[Any]:
        """Those of the first domain, at the lowest severity that it has."""
        name = self.domains[0]
        return self.at(name, next(iter(self._levels(name))) if self._names else 1)

    def train(self) -> Dataset[Any]:
        """Training images, in folders of classes below `train`, at the size of the corrupted ones.

        Raises:
            InputError: there are none.
        """
        folder = split_folder(self.root, "train")
        names, labels, _ = _samples(folder)
        return _Files(folder, names, labels, self._size())

    def check(self, wanted: Iterable[tuple[str, int]]) -> None:
        """Raises an `InputError` where a domain is not there at a severity."""
        for domain, severity in wanted:
            self.at(domain, severity)

    def _array(self, name: str) -> "np.ndarray[Any, Any]":
        size = None if name == self.domains[0] else len(self) * (1 if name == CLEAN else 5)
        return _read_images(self._files[name], size)

    def _levels(self, domain: str) -> dict[int, Path]:
        own = {level: self._files[domain] / str(level) for level in SEVERITIES}
        return {level: folder for level, folder in own.items() if folder.is_dir()}

    def _size(self) -> tuple[int, int]:
        """Width and height of the corrupted images."""
        if not self._names:
            _, height, width, _ = self._array(self.domains[0]).shape
            return width, height
        folder = next(iter(self._levels(self.domains[0]).values()))
        return open_image(str(folder / self._names[0])).size


@final
class _Arrays(Dataset[tuple[Tensor, int]]):
    """Part of an array of images that stays on the disk."""

    def __init__(self, array: "np.ndarray[Any, Any]", labels: Tensor, start: int) -> None:
        self.array, self.labels, self.start = array, labels, start

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.from_numpy(np.array(self.array[self.start + index]))
        return image.permute(2, 0, 1), int(self.labels[index])


@final
class _Files(Dataset[tuple[Any, int]]):
    """Files below a folder; where a size is given, those of another are brought to it."""

    def __init__(
        self, folder: Path, names: list[str], labels: Tensor, size: tuple[int, int] | None
    ) -> None:
        self.folder, self.names, self.labels, self.size = folder, names, labels, size

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> "tuple[Image, int]":
        image = open_image(str(self.folder / self.names[index]))
        if self.size is not None and image.size != self.size:
            image = _fitted(image, self.size)
        return image, int(self.labels[index])


def _fitted(image: "Image", size: tuple[int, int]) -> "Image":
    """An image at the size of the corrupted ones: 256 pixels are cropped to 224, others in proportion."""
    from torchvision.transforms import functional as transform  # noqa: PLC0415

    resized = transform.resize(image, [round(min(size) * 256 / 224)])  # pyright: ignore[reportArgumentType]
    return transform.center_crop(resized, [size[1], size[0]])  # pyright: ignore[reportArgumentType, reportReturnType]


def _arrays(root: Path) -> dict[str, Path]:
    return {file.stem: file for file in sorted(root.glob("*.npy")) if file.stem != "labels"}


def _folders(root: Path) -> dict[str, Path]:
    """Domains in a folder, or one folder further down: those with a folder that a severity names.

    Names of classes may be numbers too: nothing is looked for within a domain, clean or training images.
    """
    found = {CLEAN: root / CLEAN} if (root / CLEAN).is_dir() else {}
    taken = {CLEAN, *(name for names in SPLIT_FOLDERS.values() for name in names)}
    for group in sorted(path for path in root.glob("*") if path.name not in taken):
        for folder in [group] if _is_domain(group) else filter(_is_domain, sorted(group.glob("*"))):
            found.setdefault(folder.name, folder)
    return found


def _is_domain(folder: Path) -> bool:
    return any((folder / str(level)).is_dir() for level in SEVERITIES)


def _samples(folder: Path) -> tuple[list[str], Tensor, list[str]]:
    """Names of the images below a folder of classes, their labels, and the names of the classes."""
    found: Any = image_folder(folder)  # the folder of a split holds no other split
    names = [str(Path(path).relative_to(found.root)) for path, _ in found.samples]
    return names, torch.tensor(found.targets, device="cpu"), found.classes


def _read_images(file: Path, size: int | None) -> "np.ndarray[Any, Any]":
    array = _read(file)
    if array.ndim != 4 or array.dtype != np.uint8 or array.shape[3] not in (1, 3):
        raise InputError(
            f"{file} holds an array of shape {array.shape} and type {array.dtype}; expected bytes "
            "(uint8) of shape (images, height, width, channels), channels 1 or 3."
        )
    if size is not None and len(array) != size:
        raise InputError(f"{file} holds {len(array)} images; expected {size}, as of the others.")
    return array


def _read_labels(file: Path, images: "np.ndarray[Any, Any]") -> Tensor:
    labels, size = _read(file), len(images) // 5
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) not in (size, 5 * size):
        raise InputError(
            f"{file} holds an array of shape {labels.shape} and type {labels.dtype}; expected whole "
            f"numbers, one for each of {size} images, or for each of {5 * size} at five severities."
        )
    return torch.from_numpy(np.array(labels[:size])).long()


def _read(file: Path) -> "np.ndarray[Any, Any]":
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"{file} cannot be read as an array ({error}). Get the file again; arrays of objects are "
            "not read, since they may run code."
        ) from error


def _advice(domain: str, domains: tuple[str, ...]) -> str:
    if domain == CLEAN:
        return "Put clean.npy, or a folder clean with the folders of classes, beside these; a link will do."
    return f"Give domains={'+'.join(domains)}."
