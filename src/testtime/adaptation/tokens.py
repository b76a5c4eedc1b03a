"""A transformer of images, found by how it runs, with prompts put in and its class token seen."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from testtime._core.errors import ScopeError
from testtime.adaptation.layers import Hook, hooked, norm_kind
from testtime.adaptation.loan import Loan
from testtime.adaptation.look import source_output


@dataclass(frozen=True)
class Blocks:
    """The blocks of a transformer with a class token.

    Attributes:
        first: the first block, whose input are tokens (B, N, d), the class token first.
        norms: what normalises the tokens after each block: the first normalisation of the next
            block, after the last block the final one.
        width: d.
    """

    first: nn.Module
    norms: tuple[nn.Module, ...]
    width: int

    @contextmanager
    def watched(
        self,
        into: list[Tensor],
        *,
        prompts: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Iterator[None]:
        """While it lasts, a forward appends to `into` its class tokens after each block, (B, d).

        Args:
            into: receives the class token of each block, normalised.
            prompts: (B, k, d), put in after the class token before the first block, and taken out
                again before the final normalisation.
            shift: (d,), added to the class token behind the final normalisation in a second copy
                of the batch, which follows the first: the head answers for both.
        """
        count = 0 if prompts is None else prompts.shape[1]

        def put_in(_: nn.Module, args: Any, kwargs: Any) -> Any:
            assert prompts is not None
            own = prompts
            return _changed(args, kwargs, lambda x: torch.cat([x[:, :1], own.to(x), x[:, 1:]], 1))

        def take_out(_: nn.Module, args: Any, kwargs: Any) -> Any:
            return _changed(args, kwargs, lambda x: torch.cat([x[:, :1], x[:, 1 + count :]], 1))

        def move(_: nn.Module, __: Any, tokens: Tensor) -> Tensor:
            assert shift is not None
            moved = torch.cat([tokens[:, :1] + shift.to(tokens), tokens[:, 1:]], 1)
            return torch.cat([tokens, moved])

        def see(_: nn.Module, __: Any, tokens: Tensor) -> None:
            into.append(tokens[:, 0].detach())

        def hooks() -> Iterator[Hook]:
            for norm in self.norms:
                yield Hook(norm, see, after=True)
            if count:
                yield Hook(self.first, put_in, named=True)
                yield Hook(self.norms[-1], take_out, named=True)
            if shift is not None:
                yield Hook(self.norms[-1], move, after=True)

        with hooked(hooks()):
            yield


def _changed(args: Any, kwargs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The arguments of a module with its tokens changed: the first tensor of three dimensions."""
    given = list(args) + list(kwargs.values())
    tokens = _tokens(given)
    new = [change(value) if value is tokens else value for value in given]
    return tuple(new[: len(args)]), dict(zip(kwargs, new[len(args) :], strict=True))


def _tokens(given: list[Any]) -> Tensor | None:
    each = (v for v in given if isinstance(v, Tensor) and not v.is_nested)
    return next((v for v in each if v.dim() == 3), None)


def find_blocks(loan: Loan, x: Tensor) -> Blocks:
    """The blocks of a transformer of images; looked for once, with the first batch.

    Raises:
        ScopeError: the model is made otherwise.
    """
    if loan.blocks is None:
        loan.blocks = _seen_to_run(loan, x)
    return loan.blocks


def _seen_to_run(loan: Loan, x: Tensor) -> Blocks:
    """The blocks, seen on one sample and a brighter copy of it."""
    groups = [
        list(module)
        for module in loan.model.modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and len(module) > 1
        and len({type(child) for child in module}) == 1
        and not any(map(_leaf, module))
    ]
    members = {block: number for number, group in enumerate(groups) for block in group}
    ran: list[tuple[str, nn.Module, Tensor | None]] = []

    def note(what: str) -> Callable[..., None]:
        return lambda module, args, kwargs, *_: ran.append(
            (what, module, _tokens([*args, *kwargs.values()]))
        )

    def hooks() -> Iterator[Hook]:
        for module in loan.model.modules():
            if module in members:
                yield Hook(module, note("block"), named=True)
                yield Hook(module, note("end"), after=True, named=True)
            elif norm_kind(module) == "layer":
                yield Hook(module, note("norm"), named=True)

    with hooked(hooks()), torch.no_grad():
        source_output(loan, torch.cat([x[:1], x[:1] + 1]))
    for group in sorted(groups, key=len, reverse=True):
        found = _read(group, ran)
        if found is not None:
            return found
    kinds = sorted({type(module).__name__ for module in loan.model.modules() if _leaf(module)})
    raise ScopeError(
        "foa puts prompts into a vision transformer with a class token: a list of two or more "
        "blocks of one kind whose input are tokens (batch, tokens, width), the first token the "
        "same for every image, with a layer normalisation that runs first in each block and one "
        f"after the last. {type(loan.model).__name__} has no such blocks (it is made of "
        f"{', '.join(kinds)}). Take tent or sar for it, or lame, which changes no model."
    )


def _leaf(module: nn.Module) -> bool:
    return not any(True for _ in module.children())


def _read(group: list[nn.Module], ran: list[tuple[str, nn.Module, Tensor | None]]) -> Blocks | None:
    """The blocks, when they ran one after another on tokens whose first is a class token."""
    starts = [i for i, (what, module, _) in enumerate(ran) if what == "block" and module in group]
    ends = [i for i, (what, module, _) in enumerate(ran) if what == "end" and module in group]
    if [ran[i][1] for i in starts] != group or len(ends) != len(starts):
        return None
    tokens = ran[starts[0]][2]
    if tokens is None or tokens.shape[0] != 2 or tokens.shape[1] < 2:
        return None
    if not torch.equal(tokens[0, 0], tokens[1, 0]) or torch.equal(tokens[0], tokens[1]):
        return None
    norms: list[nn.Module] = []
    for begin in [*starts[1:], ends[-1]]:
        run = ((m, t) for what, m, t in ran[begin:] if what == "norm" and t is not None)
        norm, seen = next(run, (None, None))
        if norm is None or seen is None or seen.shape != tokens.shape:
            return None
        norms.append(norm)
    if len(set(norms)) != len(norms):
        return None
    return Blocks(group[0], tuple(norms), tokens.shape[-1])
