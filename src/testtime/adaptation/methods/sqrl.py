"""SQRL: statistical quantile rules, learnt from training data and kept at test time.

training data:  cut every feature at its 5, 20, ..., 95th percentile; keep "if s > t then class k"
                (or "s <= t") where it holds; [lo, hi] = 1st and 99th percentile of its F1
for each batch x:  z = f_theta(x),  p = softmax(z)
    for each rule r with matching samples M_r and class k:
        g_i = 1 / (1 + exp(-100 (p_ik - 0.5))),  tp = sum g_i,  fn = sum (1 - g_i)   over M_r
        F_r = 2 tp / (2 tp + fn + 1e-16),  l_r = distance of F_r to [lo_r, hi_r]
    theta <- theta - lr * d/dtheta  sum_r l_r / #{r : l_r > 0}       where some l_r > 0
    return z
"""

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from testtime._core.arrays import at_least_single
from testtime._core.errors import TesttimeWarning
from testtime._core.options import in_range, whole
from testtime._core.outcomes import Outcome
from testtime._core.registry import register
from testtime.adaptation.engine import Engine
from testtime.adaptation.evidence import Evidence
from testtime.adaptation.fitting import SourceBatch
from testtime.adaptation.parts.knowledge import joined
from testtime.adaptation.parts.optimizer import Adam
from testtime.adaptation.parts.rules import Rules, class_rules, matches, violations
from testtime.adaptation.parts.scope import all_parameters
from testtime.adaptation.ranks import Ranks
from testtime.adaptation.recipe import Recipe
from testtime.adaptation.state import State
from testtime.adaptation.steps import Step, Steps
from testtime.measures.entropy import entropy

VALIDATION = 3
"""Every third source sample validates rules."""


@dataclass(frozen=True, kw_only=True)
class ClassRules:
    """Class rules of the inputs, each value a feature, from all source samples.

    Every third sample is of the validation split; a batch is a group. Classes are the labels where
    the loader gives them, else the model's own predictions.

    Args:
        purity: of the matching training samples, of one class.
        validated: the same of the validation samples.
        limit: rules of a class.
    """

    purity: float
    validated: float
    limit: int
    name: ClassVar[str] = "rules"

    def add(self, total: dict[str, Tensor], batch: SourceBatch) -> dict[str, Tensor]:
        """Appends a batch."""
        number = len(total) // 2
        return {
            **total,
            f"values {number}": at_least_single(batch.inputs).flatten(1),
            f"labels {number}": batch.labels_or_predictions,
        }

    def finish(self, total: dict[str, Tensor], *, samples: int, batches: int) -> Rules:
        """The rules; warns where there are none."""
        parts = [total[f"labels {number}"] for number in range(batches)]
        sizes = torch.tensor([len(part) for part in parts], device=parts[0].device)
        place = torch.arange(samples, device=parts[0].device)
        rules = class_rules(
            joined(total, "values", batches),
            torch.cat(parts),
            torch.arange(batches, device=place.device).repeat_interleave(sizes),
            place % VALIDATION == VALIDATION - 1,
            purity=self.purity,
            validated=self.validated,
            limit=self.limit,
        )
        if not len(rules["label"]):
            warnings.warn(
                f"no single value of the input tells a class apart in {samples} samples, so there "
                "is no rule and sqrl will answer as the source model. It is made for tables; take "
                "more samples, or lower purity= and validated=.",
                TesttimeWarning,
                stacklevel=2,
            )
        return rules


def rule_losses(logits: Tensor, values: Tensor, rules: Rules, *, ranks: Ranks) -> Tensor:
    """Distance of each rule's soft F1 score to its interval (R,); 0 for rules that match nothing."""
    sure = torch.sigmoid(100 * (at_least_single(logits).softmax(-1) - 0.5))
    match = matches(values, rules).to(sure.dtype)
    label = rules["label"][:, None]
    right = ranks.sum((match.T @ sure).gather(1, label)[:, 0])
    wrong = ranks.sum((match.T @ (1 - sure)).gather(1, label)[:, 0])
    score = 2 * right / (2 * right + wrong + 1e-16)
    distance = torch.maximum(rules["low"] - score, score - rules["high"]).clamp(0, 1)
    return torch.where(ranks.sum(match.sum(0)) > 0, distance, 0.0)


@dataclass(frozen=True)
class RuleLoss:
    """Mean distance of the rules that are broken; what they speak of are the input's values."""

    needs: tuple[ClassRules, ...]
    dense: ClassVar[bool] = False

    def __call__(
        self, logits: Tensor, inputs: Tensor, known: dict[str, Rules], ranks: Ranks
    ) -> Tensor:
        values = at_least_single(inputs).flatten(1)
        losses = rule_losses(logits, values, known["rules"], ranks=ranks)
        return losses.sum() / (losses > 0).sum().clamp(min=1)


@dataclass(frozen=True)
class WhereRulesBreak:
    """Answers, and learns where a rule is broken.

    Args:
        needs: the rules.
    """

    needs: tuple[ClassRules, ...] = field(repr=False)
    passes: ClassVar[tuple[float, float]] = (1.0, 1.0)

    def step(self, engine: Engine, x: Tensor, state: State) -> Steps:
        """One step on a batch."""
        evidence = Evidence(engine, state, engine.leaves(state), x)
        with torch.enable_grad():
            output, logits = engine.answer(evidence)
        yield output
        values, rules = at_least_single(x).flatten(1), engine.known["rules"]
        logits = logits.detach()
        losses = rule_losses(logits, values, rules, ranks=engine.ranks)
        told: dict[str, Any] = {"used": 0}
        outcome = Outcome.NOTHING_RELIABLE
        if bool((losses != 0).any()):  # also where they are no numbers
            state, outcome, told = engine.learn(evidence)
        told["entropy"] = entropy(logits).mean()
        told["violations"] = violations(values, logits.argmax(1), rules).sum()
        return Step(output, logits, state, outcome, told)


@register("method", paper="sqrl")
def sqrl(
    *, lr: float = 1e-4, purity: float = 0.95, validated: float = 0.93, limit: int = 1000
) -> Recipe:
    """Learns simple rules from training data, and adapts the model where its answers break them.

    The rules are of the form "if feature 3 is above 0.5 then class 1"; a feature is a value of the
    input, so they say most of tabular data. `rules_to_json(known["rules"])` of
    `testtime.adaptation.parts.rules` shows them; how many a batch breaks is told in the events, as
    `measured["violations"]`. The paper goes over the test set 10 to 15 times: send it as often.

    Use when: inputs are tables, and single features tell classes apart for many samples; also to
    mend a model that was trained on wrong labels, with rules from a few right ones.

    Not when: inputs are images: a pixel says little of a class, and a shift moves it.

    Args:
        lr: step size of Adam; 1e-4 (code, tabular; ImageNet-X 2e-3). The code's weight decay of
            2e-4 is left out.
        purity: of the matching training samples, of one class. Rules of the code come from an
            unfinished generator; 0.95 here.
        validated: the same of every third sample, which is held out; 0.93 here.
        limit: rules of a class, those that match most (the code's 20 are of other rules).

    Example:
        >>> sqrl().needs[0].purity
        0.95

    Reference: Naik, Wu, Naik, Wong, Do Machine Learning Models Learn Statistical Rules Inferred
    from Data?, ICML 2023.
    """
    in_range(0, 1, purity=purity, validated=validated)
    whole(1, limit=limit)
    need = ClassRules(purity=purity, validated=validated, limit=limit)
    return Recipe(
        scope=all_parameters,
        batch_objective=RuleLoss((need,)),
        procedure=WhereRulesBreak((need,)),
        optimizer=Adam(lr=lr),
    )
