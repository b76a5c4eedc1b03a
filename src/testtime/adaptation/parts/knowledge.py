"""What must be known of source data? Each need sums up batches of it, and is done in a pass.

A part that needs something lists it in `needs`; what was found is `known[need.name]` in the
evidence, a dictionary of tensors.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from testtime._core.arrays import at_least_single
from testtime._core.errors import InputError

if TYPE_CHECKING:
    from testtime.adaptation.fitting import SourceBatch

Known = dict[str, Tensor]
"""Tensors by name: sums while the pass goes on, afterwards what is known."""


class Need(Protocol):
    """Something to be known of source data, a frozen dataclass; equal needs are met once.

    A need that must see the data several times has an attribute `passes`, and may have `turn(total)
    -> total`, called when a pass is over. One that tells of each adapted tensor, as `name` or `what
    name`, has an attribute `of_tensors`, and one that tells of features, `of_features`.
    """

    name: ClassVar[str]
    """What it is called in a file and in the evidence."""

    def add(self, total: Known, batch: "SourceBatch") -> Known:
        """The sums after one more batch; `total` is empty at first."""
        ...

    def finish(self, total: Known, *, samples: int, batches: int) -> Known:
        """What is known, from the sums over all batches of a pass."""
        ...


def named(key: str, names: Iterable[str], tensors: Iterable[Tensor]) -> Known:
    """One tensor for each name, as `key name`; `part_of` finds them again."""
    return {f"{key} {name}": tensor for name, tensor in zip(names, tensors, strict=True)}


def part_of(known: Mapping[str, Tensor], key: str) -> Known:
    """The tensors that `named` called by `key`, by the rest of their names."""
    begin = f"{key} "
    return {k.removeprefix(begin): tensor for k, tensor in known.items() if k.startswith(begin)}


def joined(total: Known, key: str, batches: int) -> Tensor:
    """The tensors that were kept as `key 0`, `key 1`, ... in one.

    Raises:
        InputError: their samples differ in shape.
    """
    parts = [total[f"{key} {number}"] for number in range(batches)]
    check_alike(key, parts)
    return torch.cat(parts)


def check_alike(key: str, parts: Iterable[Tensor]) -> None:
    """Refuses tensors that hold other than one number of values for each row.

    Args:
        key: what they are called.
        parts: (n, ...), where n may differ.
    """
    shapes = {str(tuple(part.shape[1:])) for part in parts}
    if len(shapes) > 1:
        raise InputError(
            f"the {key} of source samples are of the shapes {', '.join(sorted(shapes))}; expected "
            "one. Give a loader of samples of one size."
        )


@dataclass(frozen=True)
class Fisher:
    """Fisher information of the tensors that adapt, from the model's own predictions.

        F_j = mean over batches of ( d/dtheta_j mean_i CE(argmax z_i, z_i) )^2

    Labels are not read. The squared gradient is that of the batch mean, as in EATA's code, so it
    depends on the batch size: use the stream's.

    Reference: Niu et al., Efficient Test-Time Model Adaptation without Forgetting, ICML 2022.
    """

    name: ClassVar[str] = "fisher"
    of_tensors: ClassVar[bool] = True

    def add(self, total: Known, batch: "SourceBatch") -> Known:
        """Adds the squared gradients of a batch."""
        grads = batch.gradients(lambda z: F.cross_entropy(at_least_single(z), z.argmax(-1)))
        return {
            name: total[name] + grad.square() if name in total else grad.square()
            for name, grad in grads.items()
        }

    def finish(self, total: Known, *, samples: int, batches: int) -> Known:
        """Their mean over batches."""
        return {name: value / batches for name, value in total.items()}


@dataclass(frozen=True)
class Prototypes:
    """Mean feature of each class, under the method's statistics: `means` (K, d).

    By label where the loader gives labels, else by predicted class; classes without samples are
    left out.
    """

    name: ClassVar[str] = "prototypes"
    of_features: ClassVar[bool] = True

    def add(self, total: Known, batch: "SourceBatch") -> Known:
        """Adds the features of a batch to the sums of their classes."""
        features = at_least_single(batch.own_features)
        labels = batch.labels_or_predictions
        member = F.one_hot(labels, batch.logits.shape[-1]).to(features.dtype)
        sums, counts = member.T @ features, member.sum(0)
        if total:
            check_alike("features", (total["sums"], features))
            sums, counts = total["sums"] + sums, total["counts"] + counts
        return {"sums": sums, "counts": counts}

    def finish(self, total: Known, *, samples: int, batches: int) -> Known:
        """The means of the classes that there are samples of."""
        seen = total["counts"] > 0
        return {"means": total["sums"][seen] / total["counts"][seen, None]}


@dataclass(frozen=True)
class LabelledSamples:
    """The source samples themselves, to be seen again: `inputs` (n, ...) and `labels` (n,)."""

    name: ClassVar[str] = "labelled samples"

    def add(self, total: Known, batch: "SourceBatch") -> Known:
        """Keeps a batch."""
        number = len(total) // 2
        return {
            **total, f"inputs {number}": batch.inputs, f"labels {number}": batch.labels
        }  # fmt: skip

    def finish(self, total: Known, *, samples: int, batches: int) -> Known:
        """All that were kept."""
        return {key: joined(total, key, batches) for key in ("inputs", "labels")}


@dataclass(frozen=True, kw_only=True)
class ClassMoments:
    """Mean and covariance of the features of each class: a Gaussian for each.

    `count` (C,), `mean` (C, d) and `covariance`, (d, d) where classes share one, else (C, d, d), in
    float64, with the divisor n. Classes are the labels where the loader gives them, else the
    model's own predictions. One pass, stable however far the features are from zero: sums are of
    deviations from means, merged batch by batch (Chan, Golub, LeVeque 1983).

    Args:
        tied: whether all classes share one covariance, that around their own means.
    """

    tied: bool = True
    name: ClassVar[str] = "class_moments"
    of_features: ClassVar[bool] = True

    def add(self, total: Known, batch: "SourceBatch") -> Known:
        """Merges the counts, means and sums of squared deviations of a batch."""
        features, labels = batch.features.double(), batch.labels_or_predictions
        classes, size = batch.logits.shape[-1], features.shape[1]
        count = labels.bincount(minlength=classes).double()
        mean = features.new_zeros(classes, size).index_add_(0, labels, features)
        mean = mean / count.clamp(min=1)[:, None]
        deviations = features - mean[labels]
        if not total:
            shape = (size, size) if self.tied else (classes, size, size)
            total = {
                "count": torch.zeros_like(count),
                "mean": torch.zeros_like(mean),
                "scatter": features.new_zeros(shape),
            }
        check_alike("features", (total["mean"], features))
        both = total["count"] + count
        share = count / both.clamp(min=1)
        apart, pull = mean - total["mean"], total["count"] * share
        scatter = total["scatter"]
        if self.tied:
            scatter.addmm_(deviations.T, deviations).addmm_(apart.T, pull[:, None] * apart)
        else:
            for label in labels.unique():
                own = deviations[labels == label]
                scatter[label] += own.T @ own + pull[label] * apart[label].outer(apart[label])
        return {
            "count": both,
            "mean": total["mean"] + share[:, None] * apart,
            "scatter": scatter,
        }

    def finish(self, total: Known, *, samples: int, batches: int) -> Known:
        """Means and covariances; a class without samples has those of the classes on average."""
        count, mean, scatter = total["count"], total["mean"], total["scatter"]
        absent, share = count == 0, count / count.sum()
        mean = torch.where(absent[:, None], share @ mean, mean)
        if self.tied:
            return {"count": count, "mean": mean, "covariance": scatter / count.sum()}
        own = scatter / count.clamp(min=1)[:, None, None]
        pooled = torch.einsum("c,cij->ij", share, own)
        covariance = torch.where(absent[:, None, None], pooled, own)
        return {"count": count, "mean": mean, "covariance": covariance}


@dataclass(frozen=True)
class FeatureMemory:
    """The features of all source samples, each of length one, and their classes.

    `features` (n, d) and `labels` (n,). Classes are the labels where the loader gives them, else
    the model's own predictions. It is as large as the source data that is read: 8 MB for a thousand
    samples of 2048 features.
    """

    name: ClassVar[str] = "feature_memory"
    of_features: ClassVar[bool] = True

    def add(self, total: Known, batch: "SourceBatch") -> Known:
        """Appends a batch."""
        number = len(total) // 2
        features = F.normalize(at_least_single(batch.features), dim=-1)
        return {
            **total,
            f"features {number}": features,
            f"labels {number}": batch.labels_or_predictions,
        }

    def finish(self, total: Known, *, samples: int, batches: int) -> Known:
        """All of them in the order of the pass."""
        return {key: joined(total, key, batches) for key in ("features", "labels")}


@dataclass(frozen=True)
class ClsMoments:
    """Mean and standard deviation of a transformer's class tokens after each of its blocks.

    Each as the next block's first normalisation leaves it, after the last block as the final one
    does; `mean` and `deviation` (blocks * d,), the divisor of the variance n - 1. Labels are not read.

    Reference: Niu et al., Test-Time Model Adaptation with Only Forward Passes, ICML 2024.
    """

    name: ClassVar[str] = "cls_moments"

    def add(self, total: Known, batch: "SourceBatch") -> Known:
        """Merges the moments of a batch (Chan, Golub, LeVeque 1983)."""
        from testtime.adaptation.tokens import find_blocks  # noqa: PLC0415  (it runs models)

        engine, tokens = batch.engine, list[Tensor]()
        blocks = find_blocks(engine.loan, batch.inputs)
        engine.run(batch.inputs, {}, tap=lambda: blocks.watched(tokens))
        seen = torch.cat(tokens, 1).double()
        count, mean = torch.full_like(seen[0, :1], len(seen)), seen.mean(0)
        scatter = (seen - mean).square().sum(0)
        if not total:
            return {"count": count, "mean": mean, "scatter": scatter}
        share = count / (total["count"] + count)
        apart = mean - total["mean"]
        return {
            "count": total["count"] + count,
            "mean": total["mean"] + share * apart,
            "scatter": total["scatter"] + scatter + total["count"] * share * apart.square(),
        }

    def finish(self, total: Known, *, samples: int, batches: int) -> Known:
        """The moments, in float32."""
        variance = total["scatter"] / (total["count"] - 1).clamp(min=1)
        return {"mean": total["mean"].float(), "deviation": variance.sqrt().float()}
