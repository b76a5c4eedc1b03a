"""`testtime generate`, on a tiny model in a folder."""

import copy
import json

import pytest
from typer.testing import CliRunner

from decode.conftest import byte_tokenizer, tiny_model
from testtime.cli.main import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    copy.deepcopy(tiny_model()).float().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return f"hf:{path}"


def call(*words, text=None):
    return CliRunner().invoke(app, ["generate", *words], input=text)


def test_a_text_is_shown_and_told_as_json(folder):
    more = ("--model", folder, "--method", "min-p", "--option", "p=0.2", "--max-new-tokens", "9")
    shown, told = call("ab", *more), call("ab", *more, "--json")
    assert (shown.exit_code, told.exit_code) == (0, 0)
    found = json.loads(told.stdout)
    assert shown.stdout == found["text"] + "\n"
    assert (found["method"], found["ended"], len(found["tokens"])) == ("min-p", "length", 9)
    assert json.loads(call("-", *more, "--json", text="ab").stdout) == found
    ead = call("ab", "--model", folder, "--large", folder, "--method", "ead", "--option",
               "threshold=inf", "--json", "--max-new-tokens", "9")  # fmt: skip
    assert json.loads(ead.stdout)["numbers"]["share of the large model"] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [(["a", "--method", "minp"], "did you mean min-p"), (["a", "--option", "p"], "NAME=VALUE"),
     (["a", "--method", "top-p", "--option", "q=1"], "no option is called"),
     (["a", "--model", "gpt2"], "no language model is called"),
     (["a", "--lame", "missing.txt"], "missing.txt cannot be read"), ([""], "prompt is empty"),
     (["-"], "prompt is empty")],
)  # fmt: skip
def test_a_wrong_call_is_answered_before_a_model_is_loaded(words, said):
    found = call(*words)
    assert found.exit_code == 2
    assert said in " ".join(found.stderr.split())
