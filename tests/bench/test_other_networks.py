"""Networks of other kinds: what they read and are sent, and what the page says of them."""

import pytest
import torch

from scripts import script


@pytest.fixture
def kinds(monkeypatch):
    """The networks and their data, with few words of two packages."""
    found = script("other_kinds")
    monkeypatch.setattr(found, "PACKAGES", ("river", "timm"))
    monkeypatch.setattr(found, "EACH", 60)
    return found


def test_passages_to_learn_from_and_to_be_sent_are_of_other_files(kinds):
    x, y, others, answers = kinds.texts()
    assert x.shape == others.shape == (120, kinds.LENGTH)
    assert y.bincount().tolist() == answers.bincount().tolist() == [60, 60]
    assert not torch.equal(x, others)
    assert 1 <= min(x.min(), others.min()) <= max(x.max(), others.max()) < kinds.WORDS


@pytest.mark.parametrize(
    ("stream", "classes", "size"), [("continual", 2, 64), ("one class", 1, 60), ("single", 2, 1)]
)
def test_a_stream_of_words_holds_the_classes_that_it_names(kinds, stream, classes, size):
    batches = kinds.sent("words", stream)
    assert len(torch.cat([labels for _, labels in batches]).unique()) == classes
    assert max(len(x) for x, _ in batches) == size
    assert all(len(x) == len(labels) for x, labels in batches)


@pytest.mark.parametrize(
    ("how", "same"),
    [("clean", 1.0), ("missing", 0.6), ("replaced", 0.6), ("both", 0.2), ("cut", 0.375)],
)
def test_so_many_words_are_read_as_they_stand(kinds, how, same):
    x = torch.arange(1.0, 1 + kinds.LENGTH).expand(4000, -1)
    read = kinds.misread(x, how, torch.Generator().manual_seed(0))
    assert float((read == x).double().mean()) == pytest.approx(same, abs=0.01)


def test_every_network_takes_what_it_is_sent(kinds):
    for how in kinds.NETWORKS.values():
        x = torch.ones(2, kinds.LENGTH) if how.data == "words" else torch.rand(2, 1, 28, 28)
        assert how.make(5)(x).shape == (2, 5)


def test_logits_that_are_larger_give_the_same_answers(kinds):
    model = kinds.Convolutions(5).eval()
    x = torch.rand(8, 1, 28, 28)
    torch.testing.assert_close(kinds.Times(model, 3.0)(x), 3 * model(x))


def test_what_is_said_of_a_network_counts_harm_and_gains_lost():
    summary = script("other_networks").summary
    frozen = {"clean": 10.0, "noise": 40.0}
    errors = {
        ("tent", "clean"): (20.0, 12.0),
        ("tent", "noise"): (20.0, 30.0),
        ("sar", "noise"): (30.0, 30.0),
    }
    assert summary(frozen, errors) == ["3", "1", "2.0", "0.67", "clean", "noise"]
