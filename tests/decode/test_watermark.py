import copy
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from reference import codes as reference
from testtime._core.errors import InputError, OptionError
from testtime.decode.api import generate
from testtime.decode.decoding import Decoding
from testtime.decode.methods.classical import heated
from testtime.decode.watermark import (
    Watermark,
    detect,
    detect_text,
    token_entropies,
    z_score,
)
from toys import ToyModel

V = 50


def drawn(seed, count, vocabulary=V):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (count,), generator=draw)


def written(mark, *, seed, count=200, sure=0.8):
    """Tokens of a toy model that is nearly certain at most places, and their entropies."""
    draw = torch.Generator().manual_seed(seed)
    tokens, entropies = [0], [0.0]
    for _ in range(count):
        logits = torch.randn(1, mark.vocabulary, generator=draw)
        if torch.rand((), generator=draw) < sure:
            logits[0, int(torch.randint(mark.vocabulary, (), generator=draw))] += 12
        p = torch.softmax(logits, 1)
        entropies.append(float(-(p * p.log()).sum()))
        marked = mark(torch.tensor([tokens]), logits)
        tokens.append(int(torch.multinomial(torch.softmax(marked, 1), 1, generator=draw)))
    return tokens, entropies


@pytest.mark.parametrize("tau", [None, 0.0, 0.9, 2.5, math.inf])
@pytest.mark.parametrize("gamma", [0.1, 0.5])
def test_scores_equal_the_reference_row_by_row(tau, gamma):
    draw = torch.Generator().manual_seed(0)
    previous = drawn(1, 8)
    scores = torch.randn(8, V, generator=draw, dtype=torch.float64) * torch.arange(8)[:, None]
    scores[:, 3] = -math.inf
    scores[0], scores[7, 1:] = 0, -math.inf  # uniform, and one-hot
    before = scores.clone()
    mark = Watermark(vocabulary=V, gamma=gamma, delta=1.5, tau=tau)
    found = mark(previous[:, None], scores)
    assert torch.equal(scores, before)
    for row in range(8):
        with torch.random.fork_rng():
            expected = reference.mark(int(previous[row]), scores[row].tolist(), gamma, 1.5, tau)
        torch.testing.assert_close(found[row], torch.tensor(expected, dtype=torch.float64))
        alone = mark(previous[row : row + 1, None], scores[row : row + 1])
        assert torch.equal(alone[0], found[row])


def test_the_plain_watermark_is_that_of_transformers():
    import transformers

    theirs = transformers.WatermarkLogitsProcessor(
        vocab_size=V, device="cpu", greenlist_ratio=0.25, bias=3.0, seeding_scheme="lefthash",
        context_width=1, hashing_key=15485863,
    )  # fmt: skip
    previous, scores = drawn(2, 20)[:, None], torch.randn(20, V)
    ours = Watermark(vocabulary=V, tau=None)
    torch.testing.assert_close(ours(previous, scores), theirs(previous, scores.clone()))
    below_zero = Watermark(vocabulary=V, tau=-1.0)
    assert torch.equal(below_zero(previous, scores), ours(previous, scores))


def test_green_lists_are_the_same_everywhere():
    # written down once; another machine or version must find them again
    found = Watermark(vocabulary=1000, gamma=0.01).green(17).nonzero().flatten().tolist()
    assert found == [48, 115, 270, 378, 556, 604, 670, 759, 879, 888]
    assert int(Watermark(vocabulary=1000, gamma=0.25).green(3).sum()) == 250
    other = Watermark(vocabulary=1000, gamma=0.01, key=7).green(17).nonzero().flatten().tolist()
    assert other != found


def test_green_lists_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    Watermark(vocabulary=77).green(5)
    assert torch.equal(before, torch.random.get_rng_state())


def test_scores_beyond_the_vocabulary_are_left_alone():
    scores = torch.zeros(1, V + 6)
    found = Watermark(vocabulary=V, tau=None)(torch.tensor([[1]]), scores)
    assert torch.equal(found[:, V:], scores[:, V:])
    assert int((found[:, :V] == 3).sum()) == int(V * 0.25)


@pytest.mark.parametrize("tau", [None, 1.0])
@pytest.mark.parametrize("prompt", [0, 1, 7])
def test_detection_equals_the_reference(tau, prompt):
    tokens = drawn(3, 60).tolist()
    entropies = (torch.rand(60, generator=torch.Generator().manual_seed(4)) * 2).tolist()
    mark = Watermark(vocabulary=V, tau=tau)
    found = detect(tokens, mark, entropies=entropies, prompt=prompt)
    with torch.random.fork_rng():
        z = reference.z(tokens, V, 0.25, entropies=entropies, tau=tau, prompt=max(prompt, 1))
    assert found.z == pytest.approx(z, abs=1e-12)
    assert found.p_value == pytest.approx(norm.sf(z), rel=1e-9)


@given(scored=st.integers(1, 400), gamma=st.floats(0.05, 0.95), data=st.data())
def test_z_rises_with_every_green_token_and_is_zero_at_their_share(scored, gamma, data):
    green = data.draw(st.integers(0, scored - 1))
    assert z_score(green, scored, gamma=gamma) < z_score(green + 1, scored, gamma=gamma)
    assert z_score(4 * scored, 16 * scored, gamma=0.25) == 0


def test_text_without_the_mark_has_z_of_mean_zero_and_variance_one():
    mark = Watermark(vocabulary=1000, tau=None)
    z = torch.tensor([detect(drawn(s, 101, 1000).tolist(), mark).z for s in range(150)])
    assert abs(float(z.mean())) < 3 / math.sqrt(150)
    assert abs(float(z.var()) - 1) < 3 * math.sqrt(2 / 149)


def test_repeats_widen_z_and_can_be_counted_once():
    tokens = drawn(6, 12).tolist() * 20
    mark = Watermark(vocabulary=V, tau=None)
    once, often = detect(tokens, mark, repeats=False), detect(tokens, mark)
    assert once.scored == len(set(pairwise(tokens))) < often.scored == 239
    assert abs(often.z) > 3 * abs(once.z) > 0


def test_sweet_is_found_more_surely_where_most_tokens_are_certain_and_spares_those():
    for seed in range(3):
        plain, sweet = Watermark(vocabulary=200, tau=None), Watermark(vocabulary=200)
        z = {}
        for name, mark in (("plain", plain), ("sweet", sweet)):
            tokens, entropies = written(mark, seed=seed)
            z[name] = detect(tokens, mark, entropies=entropies).z
            bare, bare_entropies = written(Watermark(vocabulary=200, delta=1e-9), seed=seed + 10)
            assert abs(detect(bare, mark, entropies=bare_entropies).z) < 3
        assert z["sweet"] > 4
        assert z["sweet"] > z["plain"]


def test_nothing_to_count_is_never_a_watermark():
    for tokens, entropies in (([], []), ([3], [0.0]), ([3, 4], [0.0, 0.1])):
        found = detect(tokens, Watermark(vocabulary=V), entropies=entropies)
        assert (found.z, found.p_value, found.scored) == (-math.inf, 1.0, 0)


def test_wrong_calls_are_refused():
    for options in ({"gamma": 0.0}, {"gamma": 1.0}, {"gamma": 0.001}, {"delta": 0.0},
                    {"delta": math.nan}, {"tau": math.nan}, {"key": 0}, {"key": 2**62},
                    {"gamma": "x"}, {"delta": None}, {"tau": "x"}, {"key": 1.5},
                    {"vocabulary": 9.0}):  # fmt: skip
        with pytest.raises(OptionError):
            Watermark(**{"vocabulary": V} | options)
    mark = Watermark(vocabulary=V)
    for ids, scores, says in (
        (torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, V), "0 tokens"),
        (torch.tensor([[1]]), torch.zeros(1, V - 1), "49 scores"),
        (torch.tensor([[1]]), torch.full((1, V), math.nan), "NaN"),
    ):
        with pytest.raises(InputError, match=says):
            mark(ids, scores)
    with pytest.raises(InputError, match="token_entropies"):
        detect([1, 2], mark)
    with pytest.raises(InputError, match="3 tokens and 2 entropies"):
        detect([1, 2, 3], mark, entropies=[0.0, 0.0])
    with pytest.raises(InputError, match="1 to 50"):
        detect([1, V], Watermark(vocabulary=V, tau=None))


def test_entropies_of_tokens_are_those_of_whole_passes_for_every_chunk():
    model, tokens, progress = ToyModel(sharp=0.5), drawn(7, 40).tolist(), []
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].double()
    p = logits.softmax(-1)
    expected = [0.0, *(-(p * p.log()).sum(-1)).tolist()[:-1]]
    for chunk in (1, 7, 39, 40, 64):
        found = token_entropies(
            model, tokens, chunk=chunk, on_progress=lambda done, all_: progress.append(done)
        )
        assert found == pytest.approx(expected, abs=1e-5)
        assert progress[-1] == 40
    assert token_entropies(model, [3]) == [0.0]
    with pytest.raises(InputError, match="0 tokens"):
        token_entropies(model, [])


def test_a_text_longer_than_the_context_is_refused():
    model = ToyModel()
    model.config = SimpleNamespace(max_position_embeddings=10)
    with pytest.raises(InputError, match="11 tokens, but the model reads 1 to 10"):
        token_entropies(model, list(range(11)))


def test_entropies_of_a_broken_model_are_refused(llama):
    model = copy.deepcopy(llama)
    model.lm_head.weight.data[9] = math.nan
    with pytest.raises(InputError, match="NaN"):
        token_entropies(model, [1, 5, 6])


def test_what_generation_saw_is_what_detection_computes():
    model, mark = ToyModel(sharp=0.5), Watermark(vocabulary=300, tau=4.0)
    draw, tokens, seen = torch.Generator().manual_seed(0), [256, 5, 6], [0.0] * 3
    for _ in range(80):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[:, -1]
        seen.append(float(-(logits.softmax(1) * logits.log_softmax(1)).sum()))
        marked = mark(torch.tensor([tokens]), logits)
        tokens.append(int(torch.multinomial(marked.softmax(1), 1, generator=draw)))
    found = token_entropies(model, tokens)
    assert found[3:] == pytest.approx(seen[3:], abs=1e-4)
    detected = detect(tokens, mark, entropies=found, prompt=3)
    assert detected == detect(tokens, mark, entropies=seen, prompt=3)
    assert detected.z > 4 > abs(detect(tokens, Watermark(vocabulary=300, key=7, tau=4.0),
                                       entropies=found, prompt=3).z)  # fmt: skip


@pytest.mark.parametrize("tau", [None, 2.0])
def test_generation_with_left_padding_is_marked_and_found(model, tokenizer, tau):
    prompts = tokenizer(["a", "a longer prompt"], return_tensors="pt", padding=True,
                        padding_side="left")  # fmt: skip
    mark = Watermark(vocabulary=len(tokenizer), tau=tau, delta=8.0)
    torch.manual_seed(0)
    written = model.generate(**prompts, do_sample=True, min_new_tokens=70, max_new_tokens=70,
                             logits_processor=[mark])  # fmt: skip
    starts = prompts["attention_mask"].shape[1] - prompts["attention_mask"].sum(1)
    for row, start in zip(written.tolist(), starts.tolist(), strict=True):
        entropies = token_entropies(model, row[start:])
        counted = len(row) - start - 70
        found = detect(row[start:], mark, entropies=entropies, prompt=counted)
        assert found.p_value < 1e-4
        assert 0 < found.scored <= 70
        wrong = Watermark(vocabulary=len(tokenizer), tau=tau, key=99)
        assert detect(row[start:], wrong, entropies=entropies, prompt=counted).p_value > 1e-3


def test_a_text_in_words_is_counted_as_its_tokens_are_with_or_without_the_prompt(llama, tokenizer):
    mark = Watermark(vocabulary=len(tokenizer), tau=1.0)
    words = "a text in words, longer than the prompt"
    tokens = tokenizer(words, add_special_tokens=False)["input_ids"]
    for prompt, known in (("", 2), ("xyz", 4)):
        ids = [1, *tokenizer(prompt, add_special_tokens=False)["input_ids"], *tokens]
        expected = detect(ids, mark, entropies=token_entropies(llama, ids), prompt=known,
                          repeats=False)  # fmt: skip
        assert detect_text(words, llama, tokenizer, mark, prompt=prompt) == expected
    with pytest.raises(InputError, match="text is empty"):
        detect_text("", llama, tokenizer, mark)
    with pytest.raises(InputError, match="no character"):
        detect_text("a\udcff", llama, tokenizer, mark)


def test_our_own_generation_takes_it_as_its_first_step(llama, tokenizer):
    mark = Watermark(vocabulary=len(tokenizer), tau=1.0, delta=8.0)
    method = Decoding(steps=(mark, *heated(0.8)))
    found = generate(llama, tokenizer, ["ab", "a longer prompt"], method, max_new_tokens=80)
    for prompt, text in zip(("ab", "a longer prompt"), found, strict=True):
        before = tokenizer(prompt)["input_ids"]
        tokens = [*before, *text.tokens]
        entropies = token_entropies(llama, tokens)
        assert detect(tokens, mark, entropies=entropies, prompt=len(before)).p_value < 1e-4
    assert str(found[0]) == str(generate(llama, tokenizer, "ab", method, max_new_tokens=80))
