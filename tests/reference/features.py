"""Methods that work on features once more, as plainly as their algorithm boxes.

Nothing here comes from the library: copies of the model, `torch.optim`, numpy, loops.
"""

import copy

import numpy as np
import torch
from torch import Tensor, nn

from reference.methods import configured


def features_and_logits(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into the layer `head`, and what comes out of the model."""
    kept: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    z = model(x)
    hook.remove()
    return kept[0], z


def class_gaussians(
    model: nn.Module, loader: list[tuple[Tensor, Tensor]], *, classes: int, tied: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts, means and covariances (divisor n) of the features of each class."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        g = torch.cat([features_and_logits(model, x)[0] for x, _ in loader]).double().numpy()
    y = torch.cat([labels for _, labels in loader]).numpy()
    own = [g[y == c] for c in range(classes)]
    means = np.stack([rows.mean(0) if len(rows) else np.zeros(g.shape[1]) for rows in own])
    if tied:
        return np.bincount(y, minlength=classes), means, np.cov((g - means[y]).T, bias=True)
    return (
        np.bincount(y, minlength=classes),
        means,
        np.stack([np.cov(rows.T, bias=True) for rows in own]),
    )


class Cafa:
    def __init__(self, model: nn.Module, lr: float, means, inverses, per_sample: bool) -> None:
        self.model, learnt = configured(model)
        self.optimizer = torch.optim.Adam(learnt, lr=lr)
        self.means, self.inverses = torch.as_tensor(means), torch.as_tensor(inverses)
        self.per_sample, self.losses = per_sample, []

    def __call__(self, x: Tensor) -> Tensor:
        g, z = features_and_logits(self.model, x)
        intra, inter = [], []
        for row, label in zip(g.double(), z.argmax(1).tolist(), strict=True):
            d = [
                (row - mean) @ inverse @ (row - mean)
                for mean, inverse in zip(self.means, self.inverses, strict=True)
            ]
            intra.append(d[label])
            inter.append(sum(d) - d[label])
        intra, inter = torch.stack(intra), torch.stack(inter)
        loss = (
            (intra / inter).log().mean() if self.per_sample else (intra.mean() / inter.mean()).log()
        )
        self.losses.append(loss.item())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return z.detach()


class Adanpc:
    """`confidence` takes the scores of a sample."""

    def __init__(self, model, loader, k: int, tau: float, beta: float, confidence) -> None:
        self.model, self.k, self.tau, self.beta = copy.deepcopy(model).eval(), k, tau, beta
        self.confidence, self.memory = confidence, []
        for x, y in loader:
            self.memory += list(zip(self.directions(x)[0], y.tolist(), strict=True))

    def directions(self, x: Tensor) -> tuple[list[np.ndarray], int]:
        with torch.no_grad():
            g, z = features_and_logits(self.model, x)
        return [row / np.linalg.norm(row) for row in g.double().numpy()], z.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        directions, classes = self.directions(x)
        answers, fresh = [], []
        for g in directions:
            near = sorted(((float(g @ m), c) for m, c in self.memory), key=lambda pair: -pair[0])
            weights = np.exp(np.array([s for s, _ in near[: self.k]]) / self.tau)
            scores = np.full(classes, 1e-5)
            for w, (_, c) in zip(weights / weights.sum(), near, strict=False):
                scores[c] += w
            scores = np.minimum(scores, 1)
            answers.append(scores)
            if self.confidence(scores) >= self.beta:
                fresh.append((g, int(scores.argmax())))
        self.memory += fresh
        return torch.as_tensor(np.log(np.stack(answers)))
