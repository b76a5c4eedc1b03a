"""A model on loan: run with other tensors in its places, and given back bit for bit."""

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode

from testtime._core.arrays import as_real, as_was
from testtime._core.errors import InputError, ScopeError, TesttimeError
from testtime.adaptation.kernels.as_written import as_torch, infer_as_written
from testtime.adaptation.kernels.batch_statistics import InGroups, Quick, forward_of_batch
from testtime.adaptation.kernels.calls import watching, watching_again
from testtime.adaptation.kernels.lean import Lean, kept_as
from testtime.adaptation.kernels.linear import forward_of_linear, linear_layers
from testtime.adaptation.kernels.normaliser import Normaliser
from testtime.adaptation.kernels.replay import dear_layers
from testtime.adaptation.layers import NormLayer, bound, hooked, on_input
from testtime.adaptation.lent import Lent
from testtime.adaptation.modes import learnable
from testtime.adaptation.monitors import is_aside
from testtime.adaptation.parts.statistics import (
    Averages,
    BatchStatistics,
    Moments,
    RunningStatistics,
    SourceStatistics,
    Statistics,
)
from testtime.adaptation.ranks import Ranks
from testtime.adaptation.traces import traces_of

_locks: "weakref.WeakKeyDictionary[nn.Module, threading.RLock]" = weakref.WeakKeyDictionary()
_making = threading.Lock()
MANY = 1 << 19
"""Values of a batch from which on the memory of a backward is worth some of its time."""
Places = dict[str, list[tuple[dict[str, Any], str]]]
"""Tensor name -> the dictionaries of modules that hold it, and its key there."""


class Together:
    """Several locks as one; taken in the same order by all, so that none waits for ever.

    Args:
        locks: that are taken.
    """

    def __init__(self, locks: Iterable[threading.RLock]) -> None:
        self.locks = sorted(locks, key=id)

    def __enter__(self) -> None:
        with ExitStack() as taken:  # gone again where one that is waited for is interrupted
            for lock in self.locks:
                taken.enter_context(lock)
            taken.pop_all()

    def __exit__(self, *error: Any) -> None:
        for lock in self.locks:
            lock.release()


def lock_of(model: nn.Module) -> "threading.RLock | Together":
    """Who holds it has the model to himself; models that share modules share it.

    A model of parts that were lent before, each by itself, takes the locks of all of them.
    """
    with _making:
        modules = list(model.modules())
        known = {_locks[module] for module in modules if module in _locks} or {threading.RLock()}
        for module in modules:
            _locks.setdefault(module, next(iter(known)))
        return next(iter(known)) if len(known) == 1 else Together(known)


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` made or changed the module, its forward, or a function it holds."""
    dynamo = sys.modules.get("torch._dynamo")  # slow to import, and there if anything is compiled
    made = dynamo is not None and isinstance(module, dynamo.OptimizedModule)
    held = (module.forward, *vars(module).values())
    functions = any(hasattr(each, "_torchdynamo_orig_callable") for each in held if callable(each))
    return made or functions or module._compiled_call_impl is not None


def no_features(model: nn.Module) -> ScopeError:
    """The error for a model whose features cannot be found."""
    return ScopeError(
        f"no linear layer ran in {type(model).__name__}, so its features are not known. Name the "
        "layer whose input they are: features='...' of tt.adapt and tt.fit_source."
    )


def features_of(model: nn.Module, recorded: list[Tensor], *, samples: int) -> Tensor:
    """The features (B, d) of a batch: what a layer was given when it last ran.

    Args:
        model: that ran.
        recorded: what the layer was given, each time that it ran.
        samples: of the batch.

    Raises:
        ScopeError: it did not run, or has no row for each sample.
    """
    if not recorded:
        raise no_features(model)
    features = recorded[-1]
    if features.dim() > 1 and len(features) == samples:
        return features.flatten(1)
    raise ScopeError(
        f"the layer whose input are the features was given {tuple(features.shape)} for {samples} "
        f"samples; expected one row for each. {type(model).__name__} may answer frames or places one "
        "by one and then average. Name a layer whose input has one: features='...' of tt.adapt and "
        "tt.fit_source; an nn.Identity() where the features of a sample are will do."
    )


class Loan:
    """The caller's model, its places for tensors, and the one way to run it.

    After every run, also one that raised, the model's parameters, buffers, flags and hooks are
    what they were. Runs of several adapters of one model take turns.
    """

    def __init__(self, model: nn.Module, norms: list[NormLayer]) -> None:
        self.model = model
        self.norms = [layer for layer in norms if layer.has_statistics]
        self.tracked = [
            layer.module
            for layer in norms
            if layer.kind == "instance" and getattr(layer.module, "track_running_stats", False)
        ]
        self.lent_statistics = {layer.name for layer in norms}
        self.named_modules = dict(model.named_modules())
        self.modules = list(self.named_modules.values())
        self.traces = traces_of(model)
        self.dear_layers, self.linear_layers = dear_layers(model), linear_layers(model)
        self.places, self.canonical = places(model)
        self.batch_norms = [
            m for m in self.modules if isinstance(m, nn.modules.batchnorm._BatchNorm)
        ]
        self.parameters = list(model.parameters())
        self.own_functions = not any(map(is_compiled, self.modules))
        attends = any(isinstance(module, nn.MultiheadAttention) for module in self.modules)
        # under a mode attention takes no short cut, which rounds otherwise than training does
        self.in_full: Any = BaseTorchFunctionMode if attends and self.own_functions else nullcontext
        self.lock = lock_of(model)
        with self.lock:
            self.bound = bound(model)
        self.blocks: Any = None  # of a transformer, once somebody has looked for them
        self.remakes = True
        """Whether a backward may have something made again; known once one forward has run."""
        self.size: int | None = None
        """Samples of a batch that it answered though it could not take two; None: it took two."""

    def source(self, name: str) -> Tensor:
        """The model's own tensor of that name, detached; a complex one as pairs of real numbers."""
        holder, key = self.places[name][0]
        with self.lock:
            return as_real(holder[key].detach())

    def source_moments(self, layer: NormLayer) -> Moments:
        """The statistics that a layer stored in training."""
        buffers = layer.module._buffers
        return Moments(buffers["running_mean"], buffers["running_var"])  # pyright: ignore[reportArgumentType]

    def run(
        self,
        x: Tensor,
        tensors: Mapping[str, Tensor],
        statistics: Statistics,
        *,
        averages: Averages | None = None,
        learn: bool = True,
        ranks: Ranks,
        tap: Callable[[], Any] | None = None,
        lean: bool = False,
        activations: torch.dtype | None = None,
        groups: int = 1,
        exact: bool = False,
    ) -> tuple[Any, Averages | None]:
        """Runs the model on `x` and returns its output and the updated moving averages.

        Args:
            x: the batch.
            tensors: name -> tensor to use in place of the model's own.
            statistics: what layers with stored statistics normalise with.
            averages: moving averages so far, for `RunningStatistics`; without any, layers use those of
                the batch.
            learn: whether moving averages are updated by this batch, or only used.
            ranks: over whom batch statistics are taken.
            tap: context in which the model is run, e.g. one that records features.
            lean: whether to keep for a backward only what one needs that reaches no convolution's
                weight. It needs the model's own functions, so it has no effect on a compiled one.
            activations: type in which what a backward needs is kept; None: as it was computed. It
                has no effect on a compiled model either.
            groups: equal batches in `x`, each normalised by itself; where `takes_groups` says so.
            exact: whether it must answer to the last bit as it would without us, where nothing is lent;
                else linear layers may round otherwise.
        """
        fresh = averages
        if averages and learn:
            # each layer reads the count, and a loaded state may have it on a device that one waits for
            fresh = {**averages, "seen": averages["seen"].cpu() + 1}
        x = x.clone() if self.traces.batch else x
        of_batch = self.own_functions and isinstance(statistics, BatchStatistics)
        quick = of_batch and x.is_cpu and x.numel() >= groups * MANY  # as each batch would alone
        swift = self.own_functions and x.is_cpu and not exact
        lent, watchers = Lent(), watching()
        with self.lock:
            try:
                self.traces.hide(self.named_modules, lent)
                by_layers = self._lend(
                    lent, tensors, statistics, averages, fresh, learn, ranks, x, quick, swift
                )
                worth_it = lean and self.own_functions and x.numel() >= MANY
                keeping = Lean(remakes=self.remakes) if worth_it else None
                by_calls = Quick() if quick and not by_layers else nullcontext()
                shorter = activations is not None and self.own_functions and torch.is_grad_enabled()
                short = kept_as(activations, self.parameters) if shorter else nullcontext()  # pyright: ignore[reportArgumentType]
                apart = InGroups(groups) if groups > 1 else nullcontext()
                others = () if isinstance(statistics, SourceStatistics) else self.lent_statistics
                watched = self.traces.watched_once(self.named_modules, x, others)
                tapped = tap() if tap is not None else nullcontext()
                less = keeping or nullcontext()
                with by_calls, short, apart, tapped, less, watched, self._heard(), learnable():
                    output = self._answered(x)
                if keeping is not None:
                    self.remakes = keeping.asked
                return output, fresh
            finally:  # not left to a context manager, at whose doors an interrupt may fall
                try:
                    lent.give_back()
                    watching_again(watchers)
                except BaseException:  # one that falls in there waits until all is given back
                    lent.give_back()
                    watching_again(watchers)
                    raise

    def _answered(self, x: Tensor) -> Any:
        """What the model returns; of one with batches of one size, an error for others is told as such."""
        try:
            return self.model(x)
        except Exception as error:
            aside = isinstance(error, TesttimeError | torch.OutOfMemoryError) or is_aside(error)
            if self.size in (None, len(x)) or aside:
                raise
            raise InputError(
                f"{type(self.model).__name__} could not take a batch of {len(x)}: {error}. It was seen to "
                f"take {self.size} samples, and not two. Give batches of {self.size}, to a method that runs "
                "it on such alone: tent, sar, bn-adapt, lame, source; or let it take any number: "
                f"x.flatten(1) for x.view({self.size}, -1), dynamic_shapes= of torch.export."
            ) from error

    def some(self, x: Tensor) -> Tensor:
        """Two samples to look at, or one; the whole batch where the model could not take two."""
        return x[:2] if self.size is None else x

    def _heard(self) -> Any:
        """Runs the model without its compiler where hooks are: those that came later it does not call."""
        hooks = (module._forward_pre_hooks or module._forward_hooks for module in self.modules)
        deaf = not self.own_functions and any(hooks)
        return torch.compiler.set_stance("force_eager") if deaf else nullcontext()

    def takes_groups(self, statistics: Statistics) -> bool:
        """Whether batches may be joined in one run, and normalised each by itself.

        With batch statistics that is so where torch's own function normalises.
        """
        own = all(isinstance(n.module, nn.modules.batchnorm._BatchNorm) for n in self.norms)
        own = own and not any(n.module in self.bound for n in self.norms)
        own = own and not any(isinstance(n.module, nn.SyncBatchNorm) for n in self.norms)
        return self.own_functions and isinstance(statistics, BatchStatistics) and own

    @contextmanager
    def recording(self, layer: nn.Module | None, into: list[Tensor]) -> Iterator[None]:
        """While it lasts, the input of `layer` is appended to `into` at each forward."""
        if layer is None:
            raise no_features(self.model)
        with hooked([on_input(layer, lambda _, args: into.append(args[0]))]):
            yield

    def _lend(  # noqa: PLR0912  (one branch for each kind of thing that is lent)
        self,
        lent: Lent,
        tensors: Mapping[str, Tensor],
        statistics: Statistics,
        averages: Averages | None,
        fresh: Averages | None,
        learn: bool,
        ranks: Ranks,
        x: Tensor,
        quick: bool,
        swift: bool,
    ) -> bool:
        """Puts all in its place. Says whether layers take the quick way, and not whoever calls torch."""
        training = [module for module in self.modules if module.training]
        # without a gradient too, or torch multiplies otherwise than it did with one
        # each call of torch pays for a mode, together a fiftieth of a ResNet-50's inference
        by_layers = quick and all(map(as_torch, self.batch_norms))
        plain_inference = isinstance(statistics, SourceStatistics) and not torch.is_grad_enabled()
        wanting = [] if plain_inference else [p for p in self.parameters if p.requires_grad]
        for module in training:
            lent.turn(module, "training", False)
        for parameter in wanting:
            lent.turn(parameter, "requires_grad", False)
        for name, tensor in tensors.items():
            for holder, key in self.places[name]:
                lent.put(holder, key, as_was(holder[key], tensor))
        if isinstance(statistics, BatchStatistics | RunningStatistics):
            for module in self.tracked:
                lent.put(module.__dict__, "track_running_stats", False)
                for key in ("running_mean", "running_var"):  # torch would write to them
                    lent.put(module._buffers, key, None)
        of_batch = isinstance(statistics, BatchStatistics | RunningStatistics) and not averages
        plain = of_batch and ranks.alone and len(x) > 1
        for layer in () if isinstance(statistics, SourceStatistics) else self.norms:
            buffers = layer.module._buffers
            source = self.source_moments(layer)
            lent.put(buffers, "running_mean", source.mean)
            lent.put(buffers, "running_var", source.var)
            own = isinstance(layer.module, nn.modules.batchnorm._NormBase)
            if plain and own and layer.module not in self.bound:
                buffers["running_mean"] = buffers["running_var"] = None
            elif isinstance(statistics, RunningStatistics) and averages and not learn:
                for key, moment in (("running_mean", "mean"), ("running_var", "var")):
                    buffers[key] = averages[f"{layer.name}.{moment}"].to(source.mean.dtype)
                if statistics.robust and self.own_functions and as_torch(layer.module):
                    lent.put(vars(layer.module), "forward", partial(infer_as_written, layer.module))
            else:
                normalise = Normaliser(
                    layer.module, layer.name, layer.eps, source, statistics, averages, fresh,
                    len(x), ranks,
                )  # fmt: skip
                if self.own_functions and as_torch(layer.module):
                    lent.put(layer.module.__dict__, "forward", normalise.in_place_of(layer.module))
                else:
                    lent.hook(on_input(layer.module, normalise))
        for module in self.linear_layers if swift else ():
            if "forward" not in vars(module):
                lent.put(vars(module), "forward", partial(forward_of_linear, module))
        for module in self.batch_norms if by_layers else ():
            if module._buffers.get("running_mean") is None:
                lent.put(vars(module), "forward", partial(forward_of_batch, module))
        return by_layers


def places(model: nn.Module) -> tuple[Places, dict[str, str]]:
    """Where tensors are; and every name of a tensor -> that by which it goes.

    A tied tensor is held in several places, and goes by the first of its names.
    """
    found: Places = {}
    names: dict[int, str] = {}
    canonical: dict[str, str] = {}
    for prefix, module in model.named_modules():
        for holder in (module._parameters, module._buffers):
            for key, tensor in holder.items():
                if tensor is not None:
                    full = f"{prefix}.{key}".lstrip(".")
                    name = canonical[full] = names.setdefault(id(tensor), full)
                    found.setdefault(name, []).append((holder, key))
    return found, canonical
