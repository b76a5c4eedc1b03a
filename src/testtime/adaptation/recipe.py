"""A method as a value: a recipe of named parts, each of which answers one question."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from testtime._core.errors import OptionError
from testtime._core.options import whole
from testtime.adaptation.parts.knowledge import Need
from testtime.adaptation.parts.optimizer import Optimizer, SharpnessAware
from testtime.adaptation.parts.prediction import student
from testtime.adaptation.parts.scope import Scope, nothing
from testtime.adaptation.parts.statistics import RunningStatistics, SourceStatistics, Statistics

EVIDENCE = (
    "inputs", "logits", "entropies", "features", "augmented", "augmented_features", "teacher",
    "source", "forward", "forward_with_gradient", "weights", "classes", "generator", "ranks",
    "ages", "tensors", "source_tensors", "beside", "known",
)  # fmt: skip
"""What a part may ask to see, by naming it in its signature."""
CALLED = ("objective", "penalty", "prediction")
"""Parts that are single callables; selections and batch objectives may be several."""
LOSS = ("objective", "batch_objective", "penalty", "selection")
"""Parts that the loss is made of."""
OF_A_SAMPLE = frozenset({"logits", "entropies", "classes"})
"""Evidence that for one sample does not hang on the others."""
OF_TENSORS = frozenset({"tensors", "source_tensors", "known"})
"""Evidence that does not hang on the batch at all."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method: which tensors may change, what is minimised, who may teach, what is answered.

    Functions and `__call__` methods of parts name in their signature what they read, out of
    `EVIDENCE`; the engine provides just that, and runs a teacher, the source model or a further
    forward only for parts that ask.

    Args:
        scope: which tensors may change.
        statistics: what layers with stored statistics normalise with.
        objective: what is minimised, one value for each sample (dense logits: for each pixel).
        batch_objective: what is minimised besides, one value for the batch; all samples count. Of
            several (a tuple) the values add up.
        penalty: what is minimised besides, a function of the adapted tensors and of what is known.
        selection: which samples may teach, and how much: weights, 0 for those that may not. The
            objective is averaged over those that may. Of several selections (a tuple) the weights
            multiply.
        teacher: a moving average of the adapted model, which answers for the objective.
        views: changed copies that the teacher averages.
        augment: makes the one changed copy that parts see as `augmented`.
        restoration: returns adapted tensors towards the source after each step; it names what it
            reads, out of `tensors`, `source`, `grads`, `teacher` (lists) and `generator`; one that
            reads the teacher gives tensors and teacher.
        beside: learns along with the model's tensors, e.g. a projector: `init(seed, device, known)`
            gives tensors of its own by name, which parts read as `beside`.
        start: where a stream begins when that is not the source: `start(known)` gives the adapted
            tensors and the teacher's.
        recovery: when to give up and go back to the source.
        prediction: what is answered, as logits. One whose answers have another scale may have
            `to_scale(answers)`, which is what a guard is shown.
        outlier: says of each answer, from its logits, how likely its sample is of no known class;
            told in the events as `measured["outlier"]`.
        optimizer: how a step is taken.
        steps: steps on each batch.
        answer_after: whether the answer comes from a forward after the last step.
        procedure: a loop of the method's own, in place of the engine's; see below.
        episodic: whether every batch begins at the source.
        reset_every: batches after which the source is restored.
        activations: type in which what the backward needs of a forward is kept, such as
            `torch.bfloat16` for half the memory; None: as it was computed. Answers of a forward are
            the same; gradients are off by what the shorter type rounds, for bfloat16 some tenths of
            a percent. A state may go on under another type.

    A procedure is a frozen dataclass with `step(engine, x, state) -> Step`, or a generator that gives
    its output first, where that is known before the rest is done, and ends with the step. What it
    keeps is `state.memory`. It may also have:

    - `predict(engine, x, state) -> (output, logits)`: its answer, when that is not the prediction's.
    - `read(output) -> logits`: when the model answers with something else than logits.
    - `minimises`: names of the losses of this recipe that it minimises, when its loop does not leave
      that to the engine.
    - `passes`: (forward, backward) passes that a step costs for each sample.
    - `alone`: whether no batch teaches another, so that ranks have nothing to agree on.
    - `held(memory)`: the samples that it remembers, which those of a batch must fit.
    - `bought(old, new)`: the memory to go back to when a guard restores an old state, with what stays
      true of the new one.
    - `statistics_of(layer, places, canonical, adapting)`: what a layer of an exported copy uses.

    Any part may say what it `needs` to be known of the source data, and that it is not `dense`: not for
    logits of pixels. Views, an objective and a procedure may say that inputs must be images in [0, 1],
    as `pixels`.

    Example:
        >>> from dataclasses import replace
        >>> from testtime.adaptation.methods.tent import tent
        >>> from testtime.adaptation.parts.scope import all_parameters
        >>> everything = replace(tent(lr=1e-4), scope=all_parameters)  # a new method
    """

    scope: Scope = nothing
    statistics: Statistics = field(default_factory=SourceStatistics)
    objective: Callable[..., Any] | None = None
    batch_objective: Any = None
    penalty: Any = None
    selection: Any = None
    teacher: Any = None
    views: Any = None
    augment: Any = None
    restoration: Any = None
    beside: Any = None
    start: Any = None
    recovery: Any = None
    prediction: Callable[..., Any] = student
    outlier: Callable[[Tensor], Tensor] | None = None
    optimizer: Optimizer | None = None
    steps: int = 1
    answer_after: bool = False
    procedure: Any = None
    episodic: bool = False
    reset_every: int | None = None
    activations: torch.dtype | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        whole(1, steps=self.steps)
        if self.reset_every is not None:
            whole(1, reset_every=self.reset_every)
        if self.activations is not None and not (
            isinstance(self.activations, torch.dtype) and self.activations.is_floating_point
        ):
            raise OptionError(
                f"activations is {self.activations!r}; expected None or a floating point type, such "
                "as torch.bfloat16"
            )
        own = getattr(self.procedure, "minimises", LOSS)
        for name in LOSS:
            if name not in own and getattr(self, name) is not None:
                raise OptionError(
                    f"the loop of {type(self.procedure).__name__} has a loss of its own, and would "
                    f"pass over the {name} {describe(getattr(self, name))}; leave it out, or take a "
                    "method whose loss is made of the recipe's parts, such as tent or cotta"
                )
        if own and own != LOSS and not self.learns:
            raise OptionError(
                f"the loop of {type(self.procedure).__name__} minimises {' and '.join(own)}, and the "
                "recipe has none"
            )
        if self.learns and self.optimizer is None:
            raise OptionError("a recipe with an objective needs an optimizer; add optimizer=...")
        for question, part in self._callables():
            for name in reads(part):
                if name not in EVIDENCE:
                    raise OptionError(
                        f"the {question} {describe(part)} reads {name!r}, which nothing provides. "
                        f"A part may read: {', '.join(EVIDENCE)}"
                    )
                if name.startswith("augmented") and self.augment is None:
                    raise OptionError(
                        f"the {question} {describe(part)} reads the answers for changed copies, "
                        "but the recipe makes none; add augment=..."
                    )
                if name == "weights" and not self.selections:
                    raise OptionError(
                        f"the {question} {describe(part)} reads the weights of samples, but the "
                        "recipe selects none; add selection=..."
                    )
                if name == "teacher" and self.teacher is None:
                    raise OptionError(
                        f"the {question} {describe(part)} reads the teacher's logits, but the "
                        "recipe has no teacher; add teacher=MovingTeacher(...)"
                    )

    @property
    def learns(self) -> bool:
        """Whether there is anything to minimise."""
        return self.objective is not None or self.batch_objective is not None

    @property
    def needs(self) -> tuple[Need, ...]:
        """What must be known of the source data."""
        needs = (need for part in self._parts() for need in getattr(part, "needs", ()))
        return tuple(dict.fromkeys(needs))

    @property
    def selections(self) -> tuple[Any, ...]:
        """The selections, none, one or several."""
        return _several(self.selection)

    @property
    def batch_objectives(self) -> tuple[Any, ...]:
        """The objectives of a batch, none, one or several."""
        return _several(self.batch_objective)

    def _parts(self) -> list[Any]:
        several = ("selection", "batch_objective")
        own = [getattr(self, part.name) for part in fields(self) if part.name not in several]
        return [*own, *self.selections, *self.batch_objectives]

    def _callables(self) -> list[tuple[str, Callable[..., Any]]]:
        named = [(name, getattr(self, name)) for name in CALLED]
        named += [("selection", part) for part in self.selections]
        named += [("batch_objective", part) for part in self.batch_objectives]
        return [(name, part) for name, part in named if part is not None]

    def asks_for(self, name: str) -> bool:
        """Whether any part reads `name`."""
        return any(name in reads(part) for _, part in self._callables())

    @property
    def loss_by_sample(self) -> bool:
        """Whether the loss is a mean over samples that a selection chose, each by itself."""
        if self.objective is None or not self.selections or self.batch_objectives:
            return False
        again = self.selections if isinstance(self.optimizer, SharpnessAware) else ()
        read = {name for part in (self.objective, *again) for name in reads(part)} - {"ranks"}
        penalty = set(reads(self.penalty)) if self.penalty is not None else set()
        return read <= OF_A_SAMPLE and penalty <= OF_TENSORS

    @property
    def splits(self) -> bool:
        """Whether a part of a batch may teach, and the rest be answered as by `predict`, all the same.

        The student answers, before it learns, and no part of the recipe needs many samples at once.
        """
        own = self.procedure is None and self.teacher is None and self.prediction is student
        at_once = self.steps == 1 and not self.answer_after and not self.episodic
        return own and at_once and self.objective is not None and not self.batch_objectives

    @property
    def passes(self) -> tuple[float, float] | None:
        """The most forward and backward passes that a step costs, for each sample.

        Where samples that may not teach are left out of the backward, those that may take a further
        forward: fewer passes in all.

        A procedure tells it as `passes`; None when it does not.
        """
        if self.procedure is not None:
            return getattr(self.procedure, "passes", None)
        if not self.learns:
            return (2.0 if isinstance(self.statistics, RunningStatistics) else 1.0), 0.0
        again = sum(self.asks_for(name) for name in ("augmented", "forward_with_gradient"))
        asked = sum(self.asks_for(name) for name in ("source", "forward"))
        forwards = 1.0 + asked + again + (self.teacher is not None)
        if self.views is not None:  # of the teacher, and the source's confidence in the batch
            forwards += self.views.count
        rounds = self.steps * (2 if isinstance(self.optimizer, SharpnessAware) else 1)
        return rounds * forwards + self.answer_after, rounds * (1.0 + again)

    @property
    def dense(self) -> bool:
        """Whether every part can work on dense logits, where each pixel is a sample."""
        parts = all(getattr(part, "dense", True) for part in self._parts())
        return parts and self.augment is None  # a changed copy has its pixels elsewhere


def _several(parts: Any) -> tuple[Any, ...]:
    if parts is None:
        return ()
    return parts if isinstance(parts, tuple) else (parts,)


def reads(part: Callable[..., Any]) -> tuple[str, ...]:
    """The names in a part's signature, `state` left out."""
    call = part if inspect.isfunction(part) else type(part).__call__
    return _names(call)


@cache
def _names(call: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(n for n in inspect.signature(call).parameters if n not in ("self", "state"))


def describe(part: Any) -> str:
    """A part as text that is the same in every process: names of functions, values of options.

    It is whom a state belongs to, so a field that says nothing of it has `field(repr=False)`.

    Example:
        >>> describe(student)
        'student'
    """
    if inspect.isfunction(part):
        return part.__name__
    if is_dataclass(part) and not isinstance(part, type):
        shown = [f.name for f in fields(part) if f.repr]
        options = ", ".join(f"{name}={describe(getattr(part, name))}" for name in shown)
        return f"{type(part).__name__}({options})"
    if isinstance(part, tuple):
        return f"({', '.join(map(describe, part))})"
    return repr(part)
