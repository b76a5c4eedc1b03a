"""What tests of runs share."""

import pytest


@pytest.fixture
def few_images(monkeypatch):
    """Few source samples are read, and few clean ones are answered."""
    monkeypatch.setattr("testtime.bench.trial.CLEAN_SAMPLES", 50)
    monkeypatch.setattr("testtime.bench.trial.SOURCE_SAMPLES", 200)
