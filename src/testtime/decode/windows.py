"""A causal model as predictor of the next token of an unbounded text, through a window of context.

    window    start token, then the last tokens, at most M in all; positions from 0 in each window
    full      the oldest `stride` tokens are dropped and the rest is read anew

Between two such turns the key-value cache is used, one token at a time. LLMZip drops one token at a
time (stride 1), which reads the whole window for each token, and begins its windows without a start
token; many models need that token at the front, so that here every window has it.

Reference: Valmeekam et al., LLMZip, 2023.
"""

from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from testtime._core.errors import InputError, OptionError
from testtime._core.options import whole
from testtime.decode.caching import go_on


@final
class WindowedModel:
    """Probabilities of the next token, for several texts side by side.

    The sequence of calls decides every number: the same lanes and tokens lead through calls of the
    same shapes, so that on one machine, with the same versions and number of threads, the
    probabilities are the same to the last bit.

    Args:
        model: a Hugging Face causal model; it is left as it is.
        start: token in front of every window, the tokenizer's start token.
        window: tokens of context at most, 2 or more (LLMZip: 511 and the one to predict).
        stride: tokens dropped when the window is full, 1 to window - 1; half a window when None
            (LLMZip: 1).

    Raises:
        OptionError: window or stride cannot be.
    """

    def __init__(
        self, model: nn.Module, *, start: int, window: int = 512, stride: int | None = None
    ) -> None:
        whole(2, window=window)
        stride = window // 2 if stride is None else stride
        whole(1, stride=stride)
        if stride >= window:
            raise OptionError(f"stride={stride}: expected less than the window of {window} tokens")
        self.filler, self.stride = start, stride
        self._model, self._window = model, window
        self._tokens = torch.empty(0, 0, dtype=torch.long, device="cpu")
        self._cache: Any = None

    def start(self, lanes: int) -> Float[Tensor, "lanes symbols"]:
        """Forgets everything; the probabilities of the first token."""
        self._tokens = torch.full((lanes, 1), self.filler, device="cpu")
        return self._read_window()

    def step(self, symbols: Int[Tensor, "lanes"]) -> Float[Tensor, "lanes symbols"]:
        """Reads one token in each lane; the probabilities of the next.

        Raises:
            InputError: `start` was not called, or with another number of lanes.
        """
        if len(symbols) != len(self._tokens):
            raise InputError(
                f"{len(symbols)} tokens for {len(self._tokens)} lanes; call start(lanes) first"
            )
        self._tokens = torch.cat([self._tokens, symbols[:, None]], 1)
        if self._tokens.shape[1] > self._window:
            kept = self._tokens[:, 1 + self.stride :]
            self._tokens = torch.cat([torch.full_like(kept[:, :1], self.filler), kept], 1)
            return self._read_window()
        return self._forward(self._tokens[:, -1:])

    def _read_window(self) -> Float[Tensor, "lanes symbols"]:
        self._cache = None
        return self._forward(self._tokens)

    def _forward(self, tokens: Int[Tensor, "lanes length"]) -> Float[Tensor, "lanes symbols"]:
        logits, self._cache = read(self._model, tokens, self._cache, last=1)
        logits = logits[:, -1].float()
        if logits.isnan().any() or logits.isneginf().all(1).any():
            raise InputError("the model's logits are NaN or all masked; it cannot predict")
        return logits.softmax(-1)


@torch.inference_mode()
def read(
    model: nn.Module, tokens: Int[Tensor, "rows length"], cache: Any, *, last: int
) -> tuple[Float[Tensor, "rows last symbols"], Any]:
    """Logits of the last positions of some tokens after what a cache holds, and the cache after them.

    Args:
        model: a Hugging Face causal model.
        tokens: without padding.
        cache: of the tokens before, or None.
        last: for how many of the positions logits are wanted; 0 for all.
    """
    return go_on(model, tokens.to(next(model.parameters()).device), cache, last=last)


def start_token(tokenizer: Any) -> int:
    """The token that stands in front of a text: that of a start, else of an end, else padding or 0."""
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, 0)
    return next(token for token in known if token is not None)
