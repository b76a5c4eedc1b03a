"""What is no tensor is refused by name where one is expected, and so are labels of another kind."""

import pytest
import torch
from torch import Tensor, nn

from testtime._core.errors import InputError
from testtime.decode.compute_optimal import difficulty_levels, fit_policy
from testtime.decode.lengths import doubts, length_study
from testtime.decode.sparse import sparse_attention_mask
from testtime.decode.uncertainty import answer_entropy, error_prediction
from testtime.guard import correctness, misclassification, rejection
from testtime.guard.densities import Gaussian
from testtime.guard.predictive_uncertainty import predictive_uncertainty
from testtime.guard.relative_uncertainty import RelativeUncertainty
from testtime.guard.scaling import TemperatureScaling, VectorScaling
from testtime.guard.shift_statistics import ks_distance
from testtime.losses import compositional, diverse_experts
from testtime.measures import (
    calibration,
    cauchy_schwarz,
    confidence,
    coupling,
    detection,
    divergence,
    entropy,
    label_encoding,
    lipschitz,
    markov,
    network_divergence,
    open_set,
    rejection_gradients,
    spectra,
    symmetry,
)
from testtime.measures.information import bounds

CHANCE = torch.Generator().manual_seed(0)
Z, OTHER = torch.randn(2, 12, 3, generator=CHANCE)
VIEWS = torch.randn(4, 12, 3, generator=CHANCE)
P = Z.softmax(1)
ONE, LAW = torch.tensor(0.0), torch.tensor([0.5, 0.25, 0.25])
LABELS, FLAGS = torch.arange(12) % 3, torch.arange(12) % 2 == 0
SCORES, SQUARE = Z[:, 0], Z[:3]
FLIPS = symmetry.sign_flips(3)
STEPS = torch.full((2, 2), 0.5)
REJECTOR = rejection.Rejector(network=nn.Linear(3, 1), cost=0.3)
RELATIVE = RelativeUncertainty.fit(Z, LABELS)
NETWORK = misclassification.MisclassificationNetwork.fit(Z, LABELS, epochs=1)
CORRECT = correctness.CorrectnessCalibrator.fit(Z, VIEWS, LABELS, epochs=1)
DRAW = rejection_gradients.gamma(LAW + 1, generator=CHANCE)


def given(**tensors: Tensor) -> dict[str, Tensor]:
    return tensors


CALLS = [
    (calibration.reliability, given(confidence=P[:, 0], hit=FLAGS), {}),
    (calibration.calibration_error, given(confidence=P[:, 0], hit=FLAGS), {}),
    (calibration.adaptive_calibration_error, given(confidence=P[:, 0], hit=FLAGS), {}),
    (calibration.classwise_calibration_error, given(probs=P, labels=LABELS), {}),
    (calibration.brier_score, given(probs=P, labels=LABELS), {}),
    (calibration.negative_log_likelihood, given(logits=Z, labels=LABELS), {}),
    (cauchy_schwarz.quadratic_information, given(x=Z, z=OTHER), {}),
    (confidence.margin, given(logits=Z), {}),
    (coupling.entropy_bits, given(law=LAW), {}),
    (coupling.mutual_information_bits, given(joint=torch.eye(2) / 2), {}),
    (coupling.greedy_coupling, given(p=LAW, q=LAW), {}),
    (detection.auroc, given(scores=SCORES, positive=FLAGS), {}),
    (detection.aurc, given(scores=SCORES, wrong=FLAGS), {}),
    (divergence.kl_divergence, given(p_logits=Z, q_logits=OTHER), {}),
    (entropy.entropy, given(logits=Z), {}),
    (entropy.entropy_of_probs, given(probs=P), {}),
    (entropy.cross_entropy, given(target_probs=P, logits=Z), {}),
    (label_encoding.label_encoding_risk, given(logits=Z), {}),
    (
        label_encoding.semi_supervised_risk,
        given(labelled=Z, labels=LABELS, weak=Z, strong=OTHER),
        {},
    ),
    (lipschitz.lipschitz_divergence, given(distances=torch.cdist(Z, OTHER)), {}),
    (markov.transition_counts, given(path=LABELS), {"states": 3}),
    (markov.transition_matrix, given(counts=torch.ones(2, 2).long()), {}),
    (markov.stationary_law, given(transitions=STEPS), {}),
    (network_divergence.inception_score, given(logits=Z), {}),
    (open_set.oscr, given(scores=SCORES, hit=FLAGS, unknown=~FLAGS), {}),
    (rejection_gradients.gamma, given(shape=LAW), {"generator": CHANCE}),
    (rejection_gradients.beta, given(first=LAW, second=LAW), {"generator": CHANCE}),
    (rejection_gradients.dirichlet, given(concentration=LAW), {"generator": CHANCE}),
    (rejection_gradients.student, given(freedom=LAW), {"generator": CHANCE}),
    (rejection_gradients.surrogate, given(values=LAW), {"draw": DRAW}),
    (spectra.spectrum, given(features=Z), {}),
    (symmetry.invariant_distances, given(x=Z, y=OTHER, group=FLIPS), {}),
    (bounds.infonce, given(scores=SQUARE), {}),
    (bounds.tuba, given(scores=SQUARE, log_baseline=LAW), {}),
    (compositional.log_partition, given(energies=SCORES, log_noise=-SCORES.abs()), {}),
    (compositional.compositional_likelihood, given(energies=SCORES, log_g=ONE), {"log_u": ONE}),
    (diverse_experts.diverse_experts_loss, given(labels=LABELS, prior=LAW), {"logits": [Z] * 3}),
    (diverse_experts.reversed_prior, given(prior=LAW), {}),
    (correctness.consistency_features, given(logits=Z, views=VIEWS), {}),
    (correctness.correctness_loss, given(logits=Z, labels=LABELS), {}),
    (CORRECT.calibrate, given(logits=Z, views=VIEWS), {}),
    (misclassification.doctor, given(logits=Z), {}),
    (NETWORK.score, given(logits=Z), {}),
    (Gaussian.fit, given(x=Z), {}),
    (predictive_uncertainty, given(logits=VIEWS), {}),
    (rejection.best_score, given(probability=P), {"cost": 0.3, "alpha": 4.0}),
    (rejection.rejection_loss, given(scores=SCORES, good=FLAGS), {"cost": 0.3}),
    (rejection.rejection_cost, given(accepted=FLAGS, good=FLAGS), {"cost": 0.3}),
    (rejection.Rejector.fit, given(inputs=Z, good=FLAGS), {"cost": 0.3, "steps": 1}),
    (REJECTOR.score, given(inputs=Z), {}),
    (RELATIVE.score, given(logits=Z), {}),
    (TemperatureScaling.fit, given(logits=Z, labels=LABELS), {}),
    (VectorScaling.fit, given(logits=Z, labels=LABELS), {}),
    (ks_distance, given(a=Z, b=OTHER), {}),
    (difficulty_levels, given(easiness=SCORES), {}),
    (
        fit_policy,
        given(easiness=SCORES, correct=FLAGS[None].float()),
        {"strategies": ["one"], "bins": 2},
    ),
    (length_study, given(lengths=LABELS.view(4, 3) + 1, right=FLAGS.view(4, 3)), {}),
    (doubts, given(lengths=torch.tensor([[90, 30]])), {"texts": [["Wait.", "So 4."]]}),
    (
        sparse_attention_mask,
        given(scores=Z.view(1, 2, 3, 6)),
        {"kv_heads": 1, "local": 1, "top_k": 1},
    ),
    (answer_entropy, given(logits=VIEWS, answer=VIEWS[..., 0] > -9), {"after": True}),
    (error_prediction, given(score=SCORES, wrong=FLAGS), {}),
]


@pytest.mark.parametrize(
    ("call", "tensors", "others", "name"),
    [(*each, name) for each in CALLS for name in each[1]],
    ids=[f"{each[0].__name__}-{name}" for each in CALLS for name in each[1]],
)
def test_what_is_no_tensor_is_refused_by_name(call, tensors, others, name):
    call(**tensors, **others)
    for wrong in (tensors[name].tolist(), tensors[name].detach().numpy(), None):
        with pytest.raises(InputError, match="expected a tensor"):
            call(**{**tensors, name: wrong}, **others)


@pytest.mark.parametrize("name", ["log_u", "log_g", "log_g_before"])
def test_a_number_may_be_given_as_one_but_must_be_given(name):
    numbers = {"log_u": 0.5, "log_g": 0.7, "log_g_before": 0.6}
    tracked = compositional.storm(**numbers)
    torch.testing.assert_close(
        tracked, compositional.storm(**{**numbers, name: torch.tensor(numbers[name])})
    )
    wrong = {"log_u": "much"}.get(name)  # None is the first batch
    with pytest.raises(InputError, match=f"{name} is .*expected a tensor"):
        compositional.storm(**{**numbers, name: wrong})


def test_so_must_the_partition_function_and_the_densities():
    pair = SCORES, -SCORES.abs()
    for given_pair, log_z in ((pair, None), ((SCORES, pair[1].tolist()), 0.0)):
        with pytest.raises(InputError, match="expected a tensor"):
            compositional.noise_contrastive(pair, given_pair, log_z)


@pytest.mark.parametrize(
    "call",
    [misclassification.check_classified, TemperatureScaling.fit, correctness.correctness_loss],
)
def test_complex_labels_are_no_classes(call):
    with pytest.raises(InputError, match="expected whole numbers"):
        call(Z, LABELS.to(torch.complex64))
    with pytest.raises(InputError, match="expected whole numbers"):
        label_encoding.semi_supervised_risk(Z, LABELS.to(torch.complex64), Z, OTHER)
