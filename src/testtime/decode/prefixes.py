"""What a model has read of some rows of tokens, kept for the next rows that begin alike.

    of each new row the part that a known row shares with it, from the first token on:
        its keys and values are copied to where the new row stands (rows are padded at the left)
    rows that are equal are read once, and the cache is repeated for them
    the rest is read as ever

In a search the next rows are the last ones with a step more, so that of them only the last token is
read again. All layers keep all tokens, those with a sliding window too: a row may then end earlier than
it was read to. Models whose layers keep something else than keys and values (recurrent ones) read each
row from its beginning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from testtime.decode.caching import cache_name, forward, keys_alone
from testtime.decode.prompts import padded

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """One batch that was read: the tokens of each row, the place of its first, keys and values."""

    rows: tuple[Ids, ...]
    begins: tuple[int, ...]
    layers: tuple[tuple[Tensor, Tensor], ...]


@final
class Prefixes:
    """The rows that a model read last.

    Args:
        model: a causal model of transformers.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._name, self._able = model, cache_name(model) or "", _keeps_keys(model)
        self._known: tuple[Batch, ...] = ()
        self._fresh: list[Batch] = []

    def recall(self, rows: Sequence[Ids]) -> dict[str, Any]:
        """The cache with which a model goes on with rows, as an argument for it; not their last token.

        Args:
            rows: without padding. The model is to be given them padded at the left, without the
                places that the cache holds; `generate` of transformers finds these itself.
        """
        if not self._able:
            return {}
        unique = list(dict.fromkeys(rows))
        cache = self._moved(unique)
        if len(unique) < len(rows):
            self._read(unique, cache)
            cache.batch_select_indices(
                torch.tensor([unique.index(row) for row in rows], device="cpu")
            )
        return {self._name: cache}

    def add(self, rows: Sequence[Ids], found: Any, made: Sequence[Ids] | None = None) -> None:
        """Takes a batch that was read.

        Args:
            rows: that the model was given, without padding.
            found: what the model or its `generate` returned.
            made: tokens that followed each row.
        """
        if not self._able:
            return
        layers = [(layer.keys, layer.values) for layer in getattr(found, self._name).layers]
        width, slots = max(map(len, rows)), layers[0][0].shape[2]
        begins = [width - len(row) for row in rows]
        whole = rows if made is None else [a + b for a, b in zip(rows, made, strict=True)]
        held = [row[: slots - begin] for row, begin in zip(whole, begins, strict=True)]
        self._fresh.append(Batch(tuple(held), tuple(begins), tuple(layers)))

    def turn(self) -> None:
        """Forgets all but the batches that were added since the last turn."""
        self._known, self._fresh = tuple(self._fresh), []

    def _moved(self, rows: Sequence[Ids]) -> Any:
        """A cache of what known rows share with these, as far as all of them have it."""
        from transformers import DynamicCache  # noqa: PLC0415

        cache, width = DynamicCache(), max(map(len, rows))
        best = [
            max(
                ((_shared(row, known), batch, place)
                 for batch in self._known for place, known in enumerate(batch.rows)),
                key=lambda found: found[0], default=None,
            )
            for row in rows
        ]  # fmt: skip
        begins = [width - len(row) for row in rows]
        ends = [b + (f[0] if f else 0) for b, f in zip(begins, best, strict=True)]
        slots = min(*ends, width - 1)
        if not self._known or slots <= min(begins):
            return cache
        for layer, pair in enumerate(self._known[0].layers):
            moved = [old.new_zeros(len(rows), old.shape[1], slots, old.shape[3]) for old in pair]
            for row, (begin, found) in enumerate(zip(begins, best, strict=True)):
                if found is None or begin >= slots:
                    continue
                _, batch, place = found
                start = batch.begins[place]
                for new, old in zip(moved, batch.layers[layer], strict=True):
                    new[row, :, begin:] = old[place, :, start : start + slots - begin]
            cache.update(moved[0], moved[1], layer)
        return cache

    @torch.no_grad()
    def _read(self, rows: Sequence[Ids], cache: Any) -> None:
        """Reads all but the last token of rows, after what the cache holds."""
        width, known = max(map(len, rows)), cache.get_seq_length()
        if known >= width - 1:
            return
        ids, mask = padded(rows, device=self._model.device)
        forward(self._model, ids[:, known:-1], mask[:, :-1], cache=cache)


def last_logits(
    model: Any, rows: Sequence[Ids], ids: Tensor, mask: Tensor, read: Prefixes | None
) -> Tensor:
    """Logits (rows, tokens) after rows, in single precision; only what was not read before is read.

    Args:
        model: a causal model of transformers.
        rows: without padding.
        ids: the same, padded at the left.
        mask: of them.
        read: what was read before, and takes these rows; None reads all, and keeps nothing.
    """
    cache = next(iter(({} if read is None else read.recall(rows)).values()), None)
    known = 0 if cache is None else cache.get_seq_length()
    found = forward(model, ids[:, known:], mask, cache=cache, use_cache=read is not None)
    if read is not None:
        read.add(rows, found)
    return found.logits[:, -1].float()


def _shared(one: Ids, other: Ids) -> int:
    """How many tokens two rows have in common at their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # slices compare fast, so halve
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _keeps_keys(model: Any) -> bool:
    """Whether all that the model's layers keep is keys and values, one of each a token."""
    from transformers import DynamicCache  # noqa: PLC0415

    return cache_name(model) is not None and keys_alone(DynamicCache(config=model.config))
