"""A Hugging Face causal model as generator, verifier, reviser and answerer of questions.

All are callables for `testtime.decode.search` and `testtime.decode.uncertainty`. A step of a path is
the tuple of its token ids, so nothing is tokenised twice. Batches are padded on the left, and what
was read of the rows before is not read again (`testtime.decode.prefixes`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from testtime._core.errors import InputError, MissingExtra, OptionError
from testtime._core.options import in_range, whole
from testtime._core.seeds import derive, global_chance
from testtime.decode.decoding import own_settings
from testtime.decode.drawing import check_logits
from testtime.decode.models import check_pair, context_length, end_tokens
from testtime.decode.padding import together
from testtime.decode.prefixes import Ids, Prefixes, last_logits, padded
from testtime.decode.search import Path, Step, Verify
from testtime.measures.entropy import entropy
from testtime.measures.log_space import log_probs

LABELS = "123456789"
"""Of the options of a question; one token each in the usual tokenizers."""


class Sampler:
    """Samples next steps of a text: lines, whole solutions, or attempts that see earlier ones.

    A call continues each path by one step, up to and with the stop string; a path is final when the
    model ends its text. The n-th call of a sampler draws with the n-th seed derived from `seed`, and
    leaves the global generators as they were. Of paths that begin as those of the last call did, only
    what is new is read; for that the keys and values of one call are kept, so the model's weights
    must stay as they are.

    Args:
        model: a causal model of transformers, in `eval()`.
        tokenizer: its tokenizer.
        prompt: text in front of all paths; or for revisions a function that writes the whole prompt
            from the texts of the earlier attempts.
        stop: string that ends a step; None takes a whole solution as one final step.
        max_new_tokens: of a step; what is longer is cut there.
        temperature: of sampling; 0.8 (public re-implementations of beam search).
        top_p: of sampling; 1 keeps all.
        seed: of all calls.

    Raises:
        InputError: the prompt is empty, or the tokenizer does not belong to the model.
        OptionError: an option out of its range.

    Reference: Snell, Lee, Xu, Kumar, Scaling LLM Test-Time Compute Optimally can be More Effective
    than Scaling Model Parameters, ICLR 2025.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompt: str | Callable[[Sequence[str]], str],
        *,
        stop: str | None = "\n",
        max_new_tokens: int = 64,
        temperature: float = 0.8,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        whole(1, max_new_tokens=max_new_tokens)
        in_range(0, 1, top_p=top_p)
        in_range(0, temperature=temperature)
        if temperature == 0:
            raise OptionError("temperature is 0; call `.greedy` of a sampler for likeliest steps.")
        if stop == "":
            raise OptionError("stop is empty; expected a string, or None for whole solutions.")
        check_pair(model, tokenizer)
        if isinstance(prompt, str):
            _ids(tokenizer, prompt)
        self._model, self._tokenizer, self._prompt = model, tokenizer, prompt
        self._stop, self._tokens = stop, max_new_tokens
        self._drawn = {"temperature": float(temperature), "top_p": float(top_p), "top_k": 0}
        self._seed, self._calls = seed, 0
        self._read = Prefixes(model)

    def __call__(self, paths: Sequence[Path[Ids]]) -> list[Step[Ids]]:
        """One sampled step for each path.

        Raises:
            InputError: a path has outgrown the model's context, or logits are NaN.
        """
        self._calls += 1
        device = self._model.device
        with global_chance(derive(self._seed, "sampler", self._calls), [device]):
            return self._continue(paths, do_sample=True, **self._drawn)

    def greedy(self, paths: Sequence[Path[Ids]]) -> list[Step[Ids]]:
        """The likeliest step of each path, token by token.

        Raises:
            InputError: a path has outgrown the model's context, or logits are NaN.
        """
        return self._continue(paths, do_sample=False)

    def text(self, path: Path[Ids]) -> str:
        """The text of a path, without the prompt and without special tokens."""
        return self._decode([token for step in path.steps for token in step.content])

    def _continue(self, paths: Sequence[Path[Ids]], **drawn: Any) -> list[Step[Ids]]:
        if not paths:
            return []
        made = _generate(
            self._model, self._tokenizer, [self._prefix(path) for path in paths], self._read,
            stop=self._stop, max_new_tokens=self._tokens, **drawn,
        )  # fmt: skip
        ends = end_tokens(self._model, self._tokenizer)
        return [
            Step(ids, tokens=len(ids), final=self._stop is None or ids[-1] in ends) for ids in made
        ]

    def _prefix(self, path: Path[Ids]) -> Ids:
        if not isinstance(self._prompt, str):
            return _ids(
                self._tokenizer, self._prompt([self._decode(s.content) for s in path.steps])
            )
        steps = tuple(token for step in path.steps for token in step.content)
        return _ids(self._tokenizer, self._prompt) + steps

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


@dataclass(frozen=True)
class Labelled:
    """What a model says at the place where one of several labels is due.

    Attributes:
        log_probs: of the labels, among the whole vocabulary.
        entropy: of the whole distribution, in nats.
        greedy: the label that is the likeliest token of all; None if that is no label.
        likely: the likeliest label.
    """

    log_probs: tuple[float, ...]
    entropy: float
    greedy: int | None
    likely: int


@dataclass(frozen=True)
class Question:
    """A multiple-choice question.

    Attributes:
        text: of the question.
        options: to choose from.
        right: index of the right one.
    """

    text: str
    options: tuple[str, ...]
    right: int


def question_prompt(question: Question) -> str:
    """A question with numbered options, which asks for the number only.

    Example:
        >>> print(question_prompt(Question("What is 2 + 2?", ("3", "4"), 1)))
        What is 2 + 2?
        1. 3
        2. 4
        Reply with the number of the right option only.
        Answer:
    """
    options = [f"{label}. {each}" for label, each in zip(LABELS, question.options, strict=False)]
    ask = "Reply with the number of the right option only."
    return "\n".join([question.text, *options, ask, "Answer:"])


def answer_questions(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    write: Callable[[Question], str] = question_prompt,
    batch_size: int = 8,
) -> list[Labelled]:
    """Answers to multiple-choice questions, with the entropy of the token that answers.

    The paper takes `greedy`, drops questions where it is None, and says how many these were.

    Args:
        model: a causal model of transformers, in `eval()`.
        tokenizer: its tokenizer.
        questions: of two to nine options.
        write: question -> prompt, to which " 1", " 2", ... is the answer; for a chat model apply its
            template here.
        batch_size: prompts at a time.

    Raises:
        InputError: a question has fewer than two or more than nine options, a prompt is longer than
            the context, or the tokenizer gives two labels one token.

    Reference: Sychev et al., When an LLM is apprehensive about its answers -- and when its
    uncertainty is justified, 2025.
    """
    for question in questions:
        if not 2 <= len(question.options) <= len(LABELS):
            raise InputError(
                f"{question.text[:60]!r} has {len(question.options)} options; expected 2 to 9."
            )
    labels = [[f" {each}" for each in LABELS[: len(q.options)]] for q in questions]
    return read_labels(
        model, tokenizer, [write(q) for q in questions], labels, batch_size=batch_size
    )


def yes_verifier(
    model: Any,
    tokenizer: Any,
    ask: Callable[[Path[Ids]], str],
    *,
    yes: str = " Yes",
    no: str = " No",
    batch_size: int = 8,
) -> Verify[Ids]:
    """A model as verifier: the probability of yes against no.

        p(yes) / ( p(yes) + p(no) )

    Args:
        model: a causal model of transformers, in `eval()`.
        tokenizer: its tokenizer.
        ask: path -> prompt, to which `yes` or `no` is the answer.
        yes: label of a good path.
        no: label of a bad one.
        batch_size: prompts at a time.
    """

    read = Prefixes(model)

    def verify(paths: Sequence[Path[Ids]]) -> list[float]:
        found = read_labels(
            model, tokenizer, [ask(path) for path in paths], [[yes, no]] * len(paths),
            batch_size=batch_size, read=read,
        )  # fmt: skip
        return torch.tensor([each.log_probs for each in found]).softmax(1)[:, 0].tolist()

    return verify


@torch.no_grad()
def read_labels(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    labels: Sequence[Sequence[str]],
    *,
    batch_size: int = 8,
    read: Prefixes | None = None,
) -> list[Labelled]:
    """How likely each label is to follow its prompt, read at the token in which labels differ.

    Prompt and label are tokenised together, so that it does not matter whether a tokenizer joins the
    blank between them to the label.

    Args:
        model: a causal model of transformers, in `eval()`.
        tokenizer: its tokenizer.
        prompts: any number.
        labels: of each prompt, at least two.
        batch_size: prompts at a time.
        read: what the last call read, for prompts that begin as its prompts did; then this call's.

    Raises:
        InputError: a prompt is longer than the context, or two labels differ in no token that all
            of them have.
    """
    whole(1, batch_size=batch_size)
    check_pair(model, tokenizer)
    asked = [_split(tokenizer, *each) for each in zip(prompts, labels, strict=True)]
    found: dict[int, Labelled] = {}
    for start in range(0, len(asked), batch_size):
        part = asked[start : start + batch_size]
        for places in together(model, [len(prefix) for prefix, _ in part]):
            rows = [part[place][0] for place in places]
            ids, mask = _padded(model, tokenizer, rows, room=1)
            logits = last_logits(model, rows, ids, mask, read)
            check_logits(logits)
            log_p, entropies, top = log_probs(logits), entropy(logits).tolist(), logits.argmax(1)
            for row, place in enumerate(places):
                tokens = part[place][1]
                own = log_p[row, list(tokens)].tolist()
                first = int(top[row])
                found[start + place] = Labelled(
                    tuple(own), entropies[row], tokens.index(first) if first in tokens else None,
                    max(range(len(own)), key=own.__getitem__),
                )  # fmt: skip
    if read is not None:
        read.turn()
    return [found[place] for place in range(len(asked))]


def _generate(
    model: Any, tokenizer: Any, prefixes: Sequence[Ids], read: Prefixes, **how: Any
) -> list[Ids]:
    """New token ids of each row, up to its stop string, its end or the limit."""
    made: dict[int, Ids] = {}
    for places in together(model, [len(prefix) for prefix in prefixes]):
        rows = [prefixes[place] for place in places]
        made |= zip(places, _generate_batch(model, tokenizer, rows, read, **how), strict=True)
    read.turn()
    return [made[place] for place in range(len(prefixes))]


def _generate_batch(
    model: Any,
    tokenizer: Any,
    prefixes: Sequence[Ids],
    read: Prefixes,
    *,
    stop: str | None,
    max_new_tokens: int,
    **drawn: Any,
) -> list[Ids]:
    try:
        from transformers import StoppingCriteriaList  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("transformers", "lm") from error
    ids, mask = _padded(model, tokenizer, prefixes, room=max_new_tokens)
    lengths = [max_new_tokens] * len(prefixes)
    ends, start = end_tokens(model, tokenizer), ids.shape[1]

    def done(rows: Tensor, _scores: Any, **_: Any) -> Tensor:
        made = rows.shape[1] - start
        for i, row in enumerate(rows[:, start:].tolist()):
            stopped = stop is not None and stop in tokenizer.decode(row)
            if made < lengths[i] and (row[-1] in ends or stopped):
                lengths[i] = made
        return torch.tensor([made >= n for n in lengths], device=rows.device)

    def check(_rows: Tensor, logits: Tensor) -> Tensor:
        check_logits(logits)
        return logits

    with own_settings(model):
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens,
            stopping_criteria=StoppingCriteriaList([done]),  # type: ignore[list-item]
            logits_processor=[check],
            pad_token_id=_pad(model, tokenizer), eos_token_id=ends or None,
            return_dict_in_generate=True, use_cache=True, **read.recall(prefixes), **drawn,
        )  # fmt: skip
    rows = out.sequences[:, start:].tolist()
    made = [tuple(row[:n]) for row, n in zip(rows, lengths, strict=True)]
    read.add(prefixes, out, made)
    return made


def _ids(tokenizer: Any, text: str) -> Ids:
    written = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    ids = tuple(tokenizer(text, add_special_tokens=not written)["input_ids"])
    if not ids or not text:
        raise InputError("the prompt is empty; expected at least one token. Give it some text.")
    return ids


def _split(tokenizer: Any, prompt: str, labels: Sequence[str]) -> tuple[Ids, Ids]:
    """The tokens before the first in which labels differ, and that token of each label."""
    whole_ids = [_ids(tokenizer, prompt + label) for label in labels]
    shared = 0
    while all(len(ids) > shared for ids in whole_ids) and len({i[shared] for i in whole_ids}) == 1:
        shared += 1
    tokens = tuple(ids[shared] for ids in whole_ids if len(ids) > shared)
    if len(labels) < 2 or len(set(tokens)) < len(labels) or shared == 0:
        raise InputError(
            f"the labels {list(labels)} cannot be told apart by one token of this tokenizer; expected "
            "at least two, each with another token at the first place where they differ."
        )
    return whole_ids[0][:shared], tokens


def _padded(model: Any, tokenizer: Any, rows: Sequence[Ids], *, room: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, padded on the left; refuses what does not fit the context."""
    width = max(map(len, rows))
    context = context_length(model)
    if context is not None and width + room > context:
        raise InputError(
            f"{width} tokens and {room} new ones do not fit the model's context of {context}. "
            "Shorten the prompt, or ask for fewer or shorter steps."
        )
    return padded(rows, device=model.device, pad=_pad(model, tokenizer))


def _pad(model: Any, tokenizer: Any) -> int:
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return next(iter(end_tokens(model, tokenizer)), 0)
