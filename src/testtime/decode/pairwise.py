"""Pairwise ranking prompting: a language model says which of two passages fits a query better.

    ask with (a, b) and with (b, a); the first passage is preferred if its letter is likelier
    a is better if preferred in both orders, b if in none of them, else undecided

It is a judge for `ranking.rank`, whose cost counts the two orders of a pair as one comparison.

Reference: Qin et al., Large Language Models are Effective Text Rankers with Pairwise Ranking
Prompting, 2024; the costs: Are Optimal Algorithms Still Optimal?, ACL 2025.
"""

import re
from collections.abc import Sequence
from typing import Any, final

from testtime._core.errors import InputError, OptionError
from testtime.decode.labels import read_labels
from testtime.decode.models import check_pair
from testtime.decode.ranking import Pair

PROMPT = (
    "Query: {query}\n\nPassage A: {first}\n\nPassage B: {second}\n\n"
    "Of the two passages, the one that answers the query better is Passage"
)


@final
class PairwiseJudge:
    """Compares passages by the next-token logits of a causal model; all pairs of a call in one pass.

    Args:
        model: a Hugging Face causal model.
        tokenizer: its tokenizer.
        query: what the passages are ranked for.
        passages: at least one.
        prompt: text with `{query}`, `{first}` and `{second}`, after which the answer follows.
        answers: what follows when the first, or the second, passage is better; they are compared
            at the first token in which they differ.

    Raises:
        OptionError: the prompt lacks a place, or the answers are the same.
        InputError: no passage, or a tokenizer that is not the model's.

    Example:
        >>> from testtime.decode.models import load_language_model
        >>> from testtime.decode.ranking import rank
        >>> passages = ["Berlin is the capital of Germany.", "Paris is the capital of France."]
        >>> judge = PairwiseJudge(*load_language_model("gemma:270m"), "capital of France",
        ...                       passages)  # doctest: +SKIP
        >>> rank(judge, 2, k=1)  # doctest: +SKIP
        Ranking(order=(1,), comparisons=1, hits=0, inferences=1)

    Reference: Qin et al., 2024.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        query: str,
        passages: Sequence[str],
        *,
        prompt: str = PROMPT,
        answers: tuple[str, str] = (" A", " B"),
    ) -> None:
        check_pair(model, tokenizer)
        if not passages:
            raise InputError("no passage was given; expected one at least")
        for place in ("{query}", "{first}", "{second}"):
            if place not in prompt:
                raise OptionError(f"the prompt has no {place}: {prompt!r}")
        if len(set(answers)) != 2:
            raise OptionError(f"the answers are {answers}; expected two different ones")
        self._model, self._tokenizer = model, tokenizer
        self._query, self._passages, self._prompt = query, list(passages), prompt
        self._answers = list(answers)

    def __call__(self, pairs: Sequence[Pair]) -> list[int]:
        """For each pair +1 if its first passage is better, -1 if its second is, 0 if undecided.

        Raises:
            InputError: a prompt is longer than the model's context, or logits are NaN.
        """
        if not pairs:
            return []
        prompts = [self._filled(*order) for a, b in pairs for order in ((a, b), (b, a))]
        found = read_labels(
            self._model, self._tokenizer, prompts, [self._answers] * len(prompts),
            batch_size=len(prompts),
        )  # fmt: skip
        lead = [first - second for first, second in (each.log_probs for each in found)]
        return [(a > 0 > b) - (a < 0 < b) for a, b in zip(lead[::2], lead[1::2], strict=True)]

    def _filled(self, first: int, second: int) -> str:
        places = {"query": self._query, "first": self._passages[first],
                  "second": self._passages[second]}  # fmt: skip
        return re.sub("{(query|first|second)}", lambda found: places[found[1]], self._prompt)
