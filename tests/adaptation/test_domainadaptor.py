"""DomainAdaptor against its reference; its statistics and its losses alone."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import testtime as tt
from models import batches, tiny
from reference import domainadaptor as reference
from testtime._core.errors import OptionError
from testtime.adaptation.kernels.moments import moments
from testtime.adaptation.methods.domainadaptor import domainadaptor
from testtime.adaptation.methods.tent import tent
from testtime.adaptation.parts.objective import (
    augmented_distillation,
    entropy,
    generalised_entropy,
    self_distillation,
)
from testtime.adaptation.parts.scope import nothing
from testtime.adaptation.parts.statistics import AdaptiveMixture, MixedStatistics, Moments
from testtime.adaptation.ranks import Ranks
from testtime.adaptation.recipe import Recipe
from testtime.measures import entropy as measure

LOGITS = torch.tensor([[2, 0, 0], [1, 0.5, 0], [0, 3, 0], [0.2, 0.1, 0]])


def darker(x, generator):
    return 0.8 * x


def test_another_loss_is_refused():
    with pytest.raises(OptionError, match="loss is 'gem'; expected gem-t, gem-skd, gem-aug"):
        domainadaptor(loss="gem")


@pytest.mark.parametrize("loss", ["gem-t", "gem-skd", "gem-aug"])
def test_domainadaptor_batch_by_batch(loss):
    model = tiny()
    adapter = tt.adapt(model, "domainadaptor", lr=1e-2, loss=loss, augment=darker)
    unmoved = tt.adapt(model, Recipe(statistics=AdaptiveMixture()))
    xs = batches()
    for x in xs:
        expected = reference.domainadaptor(model, x, 1e-2, loss)
        torch.testing.assert_close(adapter(x), expected, rtol=0, atol=1e-4)
        assert (expected - unmoved(x)).abs().max() > 1e-2
    assert adapter.counts.forwards == (5 if loss == "gem-aug" else 2) * 160
    assert adapter.counts.backwards == 160


def test_batches_do_not_know_each_other():
    model, (one, two) = tiny(), batches(2)
    forth, back = (tt.adapt(model, "domainadaptor", lr=1e-2) for _ in range(2))
    first = forth(one), forth(two)
    second = back(two), back(one)
    assert torch.equal(first[0], second[1])
    assert torch.equal(first[1], second[0])
    assert torch.equal(forth.predict(one), first[0])


def test_the_fold_answers_as_the_mixture():
    model = tiny()
    mixture = tt.adapt(model, Recipe(scope=nothing, statistics=AdaptiveMixture()))
    fold = tt.adapt(model, "domainadaptor", lr=0.0)
    for x in batches():
        with torch.no_grad():
            expected = reference.adamix(model)(x)
        torch.testing.assert_close(mixture(x), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(fold(x), expected, rtol=0, atol=1e-4)


def tied() -> nn.Module:
    model = tiny()
    model.conv2, model.norm2 = nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)
    model.norm2.weight, model.head = model.norm1.weight, nn.Linear(6, 5)
    return model


def parametrised() -> nn.Module:
    model = tiny()
    nn.utils.parametrize.register_parametrization(model.norm1, "weight", nn.Softplus())
    return model


def unscaled() -> nn.Module:
    model = tiny()
    old = model.norm1
    model.norm1 = nn.BatchNorm2d(old.num_features, affine=False)
    model.norm1.load_state_dict(old.state_dict(), strict=False)
    return model.eval()


@pytest.mark.parametrize("make", [tiny, tied, parametrised, unscaled])
def test_a_copy_answers_as_the_method_where_it_makes_no_step(make):
    model, x = make().eval(), batches(1)[0]
    adapter = tt.adapt(model, "domainadaptor", lr=0.0)
    adapter(x)
    with torch.no_grad():
        torch.testing.assert_close(adapter.export()(x), adapter.predict(x), rtol=0, atol=1e-4)


def test_a_scale_that_serves_two_layers_is_not_folded():
    model, x = tied().eval(), batches(1)[0]
    whole = tt.adapt(model, Recipe(statistics=MixedStatistics(alpha=1.0, unbiased=True)))
    torch.testing.assert_close(tt.adapt(model, "domainadaptor", lr=0.0)(x), whole(x))


def test_the_weight_of_the_source_falls_with_the_shift():
    x = torch.randn(32, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    (mean, var), values = moments(x, Ranks())
    same = Moments(mean, var * values / (values - 1))
    weights = [
        float(
            AdaptiveMixture().weight(
                x * scale + shift, same, moments(x * scale + shift, Ranks())[0],
                values=values, ranks=Ranks(),
            )
        )
        for scale, shift in ((1, 0), (1.2, 0.1), (1.5, 0.5), (2, 2), (9, 90))
    ]  # fmt: skip
    assert weights[0] == pytest.approx(1)
    assert weights == sorted(weights, reverse=True)
    # far away, images are as far from the source as the batch is: 1 - st / (st + st)
    assert weights[-1] == pytest.approx(0.5, abs=0.01)


def test_mixtures_and_losses_serve_other_recipes():
    x = batches(1)[0]
    answers = []
    for objective in (entropy, generalised_entropy, self_distillation):
        recipe = replace(tent(lr=1e-2), statistics=AdaptiveMixture(), objective=objective)
        adapter = tt.adapt(tiny(), recipe)
        adapter(x)
        assert adapter.counts.updates == 1
        answers.append(adapter.predict(x))
    recipe = replace(tent(lr=1e-2), augment=darker, objective=augmented_distillation)
    adapter = tt.adapt(tiny(), recipe)
    adapter(x)
    answers.append(adapter.predict(x))
    for i, one in enumerate(answers):
        assert all(not torch.allclose(one, other, atol=1e-4) for other in answers[i + 1 :])


def test_recorded_values():
    values = generalised_entropy(LOGITS)
    expected = torch.tensor([5.365950, 1.020191, 12.073388, 0.040808])
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-4)
    assert float(values.mean()) == pytest.approx(4.625084, abs=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1.0, 300.0])
def test_losses_are_the_definitions_and_finite(scale):
    z = (scale * LOGITS).requires_grad_()
    other = LOGITS.flip(0)
    for value, teacher in (
        (generalised_entropy(z), None),
        (self_distillation(z), z.softmax(1)),
        (augmented_distillation(z, other), other.softmax(1)),
    ):
        grad = torch.autograd.grad(value.mean(), z)[0]
        assert grad.isfinite().all()
        if scale:
            expected = reference.gem(z, teacher)
            torch.testing.assert_close(value.mean(), expected)
            torch.testing.assert_close(grad, torch.autograd.grad(expected, z)[0])


def test_sure_predictions_still_teach():
    z = torch.tensor([[9.0, 0.5, 0.0]], requires_grad=True)
    generalised, plain = (
        torch.autograd.grad(loss(z).sum(), z)[0].norm()
        for loss in (generalised_entropy, measure.entropy)
    )
    assert generalised > 100 * plain
