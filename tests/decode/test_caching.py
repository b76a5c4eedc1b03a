"""Models that keep something else than keys and values, or bear no padding, write the same text."""

import copy

import pytest
import torch
import transformers

import testtime as tt
from reference import decode as reference
from testtime.decode.caching import Reader
from testtime.decode.padding import together
from testtime.decode.prompts import read_prompts
from testtime.decode.watermark import token_entropies
from testtime.measures.entropy import entropy

from .conftest import tiny_model

PROMPTS = ["ab", "a longer prompt, with more", "snow it"]
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 260}
BAMBA = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "num_key_value_heads": 1, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16,
    "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 8,
}  # fmt: skip
SMALL = {"hidden_size": 32, "num_hidden_layers": 2}
KINDS = {
    "mamba": ("MambaForCausalLM", "MambaConfig", SMALL | {"state_size": 4}),
    "bamba": ("BambaForCausalLM", "BambaConfig", BAMBA),  # states in one layer, keys in the other
    "rwkv": ("RwkvForCausalLM", "RwkvConfig", SMALL | {"context_length": 128}),
    "minimax": (  # says that it holds nothing, for its first layer has no keys, and misreads a mask
        "MiniMaxForCausalLM", "MiniMaxConfig",
        SMALL | {"num_attention_heads": 2, "intermediate_size": 32, "num_key_value_heads": 1,
                 "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 8,
                 "layer_types": ["linear_attention", "full_attention"],
                 "experts_implementation": "eager"},
    ),
    "first gpt": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig",
                  {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 2}),
}  # fmt: skip


@pytest.fixture(params=sorted(KINDS))
def model(request):
    model, config, shape = KINDS[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = getattr(transformers, model)(getattr(transformers, config)(**shape, **ENDS))
        for parameter in made.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return made.double().eval()


def test_a_reader_in_pieces_equals_a_forward_from_scratch(model, tokenizer):
    for prompt in PROMPTS:
        reader = Reader(model, read_prompts(model, tokenizer, [prompt]))
        written = tokenizer(prompt)["input_ids"]
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for pause in (1, 3, 2, 1):
                torch.testing.assert_close(
                    reader.logits()[0], reference.next_logits(model, written), atol=2e-5, rtol=2e-5
                )
                for _ in range(pause):
                    token = torch.randint(4, 260, (1,), generator=random)
                    reader.push(token)
                    written.append(int(token))


def test_entropies_of_tokens_do_not_depend_on_the_chunk(model, tokenizer):
    ids = tokenizer(PROMPTS[1])["input_ids"]
    with torch.no_grad():
        said = entropy(model(torch.tensor([ids]), use_cache=False).logits[0, :-1]).tolist()
    for chunk in (1, 5, 64):
        assert token_entropies(model, ids, chunk=chunk)[1:] == pytest.approx(said, abs=1e-5)


@pytest.mark.parametrize("method", ["sample", "uscd"])
def test_a_batch_writes_what_each_prompt_alone_does(model, tokenizer, method):
    lame = ["b", "cc", "d e"] if method == "uscd" else None
    pieces = ["", "", ""]

    def told(row, text):
        pieces[row] += text

    found = tt.decode.generate(
        model, tokenizer, PROMPTS, method, lame=lame, max_new_tokens=8, on_text=told
    )
    alone = tt.decode.generate(
        model, tokenizer, PROMPTS[0], method, lame=lame and lame[0], max_new_tokens=8
    )
    assert found[0] == alone
    assert pieces == [each.text for each in found]
    greedy = tt.decode.generate(model, tokenizer, PROMPTS, "greedy", max_new_tokens=6)
    for prompt, each in zip(PROMPTS, greedy, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        assert list(each.tokens) == reference.greedy(model, ids, 6)


def test_rows_of_one_length_write_what_each_alone_does(model, tokenizer):
    prompts = ["snow", "rain", "hail"]
    found = tt.decode.generate(model, tokenizer, prompts, "greedy", max_new_tokens=6)
    for prompt, each in zip(prompts, found, strict=True):
        assert list(each.tokens) == reference.greedy(model, tokenizer(prompt)["input_ids"], 6)


def test_rows_are_read_together_where_padding_changes_nothing(model, llama):
    lengths = [3, 5, 3]
    assert together(llama, lengths) == [[0, 1, 2]]
    rwkv, minimax = (type(model).__name__.startswith(name) for name in ("Rwkv", "MiniMax"))
    apart = [[0], [1], [2]] if rwkv else [[0, 2], [1]]
    assert together(model, lengths) == (apart if rwkv or minimax else [[0, 1, 2]])
    assert together(model, [4, 4]) == ([[0], [1]] if rwkv else [[0, 1]])
    assert together(model, [4, 4, 4], [9, 8, 9]) == ([[0], [1], [2]] if rwkv else [[0, 2], [1]])
    forbids = copy.deepcopy(model)  # some tokens, by -inf, which says nothing of the others
    forbids.get_output_embeddings().register_forward_hook(
        lambda head, given, out: out.index_fill(-1, torch.tensor([0]), -torch.inf)
    )
    assert together(forbids, lengths) == together(model, lengths)
    half = tiny_model("gpt2").to(torch.bfloat16)
    try:
        assert together(half, lengths) == [[0, 1, 2]]
    finally:
        half.double()
