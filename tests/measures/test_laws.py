"""The truth of each law is the mean of the log density ratio of its samples."""

import math

import pytest
import torch
from scipy import stats

from testtime._core.errors import OptionError
from testtime.measures.information import laws

N = 40_000


def generator():
    return torch.Generator().manual_seed(0)


def agrees(pairs, ratio):
    assert ratio.mean() == pytest.approx(pairs.truth, abs=4 * ratio.std() / len(ratio) ** 0.5)
    assert abs(pairs.truth) > 0.05


@pytest.mark.parametrize("dims", [1, 3])
def test_gaussian_and_cubed(dims):
    p = laws.gaussian(N, dims=dims, information=0.7, generator=generator())
    rho = math.sqrt(1 - math.exp(-1.4 / dims))
    x, y = p.x.numpy(), p.y.numpy()
    ratio = stats.norm.logpdf(y, rho * x, math.sqrt(1 - rho**2)) - stats.norm.logpdf(y)
    agrees(p, ratio.sum(1))
    other = laws.cubed(N, dims=dims, information=0.7, generator=generator())
    assert torch.equal(other.y, p.y**3)
    assert torch.equal(other.x, p.x)


@pytest.mark.parametrize("noise", [0.1, 0.5, 0.75])
def test_uniform(noise):
    p = laws.uniform(N, dims=2, noise=noise, generator=generator())
    assert float((p.y - p.x).abs().max()) <= noise
    y, width = p.y.numpy(), 2 * noise
    low, high = y - noise, y + noise
    density = (high.clip(0, 1) - low.clip(0, 1)) / width
    agrees(p, -(math.log(width) + torch.tensor(density).log().numpy()).sum(1))


@pytest.mark.parametrize("information", [0.0, 0.5])
def test_student(information):
    p = laws.student(N, dims=2, information=information, freedom=3, generator=generator())
    rho = math.sqrt(1 - math.exp(-information))
    cov = torch.eye(4) + rho * torch.diag(torch.ones(2), 2) + rho * torch.diag(torch.ones(2), -2)
    x, y = p.x.numpy(), p.y.numpy()
    joint = stats.multivariate_t(shape=cov.numpy(), df=3).logpdf(torch.cat([p.x, p.y], 1).numpy())
    one = stats.multivariate_t(shape=torch.eye(2).numpy(), df=3)
    agrees(p, joint - one.logpdf(x) - one.logpdf(y))


def test_multimodal():
    p = laws.multimodal(N, dims=1, generator=generator())
    densities = [stats.norm.pdf(v.numpy(), c.numpy(), laws.WIDTH) for v, c in zip((p.x, p.y), laws.CENTRES.T, strict=True)]  # fmt: skip
    joint = (densities[0] * densities[1]).mean(1)
    ratio = joint / (densities[0].mean(1) * densities[1].mean(1))
    agrees(p, torch.tensor(ratio).log().numpy())
    assert laws.multimodal(2, dims=3, generator=generator()).truth == pytest.approx(3 * p.truth)


def test_options():
    for call in (
        lambda: laws.gaussian(0, dims=1, information=1, generator=generator()),
        lambda: laws.gaussian(3, dims=1, information=-1, generator=generator()),
        lambda: laws.uniform(3, dims=1, noise=0, generator=generator()),
        lambda: laws.student(3, dims=1, information=1, freedom=0, generator=generator()),
        lambda: laws.multimodal(3, dims=0, generator=generator()),
    ):
        with pytest.raises(OptionError, match="expected"):
            call()
