"""A small causal model and a tokenizer with the faces of Hugging Face's, without the library."""

from types import SimpleNamespace

import torch
from torch import nn


class ToyModel(nn.Module):
    """Next-token logits from a running mean of embeddings, which its cache holds."""

    def __init__(self, vocabulary=300, *, seed=0, sharp=4.0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.embed = nn.Parameter(torch.randn(vocabulary, 16, generator=draw))
        self.head = nn.Parameter(torch.randn(16, vocabulary, generator=draw) * sharp)
        self.calls = []
        self.config = SimpleNamespace(max_position_embeddings=4096)

    def generate(self):
        raise AssertionError("a toy is only asked for logits")

    def get_input_embeddings(self):
        return SimpleNamespace(weight=self.embed)

    def forward(self, input_ids, past_key_values=None, use_cache=True, logits_to_keep=0):
        total, count = past_key_values or (torch.zeros(len(input_ids), 16), 0)
        self.calls.append((tuple(input_ids.shape), count))
        sums = total[:, None] + self.embed[input_ids].cumsum(1)
        seen = torch.arange(count + 1, count + 1 + input_ids.shape[1])
        hidden = torch.tanh(sums / seen[None, :, None].sqrt())
        return SimpleNamespace(
            logits=hidden[:, -logits_to_keep:] @ self.head,
            past_key_values=(sums[:, -1], int(seen[-1])),
        )


class ToyTokenizer:
    """Bytes, and the pair `th` as one token; it lowers capitals and has no word for `~`."""

    bos_token_id, eos_token_id, pad_token_id = 256, None, None

    def __len__(self):
        return 258

    def get_vocab(self):
        return {str(token): token for token in range(258)}

    def __call__(self, text, **_):
        parts = text.lower().replace("~", "").split("th")
        tokens = []
        for place, part in enumerate(parts):
            tokens += [257] * (place > 0) + list(part.encode())
        return {"input_ids": tokens}

    def decode(self, tokens, **_):
        spelled = b"".join({256: b"<s>", 257: b"th"}.get(t) or bytes([t % 256]) for t in tokens)
        return spelled.decode("utf-8", "replace")
