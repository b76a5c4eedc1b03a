"""The files of numbers, and what a model is seen to show of a stream."""

import json
import os

import pytest
import torch
from torch import nn

from models import batches
from scripts import script


def test_numbers_are_written_wholly_or_not_at_all(tmp_path, monkeypatch):
    write_json = script("between").write_json
    write_json(tmp_path / "some.json", {"rows": [1]})

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_json(tmp_path / "some.json", {"rows": [1, 2]})
    assert [each.name for each in tmp_path.iterdir()] == ["some.json"]
    assert json.loads((tmp_path / "some.json").read_text()) == {"rows": [1]}


class Late(nn.Module):
    """The layer that was registered last runs first."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.stem = nn.Linear(6, 5), nn.Linear(3, 6)

    def forward(self, x):
        return self.head(self.stem(x.mean((2, 3))))


def test_features_are_what_the_layer_that_gives_logits_is_given():
    model, x = Late(), batches(1)[0]
    seen = script("evidence").frozen(model, [(x, torch.zeros(len(x)), False)])
    torch.testing.assert_close(model.head(seen["features"]), seen["logits"])
