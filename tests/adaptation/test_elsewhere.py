"""Every method on a device that is not the CPU: nothing is mixed, and the numbers are the same."""

import pytest
import torch

import testtime as tt
from elsewhere import DEVICE, There, elsewhere, send
from models import Experts, batches, tiny, tiny_vit
from testtime._core.registry import entries

pytestmark = pytest.mark.filterwarnings("ignore::testtime._core.errors.TesttimeWarning")


def model_for(method):
    if method == "foa":
        return tiny_vit()
    return Experts(tiny()).eval() if method == "sade" else tiny()


def known(model, method, loader):
    needs = tt.methods()[method].needs
    return {"source": tt.fit_source(model, loader, methods=[method])} if needs else {}


@pytest.mark.slow
@pytest.mark.parametrize("method", entries("method"))
def test_a_method_works_on_another_device(method, tmp_path, monkeypatch):
    xs = batches(4)
    loader = [(x, (x.mean((1, 2, 3)) * 5).long().clamp(max=3)) for x in batches(4, seed=5)]
    here = model_for(method)
    expected = tt.adapt(here, method, **known(here, method, loader))
    answers = [first(expected(x)).detach() for x in xs]
    with elsewhere(monkeypatch):
        there = send(model_for(method))
        sent = [(There(x), There(y)) for x, y in loader]
        adapter = tt.adapt(there, method, **known(there, method, sent))
        for x, answer in zip(xs[:3], answers[:3], strict=True):
            logits = first(adapter(There(x)))
            assert logits.device == DEVICE
            torch.testing.assert_close(logits.detach().held, answer, rtol=0, atol=1e-6)
        adapter.save(tmp_path / "state.safetensors")
        mark = adapter.snapshot()
        adapter.reset()
        adapter.predict(There(xs[3]))
        adapter.restore(mark)
        adapter.load(tmp_path / "state.safetensors")
        last = first(adapter(There(xs[3]))).detach().held
        torch.testing.assert_close(last, answers[3], rtol=0, atol=1e-6)


def first(output):
    return output[0] if isinstance(output, tuple) else output


def test_the_play_notices_what_a_real_device_would(monkeypatch):
    with elsewhere(monkeypatch):
        away = There(torch.ones(3))
        with pytest.raises(RuntimeError, match="two devices"):
            away + torch.ones(3)
        with pytest.raises(RuntimeError, match="generator is not on lazy"):
            torch.rand(3, device=DEVICE, generator=torch.Generator())
        assert torch.equal((away + 1).to("cpu"), torch.full((3,), 2.0))


def test_a_state_goes_from_one_kind_of_device_to_another(tmp_path, monkeypatch):
    """A random state of a CPU is none of another device; all else goes on."""
    here = tt.adapt(tiny(), "cotta", views=2)
    for x in batches(2):
        here(x)
    here.save(tmp_path / "here")
    with elsewhere(monkeypatch):
        there = tt.adapt(send(tiny()), "cotta", views=2)
        there.load(tmp_path / "here")
        for name, value in there.snapshot().tensors.items():
            assert torch.equal(value.held, here.snapshot().tensors[name])
        assert there(There(batches(3)[2])).device == DEVICE
        there.save(tmp_path / "there")
        steps = there.snapshot().steps
    here.load(tmp_path / "there")
    assert here.snapshot().steps == steps == 3
    assert here(batches(3)[2]).isfinite().all()
