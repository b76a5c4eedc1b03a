"""The one loop: forward, answer, learn. Every method of the library runs in it."""

import math
from collections.abc import Callable, Generator, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from testtime._core.arrays import at_least_single
from testtime._core.outcomes import Outcome
from testtime._core.seeds import generator
from testtime.adaptation import learning
from testtime.adaptation.evidence import Evidence
from testtime.adaptation.kernels.replay import Recorded
from testtime.adaptation.layers import NormLayer, device_of
from testtime.adaptation.loan import Loan
from testtime.adaptation.outputs import read_logits, with_logits
from testtime.adaptation.parts.prediction import from_teacher, student
from testtime.adaptation.parts.statistics import Averages, RunningStatistics, SourceStatistics
from testtime.adaptation.ranks import Ranks
from testtime.adaptation.recipe import Recipe, describe, reads
from testtime.adaptation.shortcuts import SOME, Shortcuts
from testtime.adaptation.state import State, rejoined
from testtime.adaptation.steps import Step, Steps, ended
from testtime.measures.entropy import entropy


class Engine:
    """Runs a recipe on a model. Of a stream it holds the random generator alone, set to its state
    before each step; what else it holds is of the model, or counts passes.

    Args:
        model: the caller's model; borrowed.
        recipe: the method.
        norms: the model's normalisation layers in order of execution.
        known: what is known of the source data: need -> tensors by name.
        seed: of the random parts.
        ranks: the processes that adapt together.
        feature_layer: the layer whose input are the features, once the model was seen to run.

    Attributes:
        names: of the tensors that adapt; a budget leaves some out.
        only_norms: whether these are scales and shifts of normalisation layers alone.
        hasty: whether the next update is deferred, and nobody waits for one before it: its answer
            may then come from a forward without a graph, and one with a graph run behind it, as
            may what source model and teacher say.
        shortcuts: that change no result, and whether a batch may take them.
        dense: whether the model was seen to answer each pixel.
        forwards, backwards: samples that went through the model so far.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        norms: list[NormLayer],
        *,
        known: dict[str, dict[str, Tensor]] | None = None,
        seed: int = 0,
        ranks: Ranks,
        feature_layer: nn.Module | None = None,
    ) -> None:
        self.recipe, self.ranks, self.seed, self.known = recipe, ranks, seed, known or {}
        self.loan = Loan(model, norms)
        scope: Any = recipe.scope
        found = {"head": feature_layer} if "head" in reads(scope) else {}
        # a tied tensor adapts once
        chosen: list[str] = scope(model, norms, **found)
        own = (self.loan.canonical.get(name, name) for name in chosen)
        self.names: list[str] = list(dict.fromkeys(own))
        whole = model.named_parameters() if getattr(recipe.teacher, "whole", False) else ()
        self._whole = [name for name, parameter in whole if parameter.is_floating_point()]
        scales_and_shifts = {name for layer in norms for name in layer.tensors}
        self.only_norms = scales_and_shifts.issuperset(self.names)
        self.shortcuts = Shortcuts(recipe, self.loan, norms, ranks)
        self.hasty = self.dense = False
        self.feature_layer = feature_layer
        self.device = device_of(model)
        self.generator = generator(seed, "adapter", device=self.device)
        self.reads_features = any(map(recipe.asks_for, ("features", "augmented_features")))
        self.forwards = self.backwards = 0

    # --- states -------------------------------------------------------------------------------

    @property
    def followed(self) -> list[str]:
        """What a teacher averages: what adapts, then what its kind averages with itself."""
        return list(dict.fromkeys([*self.names, *self._whole]))

    def source_tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The model's own values of what adapts; float32 where the model is in half precision."""
        return {name: at_least_single(self.loan.source(name)) for name in names}

    def fresh(self) -> State:
        """The state of a stream that begins: all at the source."""
        recipe = self.recipe
        with self.loan.lock:  # another adapter may have tensors in the model's places
            tensors, averages = self.source_tensors(self.names), self._source_averages()
            teacher = self.source_tensors(self.followed)
        beside = {}
        # nothing is known yet to engines that are to find it out, in fit_source
        if recipe.start is not None and self.known:
            tensors, teacher = recipe.start(self.known)
        if recipe.beside is not None and self.known:
            beside = recipe.beside.init(self.seed, self.device, self.known)
        learns = [*tensors.values(), *beside.values()]
        return State(
            tensors=tensors,
            beside=beside,
            optimizer=recipe.optimizer.init(learns) if recipe.optimizer else {},
            averages=averages,
            teacher=teacher if recipe.teacher else None,
            teacher_averages=averages if recipe.teacher else None,
            selection=[p.init() if hasattr(p, "init") else None for p in recipe.selections],
            generator=generator(self.seed, "adapter", device=self.device).get_state(),
            method=describe(recipe),
        )

    def due(self, state: State) -> State:
        """The state a step begins with: the source's where the recipe says so."""
        every = self.recipe.reset_every
        if state.steps and (self.recipe.episodic or (every and state.steps % every == 0)):
            return rejoined(self.fresh(), state)
        return state

    def _source_averages(self) -> Averages | None:
        if not isinstance(self.recipe.statistics, RunningStatistics):
            return None
        averages: Averages = {"seen": torch.zeros((), dtype=torch.long, device="cpu")}
        for layer in self.loan.norms:
            moments = self.loan.source_moments(layer)
            averages[f"{layer.name}.mean"] = at_least_single(moments.mean.detach()).clone()
            averages[f"{layer.name}.var"] = at_least_single(moments.var.detach()).clone()
        return averages

    # --- forwards -----------------------------------------------------------------------------

    def run(
        self,
        x: Tensor,
        tensors: dict[str, Tensor],
        *,
        averages: Averages | None = None,
        learn: bool = True,
        tap: Callable[[], Any] | None = None,
        groups: int = 1,
        exact: bool = False,
    ) -> tuple[Any, Averages | None]:
        """One forward of the model with other tensors in its places; arguments as of `Loan.run`."""
        self.forwards += len(x)
        return self.loan.run(
            x, tensors, self.recipe.statistics,
            averages=averages, learn=learn, ranks=self.ranks, tap=tap,
            lean=self.only_norms and torch.is_grad_enabled(), activations=self.recipe.activations,
            groups=groups, exact=exact,
        )  # fmt: skip

    def answer(self, evidence: Evidence) -> tuple[Any, Tensor]:
        """The output to answer with, and its logits as rows."""
        logits = evidence.ask(self.recipe.prediction)
        if self.recipe.prediction is student:
            return evidence.output, logits
        if self.recipe.prediction is from_teacher:
            return evidence.teacher_output, logits
        return with_logits(evidence.output, logits), logits

    def predict(self, x: Tensor, state: State) -> tuple[Any, Tensor]:
        """What a step would answer, without learning."""
        if state.generator is not None:
            self.generator.set_state(state.generator)
        with torch.no_grad():
            if hasattr(self.recipe.procedure, "predict"):
                return self.recipe.procedure.predict(self, x, state)
            return self.answer(Evidence(self, state, state.tensors, x, learn=False))

    # --- steps --------------------------------------------------------------------------------

    def step(self, x: Tensor, state: State) -> Step:
        """Answers a batch and learns from it."""
        return ended(self.steps(x, state))

    def steps(self, x: Tensor, state: State) -> Steps:
        """The same in two halves where the answer comes first: it is given before the rest runs.

        The rest may run in another thread. Nothing is given early where the answer comes last.
        """
        recipe = self.recipe
        if state.generator is not None:
            self.generator.set_state(state.generator)
        if recipe.procedure is not None:
            done = recipe.procedure.step(self, x, state)
            if isinstance(done, Generator):
                done = yield from done
        elif not recipe.learns:
            done = self._only_answer(x, state)
        elif recipe.steps > 1 or recipe.answer_after:
            done = self._learn_and_answer(x, state)
        else:
            done = yield from self._one_step(x, state)
        return self.settled(done, x, state)

    def spared(self, x: Tensor, state: State) -> Step:
        """Answers a batch as `predict` does, and learns nothing from it."""
        output, logits = self.predict(x, state)
        measured: dict[str, Any] = {"entropy": entropy(logits).mean(), "used": 0}
        return self.settled(Step(output, logits, state, Outcome.NOT_DUE, measured), x, state)

    def frozen(self, x: Tensor, *, tap: Callable[[], Any] | None = None) -> tuple[Any, Tensor]:
        """What the source model answers, and its logits."""
        self.forwards += len(x)
        with torch.no_grad():
            output, _ = self.loan.run(
                x, {}, SourceStatistics(), ranks=self.ranks, tap=tap, exact=True
            )
        if hasattr(self.recipe.procedure, "read"):  # of several experts, who answer as one
            logits = self.recipe.procedure.read(output)
            return logits, logits
        return output, read_logits(output)

    def settled(self, done: Step, x: Tensor, state: State) -> Step:
        """The step with what is the same for every step: counts, and the random state."""
        if self.recipe.outlier is not None:
            done.measured["outlier"] = self.recipe.outlier(done.logits.detach())
        settled = replace(
            done.state,
            generator=self.generator.get_state(),
            gate=state.gate,
            account=state.account,
            guard=state.guard,
            steps=state.steps + 1,
            samples=state.samples + len(x),
        )
        return done._replace(state=settled)

    def _only_answer(self, x: Tensor, state: State) -> Step:
        outcome = Outcome.ANSWERED
        with torch.no_grad():
            if isinstance(self.recipe.statistics, RunningStatistics):
                _, averages = self.run(x, state.tensors, averages=state.averages, learn=True)
                told = [
                    t.isfinite().all() for name, t in (averages or {}).items() if name != "seen"
                ]
                if not told or torch.stack(told).all():
                    state = replace(state, averages=averages)
                else:
                    outcome = Outcome.NON_FINITE
        output, logits = self.predict(x, state)
        return Step(output, logits, state, outcome, {"entropy": entropy(logits).mean()})

    def _learn_and_answer(self, x: Tensor, state: State) -> Step:
        done = ended(self._one_step(x, state))
        for _ in range(self.recipe.steps - 1):
            done = ended(self._one_step(x, done.state))
        if self.recipe.answer_after:
            state = replace(done.state, generator=self.generator.get_state())
            output, logits = self.predict(x, state)
            done.measured["entropy"] = entropy(logits).mean()
            return done._replace(output=output, logits=logits)
        return done

    def _one_step(self, x: Tensor, state: State) -> Steps:
        evidence = Evidence(self, state, self.leaves(state), x)
        others = {"source", "teacher"}.intersection(reads(self.recipe.prediction))
        alone = self.hasty and self.ranks.alone and not others  # ranks ask in one order
        if not alone:
            self._look_first(evidence)
        if self.recipe.prediction is from_teacher:
            output, logits = self.answer(evidence)
            yield output
            self._see(evidence)
        else:
            twice = self._see(evidence, hasty=self.hasty)
            output, logits = self.answer(evidence)
            yield output
            if twice:
                evidence.forget()
            if alone:
                self._look_first(evidence)
        state, outcome, measured = self.learn(evidence)
        answered = self.recipe.prediction is student
        uncertainty = evidence.entropies if answered else entropy(logits)
        measured["entropy"] = uncertainty.detach().mean()
        return Step(output, logits.detach(), state, outcome, measured)

    def _see(self, evidence: Evidence, *, hasty: bool = False) -> bool:
        """The student's forward: with a graph, unless few will teach or its answer is awaited.

        True where a second forward must make the graph of all.
        """
        x, teaching = evidence.inputs, evidence.state.teaching
        few = self.shortcuts.few(x, teaching)
        sooner = self.shortcuts.sooner(evidence) if hasty and not few else None
        twice = sooner is not None and sooner.twice
        if twice:
            evidence.recorded = Recorded(len(x), self.loan.dear_layers, wide=math.inf)
        elif few and (teaching or 0) >= SOME:
            evidence.recorded = Recorded(len(x), self.loan.dear_layers)
        graph = not few and not twice
        with sooner or nullcontext(), torch.set_grad_enabled(graph):
            _ = evidence.logits
        return twice

    def _look_first(self, evidence: Evidence) -> None:
        """Asks source model and teacher before the student's graph takes its memory.

        An answer that is awaited, and needs neither, comes before them. The teacher waits where
        something else draws by chance before its views.
        """
        recipe = self.recipe
        with torch.no_grad():
            if recipe.asks_for("source"):
                _ = evidence.source
            if recipe.asks_for("teacher") and not (recipe.augment or recipe.asks_for("generator")):
                _ = evidence.teacher

    def leaves(self, state: State) -> dict[str, Tensor]:
        """The adapted tensors as leaves of a new graph."""
        return learning.as_leaves(state.tensors)

    def learn(self, evidence: Evidence) -> learning.Learned:
        """One step on what the evidence shows: the state after it, and what became of it."""
        return learning.learn(evidence)

    def gradient(self, loss: Tensor, tensors: dict[str, Tensor], *, samples: int) -> list[Tensor]:
        """Gradients of these leaves, and of nothing else; zero for those the loss never meets."""
        self.backwards += samples
        grads = learning.gradients(loss, tensors)
        if self.ranks.alone:
            return grads
        share = 1.0 / torch.distributed.get_world_size(self.ranks.group)
        total = self.ranks.sum(torch.cat([grad.flatten() for grad in grads])) * share
        parts = total.split([grad.numel() for grad in grads])
        return [part.view_as(grad).to(grad) for part, grad in zip(parts, grads, strict=True)]
