"""CMA-ES: a search that needs values alone, with a state of tensors.

    x_i = m + sigma C^(1/2) z_i,  z_i standard normal;   y_i = (x_i - m) / sigma, best first
    m <- m + sigma y,  y = sum_i w_i y_i  over the better half
    p_s <- (1 - c_s) p_s + sqrt(c_s (2 - c_s) mu) C^(-1/2) y
    sigma <- sigma exp( (c_s / d) (|p_s| / E|N(0, 1)| - 1) )
    p_c <- (1 - c_c) p_c + h sqrt(c_c (2 - c_c) mu) y
    C <- (1 - c_1 - c_mu) C + c_1 p_c p_c^T + c_mu sum_i w_i y_i y_i^T

Reference: Hansen, The CMA Evolution Strategy: A Tutorial, arXiv:1604.00772; candidates from
elsewhere are shortened as in Hansen, Injecting External Solutions Into CMA-ES, 2011.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Search = dict[str, Any]
"""Where a search stands: a tree of tensors in float64 and numbers."""


@dataclass(frozen=True, kw_only=True)
class CovarianceAdaptation:
    """Constants of the search, all from the dimension and the population.

    Args:
        dimension: n, of what is sought.
        population: candidates in each generation.
    """

    dimension: int
    population: int

    def init(self, *, sigma: float, device: torch.device) -> Search:
        """Around zero, with a standard deviation of `sigma` in every direction."""
        zero = torch.zeros(self.dimension, dtype=torch.float64, device=device)
        unit = torch.eye(self.dimension, dtype=torch.float64, device=device)
        return {
            "mean": zero, "sigma": float(sigma), "covariance": unit, "basis": unit,
            "scales": zero + 1, "path_c": zero, "path_s": zero, "generation": 0, "fresh": 0,
        }  # fmt: skip

    def ask(self, search: Search, generator: torch.Generator) -> Tensor:
        """Candidates (population, n)."""
        like = search["mean"]
        shape = (self.population, self.dimension)
        z = torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)
        # the symmetric root: the signs of basis vectors differ between machines
        y = (z @ search["basis"] * search["scales"]) @ search["basis"].T
        return search["mean"] + search["sigma"] * y

    def tell(self, search: Search, candidates: Tensor, values: Tensor) -> Search:
        """The search after the values of the candidates, lower ones being better.

        There may be more candidates than were asked for; those that lie too far out count as if
        they were nearer.
        """
        n, half = self.dimension, self.population // 2
        raw = torch.arange(1, half + 1, dtype=torch.float64, device=candidates.device)
        weights = math.log((self.population + 1) / 2) - raw.log()
        weights = weights / weights.sum()
        mu = 1 / float(weights.square().sum())
        c_s, c_c = (mu + 2) / (n + mu + 5), (4 + mu / n) / (n + 4 + 2 * mu / n)
        damping = 1 + 2 * max(0.0, math.sqrt((mu - 1) / (n + 1)) - 1) + c_s
        c_1 = 2 / ((n + 1.3) ** 2 + mu)
        c_mu = min(1 - c_1, 2 * (mu - 2 + 1 / mu) / ((n + 2) ** 2 + mu))
        expected = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))

        y = (candidates - search["mean"]) / search["sigma"]
        length = self._white(search, y).norm(dim=1, keepdim=True).clamp(min=1e-300)
        y = (y * ((math.sqrt(n) + 2 * n / (n + 2)) / length).clamp(max=1))[values.argsort()[:half]]
        step = weights @ y
        generation = search["generation"] + 1
        path_s = (1 - c_s) * search["path_s"]
        path_s = path_s + math.sqrt(c_s * (2 - c_s) * mu) * self._white(search, step)
        norm = float(path_s.norm())
        begun = norm / math.sqrt(1 - (1 - c_s) ** (2 * generation)) / expected
        steady = float(begun < 1.4 + 2 / (n + 1))
        path_c = (1 - c_c) * search["path_c"] + steady * math.sqrt(c_c * (2 - c_c) * mu) * step
        kept = 1 - c_1 - c_mu + (1 - steady) * c_1 * c_c * (2 - c_c)
        covariance = kept * search["covariance"] + c_1 * path_c.outer(path_c)
        covariance = covariance + c_mu * (y.T * weights) @ y
        sigma = search["sigma"] * math.exp(min(1.0, c_s / damping * (norm / expected - 1)))
        found = {
            **search, "mean": search["mean"] + search["sigma"] * step, "sigma": sigma,
            "covariance": covariance, "path_c": path_c, "path_s": path_s,
            "generation": generation, "fresh": search["fresh"] + 1,
        }  # fmt: skip
        if found["fresh"] > 1 / (c_1 + c_mu) / n / 10:  # C moves slowly: its root may lag behind
            squares, basis = torch.linalg.eigh((covariance + covariance.T) / 2)
            found |= {"scales": squares.clamp(min=1e-20).sqrt(), "basis": basis, "fresh": 0}
        return found

    @staticmethod
    def _white(search: Search, y: Tensor) -> Tensor:
        """C^(-1/2) y."""
        return (y @ search["basis"] / search["scales"]) @ search["basis"].T
