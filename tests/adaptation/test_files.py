"""A place that cannot be written or read is told of in words, and nothing has happened then."""

import os
import resource
import signal
from contextlib import contextmanager

import pytest

import testtime as tt
from models import batches, tiny
from testtime._core.errors import StateError


def saved_by(kind):
    """Something that saves to a path, and what reads such a file again."""
    if kind == "knowledge":
        return tt.fit_source(tiny(), batches(1)).save, tt.SourceKnowledge.load
    adapter = tt.adapt(tiny(), "tent")
    adapter(batches(1)[0])
    return adapter.save, adapter.load


each_kind = pytest.mark.parametrize("kind", ["adapter", "knowledge"])


@each_kind
@pytest.mark.parametrize(
    ("given", "writing", "reading"),
    [
        ("", "the path is ''; expected", "the path is ''; expected"),
        (None, "the path is None; expected", "the path is None; expected"),
        (3, "the path is 3; expected", "the path is 3; expected"),
        ("a\0b", "the path is 'a.*b'; expected", "the path is 'a.*b'; expected"),
        (".", "is a folder; expected", "is a folder; expected"),
        ("file/inside", "cannot be written: File exists", "cannot be read: Not a directory"),
        ("n" * 300, "cannot be written: File name too long", "cannot be read: File name too long"),
        ("none", None, r"there is no file none; expected what .*\.save\(\) wrote"),
    ],
)
def test_paths_that_cannot_be_are_told_of(kind, given, writing, reading, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    save, load = saved_by(kind)
    with pytest.raises(StateError, match=reading):
        load(given)
    if writing:
        with pytest.raises(StateError, match=writing):
            save(given)
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]
    assert not list(tmp_path.parent.glob(".*.part"))


@contextmanager
def without_rights():
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@each_kind
def test_files_without_rights_are_told_of(kind, tmp_path, monkeypatch):
    save, load = saved_by(kind)
    save(tmp_path / "state")
    (tmp_path / "state").chmod(0)
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o555)
    with without_rights():
        with pytest.raises(StateError, match="cannot be read: Permission denied"):
            load("state")
        with pytest.raises(StateError, match="cannot be written: Permission denied"):
            save("state")


@contextmanager
def a_full_disk(bytes_left):
    """Stands in for one: no file may grow beyond."""
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    heeded = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
        signal.signal(signal.SIGXFSZ, heeded)


@each_kind
def test_a_full_disk_is_told_of_and_the_old_file_stays(kind, tmp_path):
    save, load = saved_by(kind)
    save(tmp_path / "state")
    before = (tmp_path / "state").read_bytes()
    with a_full_disk(100), pytest.raises(StateError, match=r"cannot be written: .*File too large"):
        save(tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    load(tmp_path / "state")
