"""What holds of all estimators from samples: no silent NaN, and the invariances that they claim."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from testtime._core.errors import InputError
from testtime.measures.cauchy_schwarz import (
    conditional_divergence,
    normalised_information,
    quadratic_information,
)
from testtime.measures.information import bounds
from testtime.measures.information.consistency import self_consistency
from testtime.measures.information.diffusion import minde_divergence, minde_entropy
from testtime.measures.information.estimate import normal_scores, standardised
from testtime.measures.information.laws import gaussian
from testtime.measures.information.minde import minde
from testtime.measures.information.mine import mine
from testtime.measures.information.neighbours import kozachenko_leonenko, ksg
from testtime.measures.information.variational import smile, variational
from testtime.measures.network_divergence import frechet_distance, network_divergence
from testtime.measures.spectra import matrix_entropy, matrix_nuclear_norm, spectrum
from testtime.measures.symmetry import invariant_mmd

SHORT = {"steps": 2, "batch_size": 16}
TRAINED = {
    "mine": partial(mine, **SHORT),
    "smile": partial(smile, **SHORT),
    "nwj": partial(variational, bound=bounds.nwj, **SHORT),
    "dv": partial(variational, bound=bounds.donsker_varadhan, **SHORT),
    "infonce": partial(variational, bound=bounds.infonce, **SHORT),
    "js": partial(variational, bound=bounds.jensen_shannon, **SHORT),
    "minde c": partial(minde, width=8, **SHORT),
    "minde j": partial(minde, kind="j", width=8, **SHORT),
}
INFORMATION = {"ksg 1": ksg, "ksg 2": partial(ksg, variant=2), **TRAINED}
OTHERS = {
    "entropy": lambda x, y: kozachenko_leonenko(x),
    "minde entropy": lambda x, y: minde_entropy(x, width=8, **SHORT),
    "minde divergence": partial(minde_divergence, width=8, **SHORT),
    "consistency": lambda x, y: self_consistency(ksg, x, y).information,
    "network divergence": partial(network_divergence, **SHORT),
    "frechet": frechet_distance,
    "cauchy-schwarz": lambda x, y: conditional_divergence(x, y, y + 1),
    "quadratic": quadratic_information,
    "normalised": normalised_information,
    "effective rank": lambda x, y: spectrum(x).effective_rank,
    "nuclear norm": lambda x, y: matrix_nuclear_norm(x),
    "matrix entropy": lambda x, y: matrix_entropy(x),
    "mmd": lambda x, y: invariant_mmd(x, y, torch.eye(Y.shape[1])[None], bandwidth=1.0),
}
ALL = {**INFORMATION, **OTHERS}


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y = normal(0, 40, 2), normal(1, 40, 2)
AS_IT_IS = {
    "good": (X, Y), "x is y": (X, X), "one coordinate": (X[:, 0], Y[:, 0]),
    "a constant": (torch.ones(40, 2), Y), "two constants": (torch.ones(40, 2), torch.ones(40, 2)),
    "a constant feature": (torch.cat([X, torch.ones(40, 1)], 1)[:, 1:], Y),
    "each twice": (X.repeat(2, 1)[:40], Y.repeat(2, 1)[:40]),
    "two values": (X[:2].repeat(20, 1), Y[:2].repeat(20, 1)),
    "more coordinates than samples": (normal(2, 40, 90), normal(3, 40, 90)),
    "an outlier": (torch.cat([X[:39], torch.full((1, 2), 1e6)]), Y),
    "far from zero": (X + 1e9, Y + 1e9), "small": (1e-200 * X, 1e-200 * Y),
    "half": (X.half(), Y.half()), "bfloat16": (X.bfloat16(), Y.bfloat16()), "single": (X.float(), Y.float()),
    "whole numbers": ((100 * X).long(), (100 * Y).long()), "one sample": (X[:1], Y[:1]),
    "two samples": (X[:2], Y[:2]), "no sample": (X[:0], Y[:0]), "no coordinate": (X[:, :0], Y),
}  # fmt: skip
REFUSED = {
    "NaN": (X * math.nan, Y), "one NaN": (torch.cat([X[:39], torch.full((1, 2), math.nan)]), Y),
    "infinite": (X / 0, Y), "complex": (X * 1j, Y), "a number": (torch.tensor(1.0), torch.tensor(1.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_a_value_or_an_error_and_never_a_silent_nan(name):
    answered = 0
    for kind, (x, y) in AS_IT_IS.items():
        try:
            found = ALL[name](x, y)
        except InputError:
            continue
        answered += 1
        assert math.isfinite(float(found)), kind
        assert not math.isnan(getattr(found, "standard_error", 0.0)), kind
    assert answered >= 6
    for x, y in REFUSED.values():
        with pytest.raises(InputError, match="expected"):
            ALL[name](x, y)


@pytest.mark.parametrize("name", [*INFORMATION, "quadratic", "normalised", "consistency"])
def test_pairs_that_do_not_fit_are_refused(name):
    with pytest.raises(InputError, match="expected"):
        ALL[name](X, Y[:39])


@pytest.mark.parametrize("name", TRAINED)
@settings(max_examples=5, deadline=None)
@given(st.floats(-100, 100), st.floats(0.01, 100), st.booleans())
def test_moving_and_stretching_a_variable_changes_no_trained_estimate(name, shift, scale, first):
    moved = [shift + scale * v if (v is X) == first else v for v in (X, Y)]
    assert TRAINED[name](*moved).value == pytest.approx(TRAINED[name](X, Y).value, abs=1e-3)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([2.0**600, 2.0**-600, 1e200, 1e-200]), st.integers(0, 99))
def test_the_unit_of_measurement_does_not_matter_however_far_it_is(unit, seed):
    x, y = normal(seed, 30, 2), normal(seed + 100, 30, 2)
    for variant in (1, 2):
        plain, other = (ksg(u * x, u * y, variant=variant).value for u in (1, unit))
        assert other == pytest.approx(plain, abs=1e-9)
    shift = kozachenko_leonenko(unit * x).value - kozachenko_leonenko(x).value
    assert shift == pytest.approx(2 * math.log(unit), rel=1e-9)
    torch.testing.assert_close(standardised(unit * x), standardised(x))
    assert spectrum(unit * x).effective_rank == pytest.approx(spectrum(x).effective_rank)
    assert frechet_distance(1e50 * x, 1e50 * y) == pytest.approx(1e100 * frechet_distance(x, y))


MAPS = {
    "exp": torch.exp, "sinh": torch.sinh, "cube": lambda v: v**3, "kink": lambda v: v + 3 * v.relu(),
    "quantile": torch.special.ndtr, "mirror": torch.neg, "atan": torch.atan,
}  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 99), st.floats(0, 1.5), st.sampled_from([1, 2]),
    st.sampled_from(list(MAPS)), st.sampled_from(list(MAPS)),
)  # fmt: skip
def test_neighbours_find_the_same_after_invertible_maps_of_each_variable(seed, information, variant, of_x, of_y):  # fmt: skip
    """The truth stays; the estimate moves within its error."""
    draw = torch.Generator().manual_seed(seed)
    x, y, _ = gaussian(400, dims=1, information=information, generator=draw)
    plain = ksg(x, y, variant=variant)
    mapped = ksg(MAPS[of_x](x), MAPS[of_y](y), variant=variant)
    error = math.hypot(plain.standard_error, mapped.standard_error)
    assert abs(mapped.value - plain.value) < 5 * error


@pytest.mark.parametrize("name", INFORMATION)
@settings(max_examples=5, deadline=None)
@given(st.integers(0, 99), st.sampled_from(["exp", "sinh", "cube", "kink", "quantile", "atan"]))
def test_no_increasing_map_of_a_coordinate_moves_an_estimate_of_normal_scores(name, seed, of_y):
    x, y = normal(seed, 40, 2), normal(seed + 100, 40, 2)
    mapped = torch.stack([y[:, 0], MAPS[of_y](y[:, 1])], 1)
    plain = INFORMATION[name](normal_scores(x), normal_scores(y))
    assert INFORMATION[name](normal_scores(x), normal_scores(mapped)) == plain


LOSSES = {
    "size": torch.abs, "wave": lambda v: torch.sin(3 * v), "noise": lambda v: v + normal(500, *v.shape),
    "first": lambda v: v[:, :1], "sum": lambda v: v.sum(1, keepdim=True),
    "near the same": lambda v: v.pow(2) + 0.1 * v,
}  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99), st.floats(0, 2), st.sampled_from(list(LOSSES)))
def test_neighbours_find_no_more_in_a_function_of_y(seed, information, loss):
    draw = torch.Generator().manual_seed(seed)
    x, y, _ = gaussian(400, dims=2, information=information, generator=draw)
    plain, less = ksg(x, y), ksg(x, LOSSES[loss](y))
    error = math.hypot(plain.standard_error, less.standard_error)
    assert less.value < plain.value + 5 * error


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.integers(1, 3), st.sampled_from(["c", "j"]))
def test_minde_is_never_negative_and_infonce_never_above_its_limit(seed, dims, kind):
    x, y = normal(seed, 40, dims), normal(seed + 100, 40, dims)
    assert minde(x, y, kind=kind, width=8, seed=seed, **SHORT).value >= 0
    assert TRAINED["infonce"](x, x, seed=seed).value <= math.log(10) + 1e-6  # ten held out in four
