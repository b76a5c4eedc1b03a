"""Runs that cannot be: no model, files that hold none, a full disk, bits that have flipped."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from rows import make
from testtime._core.errors import InputError, OptionError, RunError, WorkFailed
from testtime.bench.cells import plan
from testtime.bench.machine import check_device
from testtime.bench.models import load_model
from testtime.bench.runner import run
from testtime.bench.store import piece, read_cell, read_run, write_cell
from testtime.streams.scenarios import Scenario

STREAM = Scenario(domains=("fog",), batch_size=20, samples=20)
BASE = {"methods": ["tent"], "data": "fashion-mnist:sample", "seeds": 1}


def cells():
    return plan(**BASE, models=["embedded:batch"], streams=[STREAM])


def test_a_model_that_asserts_its_size_is_refused_likewise(tmp_path, monkeypatch):
    class Fixed(nn.Module):
        def forward(self, x):
            raise AssertionError("input height (28) does not match model (224)")

    monkeypatch.setattr("testtime.bench.trial.load_model", lambda spec: Fixed())
    with pytest.raises(InputError, match=r"cannot run on .*\(1, 28, 28\): input height"):
        run(cells(), tmp_path, jobs=0)


def test_a_device_without_its_backend_is_no_device(tmp_path, monkeypatch):
    def missing(*_, **__):
        raise ModuleNotFoundError("No module named 'torch.hpu'")

    monkeypatch.setattr("testtime.bench.machine.torch.zeros", missing)
    with pytest.raises(InputError, match="there is no device 'hpu' here"):
        check_device("hpu")


def test_cuda_is_not_advised_where_there_is_none(monkeypatch):
    monkeypatch.setattr("testtime.bench.machine.torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match=r"Give cpu\.$"):
        check_device("hpu")


def test_a_file_is_no_folder_of_results(tmp_path):
    (tmp_path / "taken").write_text("in the way")
    with pytest.raises(RunError, match="taken: it is a file"):
        run(cells(), tmp_path / "taken", jobs=0)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("whole.pt", lambda path: torch.save(nn.Linear(2, 2), path)),
        ("junk.pt", lambda path: path.write_bytes(b"hello")),
        ("empty.pt", lambda path: path.write_bytes(b"")),
        ("cut.safetensors", lambda path: path.write_bytes(b"\x10\0\0\0\0\0\0\0{")),
        ("empty.safetensors", lambda path: path.write_bytes(b"")),
    ],
)
def test_files_that_hold_no_weights_are_refused_by_name(tmp_path, name, write):
    write(tmp_path / name)
    with pytest.raises(InputError, match=rf"{name} cannot be read as weights .*state_dict"):
        load_model(f"file:{tmp_path / name}@embedded:batch")


def test_what_is_named_twice_is_run_once_and_no_model_is_a_mistake():
    assert plan(**BASE, models=["embedded:batch"] * 2, streams=[STREAM, STREAM]) == cells()
    with pytest.raises(OptionError, match="no model is named"):
        plan(**BASE, models=[], streams=[STREAM])


def test_results_that_cannot_be_written_end_the_run_with_a_sentence(tmp_path):
    (tmp_path / "cells").write_text("in the way")
    with pytest.raises(WorkFailed, match="results cannot be written to"):
        run(cells(), tmp_path, jobs=0)


def test_a_flipped_bit_is_a_damaged_piece(tmp_path):
    rows = make(seeds=1)
    for row in rows:
        row["cell"] = "0123"
    write_cell(tmp_path, "0123", rows)
    path, chance = piece(tmp_path, "0123"), random.Random(0)
    whole = path.read_bytes()
    pages = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")  # what stands before the footer
    assert read_cell(tmp_path, "0123") == rows
    for _ in range(200):
        flipped = bytearray(whole)
        flipped[chance.randrange(pages)] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        assert read_cell(tmp_path, "0123") in (None, rows)


def test_a_name_too_long_for_a_folder_holds_no_run():
    with pytest.raises(RunError, match="holds no run"):
        read_run("a" * 5000)


@pytest.mark.slow
@pytest.mark.parametrize("later", [0.1, 0.8])
def test_a_run_that_is_stopped_while_it_starts_says_so_in_one_line(tmp_path, later):
    words = ["bench", "--methods", "tent", "--seeds", "9", "--out", str(tmp_path)]
    # who was started in the background ignores it, and so does what he starts
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{heard}; from testtime.cli.main import app; app()", *words],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    limit = time.monotonic() + 60
    while not (tmp_path / "run.json").exists() and time.monotonic() < limit:
        time.sleep(0.02)
    time.sleep(later)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said = process.communicate(timeout=60)[1]
    assert said == "interrupted; the same command goes on from here\n"
    assert process.returncode == 1
