"""A Hugging Face causal model as answerer and verifier: which of some labels it would say next.

Both are callables for `testtime.decode.search` and `testtime.decode.uncertainty`. Batches are padded on
the left, and what was read of the rows before is not read again (`testtime.decode.prefixes`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from testtime._core.errors import InputError
from testtime._core.options import whole
from testtime.decode.decoding import evaluating
from testtime.decode.drawing import check_logits
from testtime.decode.models import check_pair
from testtime.decode.padding import together
from testtime.decode.prefixes import Ids, Prefixes, last_logits
from testtime.decode.prompts import fitted, read_prompt
from testtime.decode.search import Path, Verify
from testtime.measures.entropy import entropy
from testtime.measures.log_space import log_probs

LABELS = "123456789"
"""Of the options of a question; one token each in the usual tokenizers."""


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
        model: a causal model of transformers.
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
        model: a causal model of transformers.
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
        return (
            torch.tensor([each.log_probs for each in found], device="cpu").softmax(1)[:, 0].tolist()
        )

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
        model: a causal model of transformers.
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
            ids, mask = fitted(model, tokenizer, rows, room=1)
            with evaluating(model):
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


def _split(tokenizer: Any, prompt: str, labels: Sequence[str]) -> tuple[Ids, Ids]:
    """The tokens before the first in which labels differ, and that token of each label."""
    whole_ids = [read_prompt(tokenizer, prompt + label) for label in labels]
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
