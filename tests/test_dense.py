"""Tensors without numbers (of the device "meta") and sparse ones are refused by their names."""

import pytest
import torch

from testtime._core.errors import InputError
from testtime.guard.exchangeability import Exchangeability
from testtime.guard.independence import Independence
from testtime.guard.monitor import Monitor
from testtime.losses.compositional import log_partition
from testtime.measures.cauchy_schwarz import quadratic_information
from testtime.measures.entropy import entropy
from testtime.measures.information.estimate import normal_scores
from testtime.measures.information.neighbours import kozachenko_leonenko, ksg
from testtime.measures.network_divergence import frechet_distance, network_divergence
from testtime.measures.spectra import spectrum
from testtime.measures.symmetry import invariant_mmd, sign_flips

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
GIVEN = {
    "meta": (X.to("meta"), "device meta"),
    "sparse": (X.to_sparse(), "sparse"),
    "columns": (X.to_sparse(1), "sparse"),
}
CALLS = {
    "ksg": lambda x: ksg(x, X),
    "entropy of samples": kozachenko_leonenko,
    "normal scores": normal_scores,
    "frechet": lambda x: frechet_distance(X, x),
    "network divergence": lambda x: network_divergence(x, X, steps=1),
    "quadratic": lambda x: quadratic_information(X, x),
    "mmd": lambda x: invariant_mmd(x, X, sign_flips(3), bandwidth=1.0),
    "spectrum": spectrum,
    "entropy of logits": entropy,
    "compositional": lambda x: log_partition(x, x),
    "a monitor": lambda x: Monitor(Exchangeability.fit(X)).update(x),
    "its fit": Exchangeability.fit,
    "a monitor of pairs": lambda x: Monitor(Independence(gamma_x=1.0, gamma_y=1.0)).update(X, x),
}


@pytest.mark.parametrize("kind", GIVEN)
@pytest.mark.parametrize("name", CALLS)
def test_what_has_no_dense_numbers_is_refused(name, kind):
    given, said = GIVEN[kind]
    with pytest.raises(InputError, match=said):
        CALLS[name](given)
