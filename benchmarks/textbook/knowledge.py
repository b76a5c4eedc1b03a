"""Methods that know more than images: labels they ask for, rules of training data, experts."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from textbook.parts import Loader, Step, View, entropy, watched


def moco_view(x: Tensor) -> Tensor:
    """The transform of MoCo v2 on small images, of each its own, as a loader of images has it."""
    jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8)
    blur = v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], 0.2)
    crop = v2.RandomCrop(x.shape[-2:], padding=x.shape[-1] // 8)
    changes = [crop, jitter, v2.RandomGrayscale(0.2), blur, v2.RandomHorizontalFlip()]
    return torch.stack([v2.Compose(changes)(image) for image in x])


def sade(
    model: nn.Module, *, lr: float = 0.1, floor: float = 0.05, augment: View = moco_view
) -> Step:
    """SADE, for a model that returns the logits of its experts, a tuple."""
    model = copy.deepcopy(model).eval()
    weights: Tensor | None = None
    optimizer: torch.optim.Optimizer | None = None
    stopped = False

    def aggregated(x: Tensor) -> Tensor:
        nonlocal weights, optimizer
        with torch.no_grad():
            experts = torch.stack(model(x))
        if weights is None:
            weights = torch.full(
                (len(experts),),
                1 / 3,
                dtype=experts.dtype,
                device=experts.device,
                requires_grad=True,
            )
            optimizer = torch.optim.SGD(
                [weights], lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True
            )
        return (weights.softmax(0)[:, None, None] * experts).sum(0)

    def step(x: Tensor) -> Tensor:
        nonlocal stopped
        if not stopped:
            one, two = (aggregated(augment(x)).softmax(1) for _ in range(2))
            (-F.cosine_similarity(one, two, eps=1e-6).mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
            stopped = round(float(weights.detach().softmax(0).min()), 2) < floor
        return aggregated(x).detach()

    return step


def rules_of(values: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> list[tuple]:
    """Rules `if s > t then class` and their 1st and 99th percentile of F1 over groups.

    Every third sample validates.
    """
    held = np.arange(len(values)) % 3 == 2
    cuts = np.percentile(values[~held], (5, 20, 35, 50, 65, 80, 95), axis=0)
    found: list[tuple] = []
    for feature in range(values.shape[1]):
        for cut in np.unique(cuts[:, feature]):
            for above in (True, False):
                match = (values[:, feature] > cut) == above
                train, validation = labels[match & ~held], labels[match & held]
                if not len(train) or not len(validation):
                    continue
                label = np.bincount(train).argmax()
                if (train == label).mean() <= 0.95 or (validation == label).mean() <= 0.93:
                    continue
                own = [labels[match & (groups == group)] == label for group in np.unique(groups)]
                shares = np.array([each.mean() for each in own if len(each)])
                low, high = np.percentile(2 * shares / (1 + shares), [1, 99])
                found.append((feature, above, cut, label, low, high, (train == label).sum()))
    found.sort(key=lambda rule: -rule[-1])  # of each class those that match most
    own = [[rule[:-1] for rule in found if rule[3] == label] for label in np.unique(labels)]
    return [rule for rules in own for rule in rules[:1000]]


def sqrl(model: nn.Module, *, source: Loader, lr: float = 1e-4) -> Step:
    values = torch.cat([x.flatten(1) for x, _ in source]).cpu().numpy()
    labels = torch.cat([y for _, y in source]).cpu().numpy()
    groups = np.repeat(np.arange(len(source)), [len(y) for _, y in source])
    rules = rules_of(values, labels, groups)
    dtype = source[0][0].dtype
    kinds = (torch.long, torch.bool, dtype, torch.long, dtype, dtype)
    columns = list(zip(*rules, strict=True)) or [()] * len(kinds)
    feature, above, cut, label, low, high = (
        torch.tensor(np.array(column), dtype=kind)
        for column, kind in zip(columns, kinds, strict=True)
    )
    model = copy.deepcopy(model).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)

    def step(x: Tensor) -> Tensor:
        z = model(x)
        match = ((x.flatten(1)[:, feature] > cut) == above).to(z.dtype)  # (B, rules)
        sure = torch.sigmoid(100 * (z.softmax(1)[:, label] - 0.5))
        right, wrong = (match * sure).sum(0), (match * (1 - sure)).sum(0)
        score = 2 * right / (2 * right + wrong + 1e-16)
        losses = torch.maximum(low - score, score - high).clamp(min=0) * (match.sum(0) > 0)
        if losses.any():
            (losses.sum() / (losses > 0).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return z.detach()

    return step


def simatta(  # noqa: PLR0915  (the paper, in one piece)
    model: nn.Module,
    *,
    oracle: Callable[[Tensor, Tensor], Tensor],
    budget: int = 300,
    lr: float = 1e-3,
    e_high: float = 1e-2,
    e_low: float = 1e-4,
    clusters: int = 10,
    steps: int | None = None,
) -> Step:
    from sklearn.cluster import KMeans  # noqa: PLC0415  (an extra)

    source = copy.deepcopy(model).eval().requires_grad_(False)
    model = copy.deepcopy(model).eval()
    run = watched(model)
    asked, sure = [], []  # image, label; and image, label of samples that the source is sure of
    weights = np.zeros(0)
    seen = 0

    def ask(x: Tensor, g: Tensor, high: Tensor) -> None:
        """Labels for the samples nearest to the centres of clusters without a label."""
        nonlocal weights
        seed = int(torch.randint(2**31 - 1, ()))
        if not len(high):
            weights = weights + 1
            return
        known = [run(torch.stack([image for image, _ in asked]))[0]] if asked else []
        points = torch.cat([*known, g[high]]).double().cpu().numpy()
        means = KMeans(min(clusters, len(points)), n_init=10, random_state=seed)
        heft = np.concatenate([weights, np.ones(len(high))])
        cluster = means.fit_predict(points, sample_weight=heft)
        distance = means.transform(points)
        size = np.bincount(cluster, minlength=distance.shape[1])
        held = np.bincount(cluster[: len(asked)], minlength=len(size))
        new = [c for c in np.argsort(-size, kind="stable") if size[c] and not held[c]]
        nearest = [np.where(cluster == c, distance[:, c], np.inf).argmin() for c in new]
        left = budget - len(asked)
        grown = weights + (size / np.maximum(held, 1))[cluster[: len(asked)]]
        weights = np.concatenate([grown, size[new][:left]])
        chosen = high[[place - len(asked) for place in nearest[:left]]]
        if len(chosen):
            asked.extend(zip(x[chosen], oracle(chosen + seen, x[chosen]), strict=True))

    def learn() -> None:
        held = [own for own in (sure, asked) if own]
        share = len(asked) / max(len(asked) + len(sure), 1)
        shares = [1 - share, share] if len(held) == 2 else [1.0]
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        losses: list[float] = []
        lowest, worse = np.inf, 0
        while held and worse <= 5 and len(losses) != steps:
            draws = [torch.randint(len(own), (16,)).tolist() for own in held]
            drawn = [own[i] for own, places in zip(held, draws, strict=True) for i in places]
            z = model(torch.stack([image for image, _ in drawn]))
            labels = torch.stack([label for _, label in drawn])
            parts = F.cross_entropy(z, labels, reduction="none").split(16)
            sum(part.mean() * s for part, s in zip(parts, shares, strict=True)).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(parts[-1].detach().mean()))
            if len(losses) % 5 == 0:
                mean = np.mean(losses[-5:])
                worse = 0 if mean < lowest else worse + 1
                lowest = min(lowest, mean)

    def step(x: Tensor) -> Tensor:
        nonlocal clusters, seen
        with torch.no_grad():
            g, z = run(x)
            high = torch.where(entropy(z) >= e_high)[0]
            if len(asked) < budget and (len(high) or asked):
                ask(x, g, high)
            before = source(x)
            doubt = entropy(before)
            places = doubt.argsort()[:100]
            places = places[doubt[places] < e_low]
            sure.extend(zip(x[places], before[places].argmax(1), strict=True))
        learn()
        clusters += 1
        seen += len(x)
        return z

    return step
