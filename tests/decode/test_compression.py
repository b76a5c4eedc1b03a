import copy
import lzma
import struct
import zlib
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from testtime._core import errors
from testtime._core.errors import InputError, OptionError, StateError, WorkFailed
from testtime.decode import compression, container
from testtime.decode.api import generate
from testtime.decode.compression import compress, decompress
from testtime.decode.container import inspect
from testtime.decode.decoding import Decoding
from testtime.decode.lossless_tokens import BREAK, from_tokens, to_tokens
from testtime.decode.models import load_language_model
from testtime.decode.windows import WindowedModel
from toys import ToyModel, ToyTokenizer

from .conftest import tiny_model

TOKENIZER = ToyTokenizer()
TEXT = b"the thin text, Then ~ and \xff\x00 more of that \xe2\x82\xac \xed\xa0\x80 text"


@cache
def toy():
    """A model that expects the letters a to g, in an order of its own, and a text that it likes."""
    model, written = ToyModel(seed=3), [256]
    with torch.no_grad():
        model.head[:, : ord("a")] = model.head[:, ord("h") :] = 0
        for _ in range(400):
            written.append(int(model(torch.tensor([written])).logits[0, -1].argmax()))
    return model, bytes(written[1:])


def liked(model, tokenizer):
    """A text of letters that a model of transformers finds likely."""

    def letters(_, logits):
        out = torch.full_like(logits, -torch.inf)
        out[:, 36:94] = logits[:, 36:94]
        return out

    method = Decoding(steps=(letters,), draw=False)
    return generate(model, tokenizer, "<bos>", method, max_new_tokens=110).text.encode()


contents = st.one_of(st.binary(max_size=60), st.text(max_size=40).map(str.encode))


@settings(max_examples=150, deadline=None)
@given(contents)
@example(b"")
@example(b"T")
@example("Ħ~th\u2028\ud7ff\U0010ffff\r\n\0".encode())
@example(b"\xed\xb2\x80\xff")  # bytes that look like an escape of Python's own
@example(TEXT)
def test_any_bytes_are_tokens_and_come_back(content):
    tokens = to_tokens(content, TOKENIZER)
    assert from_tokens(tokens, TOKENIZER) == content
    assert all(BREAK <= token < 258 for token in tokens)


def test_what_the_tokenizer_spells_rightly_is_not_escaped():
    assert to_tokens(b"the thing", TOKENIZER) == [257, *b"e ", 257, *b"ing"]
    assert to_tokens(b"thE", TOKENIZER)[-1] == -1 - ord("E")
    assert BREAK in to_tokens(b"a~aaaaaa", TOKENIZER)


@settings(max_examples=40, deadline=None)
@given(content=contents, lanes=st.sampled_from([None, 1, 2, 7]), window=st.integers(2, 9),
       data=st.data())  # fmt: skip
def test_compression_gives_the_same_bytes(content, lanes, window, data):
    stride = data.draw(st.none() | st.integers(1, window - 1))
    model = ToyModel()
    made = compress(content, model, TOKENIZER, lanes=lanes, window=window,
                    stride=stride)  # fmt: skip
    assert decompress(made.data, model, TOKENIZER) == content
    header = inspect(made.data)
    assert (header.lanes, header.tokens) in {(lanes or 1, made.tokens), (lanes or 1, 0)}
    assert (header.window, header.stride) == (window, stride or window // 2)
    assert len(made.data) - len(header.payload) <= 56
    assert len(header.payload) <= len(content)
    payload = 8 * len(header.payload)
    assert payload <= made.bound * max(made.characters, 1) * 1.001 + 64


def test_what_would_grow_is_kept_as_it_is():
    content = bytes(range(256))
    model = ToyModel()
    made = compress(content, model, TOKENIZER)
    assert (made.tokens > 0, inspect(made.data).payload) == (True, content)
    model.calls = []
    assert decompress(made.data, model, TOKENIZER) == content
    assert model.calls == []


def test_text_that_the_model_expects_becomes_small():
    model, text = toy()
    made = compress(text, model, TOKENIZER, window=600)
    assert made.bits_per_character == pytest.approx(8 * len(made.data) / len(text))
    assert made.bound < 0.25 * 8
    assert made.bound * len(text) <= 8 * len(inspect(made.data).payload) <= (
        made.bound * len(text) * 1.01 + 64)  # fmt: skip


def test_a_window_begins_with_the_start_token_and_the_newest_tokens():
    model = ToyModel()
    predictor = WindowedModel(model, start=256, window=5, stride=2)
    tokens = list(range(10, 22))
    probs = [predictor.start(1)]
    probs += [predictor.step(torch.tensor([token])) for token in tokens]
    windows = [[256, *tokens[:n]] for n in range(5)]  # at most five
    windows += [[256, 12, 13, 14]]  # full: the two oldest are dropped
    windows += [[256, 12, 13, 14, 15][:5], [256, 14, 15, 16], [256, 14, 15, 16, 17]]
    for found, window in zip(probs, windows, strict=False):
        with torch.no_grad():
            alone = model(torch.tensor([window])).logits[:, -1].softmax(-1)
        torch.testing.assert_close(found, alone)
    again = WindowedModel(model, start=256, window=5, stride=2)
    assert torch.equal(again.start(1), probs[0])
    assert all(torch.equal(again.step(torch.tensor([t])), p)
               for t, p in zip(tokens, probs[1:], strict=True))  # fmt: skip


def test_stride_one_is_the_window_of_the_paper():
    model = ToyModel()
    predictor = WindowedModel(model, start=256, window=4, stride=1)
    predictor.start(2)
    for step in range(9):
        found = predictor.step(torch.tensor([step, 50 + step]))
    with torch.no_grad():
        alone = model(torch.tensor([[256, 6, 7, 8], [256, 56, 57, 58]])).logits[:, -1].softmax(-1)
    torch.testing.assert_close(found, alone)


def test_encoder_and_decoder_make_the_same_calls():
    model, text = copy.deepcopy(toy())
    model.calls = []
    made = compress(text + TEXT, model, TOKENIZER, window=400, lanes=3)
    calls, model.calls = model.calls, []
    decompress(made.data, model, TOKENIZER)
    assert calls == model.calls
    assert {shape[0] for shape, _ in calls} == {3}


def test_the_file_says_with_how_many_threads_it_was_made(monkeypatch):
    (model, text), set_to = toy(), []
    made = compress(text, model, TOKENIZER)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    assert decompress(made.data, model, TOKENIZER) == text
    assert set_to == [inspect(made.data).threads, 77]


def test_every_damaged_file_is_refused_before_the_model_is_asked():
    model = ToyModel()
    data = compress(TEXT, model, TOKENIZER).data
    model.calls = []
    broken = [data[:end] for end in range(len(data))] + [data + b"\0"]
    broken += [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(len(data))]
    for damaged in broken:
        with pytest.raises(StateError):
            decompress(damaged, model, TOKENIZER)
    assert model.calls == []


def test_another_model_or_tokenizer_is_refused_by_its_fingerprint():
    class Other(ToyTokenizer):
        def get_vocab(self):
            return {"other": 257}

    model = ToyModel()
    data = compress(TEXT, model, TOKENIZER).data
    for wrong, tokenizer in ((ToyModel(seed=1), TOKENIZER), (model, Other())):
        wrong.calls = []
        with pytest.raises(StateError, match="another model or tokenizer"):
            decompress(data, wrong, tokenizer)
        assert wrong.calls == []


def test_other_probabilities_are_noticed_and_never_answered_with_other_bytes(monkeypatch):
    monkeypatch.setattr(compression, "identity", lambda *_: bytes(16))
    model, text = toy()
    data = compress(text + TEXT, model, TOKENIZER).data
    for seed in range(5):
        with pytest.raises(WorkFailed, match="gave other probabilities"):
            decompress(data, ToyModel(seed=seed), TOKENIZER)


def test_another_environment_is_said_before_the_work(monkeypatch):
    model, text = toy()
    data = compress(text, model, TOKENIZER).data
    with monkeypatch.context() as patch:
        patch.setattr(compression, "versions", lambda: (9, 8, 0, 300, 0, 0, 0, 0, 1))
        with pytest.warns(
            errors.TesttimeWarning, match=r"this is torch 9\.8\.0, transf.* 300\.0\.0"
        ):
            assert decompress(data, model, TOKENIZER) == text
    monkeypatch.setattr(compression, "machine", lambda _: b"cuda")
    with pytest.warns(errors.TesttimeWarning, match="on another machine or build"):
        assert decompress(data, model, TOKENIZER) == text


def sealed(data):
    return data[:-4] + struct.pack("<I", zlib.crc32(data[:-4]))


def test_a_file_of_another_version_is_refused():
    data = bytearray(compress(b"a", ToyModel(), TOKENIZER).data)
    for version in (1, 9):
        data[4] = version
        with pytest.raises(StateError, match=f"version {version}, and this testtime reads 2"):
            inspect(sealed(bytes(data)))


@given(st.binary(max_size=40))
def test_a_head_that_no_file_has_is_refused_though_its_checksum_fits(numbers):
    data = compress(b"", ToyModel(), TOKENIZER).data[: container.FIXED.size]
    try:
        found = inspect(sealed(data + numbers + bytes(4)))
    except StateError:
        return
    assert 0 < found.stride < found.window
    assert 0 < found.lanes < 2**16


def test_a_model_in_train_mode_is_put_aside_its_chance(tokenizer):
    model = copy.deepcopy(tiny_model("gpt2")).train()  # it has dropout
    text = liked(model, tokenizer)
    data = compress(text, model, tokenizer).data
    assert inspect(data).tokens > 0
    assert decompress(data, model, tokenizer) == text
    assert all(module.training for module in model.modules())


def test_wrong_calls_are_refused():
    with pytest.raises(InputError, match="Encode text first"):
        compress("text", ToyModel(), TOKENIZER)
    for options in ({"lanes": 0}, {"lanes": 2**16}, {"window": 1}, {"window": 4, "stride": 4},
                    {"stride": 0}, {"window": "x"}, {"window": 9.0}, {"stride": 1.5},
                    {"lanes": "2"}, {"lanes": True}):  # fmt: skip
        with pytest.raises(OptionError):
            compress(b"ab", ToyModel(), TOKENIZER, **options)
    broken = ToyModel()
    with torch.no_grad():
        broken.head[:] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        compress(b"ab", broken, TOKENIZER)
    with pytest.raises(OptionError, match="window=5000 is more than the model's context of 4096"):
        compress(b"ab", ToyModel(), TOKENIZER, window=5000)
    with pytest.raises(InputError, match="tokenizer does not belong"):
        compress(b"ab", ToyModel(vocabulary=200), TOKENIZER)
    with pytest.raises(InputError, match="2 tokens for 0 lanes"):
        WindowedModel(ToyModel(), start=0).step(torch.tensor([1, 2]))


def test_progress_reaches_the_end():
    seen = []
    compress(TEXT, ToyModel(), TOKENIZER, lanes=2,
             on_progress=lambda done, total: seen.append((done, total)))  # fmt: skip
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] == len(to_tokens(TEXT, TOKENIZER))


@pytest.mark.extra
def test_the_real_model_beats_xz_on_english_that_it_has_not_read():
    model, tokenizer = load_language_model("gemma:270m")
    text = (Path(__file__).parents[2] / "docs/never-worse.md").read_bytes()[:700]
    made = compress(text, model, tokenizer, lanes=4)
    assert len(made.data) < 0.8 * len(lzma.compress(text, preset=9))
    assert decompress(made.data, model, tokenizer) == text


@pytest.mark.parametrize("lanes", [1, 3])
def test_models_of_transformers_compress_any_text_beyond_their_window(model, tokenizer, lanes):
    part = liked(model, tokenizer)
    part += "Grüße \U0001f600 <bos><eos>\r\n\ttab \u200d ".encode() + b"\xff\xfe\x00"
    content = part * lanes  # each lane begins where the text does
    made = compress(content, model, tokenizer, window=100, lanes=lanes)
    assert decompress(made.data, model, tokenizer) == content
    assert inspect(made.data).tokens > 0
    payload = 8 * len(inspect(made.data).payload)
    assert payload == pytest.approx(made.bound * made.characters, rel=0.01, abs=64)
    whole = compress(content[:20], model, tokenizer, lanes=lanes)
    assert inspect(whole.data).window == 128
