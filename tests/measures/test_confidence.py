import math

import numpy as np
import pytest
import torch

from reference.measures import softmax
from testtime._core.errors import InputError
from testtime.measures.confidence import confidence, margin

SCORES = [confidence, margin]


def normal(seed, *shape, scale=3.0):
    draw = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=draw, dtype=torch.float64)


def gradient(score, logits):
    logits = logits.detach().clone().requires_grad_()
    return torch.autograd.grad(score(logits).sum(), logits)[0]


def test_known_values():
    adapted = torch.tensor([[2, 0, 0], [1, 0.5, 0], [0, 3, 0], [0.2, 0.1, 0]])
    original = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 2, 0], [0, 0, 1]])
    expected = torch.tensor([0.576117, 0.576117, 0.786986, 0.576117])
    assert torch.allclose(confidence(original), expected, atol=1e-6)
    rows = torch.tensor([0.786986 - 0.106507, 0.506480 - 0.307196])
    assert torch.allclose(margin(adapted)[:2], rows, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_equal_the_references(dtype):
    logits = normal(0, 5, 4, 6).to(dtype)
    ranked = np.sort(softmax(logits.double().numpy(), -1), -1)
    for got, expected in (
        (confidence(logits), ranked[..., -1]),
        (margin(logits), ranked[..., -1] - ranked[..., -2]),
    ):
        assert got.dtype == dtype
        np.testing.assert_allclose(got.double().numpy(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("score", SCORES)
def test_gradients_equal_finite_differences_and_those_in_float64(score):
    logits = normal(1, 4, 5)
    assert torch.autograd.gradcheck(score, logits.clone().requires_grad_())
    logits = logits.float()
    logits[0, 2] = -math.inf
    exact = gradient(score, logits.double())
    assert torch.allclose(gradient(score, logits).double(), exact, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hard_logits_have_values_in_range_and_finite_gradients(score, dtype):
    inf = math.inf
    logits = torch.tensor(
        [[1e4, -1e4, 0], [0, 0, 0], [0, -inf, -inf], [1, 2, -inf], [3e38, -3e38, 0]], dtype=dtype
    )
    value = score(logits)
    assert value.dtype == torch.float32
    assert ((value >= 0) & (value <= 1)).all()
    assert gradient(score, logits).isfinite().all()
    assert torch.equal(value, score(logits.float()))


def test_ties_share_the_confidence_and_leave_no_margin():
    logits = torch.tensor([1.0, 1.0, -math.inf])
    assert confidence(logits).item() == pytest.approx(0.5)
    assert margin(logits) == 0
    assert torch.allclose(gradient(confidence, logits), torch.zeros(3), atol=1e-7)


def test_too_few_classes_are_refused():
    with pytest.raises(InputError, match="classes"):
        confidence(torch.zeros(2, 0))
    with pytest.raises(InputError, match="at least two"):
        margin(torch.zeros(2, 1))
