"""Fashion-MNIST: the embedded sample, the official files wherever they are, and their download."""

import gzip
import hashlib
import os
import zlib
from collections.abc import Callable
from http.client import HTTPException
from importlib.resources import as_file, files
from pathlib import Path
from urllib.request import urlopen

import numpy as np

from testtime._core.errors import InputError, RunError
from testtime._core.files import atomic

ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
"""Where the authors publish the set."""

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package `dataset-fashion-mnist` puts it."""

CHECKSUMS = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
"""MD5 of each file, as the authors publish them."""

_PREFIX = {"train": "train", "test": "t10k"}
_SAMPLE = "fashion_mnist_sample.npz"


def split_files(split: str) -> tuple[str, str]:
    """Names of the files with the images and with the labels of "train" or "test"."""
    prefix = _PREFIX[split]
    return f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz"


def read_sample(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images (n, 28, 28) uint8, labels (n,) and official positions (n,) of the embedded sample.

    "test" has 2,000 images of the official test set, "train" 1,000 of the official training set;
    both have as many of each class. `benchmarks/make_sample.py` chose them.

    Example:
        >>> images, labels, indices = read_sample("test")
        >>> images.shape, np.bincount(labels).tolist()
        ((2000, 28, 28), [200, 200, 200, 200, 200, 200, 200, 200, 200, 200])
    """
    with (
        as_file(files("testtime.streams") / "embedded" / _SAMPLE) as path,
        np.load(path, allow_pickle=False) as sample,
    ):
        return sample[f"{split}_images"], sample[f"{split}_labels"], sample[f"{split}_indices"]


def read_split(folder: str | Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 28, 28) uint8 and labels (n,) uint8 of one split, from the official files.

    Raises:
        InputError: a file is missing, truncated or not an IDX file of bytes.
    """
    images, labels = (_read_idx(Path(folder, name)) for name in split_files(split))
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise InputError(
            f"{folder} holds images of shape {images.shape} with labels of shape {labels.shape} "
            f"for {split}; expected (n, height, width) and (n,). Get the files again."
        )
    return images, labels


def _read_idx(path: Path) -> np.ndarray:
    """The array in a gzipped IDX file of unsigned bytes."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {error}. Expected a gzipped IDX file.") from error
    rank = content[3] if len(content) > 3 and content[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(content[4 : 4 + 4 * rank], ">u4").astype(int)
    if rank == 0 or len(content) != 4 + 4 * rank + int(shape.prod()):
        raise InputError(f"{path} is not a whole IDX file of bytes. Delete it and get it again.")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(tuple(shape))


def data_folder() -> Path:
    """Where downloads go: $TESTTIME_DATA, or `testtime` in the user's cache folder."""
    if chosen := os.environ.get("TESTTIME_DATA"):
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "testtime"


def locate(split: str, *, on_progress: Callable[[str, int, int], None] | None = None) -> Path:
    """A folder with both files of the split; they are downloaded when no folder has them.

    Looks into `fashion-mnist` under $TESTTIME_DATA or the user's cache folder, then into that of
    the Debian package.
    """
    own = data_folder() / "fashion-mnist"
    for folder in (own, DEBIAN):
        if all((folder / name).is_file() for name in split_files(split)):
            return folder
    for name in split_files(split):
        download(name, own, address=ADDRESS, on_progress=on_progress)
    return own


def download(
    name: str,
    folder: str | Path,
    *,
    address: str = ADDRESS,
    checksum: str | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Fetches one official file, checks it, and only then puts it into the folder.

    Args:
        name: one of the keys of `CHECKSUMS`.
        folder: where it goes; made if it is not there.
        address: what stands before the name.
        checksum: expected MD5, 32 hex digits; the authors' by default.
        on_progress: called with the name, the bytes so far and the bytes in all (0 if not told).

    Returns:
        The path of the file. A file that is already there with the right checksum is kept.

    Raises:
        RunError: the address cannot be reached, what came has another checksum, or the folder
            cannot be written; nothing is kept.
    """
    path, expected = Path(folder, name), checksum or CHECKSUMS[name]
    if (
        path.is_file()
        and hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == expected
    ):
        return path
    try:
        with atomic(path) as part:
            found = _receive(address + name, part, name, on_progress)
            if found != expected:
                raise RunError(
                    f"{address}{name} came with MD5 {found}, expected {expected}; it was not kept. "
                    f"Try again, or put the file into {folder} yourself."
                )
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error}. Let $TESTTIME_DATA name a folder that can be written."
        ) from error
    return path


def _receive(
    url: str, part: Path, name: str, on_progress: Callable[[str, int, int], None] | None
) -> str:
    """Writes what the address sends to `part` and gives its MD5."""
    digest, done = hashlib.md5(usedforsecurity=False), 0
    try:
        with urlopen(url, timeout=30) as answer, part.open("wb") as file:
            total = int(answer.headers.get("Content-Length") or 0)
            while piece := answer.read(1 << 16):
                file.write(piece)
                digest.update(piece)
                done += len(piece)
                if on_progress is not None:
                    on_progress(name, done, total)
    except (OSError, HTTPException) as error:
        raise RunError(
            f"cannot download {url}: {error}. Install the Debian package dataset-fashion-mnist, or "
            f"put {name} into {data_folder() / 'fashion-mnist'}, or use fashion-mnist:sample."
        ) from error
    return digest.hexdigest()
