"""Trains the two embedded classifiers on the full Fashion-MNIST training set.

    python benchmarks/train_embedded.py --norm batch
    python benchmarks/train_embedded.py --norm group

Reads the four files of Fashion-MNIST from `--data` (default: where the Debian package
`dataset-fashion-mnist` puts them). Only the training files are learnt from; the test files are read
once, after the last epoch, for the accuracy at the end of the log. Writes
`src/testtime/bench/embedded/fashion_mnist_{norm}.safetensors` and `benchmarks/train_{norm}.log`.
"""

import argparse
import gzip
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from testtime.bench.networks import SmallResNet, group_norm

ROOT = Path(__file__).resolve().parents[1]


def read(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 28, 28) in [0, 1] and labels (n,) of one split."""
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return torch.from_numpy(pixels / np.float32(255)), torch.from_numpy(labels.astype(np.int64))


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrors half of the images and shifts all by up to two pixels, one shift for a batch."""
    mirrored = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
    x = torch.where(mirrored, x.flip(-1), x)
    down, right = torch.randint(0, 5, (2,), generator=generator).tolist()
    return F.pad(x, (2, 2, 2, 2))[..., down : down + 28, right : right + 28]


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers in percent."""
    model.eval()
    with torch.no_grad():
        hits = sum(
            int((model(a).argmax(1) == b).sum())
            for a, b in zip(x.split(500), y.split(500), strict=True)
        )
    return 100 * hits / len(y)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--norm", choices=["batch", "group"], required=True)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    x, y = read(args.data, "train")
    model = SmallResNet(nn.BatchNorm2d if args.norm == "batch" else group_norm)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    batches = len(x) // args.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.epochs * batches)
    log = [f"{args} torch {torch.__version__} threads {torch.get_num_threads()}"]
    print(log[0], flush=True)
    start = time.monotonic()
    for epoch in range(args.epochs):
        model.train()
        total = 0.0
        for index in torch.randperm(len(x), generator=generator).split(args.batch_size):
            inputs = augment(x[index], generator).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(inputs), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        log.append(
            f"epoch {epoch + 1:2d}  loss {total / batches:.4f}  {time.monotonic() - start:6.0f} s"
        )
        print(log[-1], flush=True)
    log.append(f"train accuracy {accuracy(model, x, y):.2f} %")
    log.append(f"test accuracy {accuracy(model, *read(args.data, 't10k')):.2f} %")
    print("\n".join(log[-2:]), flush=True)
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(weights, ROOT / f"src/testtime/bench/embedded/fashion_mnist_{args.norm}.safetensors")
    (ROOT / f"benchmarks/train_{args.norm}.log").write_text("\n".join(log) + "\n")


if __name__ == "__main__":
    main()
