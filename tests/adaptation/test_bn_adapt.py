"""BN adaptation: between the source and the batch, and with a moving average."""

import pytest
import torch

import testtime as tt
from models import batches, tiny
from reference import methods as reference
from testtime._core.errors import ScopeError


def test_bn_adapt_between_source_and_batch():
    model, x = tiny(), batches(1)[0]
    with torch.no_grad():
        plain_answer = model(x)
    batch_answer = reference.configured(model)[0](x).detach()
    assert torch.equal(tt.adapt(model, "bn-adapt", alpha=0.0)(x), plain_answer)
    torch.testing.assert_close(tt.adapt(model, "bn-adapt")(x), batch_answer)
    torch.testing.assert_close(tt.adapt(model, "bn-adapt", prior=0.0)(x), batch_answer)
    half = tt.adapt(model, "bn-adapt", prior=16.0)(x)
    torch.testing.assert_close(half, tt.adapt(model, "bn-adapt", alpha=0.5)(x))
    assert not torch.allclose(half, batch_answer, atol=1e-3)


@pytest.mark.parametrize("kind", ["group", "layer", "rms"])
@pytest.mark.parametrize("options", [{}, {"prior": 16}, {"momentum": 0.1}])
def test_bn_adapt_refuses_a_model_that_stores_no_statistics(kind, options):
    with pytest.raises(ScopeError, match=r"stores none .*tent or sar"):
        tt.adapt(tiny(kind), "bn-adapt", **options)


def test_bn_adapt_moving_average_is_torch_running_statistics():
    model = tiny()
    other = tiny()
    adapter = tt.adapt(model, "bn-adapt", momentum=0.1)
    for x in batches(4):
        for name in ("norm1", "norm2"):
            getattr(other, name).train()
        with torch.no_grad():
            other(x)
            other.eval()
            torch.testing.assert_close(adapter(x), other(x))


@pytest.mark.parametrize(
    ("options", "share"), [({"alpha": 0.3}, 0.3), ({"prior": 6}, 0.25), ({}, 1.0)]
)
def test_bn_adapt_mixes_in_the_unbiased_variance_as_torch_does(options, share):
    x = batches(1, 2)[0][..., :2, :2]
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Flatten()).eval()
    other = torch.nn.BatchNorm2d(3, momentum=share)
    other(x)
    expected = other.eval()(x).flatten(1)
    unbiased = tt.adapt(model, "bn-adapt", unbiased=True, **options)(x)
    torch.testing.assert_close(unbiased, expected)
    assert not torch.allclose(tt.adapt(model, "bn-adapt", **options)(x), expected, atol=1e-4)
