import itertools

import pytest
import torch

from testtime._core.errors import InputError, OptionError
from testtime.decode.padding import bears_padding
from testtime.decode.pairwise import PairwiseJudge
from testtime.decode.ranking import rank

PASSAGES = ["a", "bc", "a longer one", "x", "why", "{braces}"]
PROMPT = "{query}|{first}|{second}>"


def alone(model, tokenizer, first, second):
    """Whether the first passage is preferred, from one prompt without padding."""
    ids = torch.tensor([tokenizer(f"q|{PASSAGES[first]}|{PASSAGES[second]}>")["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    y, n = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("y", "n"))
    return bool(logits[y] > logits[n])


def test_answers_of_a_padded_batch_are_those_of_single_prompts_in_both_orders(model, tokenizer):
    judge = PairwiseJudge(model, tokenizer, "q", PASSAGES, prompt=PROMPT, answers=("y", "n"))
    pairs = list(itertools.permutations(range(len(PASSAGES)), 2))
    found = judge(pairs)
    for (a, b), answer in zip(pairs, found, strict=True):
        forth, back = alone(model, tokenizer, a, b), alone(model, tokenizer, b, a)
        assert answer == (forth and not back) - (back and not forth)
        assert judge([(a, b)]) == [answer]
        assert answer == -found[pairs.index((b, a))]
    assert set(found) > {0}
    assert judge([]) == []
    braces = PairwiseJudge(model, tokenizer, "q", PASSAGES, prompt="{" + PROMPT, answers=("y", "n"))
    assert set(braces(pairs)) <= {-1, 0, 1}  # a brace of a prompt's own is no place to fill
    second = PairwiseJudge(model, tokenizer, "q", PASSAGES, prompt=PROMPT, answers=("@y", "@n"))
    at = PairwiseJudge(model, tokenizer, "q", PASSAGES, prompt=PROMPT + "@", answers=("y", "n"))
    assert second(pairs) == at(pairs)  # answers are compared where they differ


def test_ranking_asks_the_model_once_for_each_inference(llama, tokenizer):
    judge = PairwiseJudge(llama, tokenizer, "q", PASSAGES, prompt=PROMPT, answers=("y", "n"))
    assert bears_padding(llama)  # which is asked once
    passes = []
    hook = llama.register_forward_pre_hook(lambda *_: passes.append(1))
    found = rank(judge, len(PASSAGES), k=3, batch_size=2)
    hook.remove()
    assert len(passes) == found.inferences
    assert len(set(found.order)) == 3


def test_wrong_calls_are_refused(llama, tokenizer):
    with pytest.raises(InputError, match="no passage"):
        PairwiseJudge(llama, tokenizer, "q", [])
    with pytest.raises(OptionError, match=r"no \{second\}"):
        PairwiseJudge(llama, tokenizer, "q", ["a"], prompt="{query} {first}")
    with pytest.raises(OptionError, match="two different ones"):
        PairwiseJudge(llama, tokenizer, "q", ["a"], answers=("y", "y"))
    judge = PairwiseJudge(llama, tokenizer, "q" * 200, ["a", "b"], answers=("y", "n"))
    with pytest.raises(InputError, match="context of 128"):
        judge([(0, 1)])
    judge = PairwiseJudge(llama, tokenizer, "q", ["a", "b"], prompt=PROMPT, answers=("y", "yn"))
    with pytest.raises(InputError, match="told apart"):
        judge([(0, 1)])
