"""What parts may see of a batch; the costly pieces are made when somebody asks, once."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from testtime.adaptation.kernels.calls import Watching
from testtime.adaptation.kernels.replay import Recorded, Replayed
from testtime.adaptation.loan import features_of
from testtime.adaptation.look import same
from testtime.adaptation.outputs import read_logits, rows
from testtime.adaptation.recipe import reads
from testtime.measures.entropy import entropy

if TYPE_CHECKING:
    from testtime.adaptation.engine import Engine
    from testtime.adaptation.state import State


class Evidence:
    """A batch, the adapted model's output for it, and whatever else the parts of a recipe read.

    Args:
        engine: runs the model.
        state: of the stream, before the step.
        tensors: that the model is run with; leaves when a gradient is wanted.
        inputs: the batch.
        student_inputs: what the student sees in its place, e.g. changed copies.
        ages: how long the samples have been in memory, in units of its capacity.
        learn: whether moving averages take the batch in.
        tapped: whether features are recorded; None: when a part reads them.

    Attributes:
        differentiated: samples that a backward goes through, changed copies included.
        recorded: outputs of layers that the student's forward keeps, for a second one.
        replayed: such outputs, which this forward takes instead of computing them.
    """

    def __init__(
        self,
        engine: "Engine",
        state: "State",
        tensors: dict[str, Tensor],
        inputs: Tensor,
        *,
        student_inputs: Tensor | None = None,
        ages: Tensor | None = None,
        learn: bool = True,
        tapped: bool | None = None,
    ) -> None:
        self.engine, self.state, self.tensors, self.inputs = engine, state, tensors, inputs
        self.ages, self.learn = ages, learn
        self.generator, self.ranks = engine.generator, engine.ranks
        self.student_inputs = inputs if student_inputs is None else student_inputs
        self.averages = state.averages
        self.teacher_averages = state.teacher_averages
        self._tapped = engine.reads_features if tapped is None else tapped
        self.beside = {n: t.detach().requires_grad_() for n, t in state.beside.items()}
        self.weights: Tensor | None = None
        self.differentiated = len(self.student_inputs)
        self.recorded: Recorded | None = None
        self.replayed: Replayed | None = None
        self._features: list[Tensor] = []
        self._augmented_features: list[Tensor] = []

    @cached_property
    def output(self) -> Any:
        """The adapted model's output, as the model returns it."""
        output, self.averages = self.engine.run(
            self.student_inputs,
            {**self._beside_what_adapts(), **self.tensors},
            averages=self.state.averages,
            learn=self.learn,
            tap=lambda: self._tap(self._features, self.replayed or self.recorded),
            exact=not self.tensors,
        )
        return output

    def _beside_what_adapts(self) -> dict[str, Tensor]:
        """What a teacher averages with itself, as leaves whose gradient nobody reads.

        Where more than normalisation layers adapts, it asks for one in published code, and torch
        multiplies by such weights otherwise.
        """
        engine = self.engine
        asks = torch.is_grad_enabled() and not engine.only_norms
        others = engine.followed[len(engine.names) :] if asks else ()
        return {n: t.requires_grad_() for n, t in engine.source_tensors(others).items()}

    @cached_property
    def logits(self) -> Tensor:
        """The adapted model's logits, one row a sample (or pixel)."""
        return rows(read_logits(self.output))

    @cached_property
    def entropies(self) -> Tensor:
        """Entropy of each of the adapted model's predictions, in nats."""
        return entropy(self.logits)

    @cached_property
    def teacher_output(self) -> Any:
        """The teacher's output for the batch; averaged over views where the recipe says so."""
        with torch.no_grad():
            views = self.engine.recipe.views
            if views is not None and views.wanted(self):
                return views.average(self, self._teach)
            return self._teach(self.inputs)

    def _teach(self, inputs: Tensor, groups: int = 1) -> Any:
        with self.engine.loan.in_full():
            output, self.teacher_averages = self.engine.run(
                inputs, self.state.teacher or {}, averages=self.state.teacher_averages,
                learn=self.learn, groups=groups,
            )  # fmt: skip
        return output

    @cached_property
    def teacher(self) -> Tensor:
        """The teacher's logits."""
        return rows(read_logits(self.teacher_output))

    @cached_property
    def source(self) -> Tensor:
        """The source model's logits, under the same kind of statistics."""
        with torch.no_grad():
            output, _ = self.engine.run(self.inputs, {})
        return rows(read_logits(output))

    @property
    def forward(self) -> Callable[[Tensor], Tensor]:
        """Runs the adapted model on other inputs, without a gradient, and gives logits."""
        return torch.no_grad()(self.forward_with_gradient)

    @property
    def forward_with_gradient(self) -> Callable[[Tensor], Tensor]:
        """Runs the adapted model on other inputs, for a loss, and gives logits."""

        def run(inputs: Tensor) -> Tensor:
            self._differentiates(inputs)
            with self.engine.loan.in_full():
                output, _ = self.engine.run(
                    inputs, self.tensors, averages=self.state.averages, learn=self.learn
                )
            return rows(read_logits(output))

        return run

    @property
    def features(self) -> Tensor:
        """The input (B, d) of the model's last linear layer."""
        _ = self.output
        return self._told(self._features)

    @cached_property
    def augmented(self) -> Tensor:
        """The adapted model's logits for a changed copy of the batch, made by `recipe.augment`."""
        changed = self.engine.recipe.augment(self.inputs, self.generator)
        self._differentiates(changed)
        output, _ = self.engine.run(
            changed,
            self.tensors,
            averages=self.state.averages,
            learn=self.learn,
            tap=lambda: self._tap(self._augmented_features),
        )
        return rows(read_logits(output))

    def _differentiates(self, inputs: Tensor) -> None:
        """Counts what a backward goes through besides the student's batch."""
        if torch.is_grad_enabled():
            self.differentiated += len(inputs)

    @property
    def augmented_features(self) -> Tensor:
        """The features of that copy."""
        _ = self.augmented
        return self._told(self._augmented_features)

    def _told(self, recorded: list[Tensor]) -> Tensor:
        return features_of(self.engine.loan.model, recorded, samples=len(self.inputs))

    @property
    def learning(self) -> dict[str, Tensor]:
        """All that gets a gradient: the adapted tensors, and what learns beside them."""
        return {**self.tensors, **self.beside}

    @property
    def known(self) -> dict[str, dict[str, Tensor]]:
        """What is known of the source data: need -> tensors by name."""
        return self.engine.known

    @property
    def source_tensors(self) -> dict[str, Tensor]:
        """The source model's values of what adapts."""
        return self.engine.source_tensors(self.tensors)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.logits.shape[-1]

    def forget(self) -> None:
        """Runs the student anew when it is next asked for, with what its forward has kept."""
        if self.recorded is not None:
            self.replayed, self.recorded = Replayed(self.recorded), None
            self.engine.forwards -= len(self.student_inputs)  # the same forward, not one more
        for name in ("output", "logits", "entropies"):
            self.__dict__.pop(name, None)
        self._features.clear()

    def only(self, chosen: Tensor) -> "Evidence":
        """What the samples at the chosen places alone show, run anew and with a graph.

        What the forward of all samples has kept for it is not computed again.
        """
        few = Evidence(
            self.engine, self.state, self.tensors, self.inputs[chosen], learn=False, tapped=False
        )
        few.beside = self.beside
        if self.recorded is not None:
            few.replayed, self.recorded = Replayed(self.recorded, chosen), None
        return few

    @contextmanager
    def _tap(self, into: list[Tensor], calls: Watching | None = None) -> Iterator[None]:
        """While it lasts, features are recorded where a part reads them, and calls are watched."""
        recording = self.engine.loan.recording(self.engine.feature_layer, into)
        with recording if self._tapped else nullcontext(), calls or nullcontext():
            yield

    def ask(self, part: Callable[..., Any], **more: Any) -> Any:
        """Calls a part with what its signature names."""
        return part(**{name: getattr(self, name) for name in reads(part)}, **more)


def answers_without_graph(evidence: Evidence) -> bool | None:
    """Whether the student answers a batch without a graph as it does with one, to the last bit.

    It need not: attention may take short cuts, and torch multiply otherwise, where nothing asks for
    a gradient. None where an answer holds NaN, so that nothing can be told.

    Args:
        evidence: of the batch, whose student has not run.
    """
    engine, state, x = evidence.engine, evidence.state, evidence.inputs
    told: list[Tensor] = []
    for graph in (False, True):
        twin = Evidence(engine, state, engine.leaves(state), x, learn=evidence.learn)
        if not graph:
            twin.recorded = Recorded(len(x), engine.loan.dear_layers, wide=math.inf)
        with torch.set_grad_enabled(graph):
            told.append(twin.logits.detach())
        engine.forwards -= len(x)  # no part of the step
    return same(*told)
