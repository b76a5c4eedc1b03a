"""A search reads nothing twice, and finds what it would find by reading everything anew."""

import copy
import random
from itertools import chain

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from testtime._core.seeds import derive, generator
from testtime.decode.labels import read_labels, yes_verifier
from testtime.decode.language import Sampler
from testtime.decode.padding import bears_company
from testtime.decode.prefixes import Prefixes
from testtime.decode.search import Path, Step
from testtime.decode.strategies import beam_search, lookahead_search, revise

from .conftest import byte_tokenizer, tiny_model

STOP, LONGEST, END = " ", 7, 2
PROMPT = "once upon a"


class Forgetful:
    """Steps as a `Sampler` draws them, every path read from its beginning and without any cache."""

    def __init__(self, model, tokenizer, prompt=PROMPT, *, stop=STOP):
        self.model, self.tokenizer, self.prompt, self.stop = model, tokenizer, prompt, stop
        self.calls = 0

    def __call__(self, paths):
        self.calls += 1
        seeds = [derive(0, "sampler", self.calls, row) for row in range(len(paths))]
        chances = [generator(seed, "token") for seed in seeds]

        def draw(_tokens, logits):
            sums = (logits / 0.8).softmax(1).cumsum(1)
            marks = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in chances])
            chosen = (sums < marks * sums[:, -1:]).sum(1, keepdim=True)
            return torch.full_like(logits, -torch.inf).scatter(1, chosen, 0.0)

        return self.steps(paths, draw)

    def greedy(self, paths):
        return self.steps(paths)

    def steps(self, paths, *processors):
        rows = [self.prefix(path) for path in paths]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        ended = [LONGEST] * len(rows)

        def done(now, _scores, **_):
            made = now.shape[1] - width
            for i, row in enumerate(now[:, width:].tolist()):
                stops = self.stop is not None and self.stop in self.tokenizer.decode(row)
                if made < ended[i] and (row[-1] == END or stops):
                    ended[i] = made
            return torch.tensor([made >= n for n in ended])

        out = self.model.generate(
            input_ids=ids, attention_mask=mask, use_cache=False, max_new_tokens=LONGEST,
            stopping_criteria=[done], pad_token_id=0, eos_token_id=END, do_sample=False,
            logits_processor=list(processors),
        )  # fmt: skip
        return [
            Step(tuple(row[:n]), tokens=n, final=self.stop is None or row[n - 1] == END)
            for row, n in zip(out[:, width:].tolist(), ended, strict=True)
        ]

    def prefix(self, path):
        contents = [step.content for step in path.steps]
        if isinstance(self.prompt, str):
            return [*self.tokenizer(self.prompt)["input_ids"], *chain(*contents)]
        tries = [self.tokenizer.decode(each, skip_special_tokens=True) for each in contents]
        return self.tokenizer(self.prompt(tries))["input_ids"]


def kept_and_forgetful(model, prompt=PROMPT, *, stop=STOP):
    tokenizer = byte_tokenizer()
    kept = Sampler(model, tokenizer, prompt, stop=stop, max_new_tokens=LONGEST)
    return kept, Forgetful(model, tokenizer, prompt, stop=stop)


def worth(paths):
    """A verifier of tokens alone, so that both samplers are judged alike."""
    return [sum(7 * t % 11 for step in path.steps for t in step.content) % 97 for path in paths]


@pytest.fixture(params=["llama", "gpt2", "gemma"])
def model(request):
    return tiny_model(request.param, peak=2.0)  # gemma's sliding window is shorter than the paths


def test_beams_and_looks_ahead_are_token_for_token_those_without_a_cache(model):
    searches = (
        lambda s: beam_search(s, worth, samples=6, width=3, rounds=5),
        lambda s: lookahead_search(s, worth, greedy=s.greedy, samples=4, width=2, steps=2, rounds=4),
    )  # fmt: skip
    for search in searches:
        kept, anew = map(search, kept_and_forgetful(model))
        assert [p.steps for p in kept.paths] == [p.steps for p in anew.paths]
        assert len({step.content for p in kept.paths for step in p.steps}) > 4


def test_revisions_whose_prompts_part_early_are_the_same_too(model):

    def prompt(tries):
        return "do:" + "".join(f" no {each[:4]}" for each in tries)

    kept, anew = (
        revise(s, worth, samples=6, sequential=3)
        for s in kept_and_forgetful(model, prompt, stop=None)
    )
    assert [p.steps for p in kept.paths] == [p.steps for p in anew.paths]


def test_paths_that_others_went_on_with_are_the_same_too(model):
    kept, anew = kept_and_forgetful(model)
    chance = random.Random(0)
    paths = [Path()] * 4
    for _ in range(5):
        steps = kept(paths)
        assert steps == anew(paths)
        grown = [path.then(step) for path, step in zip(paths, steps, strict=True)]
        foreign = [tuple(chance.choices(range(4, 260), k=chance.randint(0, 3))) for _ in grown]
        grown = [path.then(Step(new)) for path, new in zip(grown, foreign, strict=True)]
        paths = chance.choices([*grown, *paths], k=4)  # some again, some from before


def test_only_what_is_new_is_read():
    model = copy.deepcopy(tiny_model("llama", peak=2.0))
    model.config.use_cache = model.generation_config.use_cache = False  # as training leaves it
    kept, _ = kept_and_forgetful(model)
    read = []
    assert bears_company(model)  # which is asked once
    hook = model.register_forward_pre_hook(
        lambda _m, _a, given: read.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    try:
        found = beam_search(kept, worth, samples=6, width=3, rounds=5)
    finally:
        hook.remove()
    prompt = len(byte_tokenizer()(PROMPT)["input_ids"])
    assert read[0] == (1, prompt - 1)  # six rows that are one
    assert all(length == 1 for _, length in read[1:])
    assert found.spent.calls == 5


def test_a_verifier_reads_on_in_batches_and_says_the_same(model):
    tokenizer = byte_tokenizer()
    judge = yes_verifier(
        model, tokenizer, lambda path: "is " + tokenizer.decode(path.steps[-1].content) + " good?",
        batch_size=2,
    )  # fmt: skip
    texts = ["ab", "abcdefgh", "abcdef", "xyz", "abcdefg", "q"]
    paths = [Path((Step(tuple(tokenizer(text)["input_ids"][1:])),)) for text in texts]
    for some in (paths, paths[::-1], paths[2:5], [*paths, *paths]):
        prompts = [f"is {tokenizer.decode(p.steps[-1].content)} good?" for p in some]
        alone = [
            read_labels(model, tokenizer, [prompt], [[" Yes", " No"]])[0].log_probs
            for prompt in prompts
        ]
        fresh = torch.tensor(alone).softmax(1)[:, 0].tolist()
        assert judge(some) == pytest.approx(fresh, abs=1e-5)


def test_recurrent_models_read_everything_anew():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MambaConfig(vocab_size=260, hidden_size=16, num_hidden_layers=1, state_size=4,
                             pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
        model = MambaForCausalLM(config).double().eval()
    assert Prefixes(model).recall([(1, 5, 6)]) == {}
    kept, anew = kept_and_forgetful(model)
    for _ in range(2):  # rows of one length: these models do not know padding
        assert kept([Path()] * 3) == anew([Path()] * 3)
