"""A Hugging Face causal model as generator of steps, and as reviser, for `testtime.decode.search`.

A step of a path is the tuple of its token ids, so nothing is tokenised twice. Batches are padded on the
left, and what was read of the rows before is not read again (`testtime.decode.prefixes`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from testtime._core.errors import OptionError
from testtime._core.options import check_types, in_range, whole
from testtime._core.seeds import derive
from testtime.decode.decoding import borrowed, choosing, evaluating
from testtime.decode.drawing import Drawer
from testtime.decode.methods.classical import heated, nucleus
from testtime.decode.models import check_pair, end_tokens
from testtime.decode.padding import together
from testtime.decode.prefixes import Ids, Prefixes
from testtime.decode.prompts import fitted, read_prompt
from testtime.decode.search import Path, Step


class Sampler:
    """Samples next steps of a text: lines, whole solutions, or attempts that see earlier ones.

    A call continues each path by one step, up to and with the stop string; a path is final when the
    model ends its text. Each path of each call draws with a seed of its own, derived from `seed`. Of
    paths that begin as those of the last call did, only what is new is read; for that the keys and
    values of one call are kept, so the model's weights must stay as they are.

    Args:
        model: a causal model of transformers.
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
        check_types({"seed": seed, "stop": stop}, {"seed": int, "stop": str | None})
        in_range(0, temperature=temperature)
        if temperature == 0:
            raise OptionError("temperature is 0; call `.greedy` of a sampler for likeliest steps.")
        if stop == "":
            raise OptionError("stop is empty; expected a string, or None for whole solutions.")
        self._steps = heated(temperature) + nucleus(top_p)
        check_pair(model, tokenizer)
        if isinstance(prompt, str):
            read_prompt(tokenizer, prompt)
        self._model, self._tokenizer, self._prompt = model, tokenizer, prompt
        self._stop, self._tokens = stop, max_new_tokens
        self._seed, self._calls = seed, 0
        self._read = Prefixes(model)

    def __call__(self, paths: Sequence[Path[Ids]]) -> list[Step[Ids]]:
        """One sampled step for each path.

        Raises:
            InputError: a path has outgrown the model's context, or logits are NaN.
        """
        self._calls += 1
        seeds = [derive(self._seed, "sampler", self._calls, row) for row in range(len(paths))]
        return self._continue(paths, seeds, self._steps)

    def greedy(self, paths: Sequence[Path[Ids]]) -> list[Step[Ids]]:
        """The likeliest step of each path, token by token.

        Raises:
            InputError: a path has outgrown the model's context, or logits are NaN.
        """
        return self._continue(paths, None, ())

    def text(self, path: Path[Ids]) -> str:
        """The text of a path, without the prompt and without special tokens."""
        return self._decode([token for step in path.steps for token in step.content])

    def _continue(
        self, paths: Sequence[Path[Ids]], seeds: Sequence[int] | None, steps: tuple[Any, ...]
    ) -> list[Step[Ids]]:
        if not paths:
            return []
        made = _generate(
            self._model, self._tokenizer, [self._prefix(path) for path in paths], seeds, self._read,
            steps=steps, stop=self._stop, max_new_tokens=self._tokens,
        )  # fmt: skip
        ends = end_tokens(self._model, self._tokenizer)
        return [
            Step(ids, tokens=len(ids), final=self._stop is None or ids[-1] in ends) for ids in made
        ]

    def _prefix(self, path: Path[Ids]) -> Ids:
        if not isinstance(self._prompt, str):
            tries = [self._decode(step.content) for step in path.steps]
            return read_prompt(self._tokenizer, self._prompt(tries))
        steps = tuple(token for step in path.steps for token in step.content)
        return read_prompt(self._tokenizer, self._prompt) + steps

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


def _generate(
    model: Any, tokenizer: Any, prefixes: Sequence[Ids], seeds: Sequence[int] | None,
    read: Prefixes, **how: Any,
) -> list[Ids]:  # fmt: skip
    """New token ids of each row, up to its stop string, its end or the limit."""
    made: dict[int, Ids] = {}
    for places in together(model, [len(prefix) for prefix in prefixes]):
        rows = [prefixes[place] for place in places]
        drawer = Drawer(None if seeds is None else [seeds[place] for place in places])
        found = _generate_batch(model, tokenizer, rows, drawer, read, **how)
        made |= zip(places, found, strict=True)
    read.turn()
    return [made[place] for place in range(len(prefixes))]


@torch.no_grad()
def _generate_batch(
    model: Any, tokenizer: Any, prefixes: Sequence[Ids], drawer: Drawer, read: Prefixes, *,
    steps: tuple[Callable[..., Tensor], ...], stop: str | None, max_new_tokens: int,
) -> list[Ids]:  # fmt: skip
    ids, mask = fitted(model, tokenizer, prefixes, room=max_new_tokens)
    lengths = [max_new_tokens] * len(prefixes)
    ends, start = end_tokens(model, tokenizer), ids.shape[1]

    def done(rows: Tensor, _scores: Any, **_: Any) -> Tensor:
        made = rows.shape[1] - start
        for i, row in enumerate(rows[:, start:].tolist()):
            stopped = stop is not None and stop in tokenizer.decode(row)
            if made < lengths[i] and (row[-1] in ends or stopped):
                lengths[i] = made
        return torch.tensor([made >= n for n in lengths], device=rows.device)

    with evaluating(model):
        out = borrowed(model).generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
            logits_processor=[choosing(steps, drawer)], stopping_criteria=[done],
            pad_token_id=(ends or [0])[0], eos_token_id=ends or None,
            return_dict_in_generate=True, use_cache=True, **read.recall(prefixes),
        )  # fmt: skip
    rows = out.sequences[:, start:].tolist()
    made = [tuple(row[:n]) for row, n in zip(rows, lengths, strict=True)]
    read.add(prefixes, out, made)
    return made
