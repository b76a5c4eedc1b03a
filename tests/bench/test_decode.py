"""The benchmarks of language models: they go on where interrupted, and their pages are their numbers."""

import copy
import json
import sys
from pathlib import Path

import pytest

import testtime as tt
from decode.conftest import byte_tokenizer, tiny_model
from scripts import script
from testtime._core.errors import WorkFailed

ROOT = Path(__file__).parents[2]
PAGES = {"decode": "decode.md", "compression": "decode-codes.md"}


def toy(loads):
    def load(name):
        loads.append(name)
        return copy.deepcopy(tiny_model()), byte_tokenizer()

    return load


def test_rounds_are_kept_and_only_those_that_are_missing_run(tmp_path, monkeypatch, capsys):
    bench, out, loads = script("decode"), tmp_path / "d.json", []
    monkeypatch.setattr(tt.decode, "load_language_model", toy(loads), raising=False)
    for rounds in (1, 2, 2):
        words = f"decode.py --model toy --tokens 3 --prompts 2 --rounds {rounds} --out {out}"
        monkeypatch.setattr(sys, "argv", words.split())
        bench.main()
        found = json.loads(out.read_text())
        assert {len(own) for own in found["seconds"].values()} == {rounds}
        if rounds == 1:
            first = found["seconds"]
    assert all(own[0] == first[name][0] for name, own in found["seconds"].items())
    assert bench.summary(found)["plain generate"]["time against plain"] == 1
    assert loads == ["toy", "toy"]  # nothing is loaded where nothing is missing
    assert "round 2 of 2" in capsys.readouterr().out


def test_a_file_that_was_made_is_read_by_the_next_call(tmp_path, monkeypatch):
    bench, out, loads = script("compression"), tmp_path / "c.json", []
    words = f"c.py --model toy --texts a,b --lanes 2 --out {out} --work {tmp_path}"
    monkeypatch.setattr(sys, "argv", words.split())
    monkeypatch.setattr(bench, "load_language_model", toy(loads))
    monkeypatch.setattr(bench, "TEXTS", {"a": lambda: b"abc" * 9, "b": "☃".encode})
    read, tried = bench.decompress, []

    def interrupted(*args):
        tried.append(args)
        if len(tried) == 2:
            raise WorkFailed("stopped")
        return read(*args)

    monkeypatch.setattr(bench, "decompress", interrupted)
    with pytest.raises(WorkFailed):
        bench.main()
    half = json.loads(out.read_text())["texts"]
    assert ["came back" in row for row in half.values()] == [True, False]
    monkeypatch.setattr(bench, "compress", None)  # no text is compressed twice
    bench.main()
    bench.main()
    found = json.loads(out.read_text())["texts"]
    assert [row["came back"] for row in found.values()] == [True, True]
    assert found["a"] == half["a"]
    assert len(loads) == 2


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_that_of_the_numbers(name, tmp_path):
    bench, page, docs = script(name), tmp_path / "page.md", ROOT / "docs" / PAGES[name]
    page.write_text(docs.read_text())
    bench.page(page, json.loads((ROOT / f"benchmarks/{name}.json").read_text()))
    assert page.read_text() == docs.read_text()
