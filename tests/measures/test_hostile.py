"""What cannot be used is refused by name; NaN comes only from samples that have no prediction."""

import math

import pytest
import torch

from testtime._core.errors import InputError, OptionError
from testtime.measures import confidence, coupling, detection, divergence, entropy, label_encoding
from testtime.measures.cauchy_schwarz import conditional_divergence, gram, quadratic_information
from testtime.measures.information import bounds
from testtime.measures.information.neighbours import ksg
from testtime.measures.lipschitz import lipschitz_divergence
from testtime.measures.rejection_gradients import gamma
from testtime.measures.symmetry import (
    invariant_distances,
    invariant_mmd,
    invariant_wasserstein,
    permutations,
    sign_flips,
)

X = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(4)
COMPLEX = X.to(torch.complex64)
BOUNDS = (
    bounds.donsker_varadhan, bounds.nwj, bounds.infonce, bounds.jensen_shannon_bound,
    bounds.jensen_shannon, bounds.smile_bound,
)  # fmt: skip


@pytest.mark.parametrize(
    "measure",
    [
        confidence.confidence, confidence.margin, entropy.entropy, entropy.entropy_of_probs,
        entropy.marginal_entropy, entropy.mutual_information, label_encoding.label_encoding_risk,
        lambda z: divergence.kl_divergence(z, z), lambda z: entropy.renyi_entropy(z, order=2.0),
    ],
)  # fmt: skip
def test_complex_logits_are_refused(measure):
    with pytest.raises(InputError):
        measure(COMPLEX)


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: bound.__name__)
@pytest.mark.parametrize("scores", [X.long(), X > 0, COMPLEX, X[0], X[:1, :1]])
def test_scores_of_another_kind_are_refused(bound, scores):
    with pytest.raises(InputError):
        bound(scores)


@pytest.mark.parametrize(
    "call",
    [
        lambda: bounds.tuba(X, X[0] > 0),
        lambda: detection.auroc(COMPLEX[:, 0], LABELS > 1),
        lambda: coupling.entropy_bits(torch.tensor([0.5, math.nan])),
        lambda: coupling.entropy_bits(torch.tensor([1.5, -0.5])),
        lambda: coupling.mutual_information_bits(torch.tensor(1.0)),
        lambda: gram(X, X[:, :3], width=1.0),
        lambda: gram(X[0], X, width=1.0),
        lambda: gamma(COMPLEX, generator=torch.Generator()),
        lambda: label_encoding.semi_supervised_risk(X, LABELS[:3], X, X),
        lambda: label_encoding.semi_supervised_risk(X, LABELS + 1, X, X),
        lambda: label_encoding.semi_supervised_risk(X, LABELS.float(), X, X),
    ],
)
def test_what_has_no_value_is_refused(call):
    with pytest.raises(InputError):
        call()


def test_only_the_sample_without_a_prediction_is_nan():
    for bad in (math.nan, math.inf):
        z = X.clone()
        z[1, 2] = bad
        for measure in (confidence.confidence, confidence.margin, entropy.entropy):
            assert measure(z).isnan().tolist() == [False, True, False, False]


def test_huge_logits_of_labelled_samples_are_not_cut_to_single_precision():
    huge = 1e300 * torch.eye(4, dtype=torch.float64)
    assert label_encoding.semi_supervised_risk(huge, LABELS, X, X).isfinite()


def test_laws_of_complex_numbers_are_refused_and_graphs_left_behind(recwarn):
    for call in (coupling.entropy_bits, lambda p: coupling.greedy_bottleneck(p, rate=1)):
        with pytest.raises(InputError, match="real numbers"):
            call(torch.full((2,), 0.5 + 0j))
    law = torch.full((4,), 0.25, requires_grad=True)
    assert coupling.entropy_bits(law) == 2
    assert not coupling.greedy_bottleneck(law, rate=1.5).joint.requires_grad
    assert not recwarn.list
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    assert coupling.mutual_information_bits(torch.outer(p, p)) == 0


@pytest.mark.parametrize("width", [0, 1e-30, 1e-200, 1e200, math.nan])
def test_widths_without_a_square_are_refused(width):
    for call in (
        lambda: conditional_divergence(X, X, X, width=width),
        lambda: quadratic_information(X, X, width=width),
    ):
        with pytest.raises(OptionError, match="width"):
            call()


@pytest.mark.parametrize("bandwidth", [0, 1e-200, 1e200, math.nan, None, "1"])
def test_bandwidths_without_a_square_are_refused(bandwidth):
    with pytest.raises(OptionError, match="bandwidth"):
        invariant_mmd(X, X, sign_flips(4), bandwidth=bandwidth)


def test_groups_that_are_too_large_or_complex_are_refused():
    for group in (sign_flips, permutations):
        with pytest.raises(InputError, match=r"1000000.* elements"):
            group(1_000_000)
    with pytest.raises(InputError, match="real orthogonal"):
        invariant_distances(X, X, sign_flips(4).to(torch.complex64))
    assert invariant_mmd(X, X, sign_flips(4).requires_grad_(), bandwidth=1.0) == 0


def test_distances_of_huge_and_tiny_samples_are_those_of_others_scaled():
    x, y, group = X.double(), X.double().roll(1, 1) + 1, sign_flips(4)
    plain = invariant_distances(x, y, group)
    for scale in (2.0**700, 2.0**-700):
        assert torch.equal(invariant_distances(scale * x, scale * y, group), scale * plain)
    with pytest.raises(InputError, match="overflow"):
        invariant_distances(x.sign() * 1.7e308, -x.sign() * 1.7e308, torch.eye(4)[None])


def test_transport_between_huge_and_tiny_samples_is_that_of_others_scaled():
    """Half as much again was told of samples of 1e-15: a plan far from the best."""
    x = torch.rand(100, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y, group = x.roll(1, 1) + 1, sign_flips(2)
    plain = invariant_wasserstein(x, y, group)
    for scale in (2.0**40, 2.0**-40, 2.0**-50, 2.0**-700):
        assert invariant_wasserstein(scale * x, scale * y, group) == scale * plain


def test_an_alpha_that_rounding_makes_1_is_refused():
    with pytest.raises(OptionError, match="alpha"):
        lipschitz_divergence(X.abs(), alpha=1 + 1e-12)


def test_samples_that_carry_a_graph_have_a_distance():
    apart = invariant_wasserstein(X.clone().requires_grad_(), X, sign_flips(4))
    assert apart == pytest.approx(0, abs=1e-6)


def test_samples_may_be_arrays_and_lists_of_numbers():
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
    expected = ksg(x, 2 * x[:, :1])
    assert (
        ksg(x.numpy(), 2 * x.numpy()[:, :1]) == expected == ksg(x.tolist(), (2 * x[:, :1]).tolist())
    )
    for wrong in (None, "samples", [[1.0], [1.0, 2.0]]):
        with pytest.raises(InputError, match="x is of type"):
            ksg(wrong, x)
