"""What else than answers could tell a guard gain from harm: signals of windows, and their AUROC."""

import json
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import testtime as tt
from between import write_json
from testtime._core.seeds import generator
from testtime.adaptation.explained import probabilities, theil
from testtime.adaptation.layers import norm_layers
from testtime.adaptation.loan import Loan
from testtime.adaptation.look import look
from testtime.adaptation.never_worse import errors, excess, information, surprise
from testtime.measures.detection import auroc

NUMBERS = Path(__file__).with_name("evidence.json")
WINDOW, NEAREST, FEW, POINT = 256, 5, 10, 1.0
Batch = tuple[Tensor, Tensor, bool]
Seen = dict[str, Tensor]
"""Of a model and samples of a stream: logits, features, and logits of the same moved by a pixel."""


def frozen(model: nn.Module, sent: Sequence[Batch]) -> Seen:
    """What the source model shows of a stream, and the stream."""
    with torch.no_grad():
        found = [_watched(model, model, model, x) for x, _, _ in sent]
    told = {"inputs": [x.flatten(1) for x, _, _ in sent], "labels": [y for _, y, _ in sent]}
    return _joined(found) | {name: torch.cat(each) for name, each in told.items()}


def adapted(model: nn.Module, name: str, options: dict[str, Any], sent: Iterable[Batch]) -> Seen:
    """What an adapter shows of it, without a guard."""
    adapter, found = tt.adapt(model, name, **options), []
    for x, _, reset in sent:
        if reset:
            adapter.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(_watched(model, adapter, adapter.predict, x))
    return _joined(found)


def search(
    model: nn.Module,
    streams: dict[str, list[Batch]],
    methods: dict[str, dict[str, Any]],
    labelled: tuple[Tensor, Tensor],
) -> list[dict[str, Any]]:
    """Signals of all windows won or lost, of all streams and methods with their options."""
    known, rows = class_means(model, *labelled), list[dict[str, Any]]()
    for stream, sent in streams.items():
        source = frozen(model, sent)
        seen = {m: adapted(model, m.partition(" ")[0], given, sent) for m, given in methods.items()}
        others = [*list(seen.values())[1:], next(iter(seen.values()))]
        for (method, ours), other in zip(seen.items(), others, strict=True):
            told = windows(source, ours, other, known)
            rows += [row | {"stream": stream, "method": method} for row in told]
        print(stream, len(rows), flush=True)
    return rows


def _watched(
    model: nn.Module, answer: Callable[..., Any], again: Callable[..., Any], x: Tensor
) -> Seen:
    seen: list[Tensor] = []
    loan = Loan(model, norm_layers(model))
    with loan.recording(look(model, loan, x).feature_layer, seen):
        logits = answer(x).detach()
    features = next(each for each in seen if len(each) == len(x))  # not of the adapter's first look
    return {
        "logits": logits,
        "features": features.detach(),
        "moved": again(x.roll((1, -1), (2, 3))).detach(),
    }


def _joined(found: list[Seen]) -> Seen:
    return {name: torch.cat([each[name] for each in found]) for name in found[0]}


def class_means(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of source features: their mean in each class, and what whitens them within classes."""
    with torch.no_grad():
        features = _watched(model, model, model, x)["features"].double()
    means = torch.stack([features[y == label].mean(0) for label in y.unique()])
    spread = (features - means[y]).T @ (features - means[y]) / len(y)
    spread += 0.1 * spread.diagonal().mean() * torch.eye(len(spread))
    return means, torch.linalg.cholesky(torch.linalg.inv(spread))


def windows(
    source: Seen, ours: Seen, other: Seen, known: tuple[Tensor, Tensor]
) -> list[dict[str, float]]:
    """Points won and signals, of each window in which an adapted model gains or loses a point."""
    found = []
    for part in torch.arange(len(source["labels"])).split(WINDOW):
        s, a, y = (
            source["logits"][part].argmax(1),
            ours["logits"][part].argmax(1),
            source["labels"][part],
        )
        right = [(x == y)[y >= 0].double().mean() for x in (a, s)]
        gain = 100 * float(right[0] - right[1])
        if len(part) < WINDOW or abs(gain) <= POINT or len(s.unique()) < 2:
            continue
        cut = [{name: x[part] for name, x in each.items()} for each in (ours, source)]
        second = other["logits"][part].argmax(1)
        found.append({"gain": gain} | signals(cut[0], cut[1], second, known))
    return found


def signals(
    ours: Seen, theirs: Seen, second: Tensor, known: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """What can be seen of a window without labels: the more, the more it speaks for the adapted."""
    p, q = ours["logits"].double().softmax(1), theirs["logits"].double().softmax(1)
    a, s, classes = p.argmax(1), q.argmax(1), p.shape[1]
    shared, _, certain = information(a, s, classes)
    changed = a != s
    each = surprise(a) - surprise(s)
    shares = (F.one_hot(a, classes).double().sum(0) + 0.5) / (len(a) + classes / 2)
    again = [
        information(x, each["moved"].argmax(1), classes)[0] for x, each in ((a, ours), (s, theirs))
    ]
    features, means = (x @ known[1] for x in (theirs["features"].double(), known[0]))
    far = torch.cdist(features - features.mean(0) + means.mean(0), means)
    nearer = far.gather(1, s[:, None]) - far.gather(1, a[:, None])
    agrees = (second == a).double() - (second == s).double()
    return {
        "more even": errors(each.mean(), each),
        "source less even": -certain,
        "tells more": tells(p) - tells(q),
        "explained more": theil(probabilities(ours["logits"]))
        - theil(probabilities(theirs["logits"])),
        "its shares fit the source's probabilities": float((q @ shares).log().mean()),
        "followed in adapted features": follows(ours["features"], a, s, classes),
        "followed in source features": follows(theirs["features"], a, s, classes),
        "followed in inputs": follows(theirs["inputs"], a, s, classes),
        "closer clusters in source features": closer(theirs["features"], a, s),
        "nearer to source class means": float(nearer[changed].mean()),
        "keeps to its answers a pixel apart": again[0] - again[1],
        "another adapted model agrees": float(agrees[changed].mean()),
        "kept": shared / certain,
        "runs": excess(s),
    }


def signs(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """What can be seen of two models in their logits, of the adapted one against the source."""
    a, s = ours.argmax(1), theirs.argmax(1)
    p, q = ours.softmax(1), theirs.softmax(1)
    shared, own, known = information(a, s, p.shape[1])
    changed = a != s
    second = q.scatter(1, s[:, None], -1.0).argmax(1)
    return {
        "more even": own - known,
        "kept": shared / known,
        "agree": float((~changed).double().mean()),
        "second choice": float((second == a)[changed].double().mean()),
        "surer": float((p.amax(1) - q.amax(1)).mean()),
        "tells more": tells(p) - tells(q),
    }


def tells(probs: Tensor) -> float:
    """Mutual information of inputs and answers, in nats, by a model's own probabilities."""
    entropies = [torch.special.entr(x).sum(-1).mean() for x in (probs.mean(0), probs)]
    return float(entropies[0] - entropies[1])


def follows(features: Tensor, ours: Tensor, theirs: Tensor, classes: int) -> float:
    """By how many standard errors answers follow nearest neighbours more closely than others do.

    As `NeverWorse` asks of neighbours in time: by how often these are equal, and by what each tells
    of the other, less chance; the lesser of the two.
    """
    unit = F.normalize(features.double() - features.double().mean(0), dim=1)
    near = (unit @ unit.T).fill_diagonal_(-2.0).topk(NEAREST)[1]
    random = generator(0, "guard", "near")
    orders = [torch.randperm(len(near), generator=random) for _ in range(4)]
    pair = [_told(x, near, classes) for x in (ours, theirs)]
    chance = [sum(_told(x[o], near, classes).mean(1) for o in orders) / 4 for x in (ours, theirs)]
    gained = (pair[0] - pair[1]).mean(1) - (chance[0] - chance[1])
    return min(map(errors, gained, pair[0] - pair[1]))


def _told(answers: Tensor, near: Tensor, classes: int) -> Tensor:
    one, other = answers[:, None].expand_as(near), answers[near]
    told = [surprise(x.flatten()) for x in (one, other, one * classes + other)]
    told = (told[0] + told[1] - told[2]).view_as(near)
    return torch.stack([(one == other).double().mean(1), told.mean(1)])


def closer(features: Tensor, ours: Tensor, theirs: Tensor) -> float:
    """Mean silhouette of one labelling less that of another (Rousseeuw, 1987)."""
    apart = torch.cdist(features.double(), features.double())
    return silhouette(apart, ours) - silhouette(apart, theirs)


def silhouette(apart: Tensor, answers: Tensor) -> float:
    own = F.one_hot(answers.unique(return_inverse=True)[1]).double()
    counts = own.sum(0)
    mean = apart @ own / (counts - own).clamp(min=1)
    inside = (mean * own).sum(1)
    outside = mean.masked_fill(own.bool(), math.inf).amin(1)
    value = (outside - inside) / torch.maximum(outside, inside)
    return float(value.where((own @ counts > 1) & outside.isfinite(), 0.0).mean())


def together(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Tensor:
    """All signals in one: least squares on their ranks, fitted on the other streams."""
    x = torch.tensor([[row.get(name, 0.0) for name in names] for row in rows])
    x = torch.cat([x.argsort(0).argsort(0) / len(x) - 0.5, torch.ones(len(x), 1)], 1).double()
    y = torch.tensor([row["gain"] > 0 for row in rows]).double()
    score = torch.zeros(len(rows), dtype=torch.float64)
    for stream in dict.fromkeys(row["stream"] for row in rows):
        held = torch.tensor([row["stream"] == stream for row in rows])
        weight = torch.where(y[~held] > 0, 1 / y[~held].mean(), 1 / (1 - y[~held]).mean())
        fit = x[~held].T * weight
        penalty = 0.01 * len(x) * torch.eye(x.shape[1])
        score[held] = x[held] @ torch.linalg.solve(
            fit @ x[~held] + penalty, fit @ (2 * y[~held] - 1)
        )
    return score


def separated(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """AUROC of each signal, of windows won against those lost, and how many there are of each."""
    won = torch.tensor([row["gain"] > 0 for row in rows], dtype=torch.bool)
    found: dict[str, Any] = {"won": int(won.sum()), "lost": int((~won).sum())}
    if min(found.values()) < FEW:
        return found
    names = [n for n in rows[0] if n not in ("gain", "kept", "runs", "stream", "method")]
    for name in names:
        found[name] = float(auroc(torch.tensor([row.get(name, 0.0) for row in rows]), won))
    found["all of these, fitted on other streams"] = float(auroc(together(rows, names), won))
    return found


def write(model: str, rows: Sequence[dict[str, Any]], failed: set[tuple[str, str]]) -> None:
    """Adds a model's figures: of all windows, of those left open, and of gains that are lost."""
    settled = [r for r in rows if r["kept"] >= 0.3 and r["runs"] <= 0.1]
    sets = {
        "all": rows,
        "left open": [r for r in settled if r["more even"] < 1],
        "gains lost": [r for r in settled if r["gain"] < 0 or (r["method"], r["stream"]) in failed],
    }
    numbers = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
    numbers[model] = {name: separated(each) for name, each in sets.items()}
    write_json(NUMBERS, numbers)


def table() -> str:
    """Lines of the page: a column for each model and set in which windows are won and lost."""
    numbers = json.loads(NUMBERS.read_text())
    columns = {
        f"{model}, {name}": found
        for model, sets in numbers.items()
        for name, found in sets.items()
        if len(found) > 2
    }
    names = list(next(iter(columns.values())))
    lines = [["", *columns], ["---", *["--:"] * len(columns)]]
    for name in names:
        cells = [found.get(name) for found in columns.values()]
        lines.append(
            [
                name,
                *(
                    "" if x is None else f"{x:{'d' if isinstance(x, int) else '.2f'}}"
                    for x in cells
                ),
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
