"""ROID, RMT, PSMT and PETAL once more, as plainly as their algorithm boxes.

Nothing here comes from the library: copies of the whole model, `torch.optim`, loops.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


class MeanTeacher:
    """A student that learns in all its weights and a teacher that follows."""

    def __init__(self, model: nn.Module, lr: float, m: float, view: View) -> None:
        self.model, _ = configured(model)
        self.model.requires_grad_(True)
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=lr)
        self.m, self.view = m, view

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for a, b in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
                a.copy_(self.m * a + (1 - self.m) * b)


def seen(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Features and logits."""
    kept = []
    hook = model.head.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    logits = model(x)
    hook.remove()
    return kept[0], logits


def prototypes(model: nn.Module, loader: list, classes: int) -> Tensor:
    model, _ = configured(model)
    g = torch.cat([seen(model, x)[0] for x, _ in loader]).detach()
    y = torch.cat([y for _, y in loader])
    return torch.stack([g[y == c].mean(0) for c in range(classes) if (y == c).any()])


class Rmt(MeanTeacher):
    def __init__(
        self, model: nn.Module, lr: float, m: float, view: View, mu: Tensor, projector: nn.Module,
        replay: Callable[[], tuple[Tensor, Tensor]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, lr, m, view)
        self.mu, self.projector, self.replay = mu, projector, replay
        self.optimizer.add_param_group({"params": projector.parameters()})

    def contrast(self, views: list[Tensor]) -> Tensor:
        h = torch.cat([F.normalize(self.projector(v), dim=1) for v in views])
        n, losses = len(views[0]), []
        for a in range(len(h)):
            others = [b for b in range(len(h)) if b != a]
            log_p = (h[others] @ h[a] / 0.1).log_softmax(0)
            losses.append(-log_p[[k for k, b in enumerate(others) if b % n == a % n]].mean())
        return torch.stack(losses).mean()

    def warm_up(self, loader: list[Tensor]) -> None:
        for i, x in enumerate(loader):
            self.optimizer.param_groups[0]["lr"] = 1e-2 * (i + 1) / len(loader)
            self.step(sce(self.model(x), self.teacher(x)).mean())

    def __call__(self, x: Tensor) -> Tensor:
        g, z = seen(self.model, x)
        g2, z2 = seen(self.model, self.view(x))
        t = self.teacher(x)
        m = torch.stack([self.mu[F.cosine_similarity(self.mu, row[None]).argmax()] for row in g])
        loss = (0.5 * sce(z, t) + 0.5 * sce(z2, t)).mean() + self.contrast([m, g, g2])
        if self.replay is not None:
            xs, ys = self.replay()
            loss = loss + F.cross_entropy(self.model(xs), ys)
        self.step(loss)
        return (z + t).detach()


def threshold(grads: list[Tensor], share: float) -> float:
    """Quantile of all squared gradients, by sorting."""
    g = torch.cat([grad.flatten() ** 2 for grad in grads]).sort().values
    place = share * (len(g) - 1)
    low, high = g[int(place)], g[min(int(place) + 1, len(g) - 1)]
    return float(low + (high - low) * (place - int(place)))


class Selective(MeanTeacher):
    """Entries of little gradient return to the source."""

    def __init__(self, model: nn.Module, lr: float, m: float, view: View, share: float) -> None:
        super().__init__(model, lr, m, view)
        self.source = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.share = share

    def restore(self) -> dict[str, Tensor]:
        own = dict(self.model.named_parameters())
        limit = threshold([p.grad for p in own.values()], self.share)
        masks = {n: p.grad**2 < limit for n, p in own.items()}
        with torch.no_grad():
            for n, p in own.items():
                p[masks[n]] = self.source[n][masks[n]]
        return masks


class Psmt(Selective):
    def __init__(self, model: nn.Module, beta: float, fisher: dict, **more) -> None:
        super().__init__(model, **more)
        self.beta, self.fisher = beta, fisher

    def __call__(self, x: Tensor) -> Tensor:
        t, s, s2 = self.teacher(self.view(x)), self.model(x), self.model(self.view(x))
        loss = 0.5 * sce(s, t).mean() + 0.5 * sce(s2, t).mean()
        for n, p in self.model.named_parameters():
            loss = loss + self.beta * (self.fisher[n] * (p - self.source[n]) ** 2).sum()
        self.step(loss)
        masks = self.restore()
        with torch.no_grad():
            student = dict(self.model.named_parameters())
            for n, p in self.teacher.named_parameters():
                p.copy_(torch.where(masks[n], student[n], self.m * p + (1 - self.m) * student[n]))
        return (t + s).detach()


class Petal(Selective):
    def __init__(self, model: nn.Module, rho: float, mean: dict, var: dict, **more) -> None:
        super().__init__(model, **more)
        self.rho, self.mean, self.var = rho, mean, var

    def __call__(self, x: Tensor) -> Tensor:
        t, s = self.teacher(self.view(x)), self.model(x)
        loss = -(t.softmax(1) * s.log_softmax(1)).sum(1).mean()
        for n, p in self.model.named_parameters():
            loss = loss + self.rho * 0.5 * ((p - self.mean[n]) ** 2 / (self.var[n] + 1e-6)).sum()
        self.step(loss)
        self.restore()
        return t


def posterior(model: nn.Module, loader: list, passes: int, lr: float) -> tuple[dict, dict]:
    """Mean and variance of the weights after each epoch but the first."""
    model = copy.deepcopy(model).train().requires_grad_(True)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    kept: list[dict] = []
    for _ in range(passes):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        kept.append({n: p.detach().clone().double() for n, p in model.named_parameters()})
    stacks = {n: torch.stack([k[n] for k in kept[1:]]) for n in kept[0]}
    return (
        {n: s.mean(0).float() for n, s in stacks.items()},
        {n: s.var(0, correction=0).float() for n, s in stacks.items()},
    )
