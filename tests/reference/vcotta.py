"""VCoTTA once more, as plainly as its algorithm box; nothing here comes from the library."""

import copy

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.func import functional_call
from torch.nn import functional as F


class Vcotta:
    """Weights of conv1, conv2 and head are Gaussians; the norm layers learn as they are."""

    def __init__(self, model, *, lr, m, view, n, margin, t, beta, generator, rho=-4.0) -> None:
        model = copy.deepcopy(model).eval().requires_grad_(False)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train()
                module.running_mean = module.running_var = None
        self.model, self.view, self.n, self.margin = model, view, n, margin
        self.m, self.t, self.beta, self.generator = m, t, beta, generator
        self.source = {k: v.clone() for k, v in model.named_parameters()}
        for k in list(self.source):
            if not k.startswith("norm"):
                self.source[f"{k} rho"] = torch.full_like(self.source[k], rho)
        self.student = {k: v.clone().requires_grad_() for k, v in self.source.items()}
        self.teacher = {k: v.clone() for k, v in self.source.items()}
        self.optimizer = torch.optim.Adam(self.student.values(), lr=lr)
        self.trust: list[float] = []

    def run(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(
            self.model, {k: v for k, v in weights.items() if not k.endswith("rho")}, (x,)
        )

    def opinion(self, weights: dict[str, Tensor], views: list[Tensor]) -> tuple[Tensor, Tensor]:
        z = torch.stack([self.run(weights, view) for view in views])
        p = z.softmax(2)
        rows = []
        for b in range(z.shape[1]):
            good = [z[0, b]]
            for v in range(1, len(views)):
                if p[v, b].max() >= p[0, b].max() + self.margin:
                    good.append(z[v, b])
            rows.append(sum(good) / len(good))
        return torch.stack(rows), (p.exp() * p).mean()

    def kl(self, prior: dict[str, Tensor]) -> Tensor:
        total = torch.zeros(())
        for k, mean in self.student.items():
            if f"{k} rho" in self.student:
                q = Normal(mean, F.softplus(self.student[f"{k} rho"]))
                p = Normal(prior[k], F.softplus(prior[f"{k} rho"]))
                total = total + kl_divergence(q, p).sum()
        return total

    def __call__(self, x: Tensor) -> Tensor:
        views = [x] + [self.view(x) for _ in range(self.n)]
        ot, ut = self.opinion(self.teacher, views)
        os, us = self.opinion(self.source, views)
        wt, ws = torch.stack([ut / self.t, us / self.t]).softmax(0)
        self.trust.append(float(wt))
        r = torch.rand((), generator=self.generator)
        perm = torch.randperm(len(x), generator=self.generator)
        drawn = {}
        for k, mean in self.student.items():
            if f"{k} rho" in self.student:
                eps = torch.randn(mean.shape, generator=self.generator)
                drawn[k] = mean + eps * (1 + self.student[f"{k} rho"].exp()).log()
            elif not k.endswith("rho"):
                drawn[k] = mean
        s = self.run(drawn, r * x + (1 - r) * x[perm])
        ref = wt * (r * ot + (1 - r) * ot[perm]) + ws * (r * os + (1 - r) * os[perm])
        p, q = s.softmax(1), ref.softmax(1)
        loss = -(0.5 * q * p.log() + 0.5 * p * q.log()).sum(1).mean()
        loss = loss + self.beta * (wt * self.kl(self.teacher) + ws * self.kl(self.source))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for k, v in self.student.items():
                self.teacher[k] = self.m * self.teacher[k] + (1 - self.m) * v
        return wt * ot + ws * os
