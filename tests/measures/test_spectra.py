import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from testtime._core.errors import InputError, OptionError
from testtime.measures.spectra import (
    matrix_entropy,
    matrix_nuclear_norm,
    matrix_nuclear_norm_of_texts,
    normalised_rows,
    spectrum,
)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


matrices = st.builds(normal, st.integers(0, 99), st.integers(2, 12), st.integers(2, 9))


def reference(x):
    """The formulas, with an eigendecomposition instead of singular values."""
    z = x - x.mean(0)
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    columns = sorted(np.linalg.norm(z, axis=0))[::-1]
    values = np.linalg.eigvalsh(z.T @ z / len(z)).clip(1e-300)
    root = np.sqrt(values * len(z))
    p, q = values / values.sum(), root / root.sum()
    return (sum(columns[: min(x.shape)]), root.sum(), -(p * np.log(p)).sum() / np.log(x.shape[1]),
            np.exp(-(q * np.log(q)).sum()))  # fmt: skip


@given(matrices)
def test_the_formulas(x):
    found = spectrum(x)
    own = (
        found.matrix_nuclear_norm,
        found.nuclear_norm,
        found.matrix_entropy,
        found.effective_rank,
    )
    assert own == pytest.approx(reference(x.numpy()), abs=1e-5)
    assert float(matrix_nuclear_norm(x)) == found.matrix_nuclear_norm
    assert float(matrix_entropy(x)) == pytest.approx(found.matrix_entropy, abs=1e-12)


@given(matrices, st.integers(0, 9), st.floats(0.1, 9), st.floats(-9, 9))
def test_bounds_and_invariances(x, seed, scale, shift):
    found = spectrum(x)
    if x.shape[0] >= x.shape[1]:
        assert found.matrix_nuclear_norm >= found.nuclear_norm - 1e-9
    assert 0 <= found.matrix_entropy <= 1 + 1e-9
    assert 1 - 1e-9 <= found.effective_rank <= min(x.shape) + 1e-9
    turned = spectrum(scale * x @ torch.linalg.qr(normal(seed, x.shape[1], x.shape[1]))[0] + shift)
    for name in ("nuclear_norm", "matrix_entropy", "effective_rank"):
        assert getattr(turned, name) == pytest.approx(getattr(found, name), abs=1e-5)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    assert matrix_nuclear_norm(x[order]) == pytest.approx(found.matrix_nuclear_norm)


def test_it_is_exact_for_orthogonal_columns_and_not_invariant_to_rotation():
    cross = torch.cat([torch.eye(4), -torch.eye(4)]).double()
    found = spectrum(cross)
    assert found.matrix_nuclear_norm == pytest.approx(found.nuclear_norm)
    line = torch.tensor([[1.0, 0, 0], [-1, 0, 0]]).double()
    turned = line @ torch.linalg.qr(normal(0, 3, 3))[0]
    assert float(matrix_nuclear_norm(turned)) > 1.2 * float(matrix_nuclear_norm(line))


def test_dense_features_of_any_rank_look_alike():
    found = [spectrum(normal(r, 256, r) @ normal(r + 500, 256, r).T) for r in (1, 4, 16, 64, 256)]
    own = [each.matrix_nuclear_norm for each in found]
    assert max(own) < 1.3 * min(own)
    assert found[-1].nuclear_norm > 10 * found[0].nuclear_norm


def test_degenerate_features():
    same = spectrum(torch.full((5, 3), 0.1))
    assert (same.nuclear_norm, same.matrix_entropy, same.effective_rank) == (0, 0, 0)
    assert math.isfinite(spectrum(torch.rand(4, 1)).matrix_entropy)
    half = torch.tensor([[1.0, 0.1], [0.3, 2.0]])
    for bad in (torch.rand(3), torch.rand(1, 3), torch.rand(3, 0), half.fill_(math.nan)):
        with pytest.raises(InputError, match="expected"):
            normalised_rows(bad)


def test_gradients_of_equal_rows_and_constant_columns_are_finite():
    x = torch.tensor([[1.0, 2, 3], [1, 2, 3], [1, 0, 3]]).repeat(2, 1).requires_grad_()
    slope = torch.autograd.grad(matrix_nuclear_norm(x), x)[0]
    assert slope.isfinite().all()
    same = torch.ones(4, 3, requires_grad=True)
    assert torch.equal(torch.autograd.grad(matrix_nuclear_norm(same), same)[0], torch.zeros(4, 3))


def test_the_size_and_the_sign_of_features_change_nothing():
    x = normal(0, 9, 4).float().abs()
    for scale in (-1.0, 1e30, -1e30, 1e-30):
        torch.testing.assert_close(
            normalised_rows(scale * x), normalised_rows(x) * math.copysign(1, scale)
        )
    below = torch.tensor([[-3e30, 0.0], [-1e30, 0.0]])
    torch.testing.assert_close(normalised_rows(below), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))


def test_texts():
    table = normal(0, 256, 16)
    said = []

    def model(input_ids):
        said.append(input_ids.shape)
        assert not torch.is_grad_enabled()
        return SimpleNamespace(last_hidden_state=table[input_ids])

    def tokenizer(text):
        return {"input_ids": list(text.encode())}

    texts = ["one", "another text", "x"]
    found = matrix_nuclear_norm_of_texts(model, tokenizer, texts, max_tokens=5)
    each = [float(matrix_nuclear_norm(table[list(t.encode())[:5]])) / len(t[:5]) for t in texts[:2]]
    assert found == pytest.approx(sum(each) / 2)
    assert said == [(1, 3), (1, 5)]
    with pytest.raises(InputError, match="no text has two tokens"):
        matrix_nuclear_norm_of_texts(model, tokenizer, ["x"])
    with pytest.raises(OptionError, match="max_tokens"):
        matrix_nuclear_norm_of_texts(model, tokenizer, ["x"], max_tokens=1)
