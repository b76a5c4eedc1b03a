"""STAMP once more: one list per class, torch's own schedule, the perturbation by hand."""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from reference.methods import configured, entropy


class Stamp:
    """Views are 0.8 x; `chance(batch)` is the generator that draws classes in that batch."""

    def __init__(
        self,
        model: nn.Module,
        *,
        classes: int,
        lr: float,
        margin: float,
        views: int,
        capacity: int,
        period: int,
        chance: Callable[[int], torch.Generator],
    ) -> None:
        self.model, self.learnt = configured(model)
        self.source = copy.deepcopy(self.model)
        self.optimizer = torch.optim.SGD(self.learnt, lr=lr)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, period)
        self.memory: list[list[Tensor]] = [[] for _ in range(classes)]
        self.counts = [0.0] * classes
        self.margin, self.views, self.capacity = margin * math.log(classes), views, capacity
        self.chance, self.batch, self.evictions = chance, 0, 0

    def size(self) -> int:
        return sum(map(len, self.memory))

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            z = self.model(x)
            p = torch.stack([z.softmax(1), *[self.model(0.8 * x).softmax(1)] * self.views]).mean(0)
            score = -(p * (p + 1e-5).log()).sum(1)
            agreed = z.argmax(1) == self.source(x).argmax(1)
        random = self.chance(self.batch)
        self.batch += 1
        for i in range(len(x)):
            if score[i] < self.margin and agreed[i]:
                if self.size() >= self.capacity:
                    most = max(n for n, own in zip(self.counts, self.memory, strict=True) if own)
                    tied = [
                        c for c, own in enumerate(self.memory) if own and self.counts[c] == most
                    ]
                    self.memory[tied[int(torch.randint(len(tied), (), generator=random))]].pop(0)
                    self.evictions += 1
                self.memory[int(z[i].argmax())].append(x[i])
        if self.size():
            self.learn()
        return p, score

    def learn(self) -> None:
        for c, own in enumerate(self.memory):
            self.counts[c] = 0.9 * self.counts[c] + 0.1 * len(own)
        bank = torch.stack([image for own in self.memory for image in own])
        grads = torch.autograd.grad(self.loss(bank), self.learnt)
        norm = sum(g.square().sum() for g in grads).sqrt()
        old = [p.detach().clone() for p in self.learnt]
        with torch.no_grad():
            for p, g in zip(self.learnt, grads, strict=True):
                p.add_(0.05 * g / (norm + 1e-12))
        self.optimizer.zero_grad()
        self.loss(bank).backward()
        with torch.no_grad():
            for p, o in zip(self.learnt, old, strict=True):
                p.copy_(o)
        self.optimizer.step()
        self.schedule.step()

    def loss(self, bank: Tensor) -> Tensor:
        h = entropy(self.model(bank))
        w = self.capacity * (-h).exp() / (-h).exp().sum()
        return (w * h).mean()
