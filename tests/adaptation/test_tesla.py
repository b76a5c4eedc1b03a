"""TeSLA: against the reference, its operations against torchvision, and its policy."""

import pytest
import torch
import torchvision.transforms.functional as TF
from torch import nn

import reference.tesla as reference
import testtime as tt
from models import batches, tiny
from testtime._core.errors import OptionError, ScopeError
from testtime.adaptation.layers import norm_layers
from testtime.adaptation.methods.tesla import (
    augmented,
    flipped_cross_entropy,
    refined,
    remember,
    sub_policies,
    tesla,
)
from testtime.adaptation.parts.levels import level, shift
from testtime.adaptation.parts.objective import Diversity
from testtime.adaptation.parts.operations import OPERATIONS, operate
from testtime.adaptation.parts.scope import all_but_classifier
from testtime.adaptation.parts.views import weak_view
from testtime.adaptation.ranks import Ranks
from testtime.measures.entropy import entropy


def unbiased(momenta=(0.1, 0.1)):
    """Without the bias that normalisation removes: its gradient is rounding noise, which Adam makes
    steps of, and the answer, with moving averages, shows them. Trained for three batches."""
    model = tiny().double()
    model.conv2.bias = None
    for norm, momentum in zip((model.norm1, model.norm2), momenta, strict=True):
        norm.momentum, norm.num_batches_tracked = momentum, torch.tensor(3)
    return model


def darker(x, generator=None):
    return 0.8 * x


@pytest.mark.parametrize(
    ("queue", "operations", "lam1", "lam2", "momenta"),
    [(0, 2, 1.0, 1.0, (0.1, 0.1)), (3, 3, 0.5, 2.0, (0.1, 0.1)), (0, 2, 1.0, 1.0, (0.01, None))],
)
def test_tesla(queue, operations, lam1, lam2, momenta):
    adapter = tt.adapt(
        unbiased(momenta), tesla(momentum=0.9, views=2, operations=operations, likeness=lam1,
                      distillation=lam2, queue=queue, neighbours=4, augment=darker),
    )  # fmt: skip
    generator = torch.Generator()
    generator.set_state(adapter.snapshot().generator)
    other = reference.Tesla(
        unbiased(momenta), lr=1e-3, mu=0.9, view=darker, n=2, r=operations, lam1=lam1, lam2=lam2,
        queue=queue, near=4, generator=generator,
    )  # fmt: skip
    for x in [x.double() for x in batches(7)]:
        torch.testing.assert_close(adapter(x), other(x).detach(), rtol=0, atol=1e-4)
    state = adapter.snapshot()
    assert set(state.tensors) == {n for n, _ in unbiased().named_parameters() if "head" not in n}
    for held, model in ((state.tensors, other.student), (state.teacher, other.teacher)):
        for name, value in held.items():
            theirs = model.get_parameter(name).detach()
            torch.testing.assert_close(value, theirs, rtol=0, atol=1e-4)
    torch.testing.assert_close(state.memory["selection"], other.w.detach(), rtol=0, atol=1e-4)
    # a stretched image reaches 0 and 1, where rounding decides what a clip lets by of the gradient
    plain = torch.tensor(["autocontrast" not in policy for policy in other.policies])
    sizes = other.m.detach()
    torch.testing.assert_close(state.memory["sizes"][plain], sizes[plain], rtol=0, atol=1e-4)
    assert (sizes[plain] != 0).any()
    for norm in ("norm1", "norm2"):
        theirs = getattr(other.teacher, norm)
        for ours, buffer in (("mean", theirs.running_mean), ("var", theirs.running_var)):
            found = state.teacher_averages[f"{norm}.{ours}"]
            torch.testing.assert_close(found, buffer, rtol=0, atol=1e-5)
    if queue:
        kept = torch.stack([item[0] for own in other.queues for item in own])
        torch.testing.assert_close(state.memory["queue"][0].sum(0), kept.sum(0), rtol=0, atol=1e-4)


def test_the_loss_of_the_fixture():
    z = torch.tensor([[2, 0, 0], [1, 0.5, 0], [0, 3, 0], [0.2, 0.1, 0]])
    t = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 2, 0], [0, 0, 1]])
    loss = flipped_cross_entropy(z, t).mean() + Diversity(weight=1.0)(z, Ranks())
    assert float(loss) == pytest.approx(-0.101459, abs=1e-6)
    z.requires_grad_(True)
    (grad,) = torch.autograd.grad(flipped_cross_entropy(z, z).sum(), z)
    other = torch.autograd.grad(-(z.softmax(1) * z.detach().log_softmax(1)).sum(), z)[0]
    torch.testing.assert_close(grad, other)  # nothing flows through the teacher


@pytest.mark.parametrize("number", range(14))
@pytest.mark.parametrize("shape", [(4, 3, 32, 32), (4, 3, 7, 9), (4, 1, 16, 16)])
def test_each_operation_is_that_of_the_reference(number, shape):
    random = torch.Generator().manual_seed(number)
    x = torch.rand(shape, generator=random)
    x[1] = 0.4 + 0.2 * x[1]
    x[2] = 0.5  # a constant image
    share = torch.rand(4, generator=random).requires_grad_()
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0])
    leaf = x.clone().requires_grad_()
    ours = operate(leaf, torch.full((4,), number), share, sign)
    name = list(reference.RANGES)[number]
    if name == "color" and shape[1] == 1:
        assert torch.equal(ours, x)
        return
    low, high = reference.RANGES[name]
    theirs = []
    twin, size = x.clone().requires_grad_(), share.detach().clone().requires_grad_()
    for image, part, direction in zip(twin, size, sign, strict=True):
        v = low + part * (high - low)
        v = v * direction if name in reference.SIGNED else v
        theirs.append(reference.change(image, name, v).clamp(0, 1))
    expected = torch.stack(theirs)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)
    weights = torch.rand(shape, generator=random)
    grads = torch.autograd.grad((weights * ours).sum(), [leaf, share], allow_unused=True)
    others = torch.autograd.grad((weights * expected).sum(), [twin, size], allow_unused=True)
    inside = (ours > 1e-4) & (ours < 1 - 1e-4)  # at the ends rounding decides what a clip lets by
    if bool(inside.all()) or name in ("invert", "rotate"):
        torch.testing.assert_close(grads[0], others[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(grads[1], others[1], rtol=1e-4, atol=1e-4)
    assert all(grad.isfinite().all() for grad in grads)


def test_histograms_are_equalized_as_torchvision_does():
    random = torch.Generator().manual_seed(0)
    x = torch.rand(6, 5, 40, 30, generator=random) ** 3
    x[0] = x[0].round()
    number = [operation.change.__name__ for operation in OPERATIONS].index("_equalize")
    ours = operate(x, torch.full((6,), number), torch.rand(6), torch.ones(6))
    eight = (255 * x).to(torch.uint8).flatten(0, 1).unsqueeze(1)
    theirs = TF.equalize(eight).view(x.shape) / 255
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(6, 2, 5, 8), (6, 7, 24, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_image_can_be_changed(shape, dtype):
    random = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=random).to(dtype)
    before = x.clone()
    shares = torch.rand(6, 4, generator=random).to(torch.promote_types(dtype, torch.float32))
    for policy in range(0, 1001, 91):
        which = sub_policies(4)[[policy] * 6]
        changed = augmented(x, which, shares, random)
        assert (changed.shape, changed.dtype) == (x.shape, dtype)
        assert changed.isfinite().all()
        assert 0 <= changed.min() <= changed.max() <= 1
    assert torch.equal(x, before)
    view = weak_view(x, random)
    assert (view.shape, view.dtype) == (x.shape, dtype)


def test_the_policy_makes_images_hard_for_the_teacher():
    xs = batches(60, 32)
    adapter = tt.adapt(tiny(), tesla(views=1, augment=darker, lr=1e-6))
    for x in xs:
        adapter(x)
    memory = adapter.snapshot().memory
    random = torch.Generator().manual_seed(0)

    def hardness(selection, sizes):
        total = 0.0
        for x in xs[:10]:
            drawn = torch.multinomial(
                selection.softmax(0), len(x), replacement=True, generator=random
            )
            hard = augmented(x, sub_policies(2)[drawn], sizes.sigmoid()[drawn], random)
            total += float(entropy(adapter.predict(hard)).mean())
        return total / 10

    plain = sum(float(entropy(adapter.predict(x)).mean()) for x in xs[:10]) / 10
    untrained = hardness(torch.zeros(91), torch.zeros(91, 2))
    learned = hardness(memory["selection"], memory["sizes"])
    assert learned > plain
    assert learned > untrained + 0.01


def test_a_queue_keeps_the_newest_of_each_class_and_labels_by_the_nearest():
    features = torch.tensor([[1.0, 0], [2, 0], [0, 1], [3, 0]])
    probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    queue = remember(None, (features, probs), 2)
    assert torch.equal(queue[1], probs[1:])
    queue = remember(queue, (features[2:3] + 1, probs[2:3]), 1)
    assert torch.equal(queue[0], torch.tensor([[3.0, 0], [1, 2]]))
    near = refined(torch.tensor([[5.0, 0.1], [0, 9]]), queue, 1)
    torch.testing.assert_close(near, torch.tensor([[0.6, 0.4], [0.3, 0.7]]))
    torch.testing.assert_close(refined(features[:1], queue, 9), queue[1].mean(0, keepdim=True))


def test_the_classifier_is_the_linear_layer_that_runs_last():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.body = nn.Linear(6, 5), nn.Linear(192, 6)

        def forward(self, x):
            return self.head(self.body(x.flatten(1)).relu())

    adapter = tt.adapt(Two(), "tesla")
    adapter(batches(1)[0])
    assert adapter.plan().tensors == ("body.weight", "body.bias")
    assert set(adapter.snapshot().tensors) == {"body.weight", "body.bias"}
    with pytest.raises(ScopeError, match="before the last linear"):
        all_but_classifier(nn.Linear(2, 2), [])


def test_levels_are_means_of_channels_wherever_they_are():
    x = torch.rand(4, 6, 5, 5)
    for norm, given in (
        (nn.BatchNorm2d(6), x), (nn.GroupNorm(2, 6), x), (nn.LayerNorm(6), x.permute(0, 2, 3, 1)),
        (nn.LayerNorm(6), x.flatten(2).mT), (nn.BatchNorm1d(6), x.mean((2, 3))),
    ):  # fmt: skip
        (layer,) = norm_layers(norm)
        torch.testing.assert_close(level(layer, given), x.mean((2, 3)))
    moved = shift([torch.ones(8, 3), torch.zeros(7, 3)], [torch.zeros(8, 3), torch.zeros(7, 3)], 4)
    torch.testing.assert_close(moved, torch.ones(4))  # windows of four images; no samples


def test_no_more_than_fourteen_operations():
    with pytest.raises(OptionError, match="operations is 15"):
        tt.adapt(tiny(), "tesla", operations=15)
