"""ROID, RMT, PSMT and PETAL once more, as plainly as their algorithm boxes.

Nothing here comes from the library: copies of the whole model, `torch.optim`, loops.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from reference.methods import configured, entropy

View = Callable[[Tensor], Tensor]


def sce(a: Tensor, b: Tensor) -> Tensor:
    return -0.5 * (
        (b.softmax(1) * a.log_softmax(1)).sum(1) + (a.softmax(1) * b.log_softmax(1)).sum(1)
    )


class Roid:
    def __init__(self, model: nn.Module, lr: float, view: View, m: float = 0.99) -> None:
        self.model, self.learnt = configured(model)
        self.source = [p.detach().clone() for p in self.learnt]
        self.optimizer = torch.optim.Adam(self.learnt, lr=lr)
        self.view, self.m, self.c = view, m, None
        self.taught: list[int] = []

    def weights(self, z: Tensor) -> Tensor:
        p, classes = z.softmax(1), z.shape[1]
        c = torch.full((classes,), 1 / classes) if self.c is None else self.c
        d = torch.stack([1 - (c @ row) / (c.norm() * row.norm()) for row in p])
        e = -entropy(z)
        d = (d - d.min()) / (d.max() - d.min())
        e = (e - e.min()) / (e.max() - e.min())
        self.c = 0.9 * c + 0.1 * p.mean(0)
        return torch.where(d < d.mean(), 0.0, torch.exp(d * e * 3))

    def slr(self, z: Tensor) -> Tensor:
        q = z.softmax(1).clamp(max=0.99)
        return -(q * (q / (1 - q) + 1e-5).log()).sum(1)

    def corrected(self, z: Tensor) -> Tensor:
        p = z.softmax(1).mean(0)
        s = max(1 / z.shape[0], 1 / z.shape[1]) / p.max()
        return z * (p + s) / (1 + s * z.shape[1])

    def __call__(self, x: Tensor) -> Tensor:
        z = self.model(x)
        w = self.weights(z.detach())
        kept = w > 0
        self.taught.append(int(kept.sum()))
        again = sce(self.model(self.view(x[kept])), z[kept])
        loss = (w[kept] * self.slr(z)[kept]).sum() / len(x) + (w[kept] * again).sum() / len(x)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for p, source in zip(self.learnt, self.source, strict=True):
                p.copy_(self.m * p + (1 - self.m) * source)
        return self.corrected(z.detach())
