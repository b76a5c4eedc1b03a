import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from reference import lerm as reference
from testtime._core.errors import InputError, OptionError
from testtime.measures.label_encoding import label_encoding_risk, semi_supervised_risk

LOGITS = torch.tensor([[2, 0, 0], [1, 0.5, 0], [0, 3, 0], [0.2, 0.1, 0]])


def normal(seed, samples, classes, scale):
    draw = torch.Generator().manual_seed(seed)
    return scale * torch.randn(samples, classes, generator=draw, dtype=torch.float64)


drawn = st.builds(
    normal, st.integers(0, 99), st.integers(1, 8), st.integers(2, 6), st.floats(0, 300)
)


def test_recorded_value():
    torch.testing.assert_close(
        label_encoding_risk(LOGITS), torch.tensor(0.346525), atol=1e-6, rtol=0
    )


distances = st.sampled_from(["absolute", "squared", "divergence"])


@given(drawn, distances)
def test_the_definition_and_its_gradient(logits, distance):
    logits = (logits / 30).requires_grad_()  # no class without a share that can be told from zero
    own = label_encoding_risk(logits, distance=distance)
    expected = reference.risk(logits.softmax(1), distance)
    torch.testing.assert_close(own, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(risk, logits)[0] for risk in (own, expected)), rtol=1e-6, atol=1e-9
    )


@given(drawn)
def test_bounds_and_the_order_of_classes(logits):
    risk = label_encoding_risk(logits)
    assert 0 <= risk <= 2 / logits.shape[1] + 1e-9
    torch.testing.assert_close(label_encoding_risk(logits.flip(1)), risk)
    torch.testing.assert_close(label_encoding_risk(logits.flip(0)), risk)


@pytest.mark.parametrize("distance", ["absolute", "squared", "divergence"])
def test_nothing_but_sure_and_diverse_predictions_has_no_risk(distance):
    def risk(logits):
        return float(label_encoding_risk(logits, distance=distance))

    sure = 200 * torch.eye(4)
    assert risk(sure) == 0
    assert risk(sure.repeat(3, 1)) == 0
    assert risk(sure[:3]) > 0.05  # a class that never occurs
    assert risk(0.02 * sure) > 0.001  # unsure


@pytest.mark.parametrize("distance", ["absolute", "squared", "divergence"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_masked_and_far_logits_keep_gradients_finite(dtype, distance):
    for row in ([1e4, -1e4, 0.0], [0.0, -math.inf, 1.0], [0.0, 0.0, 0.0]):
        logits = torch.tensor([row, row], dtype=dtype, requires_grad=True)
        risk = label_encoding_risk(logits, distance=distance)
        assert risk.dtype == torch.float32
        assert risk.isfinite()
        assert torch.autograd.grad(risk, logits)[0].isfinite().all()


def test_the_semi_supervised_risk_weighs_its_three_terms():
    labels = torch.tensor([0, 2])
    weak, strong = LOGITS, LOGITS.flip(1) * 2
    expected = F.cross_entropy(LOGITS[:2], labels) + 5 * (
        reference.risk(weak.softmax(1)) + 0.1 * reference.risk(strong.softmax(1))
    )
    found = semi_supervised_risk(LOGITS[:2], labels, weak, strong, trade_off=5)
    torch.testing.assert_close(found, expected)
    squared = semi_supervised_risk(
        LOGITS[:2], labels, weak, strong, trade_off=5, distance="squared"
    )
    expected = F.cross_entropy(LOGITS[:2], labels) + 5 * (
        reference.risk(weak.softmax(1), "squared")
        + 0.1 * reference.risk(strong.softmax(1), "squared")
    )
    torch.testing.assert_close(squared, expected)
    usual = semi_supervised_risk(LOGITS[:2], labels.int(), weak, strong)
    options = {"trade_off": 0.1, "strong_share": 0.1, "distance": "absolute"}
    assert usual == semi_supervised_risk(LOGITS[:2], labels, weak, strong, **options)


@pytest.mark.parametrize(
    "bad", [torch.zeros(3), torch.zeros(0, 3), torch.zeros(2, 0), torch.zeros(1, 2, 3)]
)
def test_other_shapes_are_refused(bad):
    with pytest.raises(InputError, match="expected"):
        label_encoding_risk(bad)


def test_weights_are_checked():
    with pytest.raises(OptionError, match="trade_off is -1"):
        semi_supervised_risk(LOGITS, torch.arange(4) % 3, LOGITS, LOGITS, trade_off=-1)
    with pytest.raises(OptionError, match="distance is 'cosine'"):
        label_encoding_risk(LOGITS, distance="cosine")
