import math
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import codes as reference
from testtime._core.errors import InputError, OptionError
from testtime.decode.coding import (
    ESCAPES,
    code_lengths,
    decode,
    encode,
    from_ranks,
    rank_code,
    ranks,
)


class Mixer:
    """Probabilities that depend on all symbols read in a lane."""

    filler = 0

    def __init__(self, size, *, seed=0, sharp=3.0):
        self.size, self.seed, self.sharp = size, seed, sharp

    def start(self, lanes):
        self.read = [[] for _ in range(lanes)]
        self.given = []
        return self.probs()

    def step(self, symbols):
        for lane, symbol in zip(self.read, symbols.tolist(), strict=True):
            lane.append(symbol)
        return self.probs()

    def probs(self):
        rows = []
        for lane in self.read:
            seed = zlib.crc32(bytes(str((self.seed, lane)), "ascii"))
            draw = torch.Generator().manual_seed(seed)
            rows.append(torch.randn(self.size, generator=draw) * self.sharp)
        self.given.append(torch.softmax(torch.stack(rows), 1))
        return self.given[-1]


sequences = st.integers(2, 9).flatmap(
    lambda size: st.tuples(st.just(size), st.lists(st.integers(-ESCAPES, size - 1), max_size=40))
)


@settings(max_examples=60, deadline=None)
@given(sequence=sequences, lanes=st.integers(1, 5))
def test_what_is_coded_comes_back(sequence, lanes):
    size, symbols = sequence
    coded = encode(symbols, Mixer(size), lanes=lanes)
    assert decode(coded.payload, len(symbols), Mixer(size), lanes=lanes) == symbols
    assert 8 * len(coded.payload) <= coded.bound * 1.001 + 64


@pytest.mark.parametrize("lanes", [1, 3])
def test_bits_are_those_of_exact_arithmetic(lanes):
    draw = torch.Generator().manual_seed(0)
    symbols = torch.randint(5, (60,), generator=draw).tolist()
    mixer = Mixer(5, sharp=1.0)
    coded = encode(symbols, mixer, lanes=lanes)
    length = 60 // lanes
    seen = [symbols[lane * length + step] for step in range(length) for lane in range(lanes)]
    exact = reference.arithmetic_bits(seen, torch.cat(mixer.given))
    flags = -sum(math.log2(1 - 0.05 / (1 + n)) for n in range(60))
    assert coded.bound == pytest.approx(exact - 1 + flags, abs=1.01)
    assert exact - 2 <= 8 * len(coded.payload) <= exact + flags + 64


def test_a_lane_that_has_ended_reads_filler():
    class Seen(Mixer):
        def step(self, symbols):
            steps.append(symbols.tolist())
            return super().step(symbols)

    steps = []
    encode([1, 2, 3, -5, 2], Seen(4), lanes=2)
    assert steps == [[1, 0], [2, 2]]  # -5 is escaped; the second lane is shorter


def test_lanes_of_which_one_is_empty():
    coded = encode([1, 2], Mixer(4), lanes=5)
    assert decode(coded.payload, 2, Mixer(4), lanes=5) == [1, 2]
    assert encode([], Mixer(4)).payload == b""
    assert decode(b"", 0, Mixer(4)) == []


def test_rare_escapes_cost_little_and_many_cost_their_bits():
    sure = [0] * 500

    class Sure(Mixer):
        def probs(self):
            return torch.tensor([[1.0, 0.0]]).expand(len(self.read), 2)

    assert 8 * len(encode(sure, Sure(2)).payload) <= 32
    escaped = encode([-1 - i % 256 for i in range(500)], Sure(2))
    assert 8 * len(escaped.payload) < 500 * math.log2(ESCAPES) + 64


def test_another_predictor_finds_other_symbols():
    symbols = torch.randint(9, (50,), generator=torch.Generator().manual_seed(1)).tolist()
    coded = encode(symbols, Mixer(9))
    assert decode(coded.payload, 50, Mixer(9, seed=1)) != symbols


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), size=st.integers(2, 12), ties=st.booleans())
def test_ranks_equal_the_reference_and_invert(seed, size, ties):
    draw = torch.Generator().manual_seed(seed)
    probs = torch.rand(20, size, generator=draw)
    probs = (probs * 3).round() if ties else probs
    symbols = torch.randint(size, (20,), generator=draw)
    found = ranks(probs, symbols)
    assert found.tolist() == reference.ranks(probs.tolist(), symbols.tolist())
    assert torch.equal(from_ranks(probs, found), symbols)
    best = probs.sort(dim=1, descending=True, stable=True).indices[:, 0]
    assert ranks(probs, best).tolist() == [0] * 20
    assert zlib.decompress(rank_code(found)).decode().split() == [str(r) for r in found.tolist()]


@given(st.lists(st.floats(1e-6, 1), min_size=2, max_size=20))
def test_code_lengths_satisfy_kraft_and_lie_within_a_bit(weights):
    probs = torch.tensor(weights, dtype=torch.float64)
    probs = probs / probs.sum()
    lengths = code_lengths(probs)
    assert float((2.0**-lengths).sum()) <= 1 + 1e-12
    bits = -probs.log2()
    assert bool(((lengths >= bits) & (lengths - 1 < bits)).all())  # 1 + bits would round


def test_wrong_calls_are_refused():
    with pytest.raises(InputError, match="symbol 4 at 1"):
        encode([0, 4], Mixer(4))
    with pytest.raises(InputError, match="symbol -258"):
        encode([-258], Mixer(4))
    with pytest.raises(OptionError, match="lanes=0"):
        encode([0], Mixer(4), lanes=0)
    with pytest.raises(InputError, match="multiple of 4"):
        decode(b"abc", 1, Mixer(4))

    class Broken(Mixer):
        def probs(self):
            return torch.full((1, 4), math.nan)

    with pytest.raises(InputError, match="not finite"):
        encode([0], Broken(4))
