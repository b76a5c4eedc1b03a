"""FOA: a transformer's prompts, sought by CMA-ES, and a shift of its last features."""

import copy

import numpy as np
import torch
from torch import Tensor, nn

from textbook.parts import Loader, Step, entropy


class Evolution:
    """CMA-ES as Hansen's tutorial has it, of the better half of a generation."""

    def __init__(self, size: int, population: int) -> None:
        self.n, self.population, self.generation = size, population, 0
        self.mean, self.sigma = np.zeros(size), 1.0
        self.covariance, self.root, self.white = np.eye(size), np.eye(size), np.eye(size)
        self.path_c, self.path_s = np.zeros(size), np.zeros(size)
        half = population // 2
        weights = np.log((population + 1) / 2) - np.log(np.arange(1, half + 1))
        self.weights = weights / weights.sum()

    def ask(self) -> np.ndarray:
        z = torch.randn(self.population, self.n, dtype=torch.float64).numpy()
        return self.mean + self.sigma * z @ self.root

    def tell(self, candidates: np.ndarray, values: np.ndarray) -> None:
        n, w = self.n, self.weights
        mu = 1 / (w**2).sum()
        c_s, c_c = (mu + 2) / (n + mu + 5), (4 + mu / n) / (n + 4 + 2 * mu / n)
        damping = 1 + 2 * max(0, np.sqrt((mu - 1) / (n + 1)) - 1) + c_s
        c_1 = 2 / ((n + 1.3) ** 2 + mu)
        c_mu = min(1 - c_1, 2 * (mu - 2 + 1 / mu) / ((n + 2) ** 2 + mu))
        expected = np.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))
        y = (candidates - self.mean) / self.sigma
        length = np.linalg.norm(y @ self.white, axis=1, keepdims=True).clip(1e-300)
        y = y * np.minimum(1, (np.sqrt(n) + 2 * n / (n + 2)) / length)
        y = y[values.argsort()[: len(w)]]
        step = w @ y
        self.generation += 1
        self.path_s = (1 - c_s) * self.path_s
        self.path_s = self.path_s + np.sqrt(c_s * (2 - c_s) * mu) * self.white @ step
        norm = np.linalg.norm(self.path_s)
        begun = norm / np.sqrt(1 - (1 - c_s) ** (2 * self.generation)) / expected
        steady = begun < 1.4 + 2 / (n + 1)
        self.path_c = (1 - c_c) * self.path_c + steady * np.sqrt(c_c * (2 - c_c) * mu) * step
        kept = 1 - c_1 - c_mu + (1 - steady) * c_1 * c_c * (2 - c_c)
        self.covariance = kept * self.covariance + c_1 * np.outer(self.path_c, self.path_c)
        self.covariance += c_mu * (y.T * w) @ y
        self.mean = self.mean + self.sigma * step
        self.sigma *= np.exp(min(1, c_s / damping * (norm / expected - 1)))
        squares, basis = np.linalg.eigh(self.covariance)
        self.root = (basis * np.sqrt(squares)) @ basis.T
        self.white = (basis / np.sqrt(squares)) @ basis.T


def foa(
    model: nn.Module,
    *,
    source: Loader,
    prompts: int = 3,
    population: int = 27,
    lam: float = 0.4,
    first: str = "norm1",
) -> Step:
    """FOA for a transformer as timm has them; `first` is the first normalisation of a block."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    network = next(module for module in model.modules() if hasattr(module, "blocks"))
    tokens: list[Tensor] = []
    prompt: Tensor | None = None
    shift: Tensor | None = None

    def insert(block: nn.Module, args: tuple[Tensor]) -> Tensor:
        x = args[0]
        if prompt is None:
            return x
        return torch.cat([x[:, :1], prompt.to(x).expand(len(x), -1, -1), x[:, 1:]], 1)

    def note(norm: nn.Module, args: tuple[Tensor], x: Tensor) -> Tensor:
        tokens.append(x[:, 0])
        if norm is not network.norm or shift is None:
            return x
        return torch.cat([x[:, :1] + shift, x[:, 1:]], 1)

    network.blocks[0].register_forward_pre_hook(insert)
    for norm in (*(getattr(block, first) for block in network.blocks[1:]), network.norm):
        norm.register_forward_hook(note)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        """Class tokens after all blocks, and logits."""
        tokens.clear()
        z = model(x)
        return torch.cat(tokens, 1), z

    with torch.no_grad():
        seen = torch.cat([run(x)[0] for x, _ in source])
    mean, deviation, width = seen.mean(0), seen.std(0), tokens[-1].shape[1]
    search = Evolution(prompts * width, population)
    best, usual = np.zeros(prompts * width), None

    @torch.no_grad()
    def step(x: Tensor) -> Tensor:
        nonlocal best, usual, prompt, shift
        candidates = np.concatenate([search.ask(), best[None]])
        values, ends, shift = [], [], None
        for candidate in candidates:
            prompt = torch.from_numpy(candidate).view(1, prompts, width)
            c, z = run(x)
            apart = ((c.std(0) - deviation) ** 2).sum() + ((c.mean(0) - mean) ** 2).sum()
            values.append(float(entropy(z).sum() + lam * len(x) / 64 * apart))
            ends.append(c[:, -width:].mean(0))
        search.tell(candidates, np.array(values))
        best = candidates[int(np.argmin(values))]
        prompt = torch.from_numpy(best).view(1, prompts, width)
        shift = None if usual is None else mean[-width:] - usual
        end = torch.stack(ends).mean(0)
        usual = end if usual is None else 0.9 * usual + 0.1 * end
        return run(x)[1]

    return step
