"""Each method once more, as plainly as its algorithm box, on a copy of the model.

Nothing here comes from the library: copies of the whole model, `torch.optim`, loops.
"""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def entropy(z: Tensor) -> Tensor:
    return -(z.softmax(1) * z.log_softmax(1)).sum(1)


def configured(model: nn.Module) -> tuple[nn.Module, list[nn.Parameter]]:
    """A copy whose batch normalisation uses batch statistics and whose norm layers alone learn."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    learnt = []
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
            module.track_running_stats = False
            module.running_mean = module.running_var = None
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm | nn.LayerNorm):
            learnt += [p.requires_grad_(True) for p in module.parameters()]
    return model, learnt


class Tent:
    def __init__(self, model: nn.Module, lr: float) -> None:
        self.model, learnt = configured(model)
        self.optimizer = torch.optim.Adam(learnt, lr=lr)

    def __call__(self, x: Tensor) -> Tensor:
        z = self.model(x)
        self.optimizer.zero_grad()
        entropy(z).mean().backward()
        self.optimizer.step()
        return z.detach()


class Eata:
    """EATA; ETA when fisher is None."""

    def __init__(
        self, model: nn.Module, lr: float, e0: float, d: float, fisher: dict | None, beta: float
    ) -> None:
        self.model, learnt = configured(model)
        self.source = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.optimizer = torch.optim.SGD(learnt, lr=lr, momentum=0.9)
        self.e0, self.d, self.fisher, self.beta, self.mean = e0, d, fisher, beta, None
        self.taught: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        z = self.model(x)
        h = entropy(z)
        keep = [i for i in range(len(z)) if h[i] < self.e0]
        if self.mean is not None:
            p = z.detach().softmax(1)
            keep = [i for i in keep if abs(F.cosine_similarity(self.mean, p[i], dim=0)) < self.d]
        self.taught.append(len(keep))
        if keep:
            fresh = z.detach()[keep].softmax(1).mean(0)
            self.mean = fresh if self.mean is None else 0.9 * self.mean + 0.1 * fresh
            loss = ((self.e0 - h[keep]).exp().detach() * h[keep]).mean()
            if self.fisher is not None:
                for n, p in self.model.named_parameters():
                    if n in self.fisher:
                        loss = loss + self.beta * (self.fisher[n] * (p - self.source[n]) ** 2).sum()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return z.detach()


def fisher(model: nn.Module, loader: list[Tensor]) -> dict[str, Tensor]:
    model, _ = configured(model)
    total: dict[str, Tensor] = {}
    for x in loader:
        z = model(x)
        model.zero_grad()
        F.cross_entropy(z, z.argmax(1)).backward()
        for n, p in model.named_parameters():
            if p.grad is not None:
                total[n] = total.get(n, 0) + p.grad**2 / len(loader)
    return total


class Sar:
    def __init__(self, model: nn.Module, lr: float, e0: float, rho: float, recover: float) -> None:
        self.model, self.learnt = configured(model)
        self.start = copy.deepcopy(self.model.state_dict())
        self.e0, self.rho, self.recover, self.lr = e0, rho, recover, lr
        self.restart()
        self.resets = 0
        self.told: list[tuple[int, float | None]] = []  # how many taught, and their loss

    def restart(self) -> None:
        self.model.load_state_dict(self.start)
        self.optimizer = torch.optim.SGD(self.learnt, lr=self.lr, momentum=0.9)
        self.average = None

    def __call__(self, x: Tensor) -> Tensor:
        z = self.model(x)
        first = entropy(z) < self.e0
        if not first.any():
            self.told.append((0, None))
            return z.detach()
        grads = torch.autograd.grad(entropy(z)[first].mean(), self.learnt)
        norm = sum(g.square().sum() for g in grads).sqrt()
        old = [p.detach().clone() for p in self.learnt]
        with torch.no_grad():
            for p, g in zip(self.learnt, grads, strict=True):
                p.add_(self.rho * g / (norm + 1e-12))
        h = entropy(self.model(x))
        second = first & (h < self.e0)
        loss = h[second].mean()
        self.optimizer.zero_grad()
        if second.any():
            loss.backward()
        with torch.no_grad():
            for p, o in zip(self.learnt, old, strict=True):
                p.copy_(o)
        if not second.any():
            self.told.append((0, None))
            return z.detach()
        self.optimizer.step()
        value = float(loss.detach())
        self.told.append((int(second.sum()), value))
        self.average = value if self.average is None else 0.9 * self.average + 0.1 * value
        if self.average < self.recover:
            self.restart()
            self.resets += 1
        return z.detach()


class Deyo:
    def __init__(
        self,
        model: nn.Module,
        lr: float,
        ent: float,
        drop: float,
        e0: float,
        generator: torch.Generator,
    ) -> None:
        self.model, learnt = configured(model)
        self.optimizer = torch.optim.SGD(learnt, lr=lr, momentum=0.9)
        self.ent, self.drop, self.e0, self.generator = ent, drop, e0, generator

    def shuffled(self, x: Tensor, tiles: int = 4) -> Tensor:
        orders = torch.rand(len(x), tiles**2, generator=self.generator).argsort(1)
        side = x.shape[-1] // tiles
        out = x.clone()
        for i, order in enumerate(orders):
            for place, origin in enumerate(order.tolist()):
                a, b = divmod(place, tiles)
                c, d = divmod(origin, tiles)
                out[i, :, a * side : (a + 1) * side, b * side : (b + 1) * side] = x[
                    i, :, c * side : (c + 1) * side, d * side : (d + 1) * side
                ]
        return out

    def __call__(self, x: Tensor) -> Tensor:
        z = self.model(x)
        h = entropy(z)
        first = torch.where(h < self.ent)[0]
        if len(first) == 0:
            return z.detach()
        with torch.no_grad():
            after = self.model(self.shuffled(x[first])).softmax(1)
        before = z.detach()[first].softmax(1)
        c = before.argmax(1)
        plpd = before[range(len(c)), c] - after[range(len(c)), c]
        kept = plpd > self.drop
        if kept.any():
            weight = (self.e0 - h[first].detach()).exp() + plpd.exp()
            self.optimizer.zero_grad()
            (weight * h[first])[kept].mean().backward()
            self.optimizer.step()
        return z.detach()


class Ostta:
    def __init__(self, model: nn.Module, lr: float, lam: float) -> None:
        self.model, learnt = configured(model)
        self.original = copy.deepcopy(self.model)
        self.optimizer = torch.optim.Adam(learnt, lr=lr)
        self.lam = lam

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            original = self.original(x).softmax(1)
        z = self.model(x)
        p = z.softmax(1)
        value, c = original.max(1)
        kept = p.detach()[range(len(c)), c] >= value
        mean = p.mean(0)
        loss = self.lam * (mean * mean.log()).sum()
        if kept.any():
            loss = loss + entropy(z)[kept].mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return z.detach()


class Cotta:
    """Without random parts: views that are all alike, no restoration."""

    def __init__(self, model: nn.Module, lr: float, m: float, view) -> None:
        self.model, _ = configured(model)
        self.model.requires_grad_(True)
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=lr)
        self.m, self.view = m, view

    def __call__(self, x: Tensor) -> Tensor:
        t, s = self.teacher(self.view(x)), self.model(x)
        self.optimizer.zero_grad()
        (-(t.softmax(1) * s.log_softmax(1)).sum(1)).mean().backward()
        self.optimizer.step()
        with torch.no_grad():
            for a, b in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
                a.copy_(self.m * a + (1 - self.m) * b)
        return t


class RobustNorm(nn.Module):
    def __init__(self, layer: nn.BatchNorm2d, alpha: float) -> None:
        super().__init__()
        self.weight, self.bias = copy.deepcopy(layer.weight), copy.deepcopy(layer.bias)
        self.m, self.v = layer.running_mean.clone(), layer.running_var.clone()
        self.alpha, self.eps = alpha, layer.eps

    def forward(self, x: Tensor) -> Tensor:
        m, v = self.m, self.v
        if self.training:
            m = (1 - self.alpha) * m + self.alpha * x.mean((0, 2, 3))
            v = (1 - self.alpha) * v + self.alpha * x.var((0, 2, 3), correction=0)
            self.m, self.v = m.detach(), v.detach()
        shape = (1, -1, 1, 1)
        x = (x - m.view(shape)) / (v.view(shape) + self.eps).sqrt()
        return x * self.weight.view(shape) + self.bias.view(shape)


class Rotta:
    """The memory is a list for each class, as in the paper's algorithm."""

    def __init__(
        self, model: nn.Module, classes: int, lr: float, alpha: float, nu: float, n: int
    ) -> None:
        self.student = copy.deepcopy(model).requires_grad_(False)
        for name in ("norm1", "norm2"):
            setattr(
                self.student, name, RobustNorm(getattr(model, name), alpha).requires_grad_(True)
            )
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        learnt = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(learnt, lr=lr)
        self.nu, self.n, self.classes, self.count = nu, n, classes, 0
        self.memory: list[list[list]] = [[] for _ in range(classes)]

    def score(self, age: int, u: float) -> float:
        return 1 / (1 + math.exp(-age / self.n)) + u / math.log(self.classes)

    def remember(self, x: Tensor, c: int, u: float) -> None:
        sizes = [len(items) for items in self.memory]
        among = [c]
        room = False
        if sizes[c] < self.n / self.classes:
            room = sum(sizes) < self.n
            among = [k for k in range(self.classes) if sizes[k] == max(sizes)]
        if not room:
            ranked = [
                (self.score(item[2], item[1]), k, i)
                for k in among for i, item in enumerate(self.memory[k])
            ]  # fmt: skip
            worst = max(ranked) if ranked else None
            if worst and worst[0] > self.score(0, u):
                self.memory[worst[1]].pop(worst[2])
                room = True
            room = room or not ranked
        if room:
            self.memory[c].append([x, u, 0])
        for items in self.memory:
            for item in items:
                item[2] += 1

    def __call__(self, x: Tensor) -> Tensor:
        self.teacher.eval()
        answer = self.teacher(x)
        p = answer.softmax(1)
        for i in range(len(x)):
            self.remember(x[i], int(p[i].argmax()), float(-(p[i] * (p[i] + 1e-6).log()).sum()))
            self.count += 1
            if self.count % self.n == 0:
                self.update()
        return answer

    def update(self) -> None:
        items = [item for own in self.memory for item in own]
        bank = torch.stack([item[0] for item in items])
        ages = torch.tensor([item[2] / self.n for item in items])
        for network in (self.student, self.teacher):
            network.norm1.train()
            network.norm2.train()
        t, s = self.teacher(bank), self.student(0.8 * bank)
        weight = (-ages).exp() / (1 + (-ages).exp())
        self.optimizer.zero_grad()
        (weight * -(t.softmax(1) * s.log_softmax(1)).sum(1)).mean().backward()
        self.optimizer.step()
        with torch.no_grad():
            for a, b in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                a.copy_((1 - self.nu) * a + self.nu * b)


def lame(logits: Tensor, features: Tensor, k: int) -> Tensor:
    """kNN affinity, a fixed number of iterations, in float64."""
    q, g = logits.double().softmax(1), F.normalize(features.double(), dim=1)
    w = torch.zeros(len(g), len(g), dtype=torch.double)
    for i in range(len(g)):
        d = (g - g[i]).norm(dim=1)
        d[i] = math.inf
        w[i, d.argsort()[:k]] = 1
    u = -(q + 1e-10).log()
    y = (-u).softmax(1)
    for _ in range(100):
        y = (w @ y - u).softmax(1)
    return y


def memo(model: nn.Module, x: Tensor, lr: float, alpha: float, shades: list[float]) -> Tensor:
    """One step on all weights for each image, against the entropy of what its copies say on the mean."""
    answers = []
    for image in x.split(1):
        own = copy.deepcopy(model).requires_grad_(True)
        for name in ("norm1", "norm2"):
            layer = getattr(model, name)
            setattr(own, name, MixedNorm(layer, alpha))
        optimizer = torch.optim.SGD(own.parameters(), lr=lr)
        p = own(torch.cat([shade * image for shade in shades])).softmax(1).mean(0)
        (-(p * p.log()).sum()).backward()
        optimizer.step()
        with torch.no_grad():
            answers.append(own(image))
    return torch.cat(answers)


class MixedNorm(nn.Module):
    def __init__(self, layer: nn.BatchNorm2d, alpha: float) -> None:
        super().__init__()
        self.weight, self.bias = copy.deepcopy(layer.weight), copy.deepcopy(layer.bias)
        self.m, self.v, self.alpha, self.eps = (
            layer.running_mean,
            layer.running_var,
            alpha,
            layer.eps,
        )

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        m = (1 - self.alpha) * self.m + self.alpha * x.mean((0, 2, 3))
        v = (1 - self.alpha) * self.v + self.alpha * x.var((0, 2, 3), correction=0)
        x = (x - m.view(shape)) / (v.view(shape) + self.eps).sqrt()
        return x * self.weight.view(shape) + self.bias.view(shape)
