"""A causal model of transformers behind the callables of the searches."""

import copy
import math

import pytest
import torch

from testtime._core.errors import InputError, OptionError
from testtime.decode.labels import (
    Question,
    answer_questions,
    question_prompt,
    read_labels,
    yes_verifier,
)
from testtime.decode.language import Sampler
from testtime.decode.search import Path, Step
from testtime.decode.strategies import beam_search, best_of_n, lookahead_search, revise

from .conftest import byte_tokenizer, tiny_model

END = "<eos>"


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma"])
def parts(request):
    return tiny_model(request.param, peak=2.0), byte_tokenizer()


def log_prob(model, ids, new):
    logits = model(torch.tensor([[*ids, *new]])).logits[0].log_softmax(-1)
    return [logits[len(ids) - 1 + i, token].item() for i, token in enumerate(new)]


def test_greedy_steps_equal_a_loop_without_cache_and_padding(parts):
    model, tokenizer = parts
    sampler = Sampler(model, tokenizer, "to be", stop="e", max_new_tokens=12)
    starts = [Path(), Path((Step(tuple(tokenizer("or not")["input_ids"][1:])),))]
    for start, step in zip(starts, sampler.greedy(starts), strict=True):
        prefix = tokenizer("to be")["input_ids"] + [t for s in start.steps for t in s.content]
        made = []
        while len(made) < 12 and not (made and (made[-1] == 2 or "e" in tokenizer.decode(made))):
            with torch.no_grad():
                made.append(int(model(torch.tensor([prefix + made])).logits[0, -1].argmax()))
        assert step.content == tuple(made)
        assert step.tokens == len(made)
        assert step.final == (made[-1] == 2)


def test_a_models_own_settings_of_generation_change_no_step(llama, tokenizer):
    model = copy.deepcopy(llama)
    model.generation_config.update(do_sample=True, repetition_penalty=9.0, min_p=0.9, max_time=1e-9)
    for steps in ("greedy", "__call__"):
        found = [
            getattr(Sampler(each, tokenizer, "x", max_new_tokens=8), steps)([Path()] * 2)
            for each in (model, llama)
        ]
        assert found[0] == found[1]
    assert model.generation_config.min_p == 0.9


def test_steps_stop_where_they_should(parts):
    model, tokenizer = parts
    sampler = Sampler(model, tokenizer, "x", stop="z", max_new_tokens=60, temperature=1e3)  # evenly
    steps = sampler([Path()] * 64)
    kinds = set()
    for step in steps:
        text = tokenizer.decode(step.content, skip_special_tokens=False)
        assert "z" not in text[:-1].removesuffix(END)
        assert 2 not in step.content[:-1]
        assert step.final == (step.content[-1] == 2)
        kinds.add("end" if step.final else "stop" if text.endswith("z") else "cut")
        assert step.final or text.endswith("z") or step.tokens == 60
    assert kinds >= {"end", "stop"}
    solution = Sampler(model, tokenizer, "x", stop=None, max_new_tokens=5)([Path()] * 3)
    assert all(step.final and step.tokens <= 5 for step in solution)


def test_same_seed_same_paths_and_global_chance_is_untouched(parts, monkeypatch):
    others: list[int] = []  # seeds that GPUs were given, on which the model does not lie
    monkeypatch.setattr(torch.cuda, "manual_seed_all", others.append)

    def drawn(seed):
        sampler = Sampler(*parts, "once", max_new_tokens=6, seed=seed)
        return [sampler([Path()] * 4) for _ in range(2)]

    before = torch.random.get_rng_state()
    first = drawn(0)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first == drawn(0) != drawn(1)
    assert first[0] != first[1]
    assert not others
    alone = Sampler(*parts, "once", max_new_tokens=6, seed=0)([Path()])
    assert alone == first[0][:1]  # what other paths draw does not matter


def test_every_search_runs_on_a_model(parts):
    model, tokenizer = parts
    ask = {"max_new_tokens": 6, "stop": " "}
    sampler = Sampler(model, tokenizer, "count:", **ask)
    judge = yes_verifier(model, tokenizer, lambda path: sampler.text(path)[-20:] + " good?")
    found = [
        best_of_n(sampler, judge, samples=4, answer=sampler.text, rounds=3),
        beam_search(sampler, judge, samples=4, width=2, rounds=3),
        lookahead_search(sampler, judge, greedy=sampler.greedy, samples=2, steps=1, rounds=2),
        revise(
            Sampler(model, tokenizer, lambda tries: "do: " + " / ".join(tries), stop=None,
                    max_new_tokens=4),
            judge, samples=4, sequential=2,
        ),
    ]  # fmt: skip
    for each in found:
        assert 0 < each.best.score < 1
        assert each.spent.tokens >= each.best.tokens > 0


def test_labels_are_read_where_they_differ(parts):
    model, tokenizer = parts
    prompts, labels = ["is it?", "a much longer prompt, is it?"], [[" yes", " no"], [" no", " yes"]]
    for size in (1, 2):
        found = read_labels(model, tokenizer, prompts, labels, batch_size=size)
        for each, prompt, pair in zip(found, prompts, labels, strict=True):
            prefix = tokenizer(prompt + " ")["input_ids"]
            own = [
                log_prob(model, prefix, tokenizer(x.strip()[0])["input_ids"][1:])[0] for x in pair
            ]
            assert each.log_probs == pytest.approx(own, abs=1e-5)  # read in single precision
            assert each.likely == own.index(max(own))
            everything = model(torch.tensor([prefix])).logits[0, -1].detach()
            p = everything.softmax(-1)
            assert each.entropy == pytest.approx(float(-(p * p.log()).sum()), abs=1e-5)
            letters = [tokenizer(x.strip()[0])["input_ids"][1] for x in pair]
            first = int(everything.argmax())
            assert each.greedy == (letters.index(first) if first in letters else None)


def test_questions_are_answered_by_number(parts):
    model, tokenizer = parts
    questions = [Question("2 + 2?", ("3", "4"), 1), Question("1 + 1?", ("1", "2", "3"), 1)]
    few = {"write": lambda q: question_prompt(q)[-60:]}
    found = answer_questions(model, tokenizer, questions, **few)
    assert [len(each.log_probs) for each in found] == [2, 3]
    for together, question in zip(found, questions, strict=True):
        (alone,) = answer_questions(model, tokenizer, [question], **few)
        assert together.log_probs == pytest.approx(alone.log_probs, abs=1e-5)
        assert (together.greedy, together.likely) == (alone.greedy, alone.likely)


def test_bad_calls_are_refused(parts):
    model, tokenizer = parts
    with pytest.raises(InputError, match="empty"):
        Sampler(model, tokenizer, "")
    with pytest.raises(InputError, match="context of 128"):
        Sampler(model, tokenizer, "x" * 100, max_new_tokens=64)([Path()])
    for bad in ({"temperature": 0}, {"max_new_tokens": 0}, {"top_p": 1.5}, {"stop": ""},
                {"stop": 3}, {"seed": "x"}, {"seed": 1.5}, {"temperature": "x"}):  # fmt: skip
        with pytest.raises(OptionError):
            Sampler(model, tokenizer, "x", **bad)
    for pair in (["a"], ["a", "a"], ["a", "ab"]):
        with pytest.raises(InputError, match="told apart"):
            read_labels(model, tokenizer, ["x"], [pair])
    with pytest.raises(InputError, match="2 to 9"):
        answer_questions(model, tokenizer, [Question("x", ("only",), 0)])
    assert Sampler(model, tokenizer, "x")([]) == []


def test_logits_that_are_nan_are_refused(parts):
    model, tokenizer = copy.deepcopy(parts[0]), parts[1]
    model.lm_head.weight.data[9] = math.nan
    sampler = Sampler(model, tokenizer, "x")
    for ask in (
        lambda: sampler([Path()]), lambda: sampler.greedy([Path()]),
        lambda: read_labels(model, tokenizer, ["x"], [[" a", " b"]]),
    ):  # fmt: skip
        with pytest.raises(InputError, match="NaN"):
            ask()
