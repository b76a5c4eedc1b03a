"""The compressor with a copy gate, on small encoder-decoders with random weights."""

import random
from functools import cache

import pytest
import torch
from safetensors.torch import load_model, save_model
from tokenizers import processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from testtime._core.errors import InputError, OptionError, WorkFailed
from testtime.decode.code_copy import CopyModel, compressor_input, mixture, padded_right, shorten
from testtime.decode.code_prompts import compress_code
from testtime.decode.code_training import compression_pairs, copy_loss, train_copy_model

from .conftest import byte_tokenizer, tiny_model

END = 2
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END}


@cache
def bytes_with_an_end():
    made = byte_tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", END)]
    )
    return made


def tiny(kind, *, width=16, layers=2, dropout=0.1):
    shape = {"vocab_size": 260, "d_model": width, "decoder_start_token_id": 0} | IDS
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "t5":
            model = T5ForConditionalGeneration(T5Config(
                **shape, d_kv=width // 2, d_ff=2 * width, num_layers=layers, num_heads=2,
                dropout_rate=dropout,
            ))  # fmt: skip
        else:
            model = BartForConditionalGeneration(BartConfig(
                **shape, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=2 * width, decoder_ffn_dim=2 * width,
                max_position_embeddings=600, dropout=dropout, forced_eos_token_id=None,
            ))  # fmt: skip
    return model.eval()


@pytest.fixture(params=["t5", "bart"])
def model(request):
    torch.manual_seed(1)
    made = CopyModel(tiny(request.param)).eval()
    torch.nn.init.normal_(made.gate.weight, std=0.05)
    for parameter in made.model.parameters():  # far from uniform, so that a mistake shows
        parameter.data.mul_(3)
    return made


def batch(*texts):
    rows = [bytes_with_an_end()(text)["input_ids"] for text in texts]
    return padded_right(rows, pad=0, device="cpu")


def test_probabilities_are_the_formula_token_by_token(model):
    source, mask = batch("a(b, a)", "x")
    inputs, gates = torch.tensor([[0, 40, 41, 9], [0, 77, 3, 5]]), []
    with torch.no_grad():
        probs, _ = model(source, mask, inputs)
        raw = model.model(input_ids=source, attention_mask=mask, decoder_input_ids=inputs,
                          output_attentions=True, output_hidden_states=True)  # fmt: skip
        table = model.model.get_decoder().get_input_embeddings()
        for row in range(2):
            for t in range(4):
                e, h = table(inputs[row, t]), raw.decoder_hidden_states[-1][row, t]
                gates.append(
                    g := (model.gate.weight[0] @ torch.cat([e, h]) + model.gate.bias[0]).sigmoid()
                )
                expected = g * raw.logits[row, t].softmax(-1)
                for s in range(source.shape[1]):
                    if mask[row, s]:
                        a = sum(head[t, s] for head in raw.cross_attentions[-1][row]) / 2
                        expected[source[row, s]] += (1 - g) * a
                torch.testing.assert_close(probs[row, t], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 4))
    assert 0.02 < min(gates) < max(gates) < 0.98


def test_with_the_gate_shut_only_source_tokens_are_written(model):
    torch.nn.init.zeros_(model.gate.weight)
    model.gate.bias.data.fill_(-1e9)
    source, mask = batch("total += item", "xy")
    with torch.no_grad():
        probs, _ = model(source, mask, torch.randint(0, 260, (2, 9)))
    for row, tokens in enumerate(source):
        others = torch.ones(260, dtype=torch.bool)
        others[tokens[mask[row].bool()]] = False
        assert float(probs[row][:, others].max()) == 0
    code = "for x in range(3): y"
    allowed = set(compressor_input(code, 0.5))
    written = shorten(model, bytes_with_an_end(), [code, "other(code)"], 0.5, longest=(200, 20))
    assert written[0]
    assert set(written[0]) <= allowed


def test_with_the_gate_open_it_is_the_model_itself(model):
    torch.nn.init.zeros_(model.gate.weight)
    model.gate.bias.data.fill_(1e9)
    source, mask = batch("def f(x): return x", "x = 1")
    inputs = torch.randint(0, 260, (2, 7))
    with torch.no_grad():
        probs, _ = model(source, mask, inputs)
        plain = model.model(input_ids=source, attention_mask=mask, decoder_input_ids=inputs)
    torch.testing.assert_close(probs, plain.logits.softmax(-1))


def test_shortening_with_a_cache_and_in_a_batch_is_the_plain_loop(model):
    tokenizer, codes = bytes_with_an_end(), ["a = f(b)", "while longer < than_this: go()"]
    together = shorten(model, tokenizer, codes, 0.3, longest=(200, 12))
    for code, found in zip(codes, together, strict=True):
        source, mask = batch(compressor_input(code, 0.3))
        made = [model.start]
        with torch.no_grad():
            while len(made) < 13 and (len(made) == 1 or made[-1] != END):
                probs, _ = model(source, mask, torch.tensor([made]))
                made.append(int(probs[0, -1].argmax()))
        assert found == tokenizer.decode(made[1:], skip_special_tokens=True)
        assert found == shorten(model, tokenizer, [code], 0.3, longest=(200, 12))[0]


def test_pairs_are_codes_at_every_ratio():
    code = "def f(x):\n    return x + 1"
    pairs = compression_pairs([code], task="Bugs2Fix", order=("symbol",))
    assert len(pairs) == 9
    for ratio, (asked, answer) in zip(range(1, 10), pairs, strict=True):
        assert asked == f"<Bugs2Fix><ratio>0.{ratio}</ratio><compressed>{code}</compressed>"
        assert answer == compress_code(code, ratio / 10, order=("symbol",))


def chance_pairs(count, seed):
    """Words between digits; the digits go."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        text = "".join(draw.choice("abcdefghjk0123") for _ in range(8))
        made.append((text, "".join(c for c in text if c.isalpha())))
    return made


def test_training_lowers_the_loss_keeps_the_best_and_touches_nothing_else():
    given = tiny("t5")
    before = {name: value.clone() for name, value in given.state_dict().items()}
    state = torch.random.get_rng_state()
    known, held = chance_pairs(48, 0), chance_pairs(8, 1)
    too_long = [("a" * 600, "a"), ("a", "b" * 300)]
    runs = []
    for _ in range(2):
        model = CopyModel(given)
        found = train_copy_model(
            model, bytes_with_an_end(), [*known, *too_long], held, epochs=3, lr=1e-2, warmup=5
        )
        runs.append(found)
    assert runs[0] == runs[1]
    assert found.left_out == 2
    assert found.losses[-1] < found.losses[0] - 0.5
    assert found.validation[found.best] == min(found.validation)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in given.state_dict().items())
    assert not model.training
    source, mask = batch(*(a for a, _ in held))
    targets, counts = batch(*(b for _, b in held))
    inputs = torch.cat([torch.zeros_like(targets[:, :1]), targets[:, :-1]], 1)
    with torch.no_grad():
        kept = copy_loss(model(source, mask, inputs)[0], targets, counts.bool())
    assert float(kept) == pytest.approx(found.validation[found.best], rel=1e-4)


def test_a_saved_model_comes_back(model, tmp_path):
    save_model(model, str(tmp_path / "copy.safetensors"))
    kind = "t5" if isinstance(model.model, T5ForConditionalGeneration) else "bart"
    fresh = CopyModel(tiny(kind)).eval()
    load_model(fresh, str(tmp_path / "copy.safetensors"))
    source, mask = batch("x = f(y)")
    inputs = torch.tensor([[0, 5, 6]])
    with torch.no_grad():
        assert torch.equal(model(source, mask, inputs)[0], fresh(source, mask, inputs)[0])


def test_training_stops_after_epochs_without_a_gain():
    model = CopyModel(tiny("t5", dropout=0.0))
    pairs = chance_pairs(4, 0)
    found = train_copy_model(model, bytes_with_an_end(), pairs, pairs, lr=0.0, patience=2)
    assert len(found.losses) == 3
    assert found.best == 0


def test_bad_calls_are_refused(model):
    tokenizer, pairs = bytes_with_an_end(), chance_pairs(2, 0)
    with pytest.raises(InputError, match="encoder-decoder"):
        CopyModel(tiny_model("llama"))
    with pytest.raises(InputError, match="code 1 has"):
        shorten(model, tokenizer, ["x", "y" * 600], 0.5)
    with pytest.raises(InputError, match="code 0 has"):
        shorten(model, tokenizer, [" "], 0.5)
    with pytest.raises(InputError, match="no character"):
        shorten(model, tokenizer, ["x\udcff"], 0.5)
    with pytest.raises(OptionError, match="ratio"):
        shorten(model, tokenizer, ["x"], 1.5)
    for known, held in (([], pairs), (pairs, []), (pairs, [("a" * 999, "b")])):
        with pytest.raises(InputError, match="validation"):
            train_copy_model(model, tokenizer, known, held)
    small = CopyModel(tiny("t5"))
    small.model.resize_token_embeddings(50)
    with pytest.raises(InputError, match="does not belong"):
        shorten(small, tokenizer, ["zebra"], 0.5)


def test_a_broken_model_is_refused(model):
    model.gate.bias.data.fill_(float("nan"))
    with pytest.raises(InputError, match="NaN"):
        shorten(model, bytes_with_an_end(), ["x = 1"], 0.5)
    with pytest.raises(WorkFailed, match="not finite"):
        train_copy_model(model, bytes_with_an_end(), *[chance_pairs(2, 0)] * 2)


def test_mixture_of_known_numbers():
    logits = torch.tensor([[[0.0, 0.0], [50.0, 0.0]]])
    found = mixture(logits, torch.tensor([[0.5, 1.0]]),
                    torch.tensor([[[0.25, 0.75], [0.5, 0.5]]]), torch.tensor([[1, 1]]))  # fmt: skip
    torch.testing.assert_close(found, torch.tensor([[[0.25, 0.75], [1.0, 0.0]]]))
