"""Methods that remember images of the stream, balanced over classes, and learn from those."""

import copy
import math
import random

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from textbook.parts import (
    NORMS,
    BlendedNorm,
    Step,
    View,
    climb,
    configured,
    cross_entropy,
    entropy,
    follow,
    put_back,
    replaced,
    view,
)


def rotta(
    model: nn.Module,
    *,
    lr: float = 1e-3,
    capacity: int = 64,
    every: int = 64,
    augment: View = view,
) -> Step:
    """RoTTA: it learns after `every` images, in other norms where there is no batch normalisation."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    replaced(model, lambda layer: BlendedNorm(layer, 0.05))
    teacher = copy.deepcopy(model)
    norms, others = (
        [layer for layer in each.modules() if isinstance(layer, BlendedNorm)]
        for each in (model, teacher)
    )
    learners = norms or [layer for layer in model.modules() if isinstance(layer, NORMS)]
    learnt = [p.requires_grad_() for layer in learners for p in layer.parameters()]
    optimizer = torch.optim.Adam(learnt, lr=lr)
    bank: dict[int, list[list]] = {}  # class -> [image, age, uncertainty]
    seen = 0

    def badness(item: list, classes: int) -> float:
        return 1 / (1 + math.exp(-item[1] / capacity)) + item[2] / math.log(classes)

    def offer(image: Tensor, label: int, doubt: float, classes: int) -> None:
        new, own = [image, 0, doubt], bank.setdefault(label, [])
        among = [label]
        if len(own) < capacity / classes:
            if sum(map(len, bank.values())) < capacity:
                own.append(new)
                return
            most = max(map(len, bank.values()))
            among = [c for c, items in bank.items() if len(items) == most]
        held = [(badness(item, classes), c, item) for c in among for item in bank[c]]
        worst = max(held, key=lambda entry: entry[0], default=None)
        if worst is None or worst[0] > badness(new, classes):
            if worst is not None:
                bank[worst[1]] = [item for item in bank[worst[1]] if item is not worst[2]]
            bank[label].append(new)

    def update() -> None:
        items = [item for own in bank.values() for item in own]
        images = torch.stack([item[0] for item in items])
        ages = torch.tensor(
            [item[1] / capacity for item in items], dtype=images.dtype, device=images.device
        )
        for layer in [*norms, *others]:  # and not dropout
            layer.train()
        with torch.no_grad():
            t = teacher(images)
        s = model(augment(images))
        weight = (-ages).exp() / (1 + (-ages).exp())
        (cross_entropy(s, t) * weight).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        follow(teacher, model, 0.999)

    def step(x: Tensor) -> Tensor:
        nonlocal seen
        teacher.eval()
        with torch.no_grad():
            z = teacher(x)
            p = z.softmax(1)
        for image, row in zip(x, p, strict=True):
            doubt = float(-(row * (row + 1e-6).log()).sum())
            offer(image, int(row.argmax()), doubt, z.shape[1])
            for items in bank.values():
                for item in items:
                    item[1] += 1
            seen += 1
            if seen % every == 0:
                update()
        return z

    return step


def moved(x: Tensor) -> Tensor:
    """A crop after padding by four, and a mirror image half of the times."""
    return v2.RandomHorizontalFlip()(v2.RandomCrop(x.shape[-2:], padding=4)(x))


def stamp(
    model: nn.Module,
    *,
    lr: float = 0.1,
    margin: float = 0.25,
    views: int = 15,
    capacity: int = 64,
    period: int = 150,
    augment: View = moved,
) -> Step:
    model, learnt = configured(model, top=False)
    source = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.SGD(learnt, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, period)
    memory: dict[int, list[Tensor]] = {}
    counts: dict[int, float] = {}

    def offer(image: Tensor, label: int) -> None:
        if sum(map(len, memory.values())) >= capacity:
            filled = [c for c, own in memory.items() if own]
            most = max(counts.get(c, 0.0) for c in filled)
            memory[random.choice([c for c in filled if counts.get(c, 0.0) == most])].pop(0)
        memory.setdefault(label, []).append(image)

    def loss(bank: Tensor) -> Tensor:
        h = entropy(model(bank))
        return (capacity * (-h).softmax(0) * h).mean()

    def step(x: Tensor) -> Tensor:
        with torch.no_grad():
            z = model(x)
            p = torch.stack([z.softmax(1), *[model(augment(x)).softmax(1) for _ in range(views)]])
            p = p.mean(0)
            doubt = -(p * (p + 1e-5).log()).sum(1)
            labels = z.argmax(1)
            fit = (doubt < margin * math.log(z.shape[1])) & (labels == source(x).argmax(1))
        for image, label in zip(x[fit], labels[fit].tolist(), strict=True):
            offer(image, label)
        images = [image for own in memory.values() for image in own]
        if images:
            for c, own in memory.items():
                counts[c] = 0.9 * counts.get(c, 0.0) + 0.1 * len(own)
            bank = torch.stack(images)
            loss(bank).backward()
            old = climb(learnt)
            loss(bank).backward()
            put_back(learnt, old)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return p.log()

    return step
