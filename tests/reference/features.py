"""Methods that work on features once more, as plainly as their algorithm boxes.

Nothing here comes from the library: copies of the model, `torch.optim`, numpy, loops.
"""

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference.methods import configured, entropy


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


class AdanpcBn(Adanpc):
    """The same behind a batch normalisation whose statistics stay 0 and 1, in torch's gradients."""

    def __init__(self, model, loader, k, tau, beta, confidence, gamma: int, lr: float) -> None:
        super().__init__(model, loader, k, tau, beta, confidence)
        self.norm, self.gamma = nn.BatchNorm1d(len(self.memory[0][0])).double().eval(), gamma
        self.optimizer = torch.optim.Adam(self.norm.parameters(), lr=lr)

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            raw, z = features_and_logits(self.model, x)
        source = torch.as_tensor(np.stack([g for g, _ in self.memory]))
        classes = torch.tensor([c for _, c in self.memory])
        for _ in range(self.gamma):
            features, votes = F.normalize(self.norm(raw.double())), []
            for g in features:
                near = (source @ g).argsort(descending=True)[: self.k]
                weights = ((source[near] @ g) / self.tau).softmax(0)
                members = F.one_hot(classes[near], z.shape[1]).double()
                votes.append((weights @ members + 1e-5).clamp(max=1))
            self.optimizer.zero_grad()
            entropy(torch.stack(votes)).mean().backward()
            self.optimizer.step()
        self.memory += [
            (g.detach().numpy(), int(scores.argmax()))
            for g, scores in zip(features, votes, strict=True)
            if self.confidence(scores.detach().numpy()) >= self.beta
        ]
        return torch.stack(votes).log().detach()


class Simatta:
    """With k-means of scikit-learn; `draws` is the generator of the adapter that it is held beside."""

    def __init__(
        self, model, oracle, budget, lr, e_high, e_low, clusters, cold_start, steps, draws
    ) -> None:
        self.model, self.frozen = copy.deepcopy(model), copy.deepcopy(model)
        self.oracle, self.left, self.lr, self.draws, self.steps = oracle, budget, lr, draws, steps
        self.e_high, self.e_low, self.k, self.cold_start = e_high, e_low, clusters, cold_start
        self.target, self.sure, self.seen, self.asked = [], [], 0, []  # target: [x, label, weight]

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            g, z = features_and_logits(self.model, x)
            self.ask(x, g, [i for i, h in enumerate(entropy(z)) if h >= self.e_high])
            z0 = self.frozen(x)
            for i in entropy(z0).argsort()[:100].tolist():
                if entropy(z0)[i] < self.e_low:
                    self.sure.append((x[i], z0[i].argmax()))
        self.learn()
        self.k, self.seen = self.k + 1, self.seen + len(x)
        return z

    def ask(self, x: Tensor, g: Tensor, high: list[int]) -> None:
        from sklearn.cluster import KMeans

        if self.left <= 0 or not (high or self.target):
            return
        seed = int(torch.randint(2**31 - 1, (), generator=self.draws))
        if not high:
            self.target = [(a, y, w + 1) for a, y, w in self.target]
            return
        old = [features_and_logits(self.model, a[None])[0][0] for a, _, _ in self.target]
        points = torch.stack(old + [g[i] for i in high]).numpy()
        weights = [w for _, _, w in self.target] + [1.0] * len(high)
        means = KMeans(min(self.k, len(points)), n_init=10, random_state=seed)
        means.fit(points, sample_weight=weights)
        wanted, grown = [], list(self.target)
        for c, centre in enumerate(means.cluster_centers_):
            own = [i for i, label in enumerate(means.labels_) if label == c]
            anchors = [i for i in own if i < len(old)]
            for i in anchors:
                a, y, w = self.target[i]
                grown[i] = (a, y, w + len(own) / len(anchors))
            if own and not anchors:
                best = min(own, key=lambda i: round(np.linalg.norm(points[i] - centre), 9))
                wanted.append((len(own), high[best - len(old)]))
        wanted = sorted(wanted, key=lambda pair: -pair[0])[: self.left]
        self.target = grown + [(x[i], self.oracle(self.seen + i), float(n)) for n, i in wanted]
        self.asked += [self.seen + i for _, i in wanted]
        self.left -= len(wanted)

    def learn(self) -> None:
        groups = [group for group in (self.sure, self.target) if group]
        a = len(self.target) / max(len(self.target) + len(self.sure), 1)
        if len(groups) == 2 and len(self.sure) < self.cold_start:
            a = min(0.2, a)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=self.lr, momentum=0.9)
        lowest, worse, losses = np.inf, 0, []
        while groups and worse <= 5 and len(losses) != self.steps:
            ces = []
            for group in groups:
                drawn = torch.randint(len(group), (16,), generator=self.draws).tolist()
                inputs = torch.stack([group[i][0] for i in drawn])
                ces.append(
                    F.cross_entropy(self.model(inputs), torch.tensor([group[i][1] for i in drawn]))
                )
            loss = (1 - a) * ces[0] + a * ces[1] if len(ces) == 2 else ces[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(ces[-1].item())
            if len(losses) % 5 == 0:
                mean = np.mean(losses[-5:])
                worse = 0 if mean < lowest else worse + 1
                lowest = min(lowest, mean)


class Evolution:
    """CMA-ES of Hansen's tutorial in numpy, the better half alone; `draws` gives the normals."""

    def __init__(self, n: int, population: int, draws: torch.Generator) -> None:
        self.n, self.lam, self.draws, self.m, self.sigma = n, population, draws, np.zeros(n), 1.0
        self.C, self.pc, self.ps, self.g = np.eye(n), np.zeros(n), np.zeros(n), 0

    def power(self, exponent: float) -> np.ndarray:
        values, vectors = np.linalg.eigh(self.C)
        return vectors @ np.diag(values**exponent) @ vectors.T

    def ask(self) -> np.ndarray:
        z = torch.randn(self.lam, self.n, dtype=torch.double, generator=self.draws).numpy()
        return self.m + self.sigma * z @ self.power(0.5)

    def tell(self, xs: np.ndarray, values: np.ndarray) -> None:
        n, half, white = self.n, self.lam // 2, self.power(-0.5)
        w = np.log((self.lam + 1) / 2) - np.log(np.arange(1, half + 1))
        w = w / w.sum()
        mu = 1 / (w**2).sum()
        cs, cc = (mu + 2) / (n + mu + 5), (4 + mu / n) / (n + 4 + 2 * mu / n)
        d = 1 + 2 * max(0, np.sqrt((mu - 1) / (n + 1)) - 1) + cs
        c1 = 2 / ((n + 1.3) ** 2 + mu)
        cmu = min(1 - c1, 2 * (mu - 2 + 1 / mu) / ((n + 2) ** 2 + mu))
        chi = np.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))
        ys = [(x - self.m) / self.sigma for x in xs]
        ys = [
            y * min(1, (np.sqrt(n) + 2 * n / (n + 2)) / max(np.linalg.norm(white @ y), 1e-300))
            for y in ys
        ]
        best = [ys[i] for i in np.argsort(values)[:half]]
        step = sum(a * y for a, y in zip(w, best, strict=True))
        self.g += 1
        self.ps = (1 - cs) * self.ps + np.sqrt(cs * (2 - cs) * mu) * white @ step
        length = np.linalg.norm(self.ps)
        h = length / np.sqrt(1 - (1 - cs) ** (2 * self.g)) / chi < 1.4 + 2 / (n + 1)
        self.pc = (1 - cc) * self.pc + h * np.sqrt(cc * (2 - cc) * mu) * step
        self.C = (1 - c1 - cmu + (1 - h) * c1 * cc * (2 - cc)) * self.C
        self.C += c1 * np.outer(self.pc, self.pc)
        self.C += cmu * sum(a * np.outer(y, y) for a, y in zip(w, best, strict=True))
        self.m = self.m + self.sigma * step
        self.sigma *= np.exp(min(1, cs / d * (length / chi - 1)))


class Foa:
    """Of a `TinyViT`, run by hand, one candidate after another."""

    def __init__(self, model, images: Tensor, prompts: int, population: int, lam, draws) -> None:
        self.model, self.k, self.lam = model, prompts, lam
        self.search = Evolution(prompts * 8, population, draws)
        self.best, self.hist, self.losses = np.zeros(prompts * 8), None, []
        source = self.run(images, None)[0]
        self.mean, self.std = source.mean(0), source.std(0)

    def run(self, x: Tensor, prompts, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        m, seen = self.model, []
        t = m.patches(x).flatten(2).mT
        t = torch.cat([m.token.expand(len(x), -1, -1), t], 1) + m.places
        if prompts is not None:
            p = torch.as_tensor(prompts).to(t).view(1, self.k, 8)
            t = torch.cat([t[:, :1], p.expand(len(x), -1, -1), t[:, 1:]], 1)
        for i, block in enumerate(m.blocks):
            t = block(t)
            norm = m.blocks[i + 1].before if i + 1 < len(m.blocks) else m.norm
            seen.append(norm(t[:, 0]))
        last = seen[-1] if shift is None else seen[-1] + shift
        return torch.cat(seen, 1), m.head(last)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        candidates = np.concatenate([self.search.ask(), self.best[None]])
        values, ends = [], []
        for p in candidates:
            c, z = self.run(x, p)
            apart = ((c.std(0) - self.std) ** 2).sum() + ((c.mean(0) - self.mean) ** 2).sum()
            values.append(float(entropy(z).sum() + self.lam * len(x) / 64 * apart))
            ends.append(c[:, -8:].mean(0))
        self.search.tell(candidates, np.array(values))
        self.best = candidates[int(np.argmin(values))]
        self.losses.append(min(values))
        shift = None if self.hist is None else self.mean[-8:] - self.hist
        answer = self.run(x, self.best, shift)[1]
        end = torch.stack(ends).mean(0)
        self.hist = end if self.hist is None else 0.9 * self.hist + 0.1 * end
        return answer
