"""`testtime compress`, `decompress` and `watermark`, with a tiny model in place of a real one."""

import json

import pytest
from typer.testing import CliRunner

from testtime.cli.main import app
from testtime.decode import models
from toys import ToyModel, ToyTokenizer

run = CliRunner().invoke


def say(result):
    return " ".join((result.stdout + result.stderr).split())


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    wanted = []

    def load(name, *, on_progress=None):
        wanted.append(name)
        return ToyModel(seed=int(name[-1]), sharp=0.5), ToyTokenizer()

    monkeypatch.setattr(models, "load_language_model", load)
    return wanted


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_bytes("the thing, Ä ~ \0\n".encode() * 3 + b"\xff")
    return file


def test_a_file_comes_back_byte_for_byte(text, tmp_path):
    made = run(app, ["compress", str(text), "--model", "toy1", "--json"])
    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)
    packed = tmp_path / "notes.txt.ttlz"
    assert (found["file"], found["compressed"]) == (str(packed), packed.stat().st_size)
    assert found["bits_per_character"] == pytest.approx(
        8 * found["compressed"] / found["characters"]
    )
    again = run(app, ["decompress", str(packed), "--model", "toy1", "--out", str(tmp_path / "b")])
    assert again.exit_code == 0, again.output
    shown = run(app, ["decompress", str(packed), "--model", "toy1", "--out", str(tmp_path / "b"),
                      "--force", "--json"])  # fmt: skip
    assert json.loads(shown.stdout)["bytes"] == text.stat().st_size
    assert (tmp_path / "b").read_bytes() == text.read_bytes()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["b", "notes.txt", packed.name]


def test_files_are_never_written_over_unasked(text, tmp_path, loaded):
    words = ["compress", str(text), "--model", "toy1"]
    assert run(app, words).exit_code == 0
    refused = run(app, words)
    assert refused.exit_code == 2
    assert "--force" in say(refused)
    assert len(loaded) == 1  # refused before the model is loaded
    assert run(app, [*words, "--force", "--window", "8", "--lanes", "2"]).exit_code == 0
    back = run(app, ["decompress", str(text) + ".ttlz", "--model", "toy1"])
    assert back.exit_code == 2  # notes.txt is still there


def test_pipes_carry_the_content_and_nothing_else(text, tmp_path, loaded):
    words = ["--model", "toy1", "--out", "-"]
    made = run(app, ["compress", "-", *words], input=text.read_bytes())
    assert (made.exit_code, made.stderr) == (0, "")
    back = run(app, ["decompress", "-", *words], input=made.stdout_bytes)
    assert (back.exit_code, back.stdout_bytes, back.stderr) == (0, text.read_bytes(), "")
    loaded.clear()
    for wrong, said in (
        (["compress", "-"], "--out"), (["decompress", "-"], "no file of testtime"),
        (["compress", str(text), "--out", "-", "--json"], "give one"),
        (["compress", str(text), "--out", str(tmp_path / "none" / "x")], "no folder"),
    ):  # fmt: skip
        found = run(app, wrong, input=b"abc")
        assert (found.exit_code, said in say(found)) == (2, True), say(found)
    assert loaded == []


def test_wrong_files_are_refused_and_nothing_is_written(text, tmp_path, loaded):
    assert run(app, ["compress", str(text), "--model", "toy1"]).exit_code == 0
    packed = tmp_path / "notes.txt.ttlz"
    text.unlink()
    other = run(app, ["decompress", str(packed), "--model", "toy2"])
    assert (other.exit_code, "another model" in say(other)) == (2, True)
    loaded.clear()
    whole = packed.read_bytes()
    packed.write_bytes(whole[:-1])
    assert "damaged or cut short" in say(run(app, ["decompress", str(packed)]))
    packed.write_bytes(b"hello")
    assert "no file of testtime compress" in say(run(app, ["decompress", str(packed)]))
    assert "cannot be read" in say(run(app, ["compress", str(tmp_path / "none")]))
    assert "cannot be read" in say(run(app, ["compress", str(tmp_path)]))
    (tmp_path / "named").write_bytes(whole)
    assert "--out" in say(run(app, ["decompress", str(tmp_path / "named")]))
    assert loaded == []
    assert not text.exists()


@pytest.mark.parametrize("kind", [[], ["--plain"]])
def test_detection_tells_marked_text_from_other(tmp_path, kind, monkeypatch):
    from testtime.decode import watermark

    # a text of green tokens alone, made by hand: detection is given only the words
    mark = watermark.Watermark(vocabulary=258, tau=None)
    tokens = [ord("a")]
    for at in range(60):
        letters = [t for t in range(97, 123) if mark.green(tokens[-1])[t] and t != ord("h")]
        tokens.append(letters[at % len(letters)])
    file, plain = tmp_path / "answer.txt", tmp_path / "plain.txt"
    file.write_bytes(bytes(tokens))
    plain.write_text("a quick brown fox jumps over a lazy dog and looks for its own tail")
    words = ["watermark", "detect", "--model", "toy1", "--tau", "0.1", *kind]
    found = json.loads(run(app, [*words, str(file), "--json"]).stdout)
    assert found["watermarked"] is True
    assert found["green"] == found["scored"] > 30
    assert "watermarked: z" in say(run(app, [*words, str(file)]))
    assert "no watermark found" in say(run(app, [*words, str(plain)]))
    assert "no watermark found" in say(run(app, [*words, str(file), "--key", "5"]))
    known = json.loads(run(app, [*words, str(file), "--prompt", str(plain), "--json"]).stdout)
    assert known["scored"] >= found["scored"]
    piped = run(app, [*words, "-", "--json"], input=bytes(tokens))
    assert json.loads(piped.stdout) == found


def test_wrong_watermark_calls(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"")
    words = ["watermark", "detect", "--model", "toy1"]
    assert "text is empty" in say(run(app, [*words, str(file)]))
    file.write_bytes(b"ab\xff")
    assert "no text in UTF-8" in say(run(app, [*words, str(file)]))
    file.write_bytes(b"ab")
    wrong = run(app, [*words, str(file), "--gamma", "1.5"])
    assert (wrong.exit_code, "between 0 and 1" in say(wrong)) == (2, True)
