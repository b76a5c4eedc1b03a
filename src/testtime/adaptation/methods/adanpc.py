"""AdaNPC: a non-parametric classifier for test-time adaptation.

before: memory M = normalised source features and their labels
for each batch x:
    g = features of x, normalised
    for each sample n:
        s_j = cosine of g_n with its k nearest of M,  w = softmax(s / tau)
        score_nc = min(1, sum of w_j over neighbours of class c + 1e-5)
    M <- M with (g_n, argmax score_n) for all n whose max softmax(score_n) >= beta
    return ln score

AdaNPC-BN:  g = features * scale + shift, normalised; scale = 1 and shift = 0 at first
    gamma times:  score as above,  (scale, shift) <- Adam on mean_n H(softmax(score_n))
    M and the answer are those of the last score
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from testtime._core.arrays import at_least_single
from testtime._core.errors import OptionError
from testtime._core.options import in_range, whole
from testtime._core.outcomes import Outcome
from testtime._core.registry import register
from testtime.adaptation.engine import Engine
from testtime.adaptation.evidence import Evidence
from testtime.adaptation.learning import as_leaves, finite
from testtime.adaptation.outputs import with_logits
from testtime.adaptation.parts.knowledge import FeatureMemory
from testtime.adaptation.parts.optimizer import Adam
from testtime.adaptation.recipe import Recipe
from testtime.adaptation.state import State
from testtime.adaptation.steps import Step
from testtime.measures.entropy import entropy

Confidence = Literal["softmax", "score"]


def vote(similarities: Tensor, labels: Tensor, *, k: int, tau: float, classes: int) -> Tensor:
    """Share of each class (B, C) in the votes of the k most similar; at least 1e-5, at most 1.

    Args:
        similarities: of each sample to each that is remembered, (B, M).
        labels: of those, (M,).
        k: neighbours; all where there are fewer.
        tau: temperature of the weights softmax(similarity / tau).
        classes: C.

    Example:
        >>> vote(torch.tensor([[0.9, 0.8, 0.9]]), torch.tensor([0, 1, 1]), k=2, tau=0.1, classes=2)
        tensor([[0.5000, 0.5000]])
    """
    nearest, places = similarities.topk(min(k, similarities.shape[1]))
    weights = (nearest / tau).softmax(-1)
    scores = weights.new_zeros(len(weights), classes).scatter_add_(1, labels[places], weights)
    return (scores + 1e-5).clamp(max=1.0)


@dataclass(frozen=True)
class Rescaling:
    """A scale and a shift of each feature, which learn beside the model; 1 and 0 at first."""

    def init(
        self, seed: int, device: torch.device, known: dict[str, dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """As many as there are features."""
        size = known["feature_memory"]["features"].shape[1]
        return {"scale": torch.ones(size, device=device), "shift": torch.zeros(size, device=device)}


@dataclass(frozen=True, kw_only=True)
class NeighbourVote:
    """Answers with the vote of neighbours, and remembers the samples that it is sure of.

    Args:
        k: neighbours that vote.
        tau: temperature of their weights.
        beta: confidence from which a sample is remembered.
        confidence: how it is measured: largest softmax of the scores, or largest score.
        capacity: test samples that are remembered at most.
        gamma: steps of the features' scale and shift on each batch.
    """

    k: int
    tau: float
    beta: float
    confidence: Confidence
    capacity: int | None
    gamma: int = 0
    dense: ClassVar[bool] = False
    minimises: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[FeatureMemory]] = (FeatureMemory(),)
    passes: ClassVar[tuple[int, int]] = (1, 0)

    def step(self, engine: Engine, x: Tensor, state: State) -> Step:
        """Answers, then remembers."""
        told: dict[str, Any] = {"used": 0}
        with torch.no_grad():
            seen = Evidence(engine, state, state.tensors, x, tapped=True)
            learnt, features, scores, told["loss"] = self._rescaled(engine, seen, state)
            answer = scores.log()
            output, told["entropy"] = with_logits(seen.output, answer), entropy(answer).mean()
            if learnt is None:
                return Step(output, answer, state, Outcome.NON_FINITE, told)
            features, scores = engine.ranks.gather(features), engine.ranks.gather(scores)
            sure = (scores.softmax(-1) if self.confidence == "softmax" else scores).amax(-1)
            kept = (sure >= self.beta).nonzero().flatten()
            old, old_labels = _remembered(state, features)
            memory = {
                "features": torch.cat([old, features[kept]]),
                "labels": torch.cat([old_labels, scores.argmax(-1)[kept]]),
            }
            if self.capacity is not None:
                # clones: a view would keep the forgotten ones in memory
                memory = {name: own[-self.capacity :].clone() for name, own in memory.items()}
        told["used"], told["remembered"] = len(kept), len(memory["labels"])
        outcome = Outcome.STORED if told["used"] else Outcome.NOTHING_RELIABLE
        outcome = Outcome.ADAPTED if self.gamma else outcome
        return Step(output, answer, replace(learnt, memory=memory), outcome, told)

    def _rescaled(
        self, engine: Engine, seen: Evidence, state: State
    ) -> tuple[State | None, Tensor, Tensor, Tensor | None]:
        """The state after gamma steps, the features and scores before the last, and its loss.

        No state where a step is no number: then the features and scores are those before the first.
        """
        if not self.gamma:
            return (state, *self._vote(seen, state, {}), None)
        optimizer, learnt, votes = engine.recipe.optimizer, state, list[tuple[Tensor, Tensor]]()
        loss: Tensor | None = None
        assert optimizer is not None
        for _ in range(self.gamma):
            with torch.enable_grad():
                leaves = as_leaves(learnt.beside)
                features, scores = self._vote(seen, state, leaves)
                loss = engine.ranks.mean(entropy(scores))
                grads = engine.gradient(loss, leaves, samples=0)  # none through the network
            votes, loss = [*votes[:1], (features.detach(), scores.detach())], loss.detach()
            if not finite(loss, grads):
                return (None, *votes[0], loss)
            now = list(learnt.beside.values())
            moved, moments = optimizer.step(learnt.optimizer, now, grads)
            beside = dict(zip(leaves, moved, strict=True))
            learnt = replace(learnt, beside=beside, optimizer=moments)
        return (learnt, *votes[-1], loss)

    def predict(self, engine: Engine, x: Tensor, state: State) -> tuple[Any, Tensor]:
        """The vote alone."""
        seen = Evidence(engine, state, state.tensors, x, tapped=True)
        answer = self._vote(seen, state, state.beside)[1].log()
        return with_logits(seen.output, answer), answer

    def _vote(
        self, seen: Evidence, state: State, rescaling: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Features of length one, and their scores."""
        features = at_least_single(seen.features)
        if rescaling:
            features = features * rescaling["scale"] + rescaling["shift"]
        features = F.normalize(features, dim=-1)
        source = seen.known["feature_memory"]
        own, own_labels = _remembered(state, features)
        similar = torch.cat([features @ source["features"].to(features).T, features @ own.T], 1)
        labels = torch.cat([source["labels"], own_labels])
        return features, vote(similar, labels, k=self.k, tau=self.tau, classes=seen.classes)


def _remembered(state: State, like: Tensor) -> tuple[Tensor, Tensor]:
    if state.memory is None:
        return like[:0], torch.zeros(0, dtype=torch.long, device=like.device)
    return state.memory["features"].to(like), state.memory["labels"]


@register("method", paper="adanpc")
def adanpc(
    *,
    k: int = 100,
    tau: float = 0.1,
    beta: float = 0.1,
    confidence: Confidence = "softmax",
    capacity: int | None = None,
    gamma: int = 0,
    lr: float = 5e-5,
) -> Recipe:
    """Answers with a vote of the nearest remembered samples, and remembers those it is sure of.

    Needs the features and labels of source samples: `tt.fit_source(model, loader,
    methods=["adanpc"])`. Where the loader gives no labels, the model's predictions serve. The
    model stays as it is, and nothing is differentiated. Answers are logarithms of the scores.

    Use when: the shift comes little by little, so that the samples of one domain are near enough to
    label those of the next; and where a model may not be changed.

    Not when: features may not be kept, or the first shifted batch is already far from the source:
    wrong labels are remembered too. Without a `capacity` the memory grows with the stream.

    Args:
        k: neighbours that vote; 100 (code; its grid begins at 1).
        tau: temperature of their weights; 0.1 (code; grid 0.01 to 0.5).
        beta: confidence from which a sample is remembered; 0.1 (code; grid 0, 0.25, 0.75 and 1.1,
            which remembers none).
        confidence: softmax: largest softmax of the scores, as in the code. Scores being shares,
            it lies between 1/C and e/(e + C - 1): 0.23 for ten classes, so that 0.1 accepts every
            sample there. score: the largest score itself, from 1/C to 1.
        capacity: test samples that are remembered at most, the oldest are forgotten first; source
            samples stay. None: all, as in the code.
        gamma: AdaNPC-BN, where it is above 0: on each batch as many steps of a scale and a shift of
            the features, which lower the entropy of the vote; 1 or 3 (code). The code gives it
            k 1 or 5.
        lr: step size of Adam for them; 5e-5, the rate that the code trains a ResNet with, times an
            alpha out of 0.1, 1 and 10 (code).

    The paper trains the network with the loss of the vote; here any network will do. The code's
    batch normalisation runs in evaluation mode with statistics that nothing sets: it is the scale
    and shift alone. It remembers the samples anew at each of the gamma steps, so that from the
    second step on each votes for itself; here they are remembered once.

    Example:
        >>> import torch
        >>> from testtime import adapt, fit_source
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> x, y = torch.randn(90, 4), torch.arange(90) % 3
        >>> adapter = adapt(model, "adanpc", source=fit_source(model, [(x, y)], methods="adanpc"))
        >>> adapter(torch.randn(16, 4)).shape
        torch.Size([16, 3])
        >>> len(adapter.snapshot().memory["labels"])
        16

    Reference: Zhang et al., AdaNPC: Exploring Non-Parametric Classifier for Test-Time Adaptation,
        ICML 2023.
    """
    whole(1, k=k)
    whole(0, gamma=gamma)
    in_range(0, tau=tau, beta=beta)
    if tau == 0:
        raise OptionError("tau is 0; expected a number above 0")
    if capacity is not None:
        whole(1, capacity=capacity)
    if confidence not in ("softmax", "score"):
        raise OptionError(f"confidence is {confidence!r}; expected 'softmax' or 'score'")
    voting = NeighbourVote(
        k=k, tau=tau, beta=beta, confidence=confidence, capacity=capacity, gamma=gamma
    )
    optimizer = Adam(lr=lr)
    if not gamma:
        return Recipe(procedure=voting)
    return Recipe(procedure=voting, beside=Rescaling(), optimizer=optimizer)
