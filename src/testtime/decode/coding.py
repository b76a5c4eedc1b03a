"""Arithmetic coding of symbols with the probabilities of any predictor, and simpler codes beside it.

    bound    sum_i -log2 p(x_i | what came before)
    ac       range coder, within a few bits of the bound
    lengths  sum_i ceil(-log2 p(x_i | ...))                     a prefix code for each symbol
    ranks    place of x_i among all symbols, best first, as text, then zlib

The decoder asks the same predictor for the same probabilities in the same order, so both must run
through the same calls: the same number of lanes, from the first symbol on. Lanes are equal parts of
the sequence which are coded side by side, so that a predictor answers for all in one call; each
begins without knowledge of the others.

A symbol that the predictor has no name for is escaped: negative numbers -1 to -257 stand for 257
further symbols, announced by a flag whose probability adapts, and equally likely.

Reference: Valmeekam et al., LLMZip: Lossless Text Compression using Large Language Models, 2023.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from testtime._core.errors import InputError, MissingExtra, OptionError, WorkFailed

ESCAPES = 257
"""Symbols beyond the predictor's: 256 bytes, and one that only parts what stands around it."""

LEAST = 2.0**-24
"""Probability that the coder gives to every symbol at least."""

Row = np.ndarray[Any, np.dtype[np.float32]]
Progress = Callable[[int, int], None]
"""Called with the symbols done and their number."""


class Predictor(Protocol):
    """Gives the probabilities of the next symbol in each lane.

    `filler` is the symbol that it reads where a lane has ended or a symbol was escaped.
    """

    filler: int

    def start(self, lanes: int) -> Float[Tensor, "lanes symbols"]:
        """Forgets everything; the probabilities of the first symbol."""
        ...

    def step(self, symbols: Int[Tensor, "lanes"]) -> Float[Tensor, "lanes symbols"]:
        """Reads one symbol in each lane; the probabilities of the next."""
        ...


@dataclass(frozen=True, kw_only=True)
class Coded:
    """A coded sequence.

    Attributes:
        payload: what the range coder wrote.
        bound: bits that the predictor's own probabilities ask for, escapes included.
    """

    payload: bytes
    bound: float


def encode(
    symbols: Sequence[int],
    predictor: Predictor,
    *,
    lanes: int = 1,
    on_progress: Progress | None = None,
) -> Coded:
    """Codes symbols with the probabilities that a predictor gives them.

    Args:
        symbols: each a symbol of the predictor, or -1 to -257 for an escape.
        predictor: gives probabilities.
        lanes: parts coded side by side.
        on_progress: called after each step.

    Raises:
        InputError: a symbol that does not exist, or probabilities that are not.
        OptionError: fewer than one lane.
        MissingExtra: constriction is not installed.

    Example:
        >>> class Coin:
        ...     filler = 0
        ...     def start(self, lanes):
        ...         return torch.tensor([[0.9, 0.1]]).expand(lanes, 2)
        ...     def step(self, symbols):
        ...         return self.start(len(symbols))
        >>> coded = encode([0] * 99 + [1], Coin())
        >>> round(coded.bound), 8 * len(coded.payload)
        (19, 32)
        >>> decode(coded.payload, 100, Coin()) == [0] * 99 + [1]
        True
    """
    stream = _constriction().stream
    encoder, bound = stream.queue.RangeEncoder(), 0.0

    def code(place: int, row: Row, chance: float) -> int:
        nonlocal bound
        symbol = symbols[place]
        if not -ESCAPES <= symbol < len(row):
            raise InputError(
                f"symbol {symbol} at {place}: expected 0 to {len(row) - 1}, or an escape"
            )
        encoder.encode(int(symbol < 0), stream.model.Bernoulli(chance, perfect=False))
        if symbol < 0:
            encoder.encode(-1 - symbol, stream.model.Uniform(ESCAPES))
            bound -= math.log2(chance / ESCAPES)
        else:
            encoder.encode(symbol, stream.model.Categorical(row, lazy=True, perfect=False))
            bound -= math.log2((1 - chance) * max(float(row[symbol]), LEAST))
        return symbol

    _run(code, len(symbols), predictor, lanes, on_progress)
    return Coded(payload=encoder.get_compressed().astype("<u4").tobytes(), bound=bound)


def decode(
    payload: bytes,
    count: int,
    predictor: Predictor,
    *,
    lanes: int = 1,
    on_progress: Progress | None = None,
) -> list[int]:
    """The symbols that `encode` was given; needs the same predictor and lanes.

    With another predictor it mostly returns other symbols: nothing in the payload tells. The
    container of `compression` does.

    Args:
        payload: of `encode`.
        count: how many symbols there are.
        predictor: the same.
        lanes: the same.
        on_progress: called after each step.

    Raises:
        InputError: the payload is no whole number of words, or probabilities are not.
        WorkFailed: the payload cannot have been written with these probabilities.
        MissingExtra: constriction is not installed.
    """
    stream = _constriction().stream
    if len(payload) % 4:
        raise InputError(f"the payload has {len(payload)} bytes; expected a multiple of 4")
    decoder = stream.queue.RangeDecoder(np.frombuffer(payload, "<u4").astype("u4"))
    symbols = [0] * count

    def code(place: int, row: Row, chance: float) -> int:
        try:
            if decoder.decode(stream.model.Bernoulli(chance, perfect=False)):
                symbols[place] = -1 - int(decoder.decode(stream.model.Uniform(ESCAPES)))
            else:
                model = stream.model.Categorical(row, lazy=True, perfect=False)
                symbols[place] = int(decoder.decode(model))
        except AssertionError as error:  # what constriction raises
            raise WorkFailed(
                f"the payload cannot have been written with these probabilities (symbol {place}); "
                "expected the predictor and lanes that encode had"
            ) from error
        return symbols[place]

    _run(code, count, predictor, lanes, on_progress)
    return symbols


def code_lengths(probs: Float[Tensor, "*symbols"]) -> Int[Tensor, "*symbols"]:
    """Bits of a prefix code for symbols of these probabilities, each coded alone: ceil(-log2 p).

    Example:
        >>> code_lengths(torch.tensor([0.5, 0.3, 0.2]))
        tensor([1, 2, 3])
    """
    return (-probs.log2()).ceil().long()


def ranks(
    probs: Float[Tensor, "symbols classes"], symbols: Int[Tensor, "symbols"]
) -> Int[Tensor, "symbols"]:
    """Place of each symbol among all, by falling probability; equal ones in their own order.

    Example:
        >>> ranks(torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]]), torch.tensor([1, 1]))
        tensor([0, 1])
    """
    own = probs.gather(1, symbols[:, None])
    before = torch.arange(probs.shape[1], device=probs.device) < symbols[:, None]
    return ((probs > own) | ((probs == own) & before)).sum(1)


def from_ranks(
    probs: Float[Tensor, "symbols classes"], places: Int[Tensor, "symbols"]
) -> Int[Tensor, "symbols"]:
    """The symbols that have these ranks.

    Example:
        >>> from_ranks(torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]]), torch.tensor([0, 1]))
        tensor([1, 1])
    """
    order = probs.sort(dim=1, descending=True, stable=True).indices
    return order.gather(1, places[:, None]).squeeze(1)


def rank_code(places: Int[Tensor, "symbols"]) -> bytes:
    """Ranks as decimal numbers with blanks between, through zlib at level 9.

    Example:
        >>> zlib.decompress(rank_code(torch.tensor([0, 12, 3])))
        b'0 12 3'
    """
    return zlib.compress(" ".join(map(str, places.tolist())).encode(), 9)


def _run(
    code: Callable[[int, Row, float], int],
    count: int,
    predictor: Predictor,
    lanes: int,
    on_progress: Progress | None,
) -> None:
    """The one walk of encoder and decoder: what differs is `code`, which tells each symbol.

    `code` is given the symbol's place, the probabilities, and the chance of an escape, which begins
    small, follows how often there was one, and is never 0 or 1.
    """
    if lanes < 1:
        raise OptionError(f"lanes={lanes}: expected one at least")
    length, escaped, done, read = -(-count // lanes), 0, 0, [predictor.filler] * lanes
    for step in range(length):
        rows = _rows(
            predictor.start(lanes)
            if step == 0
            else predictor.step(torch.tensor(read, device="cpu"))
        )
        read = [predictor.filler] * lanes
        for lane in range(lanes):
            if (place := lane * length + step) >= count:
                continue
            symbol = code(place, rows[lane], (escaped + 0.05) / (done + 1))
            if symbol >= 0:
                read[lane] = symbol
            escaped += symbol < 0
            done += 1
        if on_progress is not None:
            on_progress(done, count)


def _rows(probs: Float[Tensor, "lanes symbols"]) -> Row:
    rows = probs.detach().to("cpu", torch.float32).contiguous().numpy()
    if not np.isfinite(rows).all() or (rows < 0).any() or not (rows.sum(1) > 0).all():
        raise InputError("the predictor gave probabilities that are negative or not finite")
    return rows


def _constriction() -> Any:
    try:
        import constriction  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("constriction", "lm") from error
    return constriction
