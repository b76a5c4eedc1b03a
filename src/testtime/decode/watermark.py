"""SWEET: a green-list watermark that touches only what the model is unsure of; and the plain one.

    green list   seed a generator with key * previous token; the first gamma V of a permutation
    generation   H = -sum p ln p of the scores;  if H > tau: scores of green tokens + delta
    detection    T = tokens predicted with H > tau,  G = those of them in their green list
                 z = (G - gamma T) / sqrt(T gamma (1 - gamma)),   p = 1 - Phi(z)

With tau None every token counts: the plain watermark, whose detection needs no model. The green
lists are those of transformers' `WatermarkLogitsProcessor` (context width 1, lefthash).

Reference: Lee et al., Who Wrote this Code? Watermarking for Code Generation, ACL 2024; Kirchenbauer
et al., A Watermark for Large Language Models, ICML 2023 (the plain one).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from testtime._core.errors import InputError, OptionError
from testtime._core.options import check_types, whole
from testtime.decode.decoding import evaluating
from testtime.decode.drawing import check_logits
from testtime.decode.models import check_pair, context_length
from testtime.decode.prompts import in_unicode
from testtime.decode.windows import read, start_token
from testtime.measures.entropy import entropy

KEY = 15485863
"""The key of both papers' codes. It is public: whoever knows it can detect and remove."""


@final
@dataclass(frozen=True, kw_only=True)
class Watermark:
    """A logits processor for `generate` that marks what it lets the model write.

    Pass it as `logits_processor=[watermark]` to transformers, or as the first step of a `Decoding`
    to `decode.api.generate`: it then sees the scores before temperature and truncation, as in the
    paper's code. Prompts in a batch must be padded at the left.

    Args:
        vocabulary: size of the tokenizer, `len(tokenizer)`; scores beyond it, where a model pads
            its head, are left alone.
        gamma: share of green tokens, in (0, 1). 0.25 and delta 3 are a usual working point of the
            papers; the options of SWEET's script stand at 0.5 for gamma, delta and tau.
        delta: added to the scores of green tokens, above 0.
        tau: entropy in nats above which a token is marked; None marks all (the plain watermark).
            The paper sweeps it, 0.6 to 1.2 for code.
        key: of the green lists.

    Raises:
        OptionError: an option that cannot be.

    Example:
        >>> mark = Watermark(vocabulary=6, gamma=0.5, tau=0.9)
        >>> sure, unsure = [9.0, 0, 0, 0, 0, 0], [1.0, 0, 0, 0, 0, 0]
        >>> mark(torch.tensor([[4], [4]]), torch.tensor([sure, unsure]))
        tensor([[9., 0., 0., 0., 0., 0.],
                [4., 0., 0., 3., 3., 0.]])

    Reference: Lee et al., ACL 2024.
    """

    vocabulary: int
    gamma: float = 0.25
    delta: float = 3.0
    tau: float | None = 0.9
    key: int = KEY

    def __post_init__(self) -> None:
        check_types(vars(self), type(self).__annotations__)
        if not 0 < self.gamma < 1 or not int(self.gamma * self.vocabulary) >= 1:
            raise OptionError(
                f"gamma={self.gamma} of vocabulary={self.vocabulary} tokens leaves no green or no "
                "red token; expected a share between 0 and 1, e.g. gamma=0.25"
            )
        if not 0 < self.delta < math.inf:
            raise OptionError(f"delta={self.delta}: expected a number above 0")
        if not 0 < self.key < 2**63 // self.vocabulary:
            raise OptionError(
                f"key={self.key}: key * token must fit 63 bits; "
                f"expected a number from 1 to {2**63 // self.vocabulary - 1}"
            )

    def green(self, previous: int) -> Bool[Tensor, "vocabulary"]:
        """Which tokens are green after the token `previous`.

        Example:
            >>> Watermark(vocabulary=6, gamma=0.5).green(4).nonzero().flatten()
            tensor([0, 3, 4])
        """
        return _green(previous, self.vocabulary, int(self.gamma * self.vocabulary), self.key)

    def __call__(
        self, input_ids: Int[Tensor, "batch length"], scores: Float[Tensor, "batch classes"]
    ) -> Float[Tensor, "batch classes"]:
        """The scores with delta added to green tokens where the entropy is above tau.

        Raises:
            InputError: there is no token yet, scores are NaN, or fewer than the vocabulary.
        """
        if input_ids.shape[-1] == 0 or scores.shape[-1] < self.vocabulary:
            raise InputError(
                f"{input_ids.shape[-1]} tokens so far and {scores.shape[-1]} scores: expected one "
                f"token at least and a score for each of vocabulary={self.vocabulary} tokens"
            )
        if scores.isnan().any():
            raise InputError("scores hold NaN; the model's logits are broken, nothing was marked")
        marked = scores.clone()
        unsure = torch.ones(len(scores), dtype=torch.bool, device="cpu")
        if self.tau is not None:
            unsure = (entropy(scores) > self.tau).cpu()
        for row in unsure.nonzero().flatten().tolist():
            green = self.green(int(input_ids[row, -1])).to(scores.device)
            marked[row, : self.vocabulary] += self.delta * green
        return marked


@lru_cache(maxsize=256)  # a list of the largest vocabularies is a quarter of a megabyte
def _green(previous: int, vocabulary: int, count: int, key: int) -> Bool[Tensor, "vocabulary"]:
    # a generator of the CPU, so that each machine finds the same list
    generator = torch.Generator("cpu").manual_seed(key * previous)
    chosen = torch.randperm(vocabulary, generator=generator, device="cpu")[:count]
    return torch.zeros(vocabulary, dtype=torch.bool, device="cpu").index_fill_(0, chosen, True)


@dataclass(frozen=True, kw_only=True)
class Detection:
    """How much a text looks watermarked.

    Attributes:
        z: standard deviations by which green tokens exceed what chance gives; -inf if none
            could be counted.
        p_value: probability of a z as large in text without the watermark.
        scored: tokens that count, T.
        green: those of them in their green list, G.
    """

    z: float
    p_value: float
    scored: int
    green: int


def detect(
    tokens: Sequence[int],
    watermark: Watermark,
    *,
    entropies: Sequence[float] | None = None,
    prompt: int = 0,
    repeats: bool = True,
) -> Detection:
    """Counts green tokens and says how unlikely their number is without the watermark.

    Args:
        tokens: of the text, with the prompt in front if it is known.
        watermark: with the vocabulary, gamma, tau and key that the text was made with; delta is
            not used.
        entropies: for each token, in nats, of the distribution that it was drawn from (see
            `token_entropies`); not needed when tau is None.
        prompt: how many of the tokens are prompt. The first token of all is never counted: there
            is none before it.
        repeats: as in the paper, count a pair of tokens each time it occurs. Repeats share
            a green list, so a text full of them has large z of either sign: with False a pair
            counts once, which is needed where a rate of false alarms must be kept.

    Returns:
        With no token to count z is -inf and p 1, so that it is never called watermarked (the
        paper's code: -100 and 1).

    Raises:
        InputError: entropies are missing or of another length; a token is not in the vocabulary.

    Example:
        >>> mark = Watermark(vocabulary=6, gamma=0.5, tau=None)
        >>> detect([4, 0, 1, 2, 3], mark)
        Detection(z=0.0, p_value=0.5, scored=4, green=2)
    """
    whole(0, prompt=prompt)
    if watermark.tau is not None and (entropies is None or len(entropies) != len(tokens)):
        raise InputError(
            f"tau={watermark.tau} counts tokens by their entropy, but there are {len(tokens)} "
            f"tokens and {0 if entropies is None else len(entropies)} entropies. Pass "
            "entropies=token_entropies(model, tokens), or tau=None for the plain watermark."
        )
    if not all(0 <= token < watermark.vocabulary for token in tokens):
        raise InputError(
            f"tokens reach from {min(tokens)} to {max(tokens)}; expected 0 to "
            f"{watermark.vocabulary - 1}. Is this the tokenizer that the text was made with?"
        )
    pairs = [
        (tokens[at - 1], tokens[at])
        for at in range(max(prompt, 1), len(tokens))
        if watermark.tau is None or entropies is None or entropies[at] > watermark.tau
    ]
    pairs = pairs if repeats else list(dict.fromkeys(pairs))
    green = sum(bool(watermark.green(previous)[token]) for previous, token in pairs)
    z = z_score(green, len(pairs), gamma=watermark.gamma)
    return Detection(z=z, p_value=math.erfc(z / math.sqrt(2)) / 2, scored=len(pairs), green=green)


def token_entropies(
    model: nn.Module,
    tokens: Sequence[int],
    *,
    chunk: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Entropy in nats of the distribution from which a model would draw each token of a text.

    It is what `Watermark` saw if the tokens begin with the same start token and prompt. Without the
    prompt the first entropies differ, most near the beginning.

    Args:
        model: the Hugging Face causal model that wrote the text.
        tokens: start token, prompt if known, and text.
        chunk: tokens read in one pass; the cache holds those before.
        on_progress: called with tokens done and all.

    Returns:
        One number for each token; that of the first, for which there is no distribution, is 0.

    Raises:
        InputError: no token, more than the model's context, or logits that are NaN.

    Reference: Lee et al., ACL 2024.
    """
    context = context_length(model)
    if not tokens or (context is not None and len(tokens) > context):
        raise InputError(
            f"{len(tokens)} tokens, but the model reads 1 to {context}; split the text"
        )
    whole(1, chunk=chunk)
    found, cache = [0.0], None
    with evaluating(model):
        for at in range(0, len(tokens) - 1, chunk):
            part = torch.tensor([list(tokens[at : min(at + chunk, len(tokens) - 1)])], device="cpu")
            logits, cache = read(model, part, cache, last=0)
            check_logits(logits[0])
            found += entropy(logits[0].float()).tolist()
            if on_progress is not None:
                on_progress(len(found), len(tokens))
    return found


def detect_text(
    text: str,
    model: nn.Module,
    tokenizer: Any,
    watermark: Watermark,
    *,
    prompt: str = "",
    repeats: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Detection:
    """`detect` for a text in words: tokens are found again, entropies computed where tau asks.

    Without a prompt the first token of the text is not counted, for what stood before it is unknown.

    Args:
        text: without the prompt.
        model: the Hugging Face causal model that wrote it; read only if the watermark has a tau.
        tokenizer: its tokenizer.
        watermark: as it was written with.
        prompt: what the model went on from, if it is known.
        repeats: count a pair of tokens each time it occurs; once by default, see `detect`.
        on_progress: called with tokens read and all.

    Raises:
        InputError: the text is empty or longer than the model's context, or the tokenizer is
            not the model's.

    Reference: Lee et al., ACL 2024.
    """
    check_pair(model, tokenizer)
    own, before = (
        tokenizer(in_unicode(part), add_special_tokens=False, verbose=False)["input_ids"]
        for part in (text, prompt)
    )
    if not own:
        raise InputError("the text is empty; there is nothing to count")
    tokens = [start_token(tokenizer), *before, *own]
    entropies = (
        None if watermark.tau is None else token_entropies(model, tokens, on_progress=on_progress)
    )
    known = 1 + len(before) if before else 2
    return detect(tokens, watermark, entropies=entropies, prompt=known, repeats=repeats)


def z_score(green: int, scored: int, *, gamma: float) -> float:
    """(G - gamma T) / sqrt(T gamma (1 - gamma)); -inf for T = 0.

    Example:
        >>> z_score(50, 100, gamma=0.25)
        5.77
    """
    if scored == 0:
        return -math.inf
    return (green - gamma * scored) / math.sqrt(scored * gamma * (1 - gamma))
