"""Neural network divergence: how well a fresh critic tells a model's samples from real ones.

for each step:
    x real, y from the model, each of its own law;   z = u x + (1 - u) y, u uniform, pair by pair
    -L = mean D(x) - mean D(y) - penalty mean ( |grad D(z)| - 1 )^2
    D <- D + lr * Adam of the gradient of -L, lr falling to 0
    mean of the weights <- decay mean + (1 - decay) weights
value: -L with the mean of the weights, on further samples; larger is worse

A model that has learned its training set by heart draws from that set. Scores that compare features
(FID) reward it; a critic that sees fresh real samples finds the places which the set leaves empty.
"""

# torch leaves some types open
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from collections.abc import Callable, Iterator
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from testtime._core.arrays import check_tensors, magnitude
from testtime._core.errors import InputError
from testtime._core.options import in_range, whole
from testtime._core.seeds import check_generator, generator
from testtime.measures.entropy import mutual_information
from testtime.measures.information.estimate import Estimate, checked, mean_estimate
from testtime.measures.information.networks import Averaged, adam, mlp, trainable, training
from testtime.measures.information.variational import HELD_OUT, LEAST, check_training, finite

Draw = Callable[[int], Tensor]
"""A function that answers so many fresh samples, as (n, ...)."""


def network_divergence(
    real: Tensor | Draw,
    fake: Tensor | Draw,
    *,
    held: Tensor | Draw | None = None,
    critic: nn.Module | None = None,
    penalty: float = 10.0,
    steps: int = 2000,
    batch_size: int = 256,
    draws: int = 200,
    lr: float = 1e-3,
    decay: float = 0.99,
    seed: int = 0,
    trace: bool = False,
) -> Estimate:
    """The divergence of a model's samples from real ones that a trained critic sees.

    It is near the distance (Wasserstein-1) of the two laws as far as the critic can see it, in the
    units of the samples. Bring these to a scale of about 1, the same for all models. Numbers compare
    for one critic and one training alone. Of two equal laws it is about 0, and may be a little below.
    Point masses are laws like others: constant samples have a value.

    Real samples must be ones that the model was not made from. The baseline is what the training
    set itself gets, as a model that has learned it by heart: `fake=training_set`.

    Args:
        real: a function of fresh samples, or samples (n, ...); of the latter a quarter is held out
            for the value, unless `held` is given.
        fake: a function of fresh samples of the model, or samples: these are then all that the
            model knows, and it draws from them with replacement. A few of many that a model can
            make are not the model: give a function.
        held: real samples for the value, each used once, or a function of them. Default: the
            function `real` (code), or the quarter.
        critic: a module that gives one score for each sample and does not mix samples; a copy of it
            is trained. Default: `image_critic` (code) for images (n, channels, height, width), else
            two hidden layers of 128 with SiLU on what a sample holds; both start as He et al. say.
        penalty: 10 (code).
        steps: 2000, ours for small problems; the code makes 100,000.
        batch_size: 256 (code).
        draws: batches for the value where real samples come from a function: 200, ours; the code
            takes 10,000.
        lr: of Adam with betas 0 and 0.9, falling to 0: 1e-3, ours for few steps; 2e-4 in the code.
        decay: of the running mean of the weights, ours for few steps; 0.999 in the code.
        seed: of the split, the weights, the batches and the points of the penalty. What a function
            draws is its own.
        trace: whether -L of each step is kept.

    Raises:
        InputError: for NaN, samples of unlike shapes, fewer than 32 real samples, a function that
            answers another number of samples than it was asked for, or a critic without weights.
        OptionError: for an option out of its range.

    Example:
        >>> random = torch.Generator().manual_seed(0)
        >>> def law(n):
        ...     return torch.randn(n, 2, generator=random)
        >>> short = {"steps": 100, "batch_size": 64, "lr": 5e-3, "decay": 0.9}
        >>> apart = network_divergence(law, lambda n: law(n) + 2, **short)
        >>> abs(apart.value - 8**0.5) < 0.8  # how far it was moved
        True
        >>> abs(network_divergence(law, law, **short).value) < 0.3
        True

    Reference: Gulrajani, Raffel, Metz, Towards GAN Benchmarks Which Require Generalization,
        ICLR 2019.
    """
    check_training(steps=steps, batch_size=batch_size, lr=lr)
    whole(1, draws=draws)
    in_range(0, penalty=penalty)
    in_range(0, 1, decay=decay)
    random = generator(seed, "network divergence")
    if isinstance(real, Tensor):
        real = _samples(real, "real", least=LEAST)
        if held is None:
            order = torch.randperm(len(real), generator=random, device="cpu").to(real.device)
            count = int(HELD_OUT * len(real))
            real, held = real[order[count:]], real[order[:count]]
    known, model = _source(real, "real", random), _source(fake, "fake", random)
    with training():
        first = known(batch_size)
        critic = trainable(_usual_critic(first, random) if critic is None else critic)
        critic.to(first.device)
        averaged = Averaged(critic, decay=decay)
        descend = adam(critic, lr=lr, betas=(0.0, 0.9), decay_over=steps)
        values: list[float] = []
        for _ in range(steps):
            gain = penalised(critic, known(batch_size), model(batch_size), penalty, random).mean()
            descend(-gain)
            averaged.follow(critic)
            if trace:
                values.append(float(gain.detach()))
        terms: list[Tensor] = []
        for batch in _further(real if held is None else held, batch_size, draws):
            other = model(batch_size)[: len(batch)]
            terms.append(penalised(averaged.network, batch, other, penalty, random).detach())
    return finite(mean_estimate(torch.cat(terms).double(), tuple(values)))


def penalised(
    critic: nn.Module,
    real: Float[Tensor, "batch *shape"],
    fake: Float[Tensor, "batch *shape"],
    penalty: float,
    generator: torch.Generator,
) -> Float[Tensor, " batch"]:
    """What each pair of samples says for the critic, differentiable; -L is the mean.

        D(x) - D(y) - penalty ( |grad D(z)| - 1 )^2

    Args:
        critic: D, one score for each sample.
        real: x.
        fake: y.
        penalty: on slopes other than 1.
        generator: of the place of z between x and y, on the CPU.

    Raises:
        InputError: for shapes that differ, or a critic that does not give one score for each sample.

    Example:
        >>> x, y = torch.tensor([[3.0], [5.0]]), torch.tensor([[1.0], [1.0]])
        >>> penalised(nn.Identity(), x, y, 10.0, torch.Generator())
        tensor([2., 4.], grad_fn=<SubBackward0>)

    Reference: Gulrajani et al., Improved Training of Wasserstein GANs, NeurIPS 2017.
    """
    check_tensors(real=real, fake=fake)
    if real.shape != fake.shape or real.device != fake.device:
        raise InputError(
            f"a batch of real samples has the shape {tuple(real.shape)} on {real.device}, one of the "
            f"model's {tuple(fake.shape)} on {fake.device}; expected samples of one shape and device."
        )
    fits = real.ndim > 0 and real.numel() > 0 and real.is_floating_point()
    if not fits or fake.dtype != real.dtype:
        raise InputError(
            f"samples are {real.dtype} and {fake.dtype} of the shape {tuple(real.shape)}; expected "
            "both as (n, ...) in one floating point type, at least one."
        )
    check_generator(generator)
    place = torch.rand(len(real), generator=generator, dtype=torch.float32, device="cpu").to(real)
    place = place.reshape(-1, *[1] * (real.ndim - 1))
    between = (place * real + (1 - place) * fake).requires_grad_()
    scores = critic(torch.cat([real, fake, between]))
    several = isinstance(scores, Tensor) and scores.ndim > 0
    if not several or scores.numel() != 3 * len(real) or len(scores) != 3 * len(real):
        told = f"the shape {tuple(scores[: len(real)].shape)}" if several else "no batch"
        raise InputError(
            f"the critic answers {told} for {len(real)} samples; expected one score for each."
        )
    of_real, of_fake, of_between = scores.split(len(real))
    (slope,) = torch.autograd.grad(of_between.sum(), between, create_graph=True)
    length = (slope.flatten(1).square().sum(1) + 1e-8).sqrt()
    return (of_real - of_fake).flatten() - penalty * (length - 1).square()


def image_critic(shape: tuple[int, int, int], *, generator: torch.Generator) -> nn.Sequential:
    """The critic of the paper's "CNN divergence": three strided convolutions, then one score.

    5 x 5 and stride 2, of 64, 128 and 256 channels, with SiLU, He's initialisation and no
    normalisation (code).

    Args:
        shape: channels, height and width of an image.
        generator: of the weights, on the CPU.

    Example:
        >>> critic = image_critic((3, 32, 32), generator=torch.Generator().manual_seed(0))
        >>> critic(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 1])

    Reference: Gulrajani, Raffel, Metz, ICLR 2019.
    """
    if len(shape) != 3:
        raise InputError(f"shape is {shape}; expected (channels, height, width).")
    check_generator(generator)
    channels, height, width = shape
    whole(1, channels=channels, height=height, width=width)
    layers: list[nn.Module] = []
    for outputs in (64, 128, 256):
        layers += [
            nn.Conv2d(
                channels, outputs, 5, stride=2, padding=2, device="meta", dtype=torch.float32
            ),
            nn.SiLU(),
        ]
        channels, height, width = outputs, -(-height // 2), -(-width // 2)
    last = nn.Linear(channels * height * width, 1, device="meta", dtype=torch.float32)
    layers += [nn.Flatten(), last]
    return _started(nn.Sequential(*layers).to_empty(device="cpu"), generator)


def dequantised(
    images: Tensor, *, generator: torch.Generator
) -> Float[Tensor, "batch channels height width"]:
    """Images of 0 ... 255 as the paper's critic reads them: in [-1, 1], with the steps blurred.

        (x - 128) / 128 + uniform on [0, 1 / 128)

    A critic must not tell a model's images by their fractions: blur real ones and the model's alike.

    Raises:
        InputError: images that are complex, or not finite in float32.

    Example:
        >>> images = torch.tensor([0, 255]).reshape(1, 1, 1, 2)
        >>> found = dequantised(images, generator=torch.Generator().manual_seed(0))
        >>> (found * 128 + 128).floor().flatten()
        tensor([  0., 255.])

    Reference: Gulrajani, Raffel, Metz, ICLR 2019.
    """
    check_tensors(images=images)
    if images.is_complex() or not bool(images.float().isfinite().all()):
        raise InputError(f"images of {images.dtype} are not all finite; expected 0 ... 255.")
    check_generator(generator)
    noise = torch.rand(images.shape, generator=generator, dtype=torch.float32, device="cpu")
    return (images.float() - 128 + noise.to(images.device)) / 128


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Of the Gaussians with the means and covariances of two samples; of Inception features, FID.

        |m_x - m_y|^2 + tr( C_x + C_y - 2 (C_x C_y)^(1/2) )

    It sees two moments alone, so a model that has learned its training set by heart is near 0.

    Args:
        x: (n, d) or (n,) features.
        y: (m, d) or (m,) features.

    Raises:
        InputError: for NaN, fewer than 2 samples, features that differ in number, or a distance beyond
            float64.

    Example:
        >>> x = torch.tensor([[0.0], [2.0]])
        >>> round(frechet_distance(x, x + 3), 4)
        9.0

    Reference: Heusel et al., GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
        Equilibrium, NeurIPS 2017.
    """
    x, y = checked(x, "x"), checked(y, "y")
    if x.shape[1] != y.shape[1] or x.device != y.device:
        raise InputError(
            f"x has {x.shape[1]} features on {x.device} and y {y.shape[1]} on {y.device}; expected "
            "the same features of both."
        )
    scale = magnitude(torch.maximum(x.abs().amax(), y.abs().amax()))
    x, y = x / scale, y / scale
    of_x, of_y = (v.T.cov().reshape(v.shape[1], -1) for v in (x, y))
    lengths, axes = torch.linalg.eigh(of_x)
    root = axes * lengths.clamp(min=0).sqrt() @ axes.T
    common = torch.linalg.eigvalsh(root @ of_y @ root).clamp(min=0).sqrt().sum()
    apart = (x.mean(0) - y.mean(0)).square().sum()
    found = (apart + of_x.trace() + of_y.trace() - 2 * common).clamp(min=0) * scale * scale
    if not found.isfinite():
        raise InputError("the squares of the features overflow; scale x and y down alike.")
    return float(found)


def inception_score(logits: Float[Tensor, "samples classes"]) -> float:
    """How sure and how varied a classifier finds a model's samples, from 1 to the number of classes.

        exp( mean_i KL( p(. | x_i) || mean_j p(. | x_j) ) )

    It sees no real samples, so a model that has learned its training set by heart is as good as can be.

    Args:
        logits: (n, classes) of the samples; of an Inception network on images, the score's own.

    Raises:
        InputError: fewer than one sample, or logits of which no prediction can be read.

    Example:
        >>> inception_score(torch.tensor([[50.0, 0.0], [0.0, 50.0]]))
        2.0

    Reference: Salimans et al., Improved Techniques for Training GANs, NeurIPS 2016.
    """
    check_tensors(logits=logits)
    if logits.ndim != 2 or not logits.numel() or not logits.is_floating_point():
        raise InputError(
            f"logits are {logits.dtype} of the shape {tuple(logits.shape)}; expected (n, classes) in "
            "floating point, at least one sample."
        )
    score = float(mutual_information(logits.detach().double()).exp())
    if not math.isfinite(score):
        raise InputError("logits hold NaN, +inf, or nothing but -inf; leave these samples out.")
    return score


def _usual_critic(sample: Tensor, random: torch.Generator) -> nn.Module:
    if sample.ndim == 4:
        return image_critic((sample.shape[1], sample.shape[2], sample.shape[3]), generator=random)
    layers = mlp([math.prod(sample.shape[1:]), 128, 128, 1], random, nn.SiLU)
    return _started(nn.Sequential(nn.Flatten(), *layers), random)


def _started(critic: nn.Sequential, random: torch.Generator) -> nn.Sequential:
    """With He's initialisation (code): one that starts smaller sees the finer holes too late."""
    for name, own in critic.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(own)
        else:
            nn.init.kaiming_normal_(own, nonlinearity="relu", generator=random)
    return critic


def _source(samples: Tensor | Draw, name: str, random: torch.Generator) -> Draw:
    """Fresh samples, checked; of a fixed set, with replacement."""
    if isinstance(samples, Tensor):
        kept = _samples(samples, name)

        def drawn(n: int) -> Tensor:
            return kept[
                torch.randint(len(kept), (n,), generator=random, device="cpu").to(kept.device)
            ]

        return drawn
    if not callable(samples):
        said = type(samples).__name__
        raise InputError(
            f"{name} is of type {said}; expected a tensor (n, ...), or a function of n."
        )
    draw = samples

    def asked(n: int) -> Tensor:
        with torch.no_grad():
            found = cast("object", draw(n))
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if not isinstance(found, Tensor) or shape[:1] != (n,):
            raise InputError(
                f"{name} was asked for {n} samples and answered {shape}; expected a tensor (n, ...)."
            )
        return _samples(found, name)

    return asked


def _further(held: Tensor | Draw, batch_size: int, draws: int) -> Iterator[Tensor]:
    """Real samples for the value: all of a fixed set, or as many batches of a function."""
    if isinstance(held, Tensor):
        return iter(_samples(held, "held").split(batch_size))
    draw = _source(held, "held", torch.Generator())
    return (draw(batch_size) for _ in range(draws))


def _samples(samples: Tensor, name: str, *, least: int = 1) -> Tensor:
    """Real numbers in float32, (n,) as (n, 1), apart from the caller's graph and mode."""
    check_tensors(**{name: samples})
    if samples.ndim == 0 or samples.numel() == 0 or samples.is_complex():
        raise InputError(
            f"{name} has the shape {tuple(samples.shape)} and the type {samples.dtype}; expected "
            "real samples as (n, ...)."
        )
    if len(samples) < least:
        raise InputError(f"{name} has {len(samples)} samples; this needs at least {least}.")
    samples = samples.detach().to(torch.float32, copy=True)
    if not samples.isfinite().all():
        raise InputError(
            f"{name} holds NaN, infinity or numbers beyond float32; expected finite numbers. Leave "
            "such samples out, and bring the others to a scale of about 1."
        )
    return samples[:, None] if samples.ndim == 1 else samples
