"""FOA: test-time model adaptation with only forward passes.

before: m_s, s_s = mean and standard deviation of the source's class tokens after each block
m_s^L = that after the last block;  P* = no search yet
for each batch x of B:
    candidates P_1 ... P_27 from CMA-ES, and P_28 = the best prompts of the batch before
    for each candidate:  z_b, class tokens c_b = f(x_b with the prompts after its class token)
        value = sum_b H(z_b) + lam B/64 ( |std_b c - s_s|^2 + |mean_b c - m_s|^2 )
    tell CMA-ES all 28 values;  P* = the best
    answer: the head on  c^L + m_s^L - hist,  for P*     (at the first batch on c^L)
    hist <- 0.9 hist + 0.1 mean of c^L over the batch and the candidates
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from testtime._core.arrays import at_least_single
from testtime._core.options import in_range, whole
from testtime._core.outcomes import Outcome
from testtime._core.registry import register
from testtime.adaptation.engine import Engine
from testtime.adaptation.outputs import map_tensors, read_logits, rows
from testtime.adaptation.parts.evolution import CovarianceAdaptation
from testtime.adaptation.parts.knowledge import ClsMoments
from testtime.adaptation.recipe import Recipe
from testtime.adaptation.state import State
from testtime.adaptation.steps import Step
from testtime.adaptation.tokens import Blocks, find_blocks
from testtime.measures.entropy import entropy

KEPT = 0.9
"""Share of hist, the mean of past class tokens, that a batch leaves."""


def discrepancy(tokens: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Squared distance of a batch's moments (B, D) to the source's; of one sample the mean's alone.

    Example:
        >>> discrepancy(torch.tensor([[0.0], [2.0]]), torch.zeros(1), torch.zeros(1))
        tensor(3.)
    """
    apart = (tokens.mean(0) - mean).square().sum()
    if len(tokens) == 1:
        return apart
    return apart + (tokens.std(0) - deviation).square().sum()


@dataclass(frozen=True, kw_only=True)
class PromptSearch:
    """A generation of CMA-ES on each batch, and the answer with its best prompts.

    Args:
        prompts: k, tokens that are put in.
        population: candidates in a generation, beside the best of the batch before.
        lam: weight of the discrepancy of moments, for 64 samples.
        chunk: samples in one forward at most, where candidates are evaluated together.
    """

    prompts: int
    population: int
    lam: float
    chunk: int
    dense: ClassVar[bool] = False
    minimises: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[ClsMoments]] = (ClsMoments(),)

    @property
    def passes(self) -> tuple[float, float]:
        """A forward for each candidate; no backward."""
        return self.population + 1, 0

    def step(self, engine: Engine, x: Tensor, state: State) -> Step:
        """Searches for a generation, and answers."""
        with torch.no_grad():
            blocks = find_blocks(engine.loan, x)
            memory = state.memory or {"search": None, "best": None, "hist": None}
            size = self.prompts * blocks.width
            strategy = CovarianceAdaptation(dimension=size, population=self.population)
            search = memory["search"] or strategy.init(sigma=1.0, device=x.device)
            best = search["mean"] if memory["best"] is None else memory["best"]
            candidates = torch.cat([strategy.ask(search, engine.generator), best[None]])
            shift = self._shift(engine, memory, blocks)
            winner, values, ends = None, [], []
            # by the joined batch of all ranks, so that they make as many forwards
            joined = len(x)
            if not engine.ranks.alone:
                joined = int(engine.ranks.sum(torch.tensor(float(joined), device=x.device)))
            for part in candidates.split(max(1, self.chunk // joined)):
                found = self._evaluate(engine, x, blocks, part, shift)
                for output, value, end in found:
                    if winner is None or value < min(values):
                        winner = output
                    values.append(value)
                    ends.append(end)
            ranked = torch.tensor(values, dtype=torch.float64, device=x.device)
            logits = rows(read_logits(winner))
            told = {"entropy": entropy(logits).mean(), "loss": ranked.min(), "used": len(x)}
            hist = torch.stack(ends).mean(0)
            if not (all(map(math.isfinite, values)) and hist.isfinite().all()):
                return Step(winner, logits, state, Outcome.NON_FINITE, {**told, "used": 0})
            if memory["hist"] is not None:
                hist = KEPT * memory["hist"] + (1 - KEPT) * hist
            memory = {
                "search": strategy.tell(search, candidates, ranked),
                "best": candidates[values.index(min(values))].clone(),
                "hist": hist,
            }
        return Step(winner, logits, replace(state, memory=memory), Outcome.ADAPTED, told)

    def predict(self, engine: Engine, x: Tensor, state: State) -> tuple[Any, Tensor]:
        """The answer with the best prompts so far, without a search; the source's at first."""
        blocks, memory = find_blocks(engine.loan, x), state.memory
        if memory is None:
            output, _ = engine.run(x, {}, exact=True)
        else:
            shift = self._shift(engine, memory, blocks)
            ((output, _, _),) = self._evaluate(engine, x, blocks, memory["best"][None], shift)
        return output, rows(read_logits(output))

    def _shift(self, engine: Engine, memory: dict[str, Any], blocks: Blocks) -> Tensor | None:
        if memory["hist"] is None:
            return None
        return engine.known["cls_moments"]["mean"][-blocks.width :] - memory["hist"]

    def _evaluate(
        self, engine: Engine, x: Tensor, blocks: Blocks, candidates: Tensor, shift: Tensor | None
    ) -> list[tuple[Any, float, Tensor]]:
        """Of each candidate: the shifted output, the value, and the mean of the last class tokens."""
        count, tokens = len(candidates), []
        prompts = candidates.view(count, self.prompts, blocks.width)
        watched = blocks.watched(tokens, prompts=prompts.repeat_interleave(len(x), 0), shift=shift)
        inputs = x.repeat(count, *[1] * (x.dim() - 1))
        output, _ = engine.run(inputs, {}, tap=lambda: watched)
        moments = engine.known["cls_moments"]
        own = at_least_single(torch.cat(tokens, 1)).unflatten(0, (count, len(x)))
        seen = engine.ranks.gather(own.transpose(0, 1)).unbind(1)
        doubt = entropy(at_least_single(rows(read_logits(output))))[: len(inputs)]
        doubt = engine.ranks.sum(doubt.view(count, len(x)).sum(1))
        before = 0 if shift is None else len(inputs)
        apart = [discrepancy(own, moments["mean"], moments["deviation"]) for own in seen]
        values = doubt + self.lam * len(seen[0]) / 64 * torch.stack(apart)
        found = []
        for i, value in enumerate(values.tolist()):
            place = slice(before + i * len(x), before + (i + 1) * len(x))
            answer = map_tensors(lambda t, place=place: _own(t, place, len(inputs), before), output)
            found.append((answer, value, seen[i][:, -blocks.width :].mean(0)))
        return found


def _own(tensor: Tensor, place: slice, samples: int, before: int) -> Tensor:
    """One candidate's part of a tensor of the output; what lies before the shift is there once."""
    if not tensor.dim():
        return tensor
    if len(tensor) == samples + before:
        return tensor[place]
    if len(tensor) == samples:
        return tensor[place.start - before : place.stop - before]
    return tensor


@register("method", paper="foa")
def foa(*, prompts: int = 3, population: int = 27, lam: float = 0.4, chunk: int = 64) -> Recipe:
    """Seeks prompts for a vision transformer by forward passes alone, and moves its class token.

    Needs the moments of the source's class tokens: `tt.fit_source(model, loader, methods=["foa"])`;
    some tens of images are enough, labels are not read. Transformers of timm, torchvision and
    Hugging Face with a class token are found by how they run. No gradient is taken and no weight
    changes, so quantised models can adapt. The search (CMA-ES) is the library's own, with a state
    of tensors that `save` writes.

    Use when: the model is a vision transformer that cannot be differentiated (quantised, compiled
    for inference), or whose weights must not change.

    Not when: answers must be quick: each batch costs 28 forwards. With a batch of one the standard
    deviations cannot be compared, and with few samples the moments are noise.

    Args:
        prompts: tokens that are put in after the class token; 3 (code).
        population: candidates of CMA-ES for each batch, beside the best of the batch before; 27
            (code).
        lam: weight of the discrepancy of moments, for 64 samples; 0.4 (code; ImageNet-R: 0.2).
        chunk: samples in one forward at most: candidates are evaluated together as long as they
            fit, and one at a time in larger batches. Bounds the memory, changes no answer.

    Hidden states and attentions that a model returns beside its logits are those of the run with the
    prompts: `prompts` tokens more, after the class token.

    The code takes the search from another library, which also learns from the worst candidates; this
    one learns from the better half. `predict` answers with the best prompts so far.

    Raises:
        ScopeError: at the first batch, when the model has no such blocks.

    Example:
        >>> foa(prompts=2).procedure.prompts
        2

    Reference: Niu et al., Test-Time Model Adaptation with Only Forward Passes, ICML 2024.
    """
    whole(1, prompts=prompts, chunk=chunk)
    whole(4, population=population)
    in_range(0, lam=lam)
    return Recipe(
        procedure=PromptSearch(prompts=prompts, population=population, lam=lam, chunk=chunk)
    )
