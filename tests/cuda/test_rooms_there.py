"""The other rooms on a GPU: measures and monitors give a CPU's values, decoders its texts."""

import copy
import math

import pytest
import torch
from torch import nn

import testtime as tt
from decode.conftest import PROMPTS, byte_tokenizer, tiny_model
from models import batches, tiny
from testtime.bench.cells import plan
from testtime.bench.runner import run
from testtime.decode.compression import compress, decompress
from testtime.decode.decoding import Decoding
from testtime.decode.watermark import Watermark, detect, token_entropies
from testtime.guard.collapse import Collapse
from testtime.guard.exchangeability import Exchangeability
from testtime.guard.feature_shift import feature_shift
from testtime.guard.fingerprint import Fingerprint
from testtime.guard.independence import Independence
from testtime.guard.monitor import Monitor
from testtime.guard.predictive_uncertainty import dropout_logits, predictive_uncertainty
from testtime.guard.relative_uncertainty import RelativeUncertainty
from testtime.guard.risk import Risk
from testtime.guard.scaling import TemperatureScaling, VectorScaling
from testtime.guard.tarp import tarp
from testtime.guard.two_sample import TwoSample
from testtime.measures import (
    calibration,
    cauchy_schwarz,
    coupling,
    detection,
    divergence,
    entropy,
    lipschitz,
    markov,
    spectra,
    symmetry,
)
from testtime.measures.information.mine import mine
from testtime.measures.information.neighbours import kozachenko_leonenko, ksg
from testtime.measures.network_divergence import frechet_distance
from testtime.streams.scenarios import Scenario

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore")]
CHANCE = torch.Generator().manual_seed(0)
X, Y = torch.randn(2, 60, 4, generator=CHANCE, dtype=torch.float64)
LABELS = torch.randint(4, (60,), generator=CHANCE)
LAW = torch.rand(6, generator=CHANCE, dtype=torch.float64)
LAW /= LAW.sum()

CALLS = {
    "entropy": lambda d: entropy.entropy(X.to(d)),
    "renyi": lambda d: entropy.renyi_entropy(X.to(d), order=2.0),
    "mutual": lambda d: entropy.mutual_information(torch.stack([X, Y]).to(d)),
    "kl": lambda d: divergence.kl_divergence(X.to(d), Y.to(d)),
    "alpha": lambda d: divergence.alpha_divergence(X.to(d), Y.to(d), alpha=2.0),
    "ece": lambda d: calibration.calibration_error(X[:, 0].sigmoid().to(d), (LABELS > 1).to(d)),
    "adaptive ece": lambda d: calibration.adaptive_calibration_error(X[:, 0].sigmoid().to(d), (LABELS > 1).to(d)),
    "brier": lambda d: calibration.brier_score(X.to(d).softmax(1), LABELS.to(d)),
    "auroc": lambda d: detection.auroc(X[:, 0].to(d), (LABELS > 1).to(d)),
    "fpr": lambda d: detection.fpr_at_95_tpr(X[:, 0].to(d), (LABELS > 1).to(d)),
    "aurc": lambda d: detection.aurc(X[:, 0].to(d), (LABELS > 1).to(d)),
    "spectrum": lambda d: spectra.spectrum(X.to(d)).matrix_entropy,
    "nuclear": lambda d: spectra.matrix_nuclear_norm(X.to(d)),
    "cauchy": lambda d: cauchy_schwarz.quadratic_information(X.to(d), Y.to(d)),
    "bottleneck": lambda d: cauchy_schwarz.normalised_information(X.to(d), Y.to(d)),
    "ksg": lambda d: ksg(X.to(d), Y.to(d)).value,
    "kl entropy": lambda d: kozachenko_leonenko(X.to(d)).value,
    "mine": lambda d: math.isfinite(mine(X.to(d), Y.to(d), steps=5).value),
    "frechet": lambda d: frechet_distance(X.to(d), Y.to(d)),
    "coupling": lambda d: coupling.greedy_coupling(LAW.to(d), LAW.flip(0).to(d)),
    "stationary": lambda d: markov.stationary_law(X[:4].softmax(1).to(d)),
    "transitions": lambda d: markov.transition_matrix(markov.transition_counts(LABELS.to(d), states=4)),
    "lipschitz": lambda d: lipschitz.lipschitz_divergence(torch.cdist(X[:8], Y[:8]).to(d)),
    "flips": lambda d: symmetry.invariant_distances(X[:5].to(d), Y[:5].to(d), symmetry.sign_flips(4).double().to(d)),
    "uncertainty": lambda d: predictive_uncertainty(torch.stack([X, Y]).to(d)).total,
    "temperature": lambda d: TemperatureScaling.fit(X.to(d), LABELS.to(d)).calibrate(X.to(d)),
    "vector": lambda d: VectorScaling.fit(X.to(d), LABELS.to(d)).calibrate(X.to(d)),
    "relative": lambda d: RelativeUncertainty.fit(X.to(d), LABELS.to(d)).score(X.to(d)),
    "feature shift": lambda d: feature_shift(X.to(d), (Y + 1).to(d)).statistic,
    "tarp": lambda d: tarp(torch.stack([X, Y, X + Y]).to(d), Y.to(d), seed=0).coverage,
}  # fmt: skip


def numbers(value) -> torch.Tensor:
    return torch.as_tensor(value).cpu().double()


@pytest.mark.parametrize("name", CALLS)
def test_values_are_those_of_a_cpu(name, device):
    expected, found = CALLS[name](torch.device("cpu")), CALLS[name](device)
    torch.testing.assert_close(numbers(found), numbers(expected), rtol=1e-6, atol=1e-6)


MONITORS = {
    "independence": (
        lambda d: Independence.fit(X[:, :1].to(d), Y[:, :1].to(d)),
        (X[:, :1], X[:, :1] + Y[:, :1]),
    ),
    "exchangeability": (lambda d: Exchangeability.fit(X.to(d)), (Y + 1,)),
    "risk": (lambda d: Risk(bound=0.2), (X.sigmoid()[:, 0],)),
    "two samples": (lambda d: TwoSample.fit(X.to(d)), (X, Y + 1)),
    "collapse": (lambda d: Collapse(classes=4, block=10), (X, Y)),
}


@pytest.mark.parametrize("name", MONITORS)
def test_monitors_follow_a_stream_there(name, device):
    make, data = MONITORS[name]
    said = []
    for place in (torch.device("cpu"), device):
        monitor = Monitor(make(place))
        alarms = [
            monitor.update(*parts)
            for parts in zip(*[values.to(place).split(20) for values in data], strict=True)
        ]
        again = Monitor(make(place))
        again.load_state_dict(monitor.state_dict())
        alarms.append(again.update(*[values[:20].to(place) for values in data]))
        said.append([(bool(a), getattr(a, "log_wealth", None)) for a in alarms])
    for one, two in zip(*said, strict=True):
        assert one[0] == two[0]
        if one[1] is not None:
            torch.testing.assert_close(numbers(one[1]), numbers(two[1]), rtol=1e-6, atol=1e-6)


def test_fingerprints_and_dropout_work_there(device):
    model = tiny().to(device)
    loader = [x.to(device) for x in batches(4)]
    fingerprint = Fingerprint.fit(model, loader)
    assert fingerprint is not None
    dropping = nn.Sequential(tiny(), nn.Dropout(0.5)).to(device)
    logits = dropout_logits(dropping, loader[0], samples=3)
    assert logits.device.type == device.type
    assert torch.equal(logits, dropout_logits(dropping, loader[0], samples=3))


NAMES = sorted(tt.decode.decodings())


@pytest.mark.parametrize("method", NAMES)
def test_decoders_write_what_they_write_on_a_cpu(method, device):
    tokenizer, texts = byte_tokenizer(), []
    for place in (torch.device("cpu"), device):
        model = copy.deepcopy(tiny_model("llama")).to(place)
        needed, options = tt.decode.decodings()[method].needs, {}
        if "large" in needed:
            options["large"] = copy.deepcopy(tiny_model(seed=9, layers=4)).to(place)
        if "lame" in needed:
            options["lame"] = ["b"] * len(PROMPTS)
        found = tt.decode.generate(
            model, tokenizer, PROMPTS, method, max_new_tokens=16, seed=3, **options
        )
        texts.append([each.tokens for each in found])
    assert texts[0] == texts[1]


def test_a_watermark_is_written_and_found_there(device):
    tokenizer, made = byte_tokenizer(), []
    for place in (torch.device("cpu"), device):
        model = copy.deepcopy(tiny_model("gpt2")).to(place)
        mark = Watermark(vocabulary=len(tokenizer), tau=0.5, delta=8.0)
        own = Decoding(steps=(mark,))
        found = tt.decode.generate(model, tokenizer, ["a"] * 8, own, max_new_tokens=60)
        tokens = [1, *max((each.tokens for each in found), key=len)]
        made.append((tokens, detect(tokens, mark, entropies=token_entropies(model, tokens)).z))
    assert made[0][0] == made[1][0]
    assert made[0][1] == pytest.approx(made[1][1])
    assert made[1][1] > 3


def test_bytes_come_back_from_what_was_compressed_there(device):
    model, content = copy.deepcopy(tiny_model("llama")).float().to(device), bytes(range(256)) * 2
    made = compress(content, model, byte_tokenizer())
    assert decompress(made.data, model, byte_tokenizer()) == content


def test_a_bench_runs_there(device, tmp_path):
    stream = Scenario(domains=("fog", "contrast"), batch_size=20, samples=40)
    cells = plan(
        methods=["tent", "eata", "lame"], models=["embedded:batch"], data="fashion-mnist:sample",
        streams=[stream], seeds=1, device=str(device),
    )  # fmt: skip
    rows = run(cells, tmp_path, jobs=0)
    assert len(rows) == 8
    assert all(math.isfinite(row["error"]) for row in rows)
    assert all(row["peak_memory_mb"] > 0 for row in rows)
