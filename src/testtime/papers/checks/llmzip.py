"""LLMZip's claim: a good predictor of text and an arithmetic coder compress better than the usual.

The predictor here is an n-gram of bytes, so that the check takes seconds; the coder, and the codes
beside it, are those that a language model uses.
"""

import bz2
import lzma
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.decode.coding import code_lengths, decode, encode, rank_code, ranks
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Help topics of Python, 300 kB to count n-grams of bytes in, 20 kB of other topics to compress: "
    "arithmetic coding takes fewer bits than bz2 and less than 0.95 of zlib's, lies within 1% + 64 "
    "bits of the bound, not above the code of whole bits, order 1 > order 3 > order 5, and decodes."
)
KNOWN, HELD = 300_000, 20_000
ORDERS = (1, 3, 5)


@register("check", paper="llmzip", name="llmzip")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Bits per byte of three n-grams and of common compressors."""
    return reproduce(
        "llmzip", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Bits per byte of held-out text; each seed holds out other topics."""
    known, held = _texts(seed)
    for name, code in (("zlib", zlib.compress(held, 9)), ("bz2", bz2.compress(held, 9)),
                       ("xz", lzma.compress(held, preset=9))):  # fmt: skip
        yield name, 8 * len(code) / len(held)
    counts = _counted(known)
    for order in ORDERS:
        predictor = _NGram(counts, order)
        coded = encode(held, predictor)
        yield f"order {order}", 8 * len(coded.payload) / len(held)
        if order == ORDERS[-1]:
            probs, symbols = torch.cat(predictor.given), torch.tensor(list(held))
            own = probs.gather(1, symbols[:, None]).squeeze(1)
            yield "bound", float(-own.log2().sum()) / len(held)
            yield "whole bits", float(code_lengths(own).sum()) / len(held)
            yield "ranks", 8 * len(rank_code(ranks(probs, symbols))) / len(held)
            back = decode(coded.payload, len(held), predictor)
            yield "decoded", float(bytes(back) == held)


def _texts(seed: int) -> tuple[bytes, bytes]:
    from pydoc_data.topics import topics  # noqa: PLC0415

    names = sorted(topics)
    order = torch.randperm(len(names), generator=generator(seed, "llmzip")).tolist()
    whole = "\n".join(topics[names[place]] for place in order).encode()
    return whole[HELD : HELD + KNOWN], whole[:HELD]


def _counted(text: bytes) -> list[dict[bytes, dict[int, int]]]:
    """For each length of context: context -> byte that followed -> how often."""
    counts: list[dict[bytes, dict[int, int]]] = []
    for length in range(max(ORDERS) + 1):
        seen: dict[bytes, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        for at in range(length, len(text)):
            seen[text[at - length : at]][text[at]] += 1
        counts.append(dict(seen))
    return counts


class _NGram:
    """Witten-Bell: (counts + kinds * probability of the shorter context) / (number + kinds)."""

    filler = 0

    def __init__(self, counts: list[dict[bytes, dict[int, int]]], order: int) -> None:
        self._counts, self._order = counts, order
        self._before = b""
        self.given: list[Tensor] = []

    def start(self, lanes: int) -> Tensor:
        if lanes != 1:
            raise ValueError("an n-gram has one lane")
        self._before, self.given = b"", []
        return self._probs()

    def step(self, symbols: Tensor) -> Tensor:
        self._before = (self._before + bytes(symbols.tolist()))[-self._order :]
        return self._probs()

    def _probs(self) -> Tensor:
        probs = np.full(256, 1 / 256)
        for length in range(len(self._before) + 1):
            seen = self._counts[length].get(self._before[len(self._before) - length :])
            if seen is None:
                break
            probs *= len(seen)
            probs[list(seen)] += list(seen.values())
            probs /= sum(seen.values()) + len(seen)
        self.given.append(torch.from_numpy(probs)[None].float())
        return self.given[-1]


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    coded = found["order 5"]
    return (
        coded < found["bz2"]
        and coded < 0.95 * found["zlib"]
        and abs(coded - found["bound"]) <= 0.01 * found["bound"] + 64 / HELD
        and coded <= found["whole bits"]
        and found["order 1"] > found["order 3"] > coded
        and found["decoded"] == 1
    )
