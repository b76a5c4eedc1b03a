"""Inputs of another kind at functions that others are made of, and numbers at their edges."""

import math

import pytest
import torch

from testtime._core.errors import InputError, OptionError, UnknownName
from testtime.guard.scaling import TemperatureScaling, VectorScaling
from testtime.losses.compositional import (
    compositional_likelihood,
    moving_average,
    noise_contrastive,
    storm,
)
from testtime.losses.diverse_experts import diverse_experts_loss, reversed_prior
from testtime.measures import (
    calibration,
    cauchy_schwarz,
    divergence,
    entropy,
    open_set,
    symmetry,
)
from testtime.measures.cauchy_schwarz import conditional_divergence, gram, log_gram
from testtime.measures.information.estimate import standardised
from testtime.measures.label_encoding import label_encoding_distance
from testtime.measures.markov import row_divergence, sample_path
from testtime.measures.rejection_gradients import accepted_noise, gamma_from_noise, noise_of_gamma
from testtime.measures.spectra import matrix_entropy, spectrum


def generator():
    return torch.Generator().manual_seed(0)


Z = torch.randn(12, 3, generator=generator())
LABELS = torch.arange(12) % 3
ONE = torch.ones(3)
SCALING = VectorScaling(scale=ONE, shift=ONE)


@pytest.mark.parametrize("wrong", [Z.tolist(), None, "logits", torch.tensor(1.0), Z[:, :0], Z * 1j])
def test_what_are_no_logits_is_not_scaled(wrong):
    for each in (TemperatureScaling(temperature=2.0), SCALING):
        with pytest.raises(InputError, match="logits"):
            each.calibrate(wrong)


def test_logits_of_other_classes_are_not_scaled():
    with pytest.raises(InputError, match="fitted to"):
        SCALING.calibrate(Z[:, :2])
    assert torch.equal(TemperatureScaling(temperature=2.0).calibrate(LABELS), LABELS / 2)


@pytest.mark.parametrize("call", [gram, log_gram])
def test_what_are_no_samples_has_no_kernels(call):
    for wrong in (Z.tolist(), None, Z[0], Z[:, :2], Z * 1j):
        for pair in ((wrong, Z), (Z, wrong)):
            with pytest.raises(InputError):
                call(*pair, width=1.0)
    assert torch.equal(call(Z.long(), Z, width=1.0), call(Z.long().float(), Z, width=1.0))
    assert call(Z[:0], Z, width=1.0).shape == (0, 12)


@pytest.mark.parametrize("bins", ["a", None, math.inf, 15.0, True, 0, math.nan])
def test_bins_are_whole_numbers(bins):
    with pytest.raises(OptionError, match="bins is"):
        calibration.calibration_error(torch.tensor([0.5]), torch.tensor([True]), bins=bins)
    with pytest.raises(OptionError, match="bins is"):
        calibration.classwise_calibration_error(torch.eye(2), torch.arange(2), bins=bins)


def test_labels_of_any_whole_type_and_no_complex_logits():
    for kind in (torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int32):
        assert calibration.brier_score(torch.eye(3), torch.arange(3).to(kind)) == 0
    with pytest.raises(InputError, match="real numbers"):
        calibration.negative_log_likelihood(Z.to(torch.complex64), LABELS)


def test_likelihood_of_many_samples_is_summed_in_parts():
    many = torch.randn(2500, 4, generator=generator(), dtype=torch.float64).requires_grad_()
    labels = torch.arange(2500) % 4
    found = calibration.negative_log_likelihood(many, labels)
    expected = torch.nn.functional.cross_entropy(many, labels)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v, many)[0] for v in (found, expected)))


@pytest.mark.parametrize("order", [None, "2", -1, math.nan])
def test_orders_are_numbers(order):
    for call in (entropy.renyi_entropy, entropy.tsallis_entropy):
        with pytest.raises(OptionError, match="order is"):
            call(Z, order=order)
    assert math.isfinite(float(entropy.renyi_entropy(Z, order=math.inf).sum()))
    for alpha in (None, "a", math.inf, math.nan):
        with pytest.raises(OptionError, match="alpha is"):
            divergence.alpha_divergence(Z, Z, alpha=alpha)


@pytest.mark.parametrize(
    ("together", "belonging"),
    [(Z, ONE), (torch.eye(3), ONE[:2]), (torch.eye(3), LABELS[:3]), ([1.0], ONE),
     (torch.eye(3), None), (torch.eye(3), ONE[0]), (torch.eye(3), ONE * 1j), (Z[:0, :0], ONE[:0])],
)  # fmt: skip
def test_sums_of_another_kind_have_no_risk(together, belonging):
    with pytest.raises(InputError):
        label_encoding_distance(together, belonging)


def test_a_start_and_a_kind_of_another_type():
    flat = torch.full((2, 2), 0.5)
    with pytest.raises(InputError, match="expected a tensor"):
        sample_path(flat, steps=2, paths=1, generator=generator(), start=[0.5, 0.5])
    with pytest.raises(InputError, match="generator"):
        sample_path(flat, steps=2, paths=1, generator=0)
    for kind in (None, 3):
        with pytest.raises(UnknownName):
            row_divergence(flat, flat, kind=kind)


@pytest.mark.parametrize("value", [1e4, 1e12, 1e14, 1e20])
def test_noise_of_large_shapes_in_single_precision_is_that_of_double(value):
    """Of large shapes it is normal; what v lost in float32 had made its deviation 0.9 at 1e14."""
    found = accepted_noise(torch.full((50_000,), value), generator())
    assert found.dtype == torch.float32
    assert float(found.double().std()) == pytest.approx(1, abs=0.015)


def test_noise_in_half_and_single_precision_keeps_its_digits():
    shape, noise = torch.tensor(50.0), torch.tensor(0.5)
    half = gamma_from_noise(shape.half(), noise.half())
    assert torch.equal(half.log_ratio, gamma_from_noise(shape, noise).log_ratio)
    large, sample = torch.tensor(1e8), torch.tensor(1e8 + 12344)
    exact = noise_of_gamma(sample.double(), large.double())
    found = noise_of_gamma(sample, large)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(exact), rel=1e-6)


def test_noise_that_does_not_go_with_the_shapes():
    for wrong in (None, [0.5], torch.zeros(2), torch.zeros(3) * 1j, torch.full((3,), 1e30)):
        with pytest.raises(InputError):
            gamma_from_noise(ONE, wrong)
    for wrong in (None, [0.5], torch.ones(2), ONE * 1j):
        with pytest.raises(InputError):
            noise_of_gamma(wrong, ONE)


@pytest.mark.parametrize(
    "features", [torch.cat([Z, torch.ones(12, 1)], 1), torch.ones(4, 3), torch.zeros(3, 3)]
)
def test_the_entropy_of_fewer_directions_has_a_gradient(features):
    own = features.clone().requires_grad_()
    found = matrix_entropy(own)
    assert torch.autograd.grad(found, own)[0].isfinite().all()
    assert float(found.detach()) == pytest.approx(spectrum(features).matrix_entropy)


def test_a_spectrum_leaves_the_graph_behind(recwarn):
    assert spectrum(Z.clone().requires_grad_()) == spectrum(Z)
    assert not recwarn.list


def test_a_domain_of_huge_samples_and_of_many(monkeypatch):
    x = torch.randn(50, 3, generator=generator(), dtype=torch.float64)
    for group in (symmetry.sign_flips(3), symmetry.permutations(3)):
        plain = symmetry.fundamental_domain(x, group)
        huge = symmetry.fundamental_domain(2.0**1020 * x, group)
        assert torch.equal(huge, 2.0**1020 * plain)
        monkeypatch.setattr(symmetry, "AT_ONCE", 7 * len(group))
        assert torch.equal(symmetry.fundamental_domain(x, group), plain)
        monkeypatch.undo()


EXPERTS, PRIOR = [Z, Z, Z], torch.tensor([2.0, 1.0, 1.0])


@pytest.mark.parametrize(
    "labels",
    [LABELS + 1, LABELS - 1, LABELS[:3], LABELS.float(), LABELS * 1j, LABELS[:, None], LABELS[0],
     torch.full((12,), -100)],
)  # fmt: skip
def test_labels_that_are_no_classes_of_the_experts(labels):
    with pytest.raises(InputError, match="labels"):
        diverse_experts_loss(EXPERTS, labels, PRIOR)


def test_experts_and_priors_of_another_kind():
    for logits in (None, 3, torch.tensor(1.0), Z, [Z[:0]] * 3, [Z * 1j] * 3):
        labels = LABELS[:0] if isinstance(logits, list) and not len(logits[0]) else LABELS
        with pytest.raises(InputError):
            diverse_experts_loss(logits, labels, PRIOR)
    for prior in (PRIOR * math.inf, PRIOR * math.nan, PRIOR[0], PRIOR * 1j, PRIOR.double() * 1e300):
        with pytest.raises(InputError, match="number of training samples"):
            diverse_experts_loss(EXPERTS, LABELS, prior)
    expected = diverse_experts_loss(EXPERTS, LABELS, PRIOR)
    for kind in (torch.int32, torch.uint8):
        assert torch.equal(diverse_experts_loss(EXPERTS, LABELS.to(kind), PRIOR), expected)
    for wrong in (torch.eye(3), torch.tensor(1.0), PRIOR * 1j):
        with pytest.raises(InputError, match="expected shares"):
            reversed_prior(wrong)


def test_numbers_of_likelihoods_may_be_whole_but_not_complex():
    assert torch.equal(moving_average(0, 0.5), moving_average(0.0, 0.5))
    assert torch.equal(storm(0, torch.tensor(1), 0), storm(0.0, 1.0, 0.0))
    energies, pair = Z[:, 0], (Z[:, 0], Z[:, 1])
    imaginary = torch.tensor(1j)
    with pytest.raises(InputError, match="one real number"):
        compositional_likelihood(energies, imaginary, torch.tensor(0.0))
    with pytest.raises(InputError, match="one real number"):
        noise_contrastive(pair, pair, imaginary)
    for wrong in (energies, Z[:2], None, (energies,)):
        with pytest.raises(InputError, match="expected a pair"):
            noise_contrastive(pair, wrong, 0.0)


def test_kernels_of_many_samples_hold_no_differences(monkeypatch):
    x, y = Z.double(), (Z + 1).double().requires_grad_()
    plain = conditional_divergence(x, x, y)
    slope = torch.autograd.grad(plain, y)
    monkeypatch.setattr(cauchy_schwarz, "ENTRIES", 9)
    found = conditional_divergence(x, x, y)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(torch.autograd.grad(found, y), slope)
    assert gram(x, x.float(), width=1.0).dtype == torch.float64


def test_scores_of_complex_numbers_cannot_be_ranked(recwarn):
    for call in (open_set.oscr, open_set.h_score):
        with pytest.raises(InputError, match="real numbers"):
            call(Z[:, 0] * 1j, LABELS > 0, LABELS > 1)
    assert not recwarn.list
    with pytest.raises(InputError, match="log_z"):
        noise_contrastive((ONE, ONE), (ONE, ONE), torch.tensor(True))


def test_what_can_be_standardised():
    assert torch.equal(standardised(LABELS), standardised(LABELS[:, None].double()))
    for wrong in (None, Z[:0], torch.tensor(1.0), Z[:1], Z * math.nan):
        with pytest.raises(InputError):
            standardised(wrong)
