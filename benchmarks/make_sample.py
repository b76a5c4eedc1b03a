"""Chooses the embedded sample of Fashion-MNIST from the files of the full set.

    python benchmarks/make_sample.py

Draws 200 test images and 100 training images of every class, without replacement and with a fixed
seed, and writes `src/testtime/streams/embedded/fashion_mnist_sample.npz`: images (n, 28, 28) uint8,
labels (n,) uint8, and the positions (n,) that they have in the official files. A test image that
also stands, byte for byte, among the 60,000 training images is never chosen. Running the script
again gives the same file.
"""

import argparse
from pathlib import Path

import numpy as np

from testtime.streams.fashion_mnist import read_split

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "src/testtime/streams/embedded/fashion_mnist_sample.npz"


def choose(
    labels: np.ndarray, allowed: np.ndarray, each: int, rng: np.random.Generator
) -> np.ndarray:
    """Sorted positions of `each` allowed samples of every class."""
    picks = [
        rng.choice(np.flatnonzero((labels == c) & allowed), each, replace=False)
        for c in np.unique(labels)
    ]
    return np.sort(np.concatenate(picks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, default=TARGET)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    rng = np.random.default_rng(args.seed)
    train_images, train_labels = read_split(args.data, "train")
    test_images, test_labels = read_split(args.data, "test")
    seen = {image.tobytes() for image in train_images}
    unseen = np.array([image.tobytes() not in seen for image in test_images])
    print(f"{(~unseen).sum()} test images are also training images; they are left out")
    test = choose(test_labels, unseen, 200, rng)
    train = choose(train_labels, np.ones(len(train_labels), bool), 100, rng)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        args.out,
        test_images=test_images[test],
        test_labels=test_labels[test],
        test_indices=test.astype(np.int32),
        train_images=train_images[train],
        train_labels=train_labels[train],
        train_indices=train.astype(np.int32),
    )
    print(
        f"{args.out.name}: {len(test)} test and {len(train)} training images, "
        f"{args.out.stat().st_size / 1e6:.2f} MB"
    )


if __name__ == "__main__":
    main()
