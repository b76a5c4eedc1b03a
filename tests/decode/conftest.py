"""A tokenizer of bytes and small causal models with random weights; nothing is downloaded."""

from functools import cache

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

PROMPTS = ["ab", "a longer prompt, with more to read", "☃ snow"]
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


def byte_tokenizer():
    """One token for each byte after four special ones: any text is read, and 260 tokens are all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *alphabet))}
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=fast, **names)


@cache
def tiny_model(kind="llama", *, seed=0, layers=2, width=32, context=128, vocabulary=260, peak=4.0):
    """A causal model in float64 whose answers are sure at some steps and unsure at others.

    kind: `llama` (rotary positions), `gpt2` (learned ones, which show wrong padding at once) or
    `gemma` (a sliding window of 8 tokens in every other layer). peak: factor of the logits.
    """
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2,
             "max_position_embeddings": context, "vocab_size": vocabulary,
             "tie_word_embeddings": False} | ends  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "gpt2":
            model = GPT2LMHeadModel(GPT2Config(**shape))
        elif kind == "gemma":
            model = Gemma3ForCausalLM(Gemma3TextConfig(
                **shape, intermediate_size=2 * width, num_key_value_heads=1, head_dim=16,
                sliding_window=8, layer_types=["sliding_attention", "full_attention"] * (layers // 2),
            ))  # fmt: skip
        else:
            model = LlamaForCausalLM(
                LlamaConfig(**shape, intermediate_size=2 * width, num_key_value_heads=1)
            )
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=width**-0.5)
        model.lm_head.weight.data *= peak
        model.lm_head.weight.data[:4] = 0  # special tokens are rare
    return model.double().eval()


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(params=["llama", "gpt2", "gemma"])
def model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def llama():
    return tiny_model("llama")
