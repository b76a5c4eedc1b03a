"""Standard errors of neighbours beside the spread of values over fresh draws."""

import math
from functools import partial

import pytest
import torch

from testtime.measures.information import laws
from testtime.measures.information.neighbours import kozachenko_leonenko, ksg


def gaussian(n, d, random, rho):
    return laws.gaussian(n, dims=d, information=-d / 2 * math.log(1 - rho**2), generator=random)


def uniform(n, d, random):
    return laws.uniform(n, dims=d, noise=0.5, generator=random)


def student(n, d, random):
    return laws.student(n, dims=d, information=0.15 * d, freedom=3, generator=random)


def exponential(n, d, random):
    x, e = torch.empty(2, n, d, dtype=torch.float64).exponential_(generator=random)
    return x, x + e, math.nan


LAWS = {
    **{f"Gaussian {rho}": partial(gaussian, rho=rho) for rho in (0.0, 0.5, 0.9)},
    "uniform": uniform,
    "Student": student,
    "exponential": exponential,
}
ESTIMATORS = {
    "ksg 1": ksg,
    "ksg 2": partial(ksg, variant=2),
    "entropy": lambda x, y, **options: kozachenko_leonenko(y, **options),
}


def of_spread(estimator, law, n, d, draws, **options):
    """The mean standard error over the standard deviation of values."""
    random = torch.Generator().manual_seed(0)
    found = [estimator(*law(n, d, random)[:2], **options) for _ in range(draws)]
    values, errors = torch.tensor([(each.value, each.standard_error) for each in found]).double().T
    return float(errors.mean() / values.std())


@pytest.mark.parametrize("law", ["Gaussian 0.9", "exponential"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_standard_error_counts_shared_neighbours(name, law):
    assert 0.82 < of_spread(ESTIMATORS[name], LAWS[law], 200, 2, 200) < 1.2


@pytest.mark.slow
@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_standard_error_is_near_the_spread_whatever_the_law(name, law, d):
    """Of independent variables of many coordinates it is more."""
    most = 1.4 if law == "Gaussian 0.0" and d == 5 and name != "entropy" else 1.25
    assert 0.85 < of_spread(ESTIMATORS[name], LAWS[law], 200, d, 500) < most
    assert 0.8 < of_spread(ESTIMATORS[name], LAWS[law], 200, d, 250, k=1) < 1.25
    assert 0.8 < of_spread(ESTIMATORS[name], LAWS[law], 200, d, 250, k=5) < most


@pytest.mark.slow
@pytest.mark.parametrize("law", ["Gaussian 0.0", "Gaussian 0.5", "exponential"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_standard_error_is_right_for_many_samples(name, law):
    assert 0.85 < of_spread(ESTIMATORS[name], LAWS[law], 1000, 1, 150) < 1.15
