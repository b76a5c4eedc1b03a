"""SimATTA: active test-time adaptation with few queried labels.

T = queried samples with labels and weights,  S = samples that the source is sure of;  K = 10
for each batch x:
    z = f_theta(x)
    k-means with K centres on features of T, with their weights, and of {n : H(z_n) >= e_h}
    for each cluster without a sample of T:  ask for the label of the sample nearest to its centre;
        T <- T with it, its weight the size of the cluster
    for each other cluster:  weights of its samples of T  +=  size / number of these
    S <- S with the 100 samples of lowest entropy H(f_source(x_n)) < e_l, and their predicted classes
    a = |T| / (|T| + |S|),  at most 0.2 while |S| is small
    repeat:  theta <- theta - lr * d/dtheta ( (1 - a) CE(16 of S) + a CE(16 of T) )
    until the mean CE on T over five steps has not fallen for more than five times
    K <- K + 1
    return z
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from testtime._core.arrays import at_least_single
from testtime._core.errors import MissingExtra, OptionError, TesttimeWarning
from testtime._core.options import in_range, whole
from testtime._core.outcomes import Outcome
from testtime._core.registry import register
from testtime.adaptation.checks import read_labels
from testtime.adaptation.engine import Engine
from testtime.adaptation.evidence import Evidence
from testtime.adaptation.learning import finite, gradients
from testtime.adaptation.parts.optimizer import SGD
from testtime.adaptation.parts.scope import all_parameters
from testtime.adaptation.recipe import Recipe
from testtime.adaptation.state import State
from testtime.adaptation.steps import Step, Steps
from testtime.measures.entropy import entropy

Oracle = Callable[[Tensor, Tensor], Any]
"""Takes places in the stream (n,) and inputs (n, ...), gives the n labels."""
SURE, BATCH, WINDOW, PATIENCE, COLD = 100, 16, 5, 5, 0.2
"""Of the box: sure samples of a batch, draws of S and of T, steps of a mean, means, and a at most."""
MOST, ROUNDING = 2000, 1e-6
"""Steps on a batch where none are given; how much farther a sample may be and count as as near."""


class Wanted(NamedTuple):
    """New samples to ask about, most wanted first, their weights, and the new ones of T."""

    places: list[int]
    weights: list[float]
    grown: Tensor


def nearest_to_new_centres(
    known: Tensor, weights: Tensor, fresh: Tensor, *, clusters: int, seed: int
) -> Wanted:
    """Of each cluster without a known sample, the fresh one nearest to its centre; large ones first.

    Of two that are as near, as both of a cluster of two are, it is the earlier, on every machine.

    Args:
        known: features of the samples of T, (m, d).
        weights: of these, (m,).
        fresh: features of the samples that may be asked about, (n, d).
        clusters: K; at most m + n are made.
        seed: of the ten starts of k-means.
    """
    from sklearn.cluster import KMeans  # noqa: PLC0415  (an extra, and slow to import)

    if not len(fresh):
        return Wanted([], [], weights + 1)
    points = torch.cat([known, fresh]).double().cpu().numpy()
    heft = torch.cat([weights, weights.new_ones(len(fresh))]).double().cpu().numpy()
    count = min(clusters, len(points))
    means = KMeans(count, n_init=10, random_state=seed)  # pyright: ignore[reportArgumentType]
    label = torch.as_tensor(means.fit_predict(points, sample_weight=heft), device="cpu").long()
    distance = torch.as_tensor(means.transform(points), device="cpu")
    size = label.bincount(minlength=distance.shape[1])
    held = label[: len(known)].bincount(minlength=len(size))
    found: list[tuple[int, int]] = []
    for cluster in (held == 0).logical_and(size > 0).nonzero()[:, 0].tolist():
        own = (label == cluster).nonzero()[:, 0]
        away = distance[own, cluster]
        nearest = own[(away <= away.min() * (1 + ROUNDING)).nonzero()[0, 0]]
        found.append((int(size[cluster]), int(nearest) - len(known)))
    found.sort(key=lambda pair: -pair[0])
    gain = (size / held.clamp(min=1))[label[: len(known)]]
    return Wanted([p for _, p in found], [float(s) for s, _ in found], weights + gain.to(weights))


@dataclass(frozen=True, kw_only=True)
class ActiveLearning:
    """Asks for labels of few samples, remembers sure ones, and learns from both.

    Args:
        oracle: gives labels; not part of what the method is called in files.
        budget: labels that are asked for at most.
        e_high: entropy from which a sample is asked about.
        e_low: entropy below which a sample is sure.
        clusters: K at first.
        growth: what each batch adds to K.
        cold_start: sure samples below which T weighs at most 0.2.
        steps: steps on a batch at most.
        capacity: sure samples that are remembered at most.
        choose: which samples to ask about.
    """

    oracle: Oracle | None = field(repr=False)
    budget: int
    e_high: float
    e_low: float
    clusters: int
    growth: int
    cold_start: int
    steps: int | None
    capacity: int | None
    choose: Callable[..., Wanted] = nearest_to_new_centres
    dense: ClassVar[bool] = False
    minimises: ClassVar[tuple[str, ...]] = ()

    def held(self, memory: dict[str, Any]) -> Tensor:
        """What is remembered of the samples themselves."""
        own = memory["sure"]["inputs"]
        return own if len(own) else memory["target"]["inputs"]

    def bought(self, old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
        """An old memory with the labels of a new one: they stay true, and count."""
        return {**new, "sure": (old or _nothing(new["sure"]["inputs"]))["sure"]}

    def step(self, engine: Engine, x: Tensor, state: State) -> Steps:
        """Answers, asks, remembers, learns."""
        if not engine.ranks.alone:
            raise OptionError(
                "simatta asks for labels, and works in one process; leave out process_group."
            )
        with torch.no_grad():
            seen = Evidence(engine, state, state.tensors, x, tapped=True)
            logits = seen.logits
        yield seen.output
        with torch.no_grad():
            doubt, source = entropy(logits), entropy(seen.source)
            told: dict[str, Any] = {"entropy": doubt.mean(), "used": 0}
            if not (doubt + source).isfinite().all():
                return Step(seen.output, logits, state, Outcome.NON_FINITE, told)
            memory = state.memory or _nothing(x)
            clusters = self.clusters + self.growth * state.steps
            memory, asking = self._ask(engine, memory, seen, doubt, clusters, state)
            sure = source.argsort()[:SURE]
            sure = sure[source[sure] < self.e_low]
            more = {"inputs": x[sure], "labels": seen.source[sure].argmax(-1)}
            memory = {**memory, "sure": _joined(memory["sure"], more, self.capacity)}
        tensors, outcome, loss, steps = self._learn(engine, state, memory)
        used = sum(len(memory[own]["labels"]) for own in ("sure", "target"))
        told |= {**asking, "loss": loss, "used": used, "clusters": clusters, "steps": steps}
        state = replace(state, tensors=tensors, memory=memory)
        return Step(seen.output, logits, state, outcome, told)

    def _ask(
        self,
        engine: Engine,
        memory: dict[str, Any],
        seen: Evidence,
        doubt: Tensor,
        clusters: int,
        state: State,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """T after the queries of a batch; and how many labels there were."""
        target, x = memory["target"], seen.inputs
        asked = len(target["labels"])
        left = self.budget - asked
        high = (doubt >= self.e_high).nonzero()[:, 0]
        told = {"asked": 0, "labels": asked, "refused": 0}
        if self.oracle is None or (not len(high) and not asked):
            return memory, told
        if left <= 0:
            told["refused"] = len(high)
            return self._spent(memory, len(high)), told
        seed = torch.randint(2**31 - 1, (), generator=engine.generator, device=x.device)
        wanted = self.choose(
            self._features(engine, state, target["inputs"], seen.features),
            target["weights"],
            at_least_single(seen.features)[high],
            clusters=clusters,
            seed=int(seed),
        )
        target = {**target, "weights": wanted.grown}
        chosen = high[torch.tensor(wanted.places[:left], dtype=torch.long, device=x.device)]
        if len(chosen):
            labels = self._labels(x, chosen, state.samples, logits=seen.logits)
            weights = target["weights"].new_tensor(wanted.weights[:left])
            more = {"inputs": x[chosen], "labels": labels, "weights": weights}
            target = _joined(target, more, None)
        told = {"asked": len(chosen), "labels": asked + len(chosen)}
        told["refused"] = len(wanted.places) - len(chosen)
        return self._spent({**memory, "target": target}, told["refused"]), told

    def _spent(self, memory: dict[str, Any], refused: int) -> dict[str, Any]:
        """The memory, which notes that the end of the budget was told."""
        if not refused or memory["told"]:
            return memory
        warnings.warn(
            f"all {self.budget} labels of the budget are asked for; from here on simatta learns "
            "from those and from its own sure answers. Give a larger budget to ask for more.",
            TesttimeWarning,
            stacklevel=2,
        )
        return {**memory, "told": True}

    def _labels(self, x: Tensor, chosen: Tensor, before: int, *, logits: Tensor) -> Tensor:
        assert self.oracle is not None
        given = self.oracle(chosen.cpu() + before, x[chosen])
        classes = logits.shape[-1]
        labels = read_labels(given, shape=(len(chosen),), classes=classes, who="the oracle")
        return labels.to(x.device)

    def _features(self, engine: Engine, state: State, inputs: Tensor, like: Tensor) -> Tensor:
        """Of what is remembered, under the tensors of now."""
        parts = [at_least_single(like)[:0]]
        for part in inputs.split(32) if len(inputs) else ():
            seen = Evidence(engine, state, state.tensors, part, tapped=True)
            parts.append(at_least_single(seen.features))
        return torch.cat(parts)

    def _learn(
        self, engine: Engine, state: State, memory: dict[str, Any]
    ) -> tuple[dict[str, Tensor], Outcome, Tensor | None, int]:
        """Steps until the loss on T (on S where there is no T) stands still."""
        sure, target = memory["sure"], memory["target"]
        held = [own for own in (sure, target) if len(own["labels"])]
        if not held:
            return state.tensors, Outcome.NOTHING_RELIABLE, None, 0
        share = len(target["labels"]) / (len(target["labels"]) + len(sure["labels"]))
        if len(held) == 2 and len(sure["labels"]) < self.cold_start:
            share = min(COLD, share)
        shares = [1 - share, share] if len(held) == 2 else [1.0]
        optimizer = engine.recipe.optimizer
        assert optimizer is not None
        tensors, momentum = state.tensors, optimizer.init(list(state.tensors.values()))
        window: list[float] = []
        lowest, worse, steps, total = math.inf, 0, 0, 0.0
        while worse <= PATIENCE and steps < (self.steps or MOST):
            losses, grads = self._gradient(engine, replace(state, tensors=tensors), held, shares)
            loss = torch.stack(losses).detach()
            if not finite(loss.sum(), grads):
                return state.tensors, Outcome.NON_FINITE, None, steps
            with torch.no_grad():
                moved, momentum = optimizer.step(momentum, list(tensors.values()), grads)
            tensors = dict(zip(tensors, moved, strict=True))
            steps, total = steps + 1, total + float(loss @ loss.new_tensor(shares))
            window.append(float(loss[-1]))
            if len(window) == WINDOW:
                mean, window = sum(window) / WINDOW, []
                worse, lowest = (0, mean) if mean < lowest else (worse + 1, lowest)
        return tensors, Outcome.ADAPTED, torch.tensor(total / steps, device="cpu"), steps

    def _gradient(
        self, engine: Engine, state: State, held: list[dict[str, Tensor]], shares: list[float]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The loss on a draw of S and of T, in one forward: no layer mixes samples."""
        draws = []
        for own in held:
            count, device = len(own["labels"]), own["labels"].device
            draws.append(torch.randint(count, (BATCH,), generator=engine.generator, device=device))
        inputs = torch.cat([own["inputs"][d] for own, d in zip(held, draws, strict=True)])
        with torch.enable_grad():
            evidence = Evidence(engine, state, engine.leaves(state), inputs)
            parts = at_least_single(evidence.logits).split(BATCH)
            losses = [
                F.cross_entropy(part, own["labels"][d])
                for part, own, d in zip(parts, held, draws, strict=True)
            ]
            loss = sum(s * value for s, value in zip(shares, losses, strict=True))
            assert isinstance(loss, Tensor)
            engine.backwards += len(inputs)
            return losses, gradients(loss, evidence.tensors)


def _nothing(x: Tensor) -> dict[str, Any]:
    labels = torch.zeros(0, dtype=torch.long, device=x.device)
    weights = torch.zeros(0, device=x.device)
    return {
        "target": {"inputs": x[:0], "labels": labels, "weights": weights},
        "sure": {"inputs": x[:0], "labels": labels},
        "told": False,
    }


def _joined(
    old: dict[str, Tensor], more: dict[str, Tensor], capacity: int | None
) -> dict[str, Tensor]:
    joined = {name: torch.cat([value, more[name]]) for name, value in old.items()}
    if capacity is None or len(joined["labels"]) <= capacity:
        return joined
    return {name: value[-capacity:].clone() for name, value in joined.items()}


@register("method", paper="simatta")
def simatta(
    *,
    oracle: Oracle | None = None,
    budget: int = 300,
    lr: float = 1e-3,
    e_high: float = 1e-2,
    e_low: float = 1e-4,
    clusters: int = 10,
    growth: int = 1,
    cold_start: int = 0,
    steps: int | None = None,
    capacity: int | None = None,
) -> Recipe:
    """Asks for the labels of few, diverse, uncertain samples, and learns from them and sure ones.

    Asking needs scikit-learn: `pip install 'testtime[active]'`. Each event tells, in `measured`, how
    many labels were `asked` for with the batch, how many `labels` there are in all, and how many
    were `refused` because the budget was spent. With a spent budget it goes on with the labels that
    it has; a `TesttimeWarning` says so once.

    Use when: somebody can label some tens of samples, and the shift is hard: an error of a quarter
    or more.

    Not when: the source is already right nine times in ten: learning from so few samples then costs
    accuracy. Nor where inputs may not be kept, or every batch must be answered in the same time: it
    trains until the loss stands still.

    Args:
        oracle: `oracle(indices, inputs)` gives the labels of `inputs` (n, ...), as n whole numbers
            in the same order; `indices` (n,) are their places in the stream, counted from 0 since
            the adapter was built or reset. It is called at most once for each batch. An error that
            it raises reaches the caller, or with `deferred=True`, where it is called in another
            thread, the next call; nothing has changed then. None: no label is asked for, and the
            model learns from its sure answers alone. Adapters with another oracle can load a state.
        budget: labels that are asked for at most, since the source. The code knows no such bound;
            300 is about what it needs for a stream of the paper. A guard takes no label back.
        lr: step size of SGD with momentum 0.9, which starts anew with each batch; 1e-3 (code, PACS
            and VLCS; OfficeHome and Tiny-ImageNet-C: 1e-4).
        e_high: e_h, entropy from which a sample may be asked about; 1e-2 (code, PACS; Tiny-ImageNet-C:
            0.1).
        e_low: e_l, entropy under the source model below which its answer is taken for true; 1e-4
            (code, PACS; VLCS and OfficeHome: 1e-3, Tiny-ImageNet-C: 0.1).
        clusters: K at first; 10 (code).
        growth: what each batch adds to K; 1 (code).
        cold_start: while there are fewer sure samples, T weighs at most 0.2; 0 (code, PACS; VLCS:
            100).
        steps: steps on each batch at most; None (code, PACS; Tiny-ImageNet-C: 10) is 2,000.
        capacity: sure samples that are remembered at most, the oldest are forgotten first. None: all,
            as in the code; up to 100 inputs a batch then stay in memory.

    Statistics of normalisation stay the source's, as the code freezes them for its ResNet-18. Beside
    the budget three details are ours: the sample to ask about is the nearest of the cluster itself
    (the code takes the nearest of all, and drops it where it is an old one), every window has five
    steps (the code leaves out the loss of each sixth), and 2,000 steps are enough (in the code the
    loss of a T of one sample falls for ten times as many, as no draw differs).

    Raises:
        MissingExtra: an oracle is given and scikit-learn is not installed.

    Example:
        >>> import torch
        >>> answers = {"asked": 0}
        >>> def oracle(indices, inputs):
        ...     answers["asked"] += len(indices)
        ...     return torch.zeros(len(indices), dtype=torch.long)
        >>> from testtime import adapt
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> adapter = adapt(model, "simatta", oracle=oracle, budget=12, steps=3)
        >>> adapter(torch.randn(50, 4)).shape, answers["asked"]
        (torch.Size([50, 3]), 10)

    Reference: Gui, Li, Ji, Active Test-Time Adaptation: Theoretical Analyses and An Algorithm,
        ICLR 2024.
    """
    whole(0, budget=budget, growth=growth, cold_start=cold_start)
    whole(1, clusters=clusters)
    for name, value in (("steps", steps), ("capacity", capacity)):
        if value is not None:
            whole(1, **{name: value})
    if e_high != math.inf:
        in_range(0, e_high=e_high)
    in_range(0, e_low=e_low)
    if oracle is not None and not callable(oracle):
        raise OptionError(f"oracle is {oracle!r}; expected a function of indices and inputs")
    if oracle is not None and find_spec("sklearn") is None:
        raise MissingExtra("scikit-learn", "active")
    return Recipe(
        scope=all_parameters,
        procedure=ActiveLearning(
            oracle=oracle, budget=budget, e_high=e_high, e_low=e_low, clusters=clusters,
            growth=growth, cold_start=cold_start, steps=steps, capacity=capacity,
        ),
        optimizer=SGD(lr=lr, momentum=0.9),
    )  # fmt: skip
