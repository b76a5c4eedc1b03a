"""Two models, or two prompts, with one answer: EAD and USCD against their boxes."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

import testtime as tt
from reference import decode as reference
from testtime.decode.methods.ead import Switch, ead
from testtime.decode.methods.uscd import uscd, without_examples
from testtime.measures.entropy import entropy

from .conftest import PROMPTS, tiny_model

EXAMPLE = "def f(x):\n    '''Twice.\n    >>> f(1)\n    2\n    '''\n"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize(
    "options",
    [{"window": 1}, {"window": 3, "dwell": 4}, {"window": 2, "signal": "small"}],
    ids=str,
)  # fmt: skip
def test_ead_equals_its_box_with_everything_recomputed(kind, options, tokenizer):
    small, large = tiny_model(kind), tiny_model(kind, seed=1, layers=4)
    switched = 0.0
    for prompt in PROMPTS[:2]:
        ids = tokenizer(prompt)["input_ids"]
        written = reference.greedy(small, ids, 15)
        seen = [float(entropy(reference.next_logits(small, ids + written[:i]))) for i in range(15)]
        tau = sum(sorted(seen)[6:8]) / 2 / math.log(2)
        found = tt.decode.generate(
            small,
            tokenizer,
            prompt,
            "ead",
            large=large,
            max_new_tokens=25,
            threshold=tau,
            **options,
        )
        new, who = reference.ead(
            small, large, ids, 25, tau, options["window"], options.get("dwell", 0),
            options.get("signal", "active"),
        )  # fmt: skip
        assert list(found.tokens) == new
        assert found.numbers["share of the large model"] == who.count("large") / len(who)
        switched += sum(a != b for a, b in itertools.pairwise(who))
    assert switched > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ead_at_the_ends_is_one_model_alone(model, tokenizer, temperature):
    kind = {"LlamaForCausalLM": "llama", "GPT2LMHeadModel": "gpt2"}.get(
        type(model).__name__, "gemma"
    )
    large = tiny_model(kind, seed=1, layers=4)
    plain = {"method": "sample"} if temperature else {"method": "greedy"}
    for tau, alone in ((0.0, large), (math.inf, model)):
        for dwell in (0, 10)[: 1 + (temperature == 0)]:
            found = tt.decode.generate(
                model, tokenizer, PROMPTS, "ead", large=large, threshold=tau, dwell=dwell,
                temperature=temperature, seed=2, max_new_tokens=12,
            )  # fmt: skip
            said = tt.decode.generate(alone, tokenizer, PROMPTS, seed=2, max_new_tokens=12, **plain)
            assert [f.tokens for f in found] == [s.tokens for s in said]


def test_ead_forced_to_switch_at_every_token_keeps_its_caches(tokenizer, monkeypatch):
    models = tiny_model("gemma"), tiny_model("gemma", seed=1, layers=4)

    def other(self, bits):
        self.large = not self.large
        return self.large

    monkeypatch.setattr(Switch, "large_next", other)
    found = tt.decode.generate(
        models[0], tokenizer, "abc", ead(threshold=math.inf), large=models[1], max_new_tokens=30
    )
    ids = tokenizer("abc")["input_ids"]
    for place, token in enumerate(found.tokens):
        logits = reference.next_logits(models[place % 2], ids + list(found.tokens[:place]))
        assert token == int(logits.argmax())
    assert found.numbers["switches"] == 29


@pytest.mark.parametrize("swapped", [False, True])
def test_ead_writes_no_token_that_one_of_the_models_cannot_read(swapped, tokenizer):
    models = [tiny_model(seed=1), tiny_model(seed=2, vocabulary=320)][:: -1 if swapped else 1]
    found = tt.decode.generate(
        models[0], tokenizer, PROMPTS[:2], "ead", large=models[1], window=1, threshold=2.5,
        temperature=3.0, max_new_tokens=30,
    )  # fmt: skip
    assert all(max(each.tokens) < 260 for each in found)
    assert found[0].numbers["switches"] > 3


def test_uscd_contrasts_two_prompts_with_one_answer(model, tokenizer):
    method = uscd(collision=0.9)
    lame = without_examples(EXAMPLE)
    found = tt.decode.generate(model, tokenizer, EXAMPLE, method, max_new_tokens=20, lame=lame)
    again = tt.decode.generate(model, tokenizer, EXAMPLE, "uscd", collision=0.9, max_new_tokens=20)
    assert found == again
    seen = []

    def watch(tokens, scores):
        seen.append((tokens.clone(), scores.clone()))
        return scores

    method = replace(method, steps=(watch,))
    tt.decode.generate(model, tokenizer, EXAMPLE, method, lame=lame, max_new_tokens=20)
    begin, other = tokenizer(EXAMPLE)["input_ids"], tokenizer(lame)["input_ids"]
    changed = 0
    for tokens, scores in seen:
        suffix = tokens[0, len(begin) :].tolist()
        z, q = (reference.next_logits(model, ids + suffix) for ids in (begin, other))
        said = reference.uscd_scores(z, q, 0.9, 2 / 3, -0.7)
        torch.testing.assert_close(scores[0].softmax(-1), said, atol=1e-5, rtol=1e-5)
        changed += not torch.allclose(said, z.softmax(-1))
    assert changed > 5
