import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import experts as reference
from testtime._core.errors import InputError
from testtime.losses.diverse_experts import diverse_experts_loss, reversed_prior


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), classes=st.integers(2, 7), tau=st.floats(0, 3))
def test_the_loss_equals_its_definition(seed, classes, tau):
    chance = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(3, 9, classes, generator=chance, dtype=torch.float64)
    labels = torch.randint(classes, (9,), generator=chance)
    counts = torch.randperm(50, generator=chance)[:classes].double() + 1
    expected = reference.diverse_experts_loss(logits.numpy(), labels.numpy(), counts.numpy(), tau)
    loss = diverse_experts_loss(logits.transpose(0, 1), labels, counts, tau=tau)
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    again = diverse_experts_loss(list(logits), labels, counts / counts.sum(), tau=tau)
    torch.testing.assert_close(again, loss)


def test_the_reversed_prior_keeps_the_values_and_turns_the_ranks():
    prior = torch.tensor([0.3, 0.6, 0.1])
    assert torch.equal(reversed_prior(prior), torch.tensor([0.3, 0.1, 0.6]))
    tied = reversed_prior(torch.tensor([0.4, 0.2, 0.4]))
    assert tied.sort().values.tolist() == pytest.approx([0.2, 0.4, 0.4])


def test_each_expert_gets_a_gradient_of_its_own_and_missing_classes_are_finite():
    logits = torch.zeros(4, 3, 3, requires_grad=True)
    loss = diverse_experts_loss(logits, torch.tensor([0, 0, 1, 0]), torch.tensor([3, 1, 0]))
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.isfinite().all()
    assert not torch.allclose(grad[:, 0], grad[:, 1])
    assert not torch.allclose(grad[:, 1], grad[:, 2])
    half = diverse_experts_loss(logits.half(), torch.tensor([0, 0, 1, 0]), torch.tensor([3, 1, 2]))
    assert half.dtype == torch.float32


def test_bad_calls_are_refused():
    labels, prior = torch.tensor([0, 1]), torch.tensor([2.0, 1.0])
    for logits in (
        [torch.zeros(2, 2)] * 2,
        torch.zeros(2, 2, 2),
        [torch.zeros(2, 2)] * 2 + [torch.zeros(2, 3)],
    ):
        with pytest.raises(InputError, match="three experts"):
            diverse_experts_loss(logits, labels, prior)
    for bad in (torch.ones(3), torch.tensor([1.0, -1.0]), torch.zeros(2)):
        with pytest.raises(InputError, match="number of training samples"):
            diverse_experts_loss(torch.zeros(2, 3, 2), labels, bad)
    for bad in (labels[:1], labels.float(), torch.tensor([0, 2]), torch.tensor([-100, 0])):
        with pytest.raises(InputError, match="labels"):
            diverse_experts_loss(torch.zeros(2, 3, 2), bad, prior)


def test_labels_of_any_whole_type_will_do():
    logits, labels, prior = torch.zeros(2, 3, 2), torch.tensor([0, 1]), torch.tensor([2.0, 1.0])
    small = diverse_experts_loss(logits, labels.int(), prior)
    assert small == diverse_experts_loss(logits, labels, prior)
