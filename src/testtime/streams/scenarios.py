"""Scenarios: how the world sends its samples, as a small record that repeats exactly."""

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, final

from torch import Tensor
from torch.utils.data import Dataset

from testtime._core.errors import OptionError, unknown
from testtime.streams.batches import UNKNOWN, Batch, Sample, Stream, kinds_of
from testtime.streams.corruptions import (
    CORRUPTIONS,
    EXTRA_CORRUPTIONS,
    GEOMETRIC,
    ILLUMINATION,
)
from testtime.streams.data import labels_of, stack
from testtime.streams.open_set import MADE, check_kinds, with_strangers
from testtime.streams.order import DISTRIBUTIONS, ORDERS
from testtime.streams.plan import segments
from testtime.streams.recorded import Recorded

__all__ = [
    "PATTERNS",
    "PRESETS",
    "UNKNOWN",
    "Batch",
    "Sample",
    "Scenario",
    "Stream",
    "known_domains",
]

PATTERNS = ("stationary", "reset", "continual", "gradual", "recurring", "mixed")
"""How domains follow one another."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    **{name: {"pattern": name} for name in PATTERNS},
    **{name: {"labels": name} for name in ORDERS},
    **{name: {"distribution": name} for name in DISTRIBUTIONS},
    "single": {"batch_size": 1},
    "open-set": {"unknown": ("blobs",)},
}
"""Name -> what it sets. Names of different kinds combine: "recurring,dirichlet,long-tailed"."""

RECURRING_ROUNDS = 3
"""What "recurring" means where the number of rounds is not said; papers take up to 50."""

SMALLEST_DELTA, LARGEST_DELTA = 1e-6, 1e6


def known_domains() -> tuple[str, ...]:
    """Names that a domain can have: "clean" and every corruption."""
    return ("clean", *CORRUPTIONS, *EXTRA_CORRUPTIONS, *GEOMETRIC, *ILLUMINATION)


@final
@dataclass(frozen=True, kw_only=True)
class Scenario:
    """The order in which a shifting world sends samples: five independent choices, and sizes.

    Any product of the choices works. The same record, data set and seed give the same batches, bit
    for bit; `to_toml` and `from_toml` are inverse to each other.

    Args:
        pattern: how domains follow one another. "stationary": one domain for ever. "continual": one
            after another, and nobody says when. "reset": the same, and the first batch of each
            domain says `reset=True`. "gradual": continual, with severity 1, 2, …, `severity`, …,
            2, 1 inside each domain. "recurring": continual, again and again (`rounds` >= 2).
            "mixed": samples of all domains in every batch.
        labels: order of labels inside a domain (inside the whole of a mixture). "shuffled";
            "dirichlet", temporally correlated as in RoTTA; "sorted", one class after another.
        delta: concentration of "dirichlet", 1e-6 to 1e6; small is more correlated. RoTTA: 0.1. A
            large one still sends runs of a class: with ten classes of 200, neighbours are alike in
            99 % of cases at 0.01, 98 % at 0.1 and 95 % from 1 on, where 64 samples hold 4 classes.
        distribution: how many samples of each class. "natural": all that the data set has;
            "balanced"; "long-tailed", n_c = n_max ratio^(−c/(C−1)); "inverse", the same from the
            last class on.
        ratio: most frequent over least frequent class, for the last two.
        domains: names in order. Default: the fifteen corruptions of ImageNet-C; of "stationary" the
            first of these.
        severity: 1 to 5; the peak in a gradual stream.
        batch_size: samples that arrive at once. Batches do not cross from one domain to the next,
            but for "mixed"; the last one of a domain may be smaller.
        samples: upper limit per domain and visit; None for all. The same samples are sent in all.
            Unknown samples come on top.
        rounds: how often the domains are gone through.
        unknown: kinds of samples of unknown classes that are mixed in, in equal parts; their label
            is -1. "blobs", white shapes on black; "noise", uniform in every pixel; "digits", the
            handwritten digits of scikit-learn at the size of the images; "class:N", the samples of
            class N of the data set itself, which then is no known class (known classes keep their
            labels, so give a model that has not learnt class N). They are corrupted like the
            others. () for none.
        unknown_share: share of unknown samples in every batch, 0.001 to 0.99. OSTTA: 0.5.

    Raises:
        UnknownName: a pattern, order, distribution or domain that does not exist.
        OptionError: a value out of range, or values that contradict each other.

    Example:
        >>> Scenario(labels="dirichlet", domains=("fog", "snow"), batch_size=16).domains
        ('fog', 'snow')

    Reference: Wang et al. (CoTTA), CVPR 2022: continual, gradual; Yuan et al. (RoTTA), CVPR 2023:
    dirichlet; Niu et al. (SAR), ICLR 2023: mixed, single; Zhang et al. (SADE), NeurIPS 2022:
    long-tailed, inverse; Hoang et al. (PeTTA), NeurIPS 2024: recurring; Lee et al. (OSTTA), ICCV
    2023: unknown classes.
    """

    pattern: str = "continual"
    labels: str = "shuffled"
    delta: float = 0.1
    distribution: str = "natural"
    ratio: float = 50.0
    domains: tuple[str, ...] = ()
    severity: int = 5
    batch_size: int = 64
    samples: int | None = None
    rounds: int = 1
    unknown: tuple[str, ...] = ()
    unknown_share: float = 0.5

    def __post_init__(self) -> None:
        _one_of("pattern", self.pattern, PATTERNS)
        _one_of("label order", self.labels, ORDERS)
        _one_of("label distribution", self.distribution, DISTRIBUTIONS)
        object.__setattr__(self, "domains", _domains(self.domains, self.pattern))
        object.__setattr__(self, "delta", _real("delta", self.delta, SMALLEST_DELTA, LARGEST_DELTA))
        object.__setattr__(self, "ratio", _real("ratio", self.ratio, 1.0, 1e9))
        check_kinds(_names("unknown", self.unknown))
        object.__setattr__(self, "unknown", tuple(self.unknown))
        object.__setattr__(
            self, "unknown_share", _real("unknown_share", self.unknown_share, 1e-3, 0.99)
        )
        _whole("severity", self.severity, 1, 5)
        _whole("batch_size", self.batch_size, 1)
        _whole("rounds", self.rounds, 1)
        if self.samples is not None:
            _whole("samples", self.samples, 1)
        if self.pattern == "stationary" and len(self.domains) > 1:
            raise OptionError(
                f"a stationary stream has one domain, got {', '.join(self.domains)}. "
                'Give one, or pattern="continual".'
            )
        if self.pattern == "recurring" and self.rounds < 2:
            raise OptionError(
                f"a recurring stream comes back, so rounds is 2 or more, got {self.rounds}. "
                'Give rounds=3, or pattern="continual".'
            )

    def stream(self, dataset: Dataset[Any], *, seed: int = 0) -> Stream:
        """The batches of this scenario on a data set, made when they are asked for.

        Args:
            dataset: items (image, label), images as float (C, H, W) in [0, 1], bytes (uint8) or
                Pillow images of one size; a user's own will do. Or a `Recorded` one, whose
                corrupted images are read instead of made.
            seed: of the choice of samples, of their order and of the noise in corruptions.

        Raises:
            InputError: the set is empty, or its items or labels are not of that kind.
            OptionError: a class is held out that the set does not have.

        Example:
            >>> from testtime.streams.data import load_data
            >>> scenario = Scenario(domains=("clean",), samples=100)
            >>> stream = scenario.stream(load_data("fashion-mnist:sample"), seed=1)
            >>> [tuple(batch.inputs.shape) for batch in stream]
            [(64, 1, 28, 28), (36, 1, 28, 28)]
        """
        labels = labels_of(dataset).cpu()
        recorded = dataset if isinstance(dataset, Recorded) else None
        if recorded is None:
            stack(dataset, [0])  # what cannot be stacked is told now, not at the first batch
        strangers: list[Tensor] = []
        if self.unknown:
            if recorded is not None and set(self.unknown) & set(MADE):
                raise OptionError(
                    f"unknown samples of {', '.join(self.unknown)} cannot be corrupted as images "
                    "that were so beforehand. Hold a class out: unknown=class:8."
                )
            dataset, strangers = with_strangers(dataset, labels, self.unknown, seed=seed)
        found = segments(self, labels, seed=seed, strangers=strangers)
        if recorded is not None:
            recorded.check(kinds_of(found))
        return Stream(
            dataset,
            found,
            batch_size=self.batch_size,
            seed=seed,
            resets=self.pattern == "reset",
        )

    def to_toml(self) -> str:
        """This record as TOML, a line per value; `samples` is left out when there is no limit.

        Example:
            >>> print(Scenario(pattern="stationary", domains=("fog",)).to_toml(), end="")
            pattern = "stationary"
            labels = "shuffled"
            delta = 0.1
            distribution = "natural"
            ratio = 50.0
            domains = ["fog"]
            severity = 5
            batch_size = 64
            rounds = 1
            unknown = []
            unknown_share = 0.5
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        # JSON's numbers, ASCII strings and lists of strings are TOML's too.
        lines = [f"{name} = {json.dumps(v)}\n" for name, v in values.items() if v is not None]
        return "".join(lines)

    @classmethod
    def from_toml(cls, text: str) -> "Scenario":
        """The record that `to_toml` wrote; what is left out has its default.

        Raises:
            OptionError: not TOML, or a key that a scenario does not have.

        Example:
            >>> scenario = Scenario.parse("gradual,dirichlet,delta=0.01")
            >>> Scenario.from_toml(scenario.to_toml()) == scenario
            True
        """
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise OptionError(f"a scenario is written in TOML: {error}.") from error
        return cls(**_known(values))

    @classmethod
    def parse(cls, text: str) -> "Scenario":
        """A scenario from names of presets and `option=value`, with commas between.

        Several domains, and several kinds of unknown samples, are joined by a plus sign. What is not said has its default.

        Raises:
            UnknownName: no preset has this name.
            OptionError: an option that does not exist or is set twice, or a value out of place.

        Example:
            >>> Scenario.parse("sorted,batch_size=16,severity=3,domains=fog+snow").labels
            'sorted'
            >>> Scenario.parse("recuring")
            Traceback (most recent call last):
            testtime._core.errors.UnknownName: no scenario is called 'recuring'; did you mean
            recurring? ...
        """
        values: dict[str, Any] = {}
        for word in filter(None, (part.strip() for part in text.split(","))):
            name, equals, value = (part.strip() for part in word.partition("="))
            if not equals and name not in PRESETS:
                raise unknown("scenario", name, PRESETS)
            for key, setting in ({name: _read(name, value)} if equals else PRESETS[name]).items():
                if key in values:
                    raise OptionError(
                        f"{text!r} sets {key} twice, to {values[key]!r} and {setting!r}. Keep one."
                    )
                values[key] = setting
        if values.get("pattern") == "recurring":
            values.setdefault("rounds", RECURRING_ROUNDS)
        _refuse_idle(text, values)
        return cls(**values)

    @classmethod
    def parse_all(cls, text: str) -> "list[Scenario]":
        """As `parse`, but where the first word is "all": then one scenario for each preset.

        What follows "all" is set in every one; a preset that sets the same keeps its own, the
        stationary stream takes the first of several domains, and those that come out alike are one.

        Raises:
            UnknownName: as `parse`.
            OptionError: as `parse`.

        Example:
            >>> found = Scenario.parse_all("all,domains=fog+snow,batch_size=16")
            >>> len(found), found[0].domains, [each.batch_size for each in found].count(1)
            (13, ('fog',), 1)
        """
        first, _, rest = text.partition(",")
        if first.strip() != "all":
            return [cls.parse(text)]
        found: list[Scenario] = []
        for name, preset in PRESETS.items():
            words = [w.strip() for w in rest.split(",") if not preset.keys() & _sets(w)]
            if name == "stationary":  # of several domains, the first
                words = [w.partition("+")[0] if w.startswith("domains") else w for w in words]
            found.append(cls.parse(",".join([name, *words])))
        return list(dict.fromkeys(found))


def _sets(word: str) -> set[str]:
    """What a word of a text sets: of a preset what it holds, of `option=value` the option."""
    name, equals, _ = word.partition("=")
    return {name.strip()} if equals else set(PRESETS.get(name.strip(), ()))


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values; a name that no field has is an `OptionError` with the nearest."""
    names = [f.name for f in fields(Scenario)]
    for name in values:
        if name not in names:
            raise OptionError(f"scenario: {unknown('option', name, names)}")
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}


def _read(name: str, value: str) -> Any:
    """The value of one option from its text."""
    _known({name: value})
    if name in ("domains", "unknown"):
        return tuple(part.strip() for part in value.split("+"))
    if name in ("pattern", "labels", "distribution"):
        return value
    real = name in ("delta", "ratio", "unknown_share")
    try:
        return float(value) if real else int(value)
    except ValueError:
        kind = "a number" if real else "a whole number"
        raise OptionError(f"{name}={value}: expected {kind}.") from None


def _refuse_idle(text: str, values: Mapping[str, Any]) -> None:
    """An option that was asked for and would do nothing is a mistake worth telling."""
    if "delta" in values and values.get("labels") != "dirichlet":
        raise OptionError(f"{text!r} gives delta, which only labels=dirichlet uses. Add dirichlet.")
    if "ratio" in values and values.get("distribution") not in ("long-tailed", "inverse"):
        raise OptionError(
            f"{text!r} gives ratio, which only distribution=long-tailed and inverse use. Add one."
        )
    if "unknown_share" in values and not values.get("unknown"):
        raise OptionError(
            f"{text!r} gives unknown_share, but no unknown samples. Add open-set, or unknown=blobs."
        )


def _one_of(kind: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise unknown(kind, str(value), known)


def _domains(given: Any, pattern: str) -> tuple[str, ...]:
    """Checked names, or the default ones of the pattern."""
    _names("domains", given)
    known = known_domains()
    for name in given:
        _one_of("domain", name, known)
    return tuple(given) or (CORRUPTIONS[:1] if pattern == "stationary" else CORRUPTIONS)


def _names(option: str, given: Any) -> tuple[str, ...] | list[str]:
    if not isinstance(given, tuple | list):
        raise OptionError(f"{option} is {given!r}; expected a tuple of names, as ({given!r},).")
    return given


def _real(name: str, value: Any, low: float, high: float) -> float:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not low <= value <= high:
        raise OptionError(f"{name} is {value!r}; expected a number from {low:g} to {high:g}.")
    return float(value)


def _whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= low
    if not fits or (high is not None and value > high):
        limits = f"{low} or more" if high is None else f"from {low} to {high}"
        raise OptionError(f"{name} is {value!r}; expected a whole number, {limits}.")
