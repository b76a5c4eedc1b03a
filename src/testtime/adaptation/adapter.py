"""The adapter: a model that learns from the batches it answers."""

import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from testtime._core.errors import InputError, OptionError, TesttimeWarning
from testtime._core.gates import Gate
from testtime._core.guards import Guard
from testtime._core.options import whole
from testtime._core.seeds import check_seed
from testtime.adaptation.budget import Ration
from testtime.adaptation.building import build, check_source, feature_layer_name, first_look
from testtime.adaptation.checks import check_held, check_input, check_model, taking
from testtime.adaptation.deferred import Behind, Give, Job, Lane, check_deferred
from testtime.adaptation.engine import Engine
from testtime.adaptation.events import Counts, Event, thin
from testtime.adaptation.export import copied, exported
from testtime.adaptation.gating import check_gate, judge
from testtime.adaptation.guarding import check_guard, distrusted, foretold, guarded, vouched
from testtime.adaptation.knowledge import SourceKnowledge
from testtime.adaptation.layers import norm_layers
from testtime.adaptation.loan import lock_of
from testtime.adaptation.modes import computing, taken_along
from testtime.adaptation.no_module import NoModule
from testtime.adaptation.outputs import detached
from testtime.adaptation.parts.statistics import BatchStatistics
from testtime.adaptation.plan import Plan, planned
from testtime.adaptation.ranks import Ranks
from testtime.adaptation.recipe import Recipe
from testtime.adaptation.resuming import check_names, owner, resumed
from testtime.adaptation.state import State, load_state, save_state
from testtime.adaptation.steps import Step, Steps, begun, ended


class Adapter(NoModule):
    """A model that learns from the batches it answers; made by `tt.adapt`.

    The model is borrowed: whatever is learnt lives beside it, and between calls its parameters,
    buffers, flags, gradients and hooks, and the global random state, are what they were. (A model
    that itself draws by chance in eval mode draws from that state, as it does alone.)

    Attributes:
        recipe: the method.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        seed: int = 0,
        source: SourceKnowledge | None = None,
        on_event: Callable[[Event], None] | None = None,
        process_group: Any = None,
        features: str | None = None,
        deferred: bool = False,
        every: int = 1,
        gate: Gate | bool | None = None,
        guard: Guard | bool | None = None,
        budget: float | None = None,
    ) -> None:
        check_model(model)
        if on_event is not None and not callable(on_event):
            raise OptionError(f"on_event is {on_event!r}; expected a function of one event")
        check_seed(seed)
        check_deferred(deferred, recipe)
        whole(1, every=every)
        self.model, self.recipe = model, recipe
        self._events, self._counts = deque[Event](maxlen=1000), Counts()
        self._deferred, self._every, self._behind = deferred, every, Behind()
        self._gate, self._guard = check_gate(gate), check_guard(guard)
        self._ration = None if budget is None else Ration(budget)
        self._on_event, self._seed, self._source = on_event, seed, source
        alone = getattr(recipe.procedure, "alone", False)  # no batch teaches another
        self._ranks = Ranks(None if alone else process_group)
        self._lock = threading.RLock()
        with lock_of(model), computing():
            check_source(source, recipe, model)
            self._features = feature_layer_name(model, features, source, recipe)
            self._engine, self._gate = self._build([], self._ration)
            self._state = self._engine.fresh()
        self._lane = Lane(self._engine.device)
        self._seen: tuple[torch.Size, torch.dtype] | None = None  # kind of batch the model took

    # --- answers ------------------------------------------------------------------------------

    def __call__(self, x: Tensor) -> Any:
        """Predicts, and learns from x.

        Args:
            x: a batch, as the model takes it.

        Returns:
            What the model returns, with the method's logits in it, detached.

        Raises:
            InputError: when the batch is empty, not finite, or of the wrong rank, type or device;
                nothing has changed then.
        """
        waits = self._behind.busy
        with self._settled():
            x = self._admit(x, teaches=True)
            before = self._engine.forwards, self._engine.backwards
            was = self._state
            state = self._engine.due(was)
            later = self._deferred and not self._behind.inside
            self._engine.hasty = later and not waits
            mine = self._lane.take(x, state) if later else x
            steps = self._steps(mine, state)
            event = None

            def book(step: Step) -> Event:
                counts = self._counts.after(
                    step.outcome, samples=len(x), forwards=self._engine.forwards - before[0],
                    backwards=self._engine.backwards - before[1], restored=state is not was,
                    distrusted=distrusted(step.state),
                )  # fmt: skip
                event = Event(counts.steps, step.outcome, len(x), step.measured)
                thin(self._events)
                # nothing is called from here on, so that an interrupt falls before or after all of it
                self._state = self._lane.own = step.state
                self._counts = counts
                self._events += (event,)
                return event

            if later:
                job = self._deferring(x, steps, book)
                answer = self._lane.leave(*self._behind.ask(job))
            else:
                step = self._taking(x, lambda: ended(steps))
                event, answer = book(step), detached(step.output)
        if event is not None:
            self._tell(event)
        return answer

    def _steps(self, x: Tensor, state: State) -> Steps:
        """The step that a batch gets: the method's, or an answer alone."""
        if self._gate is not None:
            state, calm = judge(self._gate, self._engine, x, state)
            if calm is not None:
                return self._engine.settled(calm, x, state)
        if self._guard is not None:
            return (yield from guarded(self._guard, self._engine, x, state, self._learning))
        return (yield from self._learning(x, state))

    def _learning(self, x: Tensor, state: State) -> Steps:
        """The method's step, where one is due."""
        if state.steps % self._every:
            return self._engine.spared(x, state)
        ration = self._ration or self._engine
        return (yield from ration.steps(x, state))

    def _deferring(self, x: Tensor, steps: Steps, book: Callable[[Step], Event]) -> Job:
        """The step as a job that gives its answer first; the caller's modes go with it."""
        modes = taken_along(self._engine.device)

        def job(give: Give) -> None:
            with computing(), modes(), self._lane.computing():
                output, step = self._taking(x, lambda: begun(steps))
                if not give(self._lane.give(output)):
                    steps.close()
                    return
                event = book(step or self._taking(x, lambda: ended(steps)))
            self._tell(event)

        return job

    def _tell(self, event: Event) -> None:
        """Tells of a step that stands; an error of the caller's own must not cost him the answer."""
        if self._on_event is None:
            return
        self._lane.join()  # what it measured is read out of the lane
        try:
            self._on_event(event)
        except Exception as error:
            error.add_note(f"raised by on_event after step {event.step}, which stands")
            self._behind.keep(error)

    def predict(self, x: Tensor) -> Any:
        """Predicts only; changes nothing. What a call would answer, where the answer comes first.

        What a guard or a gate would say of this very batch is not foreseen: they are asked by calls.
        Under a guard the source model answers before the first call, too, when nobody vouches for
        the method yet, and where the adapted answer is no number and the source's is.

        Raises:
            InputError: as a call.
        """
        with self._settled():
            x = self._admit(x)
            engine, state = self._engine, self._state
            asked = engine.predict if self._guard is None else partial(foretold, engine)
            return detached(self._taking(x, lambda: asked(x, state))[0])

    # --- what was done ------------------------------------------------------------------------

    @property
    def events(self) -> tuple[Event, ...]:
        """The latest steps, oldest first; a thousand are kept. Waits for an update that runs."""
        self._behind.settle()
        self._lane.join()
        return tuple(self._events)

    @property
    def counts(self) -> Counts:
        """What the adapter has done since it was built. Waits for an update that runs."""
        self._behind.settle()
        return self._counts

    def flush(self) -> None:
        """Waits for the update that runs behind the last answer, and raises the error it ended with.

        With `deferred=True` all other methods wait likewise. This is for a stream's end, and for
        before one writes to the model or runs it oneself. What `on_event` raised, deferred or not,
        is raised here as well.
        """
        with self._settled():
            pass

    # --- state --------------------------------------------------------------------------------

    def reset(self) -> None:
        """Back to the source model: tensors, optimizer, statistics, memories and random state.

        The source is the model as it now is: weights and modules may have been replaced.
        """
        with self._settled(), self._engine.loan.lock:
            ration = None if self._ration is None else Ration(self._ration.budget)
            engine, gate = self._build([], ration)
            state, lane = engine.fresh(), self._lane.on(engine.device)
            counts = self._counts._replace(resets=self._counts.resets + 1)
            # nothing is called from here on, so that an interrupt falls before or after all of it
            self._engine, self._gate, self._ration, self._lane = engine, gate, ration, lane
            self._state, self._counts, self._seen = state, counts, None

    def snapshot(self) -> State:
        """A mark to which `restore` returns. Costs nothing: steps never write to an old state."""
        with self._settled():
            return self._state

    def restore(self, mark: State) -> None:
        """Back to a snapshot of this adapter, or of another of the same model and method.

        Raises:
            StateError: when the mark is of another method, or of a model of other shapes.
        """
        with self._settled():
            self._state = self._resumed(mark, "this snapshot")

    def save(self, path: str | Path) -> None:
        """Writes the state as safetensors, wholly or not at all.

        Raises:
            StateError: when nothing can be written there.
        """
        with self._settled(), self._engine.loan.lock:
            save_state(self._state, path, owner=owner(self.model, self.recipe))

    def load(self, path: str | Path) -> None:
        """Goes on where `save` left off, bit for bit; on another kind of device, up to rounding and
        with random numbers of that device's own.

        Raises:
            StateError: when the file is truncated or damaged, holds values that are not finite, or
                is of another model or method. The adapter's own state is unchanged then.
        """
        with self._settled(), self._engine.loan.lock:
            mine = owner(self.model, self.recipe)
            state = load_state(path, owner=mine, device=self._engine.device)
            self._state = self._resumed(state, str(path))

    def export(self) -> nn.Module:
        """A plain copy of the model with what was learned, in eval mode.

        It answers as `predict` does. Layers that use batch statistics, or mix them, do so in the
        copy too. What is done around the model is left out: corrections of the answer (LAME),
        averages over views (CoTTA); and MEMO looks at each image alone, so it is the copy's answer
        for batches of one that is `predict`'s.

        Its `state_dict` fits the model itself where the copy answers with what it stores. Where it
        normalises with statistics of each batch, no state_dict says so, and the model refuses it:
        unexpected key `normalises_with_statistics_of_its_input`. Such a state_dict fits another
        export of the same method; `torch.save` and `torch.export` of the copy keep the whole.
        """
        with self._settled(), self._engine.loan.lock:
            if self._guard is not None and not vouched(self._state):
                return copied(self.model)
            return exported(self.model, self.recipe, self._state)

    # --- what it does -------------------------------------------------------------------------

    def plan(self, x: Tensor | None = None) -> Plan:
        """What will change, and what a step costs.

        Layers are in order of execution once a batch, or `x`, was seen.
        """
        with self._settled():
            if x is not None:
                self._admit(x)
            spending = self._ration and self._ration.told(self._state.account)
            plan = planned(self.model, self.recipe, self._state, spending, self._engine.dense)
            if self._guard is not None and plan.forwards is not None:
                plan = replace(plan, forwards=plan.forwards + 1)
            return replace(plan, ordered=self._seen is not None)

    # --- inside -------------------------------------------------------------------------------

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """The adapter to oneself, with no update pending; what the last one raised is raised.

        What is made meanwhile may learn, though the caller be in inference mode.
        """
        while True:
            self._behind.wait()  # without the lock: an update that ends may call the adapter
            with self._lock:
                if self._behind.inside or not self._behind.busy:
                    self._lane.join()
                    with computing():
                        yield
                    return

    def _build(
        self, order: list[str], ration: Ration | None, feature_layer: nn.Module | None = None
    ) -> tuple[Engine, Gate | None]:
        """An engine, and a gate that took up its work with it; those at work are left alone."""
        gate = check_gate(self._gate)
        engine = build(
            self.model, self.recipe, order,
            source=self._source, gate=gate, ration=ration, seed=self._seed,
            ranks=self._ranks, feature_layer=feature_layer,
        )  # fmt: skip
        return engine, gate

    def _admit(self, x: Tensor, *, teaches: bool = False) -> Tensor:
        """The batch, checked; the first one is also used to see the model run."""
        complaint: Exception | None = None
        try:
            rank = 1 + len(self._seen[0]) if self._seen else None
            check_input(x, self.recipe, rank=rank, device=self._engine.device)
            if teaches:
                check_held(x, self.recipe, self._state.memory)
            if x.is_inference():
                x = x.clone()
            kind = x.shape[1:], x.dtype
            # with other ranks, a batch that the model refuses must not fail in mid-step on one
            if self._seen is None or (self._seen != kind and not self._ranks.alone):
                with self._engine.loan.lock:
                    self._taking(x, lambda: self._look(x))
                self._seen = kind
        except Exception as error:
            complaint = error
        if not self._ranks.agree(complaint, self._engine.device):
            raise complaint or InputError("another rank was given a batch that it refused")
        alone = len(x) == 1 and self._ranks.alone and bool(self._engine.loan.norms)
        if alone and isinstance(self.recipe.statistics, BatchStatistics):
            warnings.warn(
                "a batch of one: its statistics are those of a single sample. Use larger "
                "batches, or statistics mixed with the source's: bn-adapt with prior=16, rotta.",
                TesttimeWarning,
                stacklevel=3,
            )
        return x

    def _look(self, x: Tensor) -> None:
        """Builds the engine anew, with the order in which layers run; the source model is run for it."""
        found = first_look(self._engine, x, features=self._features)
        ration = copy(self._ration)
        if ration is not None:
            ration.count(x, norm_layers(self.model, found.order))
        engine, gate = self._build(found.order, ration, found.feature_layer)
        engine.dense, engine.loan.size = found.dense, self._engine.loan.size
        if self.recipe.asks_for("features") and found.feature_layer is None:
            with engine.loan.recording(None, []):
                pass
        state = self._state
        if not state.steps and engine.names != self._engine.names:
            state = replace(engine.fresh(), generator=state.generator)
        check_names(state, engine.names, "the state that was given")
        # nothing is called from here on, so that an interrupt falls before or after all of it
        self._engine, self._gate, self._ration, self._state = engine, gate, ration, state

    def _taking(self, x: Tensor, run: Callable[[], Any]) -> Any:
        return taking(self.model, x, run, met=self._seen == (x.shape[1:], x.dtype))

    def _resumed(self, state: State, what: str) -> State:
        return resumed(
            state, self._engine, what,
            seen=self._seen is not None, gate=self._gate, guard=self._guard,
        )  # fmt: skip
