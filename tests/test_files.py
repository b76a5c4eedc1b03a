"""Files are written wholly or not at all, and nothing is left beside them."""

import os
import stat

import pytest

import testtime as tt
from battery import alike
from interrupts import interrupted
from models import batches, tiny
from testtime._core.files import atomic


def test_an_interrupt_in_a_save_leaves_the_old_file_or_the_new_one_and_no_other(tmp_path):
    path, model = tmp_path / "state", tiny()
    adapter, reader = tt.adapt(model, "tent"), tt.adapt(model, "tent")
    adapter(batches(1)[0])
    old = adapter.snapshot()
    adapter.save(path)
    adapter(batches(2)[1])
    new = adapter.snapshot()
    places = interrupted(lambda: adapter.save(path))
    late = range(places - 40, places + 1)  # where the file is written
    for at in [*range(1, places, 20), *late]:
        adapter.restore(old)
        adapter.save(path)
        adapter.restore(new)
        interrupted(lambda: adapter.save(path), at)
        assert [each.name for each in tmp_path.iterdir()] == ["state"], at
        reader.load(path)
        held = vars(reader.snapshot())
        assert alike(held, vars(old)) or alike(held, vars(new)), at


def test_a_file_is_for_whom_the_process_says_and_its_mask_is_left_alone(tmp_path, monkeypatch):
    mask = os.umask(0o027)
    try:
        # it is the whole process's: another thread would make a file for all meanwhile
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the mask was changed"))
        with atomic(tmp_path / "a") as part:
            part.write_text("whole")
        tt.adapt(tiny(), "tent").save(tmp_path / "b")
    finally:
        monkeypatch.undo()
        os.umask(mask)
    for name in "ab":
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640
