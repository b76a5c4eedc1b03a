"""Which samples of a data set a domain sends, and in which order of labels."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from testtime._core.errors import InputError

ORDERS = ("shuffled", "dirichlet", "sorted")
DISTRIBUTIONS = ("natural", "balanced", "long-tailed", "inverse")
MOST_SLOTS = 100


def class_counts(
    available: Int[Tensor, " classes"],
    *,
    distribution: str,
    ratio: float = 50.0,
    samples: int | None = None,
) -> Int[Tensor, " classes"]:
    """Samples to take of each class, c = 0 .. C-1 in the order of the labels.

        long-tailed   n_c = ⌊n_max · ratio^(−c / (C−1))⌋
        inverse       the same for C−1−c
        balanced      ratio 1

    n_max is the largest number that no class lacks samples for and whose total stays within
    `samples`; with equally large classes and no limit it is their size. A class whose number is
    below 1 gets no sample: `ratio` is reached where n_max is at least as large.

    Args:
        available: (C,) how many there are of each class.
        distribution: "balanced", "long-tailed" or "inverse".
        ratio: most frequent over least frequent class.
        samples: upper limit of the total; None for no limit.

    Raises:
        InputError: no class would have a sample.

    Example:
        >>> class_counts(torch.tensor([100, 100, 100]), distribution="long-tailed", ratio=100)
        tensor([100,  10,   1])

    Reference: Zhang et al., Self-Supervised Aggregation of Diverse Experts (SADE), NeurIPS 2022.
    """
    classes = len(available)
    place = torch.arange(classes, dtype=torch.float64, device="cpu") / max(classes - 1, 1)
    profile = (1.0 if distribution == "balanced" else ratio) ** -place
    if distribution == "inverse":
        profile = profile.flip(0)
    most = float((available / profile).min())
    if samples is not None:
        most = min(most, samples / float(profile.sum()))
    counts = (most * profile + 1e-9).floor().long()  # 50 * 0.02 is not to become 0.99…
    if counts.sum() == 0:
        raise InputError(
            f"a {distribution} stream has no sample to send: samples={samples}, ratio={ratio:g}, "
            f"{classes} classes. Raise samples or lower ratio."
        )
    return counts


def choose(
    labels: Int[Tensor, " n"],
    *,
    distribution: str,
    ratio: float,
    samples: int | None,
    generator: torch.Generator,
) -> Int[Tensor, " chosen"]:
    """Sorted positions of the samples that a domain sends, drawn without replacement.

    "natural" takes all, or `samples` of them at random; the others follow `class_counts`.
    """
    shuffled = torch.randperm(len(labels), generator=generator, device="cpu")
    if distribution == "natural":
        return shuffled[:samples].sort().values
    available = labels.unique(return_counts=True)[1]
    counts = class_counts(available, distribution=distribution, ratio=ratio, samples=samples)
    by_class = shuffled[labels[shuffled].sort(stable=True).indices].split(available.tolist())
    picks = [members[:n] for members, n in zip(by_class, counts.tolist(), strict=True)]
    return torch.cat(picks).sort().values


def arrange(
    labels: Int[Tensor, " n"], *, order: str, delta: float, generator: torch.Generator
) -> Int[Tensor, " n"]:
    """Positions (n,) in the order in which they are sent.

    "shuffled" is uniform; "sorted" sends one class after another, shuffled within each;
    "dirichlet" is `dirichlet_order`.
    """
    shuffled = torch.randperm(len(labels), generator=generator, device="cpu")
    if order == "shuffled":
        return shuffled
    if order == "sorted":
        return shuffled[labels[shuffled].sort(stable=True).indices]
    return shuffled[dirichlet_order(labels[shuffled], delta=delta, generator=generator)]


def dirichlet_order(
    labels: Int[Tensor, " n"],
    *,
    delta: float,
    generator: torch.Generator,
    slots: int | None = None,
) -> Int[Tensor, " n"]:
    """Temporally correlated order of labels, as in RoTTA.

        1. q_c ~ Dirichlet(δ, …, δ) over S slots, for every class c
        2. the samples of c, in the order given, are cut into S runs at ⌊n_c Σ_{t≤s} q_ct⌋
        3. slot s holds its run of every class, one class after another, classes in random order
        4. the slots follow one another

    Small δ puts a class into one or two slots (nearly sorted); large δ gives every slot the same
    share of every class, still one class after another inside it.

    Args:
        labels: (n,) of the samples of a domain.
        delta: δ > 0; RoTTA uses 0.1.
        generator: of the draws.
        slots: S; by default the number of classes, at most 100.

    Returns:
        Positions (n,) in `labels`, each once.

    Example:
        >>> labels = torch.arange(4).repeat(25)
        >>> sent = labels[dirichlet_order(labels, delta=0.01, generator=torch.Generator())]
        >>> int((sent[1:] != sent[:-1]).sum()) < 10
        True

    Reference: Yuan, Xie, Li, Robust Test-Time Adaptation in Dynamic Scenarios, CVPR 2023.
    """
    classes = labels.unique()
    slots = slots or min(len(classes), MOST_SLOTS)
    shares = dirichlet(len(classes), slots, delta=delta, generator=generator)
    turns = torch.stack(
        [torch.randperm(len(classes), generator=generator, device="cpu") for _ in range(slots)]
    )
    return slotted(labels, shares, turns)


def slotted(
    labels: Int[Tensor, " n"],
    shares: Float[Tensor, "classes slots"],
    turns: Int[Tensor, "slots classes"],
) -> Int[Tensor, " n"]:
    """Steps 2 to 4 of `dirichlet_order`: classes in order of their labels, nothing random left.

    Args:
        labels: (n,).
        shares: (C, S) the share of a class that each slot gets; rows sum to 1.
        turns: (S, C) the order of classes inside each slot.
    """
    classes = labels.unique(return_inverse=True)[1]
    members = classes.sort(stable=True).indices  # one class after another
    counts = classes.bincount()
    cuts = (shares.cumsum(1)[:, :-1] * counts[:, None]).long()
    ends = cuts + (counts.cumsum(0) - counts)[:, None]  # as places in `members`, so they rise
    place = torch.arange(len(labels), device="cpu")
    slot = torch.searchsorted(ends.flatten(), place, right=True) - classes[members] * cuts.shape[1]
    turn = slot * len(counts) + turns.argsort(dim=1)[slot, classes[members]]
    return members[turn.sort(stable=True).indices]


def dirichlet(
    rows: int, columns: int, *, delta: float, generator: torch.Generator
) -> Float[Tensor, "rows columns"]:
    """Draws (rows, columns) of Dirichlet(δ, …, δ) in float64, safe for any small δ.

        ln G(δ) = ln G(δ + 1) + ln U / δ,   q = softmax(ln G)

    Gamma variates of small shape underflow; their logarithms do not.
    """
    shape = torch.full((rows, columns), delta + 1.0, dtype=torch.float64, device="cpu")
    # torch.distributions draws with the same function, but from the global generator.
    gamma = torch._standard_gamma(shape, generator=generator)
    uniform = 1 - torch.rand(shape.shape, dtype=torch.float64, generator=generator, device="cpu")
    return (gamma.log() + uniform.log() / delta).softmax(dim=1)
