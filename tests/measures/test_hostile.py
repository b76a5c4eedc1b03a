"""What cannot be used is refused by name; NaN comes only from samples that have no prediction."""

import math

import pytest
import torch

from testtime._core.errors import InputError
from testtime.measures import confidence, coupling, detection, divergence, entropy, label_encoding
from testtime.measures.cauchy_schwarz import gram
from testtime.measures.information import bounds
from testtime.measures.information.neighbours import ksg
from testtime.measures.rejection_gradients import gamma
from testtime.measures.symmetry import invariant_wasserstein, sign_flips

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
