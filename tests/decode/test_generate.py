"""Writing: batches, seeds, stop strings, streams; and what is refused before it runs."""

import copy
import math
import threading
import time

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import testtime as tt
from reference import decode as reference
from testtime._core.errors import InputError, OptionError, UnknownName
from testtime.decode.caching import Reader
from testtime.decode.decoding import Decoding
from testtime.decode.methods.classical import typical
from testtime.decode.methods.ead import ead
from testtime.decode.methods.em_inf import LowerEntropy
from testtime.decode.prompts import read_prompts
from testtime.decode.writing import Row

from .conftest import PROMPTS, tiny_model

NAMES = sorted(tt.decode.decodings())


def write(model, tokenizer, prompts, method, **options):
    needed = tt.decode.decodings()[method].needs
    if "large" in needed:
        options |= {"large": tiny_model(seed=9, layers=4)}
    if "lame" in needed:
        options |= {"lame": "b" if isinstance(prompts, str) else ["b"] * len(prompts)}
    return tt.decode.generate(model, tokenizer, prompts, method, max_new_tokens=16, **options)


def test_greedy_is_the_best_token_of_a_forward_from_scratch(model, tokenizer):
    for prompt, found in zip(PROMPTS, write(model, tokenizer, PROMPTS, "greedy"), strict=True):
        ids = tokenizer(prompt)["input_ids"]
        assert list(found.tokens) == reference.greedy(model, ids, 16)
        whole = tokenizer.decode(found.tokens, skip_special_tokens=True)
        assert found.text == str(found) == whole


@pytest.mark.parametrize("method", NAMES)
def test_a_batch_writes_what_each_prompt_alone_does(method, llama, tokenizer):
    together = write(llama, tokenizer, PROMPTS, method, seed=3)
    again = write(llama, tokenizer, PROMPTS, method, seed=3)
    alone = write(llama, tokenizer, PROMPTS[0], method, seed=3)
    assert together == again
    assert together[0] == alone
    if method not in ("greedy", "ead"):
        swapped = write(llama, tokenizer, PROMPTS, method, seed=4)
        assert any(a.tokens != b.tokens for a, b in zip(together, swapped, strict=True))


def test_nothing_of_the_caller_changes(llama, tokenizer):
    model = copy.deepcopy(llama).train()
    settings = {
        "do_sample": True, "repetition_penalty": 9.0, "temperature": 0.3, "guidance_scale": 3.0, "stop_strings": ["a"],
        "num_return_sequences": 3, "min_new_tokens": 50, "max_time": 1e-9, "forced_eos_token_id": 2,
        "penalty_alpha": 0.6, "prompt_lookup_num_tokens": 3, "sequence_bias": [[[70], 99.0]],
    }  # fmt: skip
    model.generation_config.update(**settings)
    before_all = model.generation_config.to_dict()
    side, before = tokenizer.padding_side, torch.random.get_rng_state()
    found = write(model, tokenizer, PROMPTS, "sample")
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(module.training for module in model.modules())
    assert tokenizer.padding_side == side
    assert found == write(llama, tokenizer, PROMPTS, "sample")  # nor do its settings change ours
    assert model.generation_config.to_dict() == before_all


def test_what_a_model_forbids_is_not_written(llama, tokenizer):
    model = copy.deepcopy(llama)
    plain = write(model, tokenizer, "ab", "greedy").tokens
    model.generation_config.suppress_tokens = [plain[0]]
    model.generation_config.bad_words_ids = [[plain[2]]]
    found = write(model, tokenizer, "ab", "greedy").tokens
    assert not {plain[0], plain[2]} & set(found)
    for threshold in (0.0, math.inf):
        ead = tt.decode.generate(
            model, tokenizer, "ab", "ead", large=model, threshold=threshold, max_new_tokens=16
        )
        assert ead.tokens == found


def test_a_method_can_be_a_value(llama, tokenizer):
    method = Decoding(steps=(LowerEntropy(threshold=0.0),), draw=False)
    found = tt.decode.generate(llama, tokenizer, "ab", method, max_new_tokens=16)
    assert found == write(llama, tokenizer, "ab", "greedy")  # the best token stays the best
    with pytest.raises(OptionError, match="go with the name"):
        tt.decode.generate(llama, tokenizer, "ab", method, p=0.1)
    for wrong in (3, Decoding):
        with pytest.raises(OptionError, match="expected a name or a value"):
            tt.decode.generate(llama, tokenizer, "ab", wrong)


def test_a_text_ends_before_its_stop_string(llama, tokenizer):
    plain = write(llama, tokenizer, "ab", "sample").text
    word = plain[5:8]
    found = write(llama, tokenizer, "ab", "sample", stop=word)
    assert found.ended == "stop"
    assert found.text == plain[: plain.index(word)]
    pieces = []
    streamed = write(
        llama, tokenizer, "ab", "sample", stop=[word, "never"],
        on_text=lambda row, piece: pieces.append(piece),
    )  # fmt: skip
    assert "".join(pieces) == streamed.text == found.text


def test_a_special_token_stops_a_text_though_it_has_none(llama, tokenizer):
    model = copy.deepcopy(llama)
    model.lm_head.weight.data[3] = model.lm_head.weight.data[first := write(
        llama, tokenizer, "ab", "greedy").tokens[4]] * 1.01  # fmt: skip
    plain = write(model, tokenizer, "ab", "greedy")
    assert 3 in plain.tokens[:5]
    found = write(model, tokenizer, "ab", "greedy", stop=["<unk>", "never"])
    assert (found.ended, found.tokens[-1], first in found.tokens) == ("stop", 3, False)
    assert plain.text.startswith(found.text)
    assert write(llama, tokenizer, "ab", "greedy", stop="<eos>").ended == "length"


def test_the_first_word_keeps_its_blank(llama):
    # a tokenizer of the Llama kind, which leaves out the blank of the first word that it reads
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"▁w{i}" for i in range(256))]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    pieces = []
    found = tt.decode.generate(
        llama, tokenizer, "w1 w2", "greedy", max_new_tokens=3, stop="never",
        on_text=lambda row, piece: pieces.append(piece),
    )  # fmt: skip
    assert found.text == "".join(f" w{token - 4}" for token in found.tokens) == "".join(pieces)


def test_text_ends_at_the_token_of_end_and_at_the_context(llama, tokenizer):
    model = copy.deepcopy(llama)
    first = write(llama, tokenizer, "ab", "greedy").tokens
    model.generation_config.eos_token_id = [2, first[4]]
    found = write(model, tokenizer, ["ab", PROMPTS[1]], "greedy")
    assert found[0].ended == "end"
    assert found[0].tokens == first[: first.index(first[4]) + 1]
    assert found[1].tokens[0] == write(llama, tokenizer, PROMPTS[1], "greedy").tokens[0]
    long = tt.decode.generate(llama, tokenizer, "x" * 120, "greedy", max_new_tokens=50)
    assert (len(long.tokens), long.ended) == (128 - 121, "length")


@pytest.mark.parametrize("method", ["sample", "ead", "uscd"])
def test_a_prompt_that_fills_the_context_leaves_the_others_their_room(model, tokenizer, method):
    prompts = ["x" * 120, "ab", "y" * 100, "z" * 120]
    more = {"lame": ["b", "c" * 110, "b", "b"]} if method == "uscd" else {}
    more |= {"large": model} if method == "ead" else {}
    found = tt.decode.generate(model, tokenizer, prompts, method, max_new_tokens=20, **more)
    room = {"sample": [7, 20, 20, 7], "ead": [7, 20, 20, 7], "uscd": [7, 17, 20, 7]}[method]
    assert [len(each.tokens) for each in found] == room
    alone = tt.decode.generate(
        model, tokenizer, prompts[0], method, max_new_tokens=20,
        **{name: value[0] if name == "lame" else value for name, value in more.items()},
    )  # fmt: skip
    assert alone == found[0]


def test_two_threads_write_with_one_model(llama, tokenizer):
    model, both, first_done, second = copy.deepcopy(llama), threading.Event(), threading.Event(), []
    settings = model.generation_config

    def wait(row, piece):
        both.set()
        assert first_done.wait(30)

    thread = threading.Thread(
        target=lambda: second.append(write(model, tokenizer, "c", "sample", on_text=wait))
    )

    def begin(row, piece):
        if not thread.ident:
            thread.start()
            assert both.wait(30)

    first = write(model, tokenizer, "ab", "sample", on_text=begin)
    first_done.set()
    thread.join()
    assert first == write(llama, tokenizer, "ab", "sample")
    assert second == [write(llama, tokenizer, "c", "sample")]
    assert model.generation_config is settings


def test_a_stream_gives_the_same_text_and_ends_when_it_is_left(llama, tokenizer):
    found = write(llama, tokenizer, PROMPTS, "sample", seed=1)
    texts = ["", "", ""]
    for piece in tt.decode.stream(llama, tokenizer, PROMPTS, "sample", max_new_tokens=16, seed=1):
        texts[piece.prompt] += piece.text
    assert texts == [each.text for each in found]
    pieces = tt.decode.stream(llama, tokenizer, "ab", "sample", max_new_tokens=100)
    next(pieces)
    pieces.close()
    with pytest.raises(InputError, match="at least one character"):
        next(tt.decode.stream(llama, tokenizer, ""))


def test_a_stream_that_is_left_ends_though_no_text_comes(llama, tokenizer):
    steps = []

    def silent(tokens, logits):  # one letter, then nothing but tokens without text
        steps.append(time.sleep(0.01 * bool(steps)))
        only = torch.full_like(logits, -math.inf)
        only[:, 3 if len(steps) > 1 else 70] = 0
        return only

    pieces = tt.decode.stream(llama, tokenizer, "ab", Decoding(steps=(silent,)), max_new_tokens=99)
    next(pieces)
    pieces.close()
    assert len(steps) < 99


@pytest.mark.parametrize("text", ["Łódź ☃ 😀!", "plain", "a\ufffdb", "\n\n  x"])
def test_pieces_join_to_the_text_and_no_character_is_broken(text, tokenizer):
    row = Row(tokenizer, [2], ["zz"], 100)
    pieces = [row.add(token) for token in [*tokenizer(text)["input_ids"][1:], 2]]
    assert "".join(pieces) == row.text == text
    assert row.ended == "end"
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_what_may_become_a_stop_string_is_held_back(tokenizer):
    row = Row(tokenizer, [2], ["END", "EQ"], 100)
    pieces = [row.add(token) for token in tokenizer("aEENx END")["input_ids"][1:]]
    assert pieces == ["a", "", "E", "", "ENx", " ", "", "", ""]
    assert (row.text, row.ended) == ("aEENx ", "stop")


def test_a_reader_in_pieces_equals_a_forward_from_scratch(model, tokenizer):
    prompts = read_prompts(model, tokenizer, PROMPTS)
    reader = Reader(model, prompts)
    written = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for pause in (1, 1, 3, 2, 12, 1):
            for row, out in zip(written, reader.logits(), strict=True):
                torch.testing.assert_close(out, reference.next_logits(model, row))
            assert reader.waiting == 0
            for _ in range(pause):
                tokens = torch.randint(4, 260, (3,), generator=random)
                reader.push(tokens)
                for row, token in zip(written, tokens.tolist(), strict=True):
                    row.append(token)


def test_wrong_calls_are_refused_before_anything_runs(llama, tokenizer, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the model ran")

    model = copy.deepcopy(llama)
    monkeypatch.setattr(model, "forward", never)
    for prompt, said in [
        ("", "at least one character"), ([], "no prompt"), (["a", ""], "prompt 1 is ''"),
        ("x" * 127, "prompt 0 has 128 tokens, and the model looks at 128"),
        ([3], "prompt 0 is 3"), (["a", "b\udcff"], "'\\\\udcff' at 1, which is no character"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=said):
            tt.decode.generate(model, tokenizer, prompt)
    with pytest.raises(InputError, match="does not belong"):
        tt.decode.generate(tiny_model(vocabulary=200), tokenizer, "a")
    with pytest.raises(InputError, match="needs a second model"):
        tt.decode.generate(model, tokenizer, "a", "ead")
    with pytest.raises(InputError, match="does not belong"):
        tt.decode.generate(model, tokenizer, "a", "ead", large=tiny_model(vocabulary=200))
    with pytest.raises(InputError, match="no example"):
        tt.decode.generate(model, tokenizer, "a", "uscd")
    with pytest.raises(InputError, match="1 lame prompts for 2"):
        tt.decode.generate(model, tokenizer, ["a", "b"], "uscd", lame="c")
    with pytest.raises(InputError, match="model looks at"):
        tt.decode.generate(model, tokenizer, "a", "uscd", lame="c" * 200)
    with pytest.raises(UnknownName, match="did you mean min-p"):
        tt.decode.generate(model, tokenizer, "a", "minp")
    with pytest.raises(InputError, match="prompt is None"):
        tt.decode.generate(model, tokenizer, None)
    for prompt in (b"ab", 3):
        with pytest.raises(InputError, match="expected a text"):
            tt.decode.generate(model, tokenizer, prompt)
        with pytest.raises(InputError, match="expected a text"):
            tt.decode.generate(model, tokenizer, "a", "uscd", lame=prompt)
    for wrong in (
        {"max_new_tokens": 0}, {"max_new_tokens": 2.0}, {"stop": [""]}, {"stop": 3}, {"stop": [3]},
        {"q": 3}, {"seed": "x"}, {"seed": 1.5}, {"seed": None}, {"seed": True}, {"on_text": "x"},
        {"temperature": "x"}, {"temperature": math.nan}, {"large": llama}, {"lame": "b"},
        {"num_return_sequences": 2},
    ):  # fmt: skip
        with pytest.raises(OptionError):
            tt.decode.generate(model, tokenizer, "a", **wrong)
    for method, option in (
        (ead, {"threshold": "x"}), (ead, {"threshold": math.nan}), (ead, {"signal": "both"}),
        (typical, {"mass": "x"}), (typical, {"mass": 1}),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=str(*option)):
            method(**option)


def test_logits_that_are_nan_are_refused(llama, tokenizer):
    model = copy.deepcopy(llama)
    model.lm_head.weight.data[9] = math.nan
    for method, more in (("greedy", {}), ("em-inf", {}), ("ead", {"large": llama})):
        with pytest.raises(InputError, match="NaN"):
            tt.decode.generate(model, tokenizer, "a", method, **more)
    for several in (["a", "b"], ["a", "longer"]):  # where it is asked first whether it bears them
        with pytest.raises(InputError, match="NaN"):
            tt.decode.generate(model, tokenizer, several, "greedy")
