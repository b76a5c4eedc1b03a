"""Answer first: the update that a batch teaches runs behind its answer, in a thread of its own.

One update is pending at most: whoever comes next waits for it, so that every step begins with the
state that the step before it left, as if nothing were deferred.
"""

import contextvars
import inspect
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from testtime._core.devices import streams_of
from testtime._core.errors import OptionError, StateError
from testtime.adaptation.outputs import map_tensors
from testtime.adaptation.parts.statistics import RunningStatistics
from testtime.adaptation.recipe import Recipe
from testtime.adaptation.state import State

Give = Callable[[Any], bool]
"""Hands an answer to who waits for it; says whether anybody still does."""
Job = Callable[[Give], None]


def answers_last(recipe: Recipe) -> str | None:
    """Why no answer of a method can leave before its update; None where it can.

    Example:
        >>> from testtime.adaptation.methods.memo import memo
        >>> answers_last(memo())
        'its own loop (EachImage) answers and learns in one go'
    """
    own = recipe.procedure
    if own is not None and not inspect.isgeneratorfunction(own.step):
        return f"its own loop ({type(own).__name__}) answers and learns in one go"
    if recipe.answer_after:
        return "it answers with a forward after its last step (answer_after=True)"
    if recipe.learns and recipe.steps > 1:
        return f"it answers with the forward of the last of {recipe.steps} steps on a batch"
    if not recipe.learns and isinstance(recipe.statistics, RunningStatistics):
        return "it answers with moving averages that have taken the batch in"
    return None


def check_deferred(deferred: Any, recipe: Recipe) -> None:
    """Refuses what is no truth value, and a method that answers last."""
    if not isinstance(deferred, bool):
        raise OptionError(f"deferred is {deferred!r}; expected True or False")
    why = answers_last(recipe) if deferred else None
    if why is not None:
        raise OptionError(
            f"deferred=True lets an answer leave before the update, and this method cannot: {why}. "
            "Leave deferred out, or take a method that answers from its first forward: tent, eta, "
            "sar."
        )


class Behind:
    """Runs jobs that give an answer first and end behind it: one at a time, in order, in one thread.

    The whole job runs in that thread, since torch numbers the nodes of a graph by thread, and adds
    up gradients in the order of these numbers. The thread begins with the first job and ends with
    this object. The interpreter's end waits for the job that runs, and so does a fork.

    Example:
        >>> done = []
        >>> def job(give):
        ...     give("answer")
        ...     done.append("behind")
        >>> behind = Behind()
        >>> behind.ask(job)
        'answer'
        >>> behind.wait()
        >>> done
        ['behind']
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self._kept = deque[Exception]()
        self._hearing = threading.Lock()
        self._thread: int | None = None
        _all.add(self)

    @property
    def inside(self) -> bool:
        """Whether the caller is the job that runs."""
        return self._thread == threading.get_ident()

    @property
    def busy(self) -> bool:
        """Whether a job runs, or an error has not been heard."""
        pending = self._pending
        runs = pending is not None and (not pending.done() or pending.exception() is not None)
        return runs or bool(self._kept)

    def ask(self, job: Job) -> Any:
        """The answer of a job, which goes on behind the caller. No other may be pending.

        Errors before the answer are raised here, later ones by `wait`. Where the caller is
        interrupted while he waits, `give` tells the job that nobody does.
        """
        answer, ended = Future[Any](), Future[None]()
        context: Any = contextvars.copy_context()
        run = partial(context.run, self._run, job, answer, ended)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="testtime")
        try:
            self._pending = ended
            self._start(run)
            return answer.result()
        except BaseException:
            # whether the job was taken is not known where an interrupt fell: what comes behind it is
            self._start(lambda: ended.done() or ended.set_result(None))
            raise
        finally:
            answer.cancel()

    def _start(self, run: Callable[[], Any]) -> None:
        assert self._pool is not None
        try:
            self._pool.submit(run)
        except RuntimeError:  # the interpreter ends, or the system has no thread left
            run()

    def keep(self, error: Exception) -> None:
        """Keeps an error that came after an answer, for `wait` to raise."""
        self._kept.append(error)

    def wait(self) -> None:
        """Waits for the job that runs; its error is raised here, once, and so is one that was kept.

        The job itself may call this, and waits for nothing.
        """
        if self.inside:
            return
        pending = self._pending
        error = None if pending is None else pending.exception()
        with self._hearing:
            if self._pending is not pending:
                error = None  # another has heard it
            else:
                self._pending = None
            if error is None and self._kept:
                error = self._kept.popleft()
        if error is not None:
            raise error

    def settle(self) -> None:
        """Waits for the job that runs, and leaves its error to `wait`."""
        pending = self._pending
        if pending is not None and not self.inside:
            wait([pending])

    def _run(self, job: Job, answer: Future[Any], ended: Future[None]) -> None:
        def give(value: Any) -> bool:
            awaited = answer.set_running_or_notify_cancel()
            if awaited:
                answer.set_result(value)
            return awaited

        self._thread = threading.get_ident()
        try:
            job(give)
        except BaseException as error:
            self._thread = None
            if answer.done() or not (answer.running() or answer.set_running_or_notify_cancel()):
                ended.set_exception(error)  # nobody waits for the answer
                return
            answer.set_exception(error)
            ended.set_result(None)
        else:
            self._thread = None
            ended.set_result(None)

    def _forked(self) -> None:
        self._pool, self._thread, self._hearing = None, None, threading.Lock()
        if self._pending is not None and not self._pending.done():
            self._pending = Future()
            self._pending.set_exception(
                StateError(
                    "this process was forked by one thread while another began an update, whose "
                    "result is not known here; the state is the one before it. Call flush() before "
                    "a fork."
                )
            )


_all: "weakref.WeakSet[Behind]" = weakref.WeakSet()


def _before_fork() -> None:
    for behind in list(_all):
        behind.settle()


def _after_fork() -> None:
    for behind in list(_all):
        behind._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


class Lane:
    """Where a deferred step computes: on a CPU, where it is called; on others, in its own stream.

    A backward runs in the stream of its forward, so the whole step runs in the lane, and only the
    answer leaves it. On a CPU all of this does nothing but keep values from being shared.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._streams = streams_of(device)
        self.device = device
        self.stream: Any = None if self._streams is None else self._streams.Stream(device)
        self.own: State | None = None  # a state that was made here

    def on(self, device: torch.device) -> "Lane":
        """The lane of that device: this one, if it is. Memory that was cached for it serves no other."""
        return self if device == self.device else Lane(device)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """What runs inside runs in the lane."""
        with ExitStack() if self.stream is None else self._streams.stream(self.stream):
            yield

    def take(self, x: Tensor, state: State) -> Tensor:
        """A copy of the batch in the lane, so that the caller may write to his own.

        Memory of the state that was not made here must not be used anew elsewhere, once the state
        is forgotten, before the lane has read it.
        """
        if self.stream is None:
            return x.clone()
        self.stream.wait_stream(self._streams.current_stream(self.device))
        with self.computing():
            mine = x.clone()
        x.record_stream(self.stream)
        if state is not self.own:
            map_tensors(lambda part: _used_in(part, self.stream), vars(state))
        return mine

    def give(self, output: Any) -> tuple[Any, Any]:
        """A copy of an output, detached, since the update may still read it; and when it is ready."""
        theirs = map_tensors(lambda part: part.detach().clone(), output)
        return theirs, None if self.stream is None else self.stream.record_event()

    def leave(self, theirs: Any, ready: Any) -> Any:
        """That copy in the caller's stream."""
        if self.stream is not None:
            current = self._streams.current_stream(self.device)
            current.wait_event(ready)
            map_tensors(lambda part: _used_in(part, current), theirs)
        return theirs

    def join(self) -> None:
        """Makes the caller's stream wait for all that the lane has been given to do."""
        if self.stream is not None:
            self._streams.current_stream(self.device).wait_stream(self.stream)


def _used_in(part: Tensor, stream: Any) -> Tensor:
    if part.device.type == stream.device.type:  # an output or a state may hold some of the CPU
        part.record_stream(stream)
    return part
