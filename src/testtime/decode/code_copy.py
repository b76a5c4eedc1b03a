"""CodePromptZip's compressor: an encoder-decoder that shortens code in one pass, with a gate that copies.

    x_1..x_S   tokens of the source, y_1..y_T of the shortened code
    e_t, h_t   embedding of the decoder's input y_{t-1}, and the decoder's last hidden state there
    a_t        cross-attention of the last layer to x, mean over its heads
    g          = sigmoid(W [e_t ; h_t])
    P(w)       = g P_vocab(w) + (1 - g) sum_{s: x_s = w} a_{t,s}
    loss       = mean_t -ln P(y_t)

The authors' code adds g times the logits of the vocabulary to 1 - g times the attention, and takes the
cross-entropy of that as if it were logits. These are two scales; here probabilities are mixed, as the
paper writes it.

Reference: CodePromptZip: Code-specific Prompt Compression for Retrieval-Augmented Generation in
Coding Tasks with LMs, 2025.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from testtime._core.errors import InputError
from testtime._core.options import in_range, whole
from testtime.decode.caching import cache_name
from testtime.decode.decoding import evaluating
from testtime.decode.models import end_tokens, vocabulary_size
from testtime.decode.prompts import in_unicode

TASK = "Suggestion"
"""One of the paper's three; the others are Assertion and Bugs2Fix."""
LONGEST = (512, 256)
"""Tokens of a source and of its shortened form (code)."""


def mixture(
    logits: Float[Tensor, "rows steps tokens"],
    gate: Float[Tensor, "rows steps"],
    attention: Float[Tensor, "rows steps source"],
    source: Int[Tensor, "rows source"],
) -> Float[Tensor, "rows steps tokens"]:
    """Probabilities of the next token, from the vocabulary and from the source.

        P(w) = g softmax(logits)_w + (1 - g) sum_{s: x_s = w} a_s

    Example:
        >>> logits, attention = torch.zeros(1, 1, 4), torch.tensor([[[0.5, 0.25, 0.25]]])
        >>> mixture(logits, torch.tensor([[0.5]]), attention, torch.tensor([[3, 1, 3]]))
        tensor([[[0.1250, 0.2500, 0.1250, 0.5000]]])
    """
    places = source[:, None].expand_as(attention)
    copied = (1 - gate)[..., None] * attention
    return (gate[..., None] * logits.softmax(-1)).scatter_add(-1, places, copied)


def compressor_input(code: str, ratio: float, *, task: str = TASK) -> str:
    """What the compressor reads for a code and the share of tokens to remove.

    Example:
        >>> compressor_input("x = 1", 0.3)
        '<Suggestion><ratio>0.3</ratio><compressed>x = 1</compressed>'
    """
    return f"<{task}><ratio>{ratio:g}</ratio><compressed>{code}</compressed>"


@final
class CopyModel(nn.Module):
    """A Hugging Face encoder-decoder with the gate; a copy of it, so the given one stays as it is.

    Save it with `safetensors.torch.save_model(model, path)`, and read that into a new one with
    `load_model`.

    Args:
        model: T5, CodeT5, BART or another encoder-decoder whose decoder has cross-attention. Its
            attention is computed by the plain ("eager") way, which alone gives the weights. The gate
            begins at one half.

    Raises:
        InputError: it is no encoder-decoder of transformers.

    Reference: CodePromptZip, 2025.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise InputError(
                f"the model is of type {type(model).__name__}; expected an encoder-decoder of "
                "transformers, such as T5ForConditionalGeneration"
            )
        self.model = copy.deepcopy(model)
        self.model.set_attn_implementation("eager")
        width = self.model.get_output_embeddings().weight.shape[1]
        size = self._embedding().weight.shape[1] + width
        empty = nn.Linear(size, 1, device="meta", dtype=self.model.dtype)  # draws no random number
        self.gate = empty.to_empty(device=self.model.device)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    @property
    def start(self) -> int:
        """The token before the first of a shortened code."""
        config = self.model.config
        found = getattr(config, "decoder_start_token_id", None)
        return config.bos_token_id if found is None else found

    def encode(self, source: Int[Tensor, "rows source"], mask: Int[Tensor, "rows source"]) -> Any:
        """What the encoder says of a source, for `forward`."""
        return self.model.get_encoder()(input_ids=source, attention_mask=mask)

    def forward(
        self,
        source: Int[Tensor, "rows source"],
        mask: Int[Tensor, "rows source"],
        inputs: Int[Tensor, "rows steps"],
        *,
        encoded: Any = None,
        cache: Any = None,
    ) -> tuple[Float[Tensor, "rows steps tokens"], Any]:
        """P of the token after each of the decoder's inputs, and the cache.

        Args:
            source: tokens to copy from, padded anywhere.
            mask: 0 where they are padding.
            inputs: the decoder's, beginning with `start`; with a cache only those it has not seen.
            encoded: of `encode`; computed when None.
            cache: of the call before.
        """
        name = cache_name(self.model) or "past_key_values"
        found = self.model(
            encoder_outputs=self.encode(source, mask) if encoded is None else encoded,
            attention_mask=mask, decoder_input_ids=inputs, use_cache=not self.training,
            output_attentions=True, output_hidden_states=True, **{name: cache},
        )  # fmt: skip
        seen = torch.cat([self._embedding()(inputs), found.decoder_hidden_states[-1]], -1)
        gate = self.gate(seen).squeeze(-1).sigmoid().float()
        # dropout scales weights of attention, and half precision rounds them: they sum to 1 again
        weights = found.cross_attentions[-1].float().mean(1) * mask[:, None]
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo().tiny)
        return mixture(found.logits.float(), gate, weights, source), getattr(found, name, None)

    def _embedding(self) -> Any:
        return self.model.get_decoder().get_input_embeddings()


@torch.no_grad()
def shorten(
    model: CopyModel,
    tokenizer: Any,
    codes: Sequence[str],
    ratio: float,
    *,
    task: str = TASK,
    batch_size: int = 8,
    longest: tuple[int, int] = LONGEST,
) -> list[str]:
    """Codes as a trained copy model shortens them: the likeliest token, one after another.

    Args:
        model: after `train_copy_model`.
        tokenizer: of its encoder-decoder.
        codes: to shorten.
        ratio: share of tokens to remove, as the model learned it; it is not kept exactly.
        task: that it was trained for.
        batch_size: codes at a time.
        longest: tokens of a source, and of what is written at most.

    Raises:
        OptionError: the ratio is not between 0 and 1.
        InputError: a code is empty or too long, or the model gives NaN.

    Reference: CodePromptZip, 2025.
    """
    in_range(0, 1, ratio=ratio)
    whole(1, batch_size=batch_size)
    rows = [read_code(model, tokenizer, compressor_input(c, ratio, task=task)) for c in codes]
    for place, (row, code) in enumerate(zip(rows, codes, strict=True)):
        if not code.strip() or len(row) > longest[0]:
            raise InputError(
                f"code {place} has {len(code)} characters and, with its frame, {len(row)} tokens; "
                f"expected some code and at most {longest[0]} tokens. Shorten single functions."
            )
    found: list[str] = []
    with evaluating(model):
        for at in range(0, len(rows), batch_size):
            made = _written(model, tokenizer, rows[at : at + batch_size], longest[1])
            found += [tokenizer.decode(each, skip_special_tokens=True) for each in made]
    return found


def padded_right(
    rows: Sequence[Sequence[int]], *, pad: int, device: Any
) -> tuple[Int[Tensor, "rows length"], Int[Tensor, "rows length"]]:
    """Rows as a tensor, padded at the right, and its mask.

    Example:
        >>> padded_right([[5], [6, 7]], pad=0, device="cpu")[0]
        tensor([[5, 0],
                [6, 7]])
    """
    width = max(map(len, rows))
    ids = [[*row, *[pad] * (width - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def read_code(model: CopyModel, tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text, if they are tokens of the model.

    Raises:
        InputError: the tokenizer does not belong to the model.
    """
    tokens: list[int] = tokenizer(in_unicode(text), verbose=False)["input_ids"]
    rows = vocabulary_size(model.model)
    if any(token >= rows for token in tokens):
        raise InputError(
            f"the tokenizer does not belong to the model: it gives token {max(tokens)}, and the model "
            f"reads {rows}. After add_tokens call resize_token_embeddings of the model."
        )
    return tokens


def _written(
    model: CopyModel, tokenizer: Any, rows: Sequence[list[int]], longest: int
) -> Iterator[list[int]]:
    """The likeliest tokens for each source, without the one that ends it."""
    device, ends = model.model.device, set(end_tokens(model.model, tokenizer))
    source, mask = padded_right(rows, pad=tokenizer.pad_token_id or 0, device=device)
    encoded, cache = model.encode(source, mask), None
    inputs = torch.full((len(rows), 1), model.start, device=device)
    made: list[list[int]] = [[] for _ in rows]
    going = set(range(len(rows)))
    for _ in range(longest):
        probs, cache = model(source, mask, inputs, encoded=encoded, cache=cache)
        if bool(probs.isnan().any()):
            raise InputError("the model gives NaN; check its weights and its precision")
        inputs = probs[:, -1].argmax(-1, keepdim=True)
        for row in list(going):
            token = int(inputs[row])
            if token in ends:
                going.remove(row)
            else:
                made[row].append(token)
        if not going:
            break
    yield from made
