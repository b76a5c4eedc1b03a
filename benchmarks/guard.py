"""Never worse than frozen: methods with and without a guard on every kind of stream.

    python benchmarks/guard.py                    all methods; goes on where it was interrupted
    python benchmarks/guard.py --methods tent     some
    python benchmarks/guard.py --again            guarded errors again, of an earlier rule
    python benchmarks/guard.py --seconds 300      stops after the cell that passes 300 seconds
    python benchmarks/guard.py --alike            only the windows that look alike and are not
    python benchmarks/guard.py --evidence MODEL   only what else could tell gain from harm
    python benchmarks/guard.py --page             only the page, from the files of numbers

Writes `benchmarks/guard.json`, `benchmarks/alike.json`, `benchmarks/evidence.json` and `docs/never-worse.md`.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import evidence
import held_out
import many_classes
import other_networks
import testtime as tt
from between import write_json
from guard_streams import CLASSES, METHODS, OPTIONS, STREAMS, sent, source_of, streams_of
from guarded import Errors, error, errors_table, kept, line, said
from testtime._core.seeds import generator
from testtime.bench.machine import describe_machine
from testtime.bench.models import load_model
from testtime.papers.digits import digits
from testtime.streams.data import labels_of, load_data, stack
from testtime.streams.scenarios import Scenario

ROOT = Path(__file__).resolve().parents[1]
NUMBERS, PAGE = ROOT / "benchmarks/guard.json", ROOT / "docs/never-worse.md"
ALIKE = ROOT / "benchmarks/alike.json"
WINDOW = 256
HELPED = ("long-tailed", "inverse")
HARMED = ("recurring", "mixed", "continual, 16")
DOUBTED = (*HELPED, *HARMED, "open-set", *CLASSES)
DOUBTED_METHODS = ("bn-adapt", "tent", "tent 10x", "deyo")
"""Streams and methods whose windows are looked at for other evidence."""
SIGNS = ("more even", "kept", "agree", "second choice", "surer", "tells more")
RULE = 9
"""Of the guard; raised by one when what it decides changes, so that its errors are measured again."""


TOP = """# Never worse than frozen

An adapted model can end far below the model it came from. With `guard=True` an adapter watches itself
beside its frozen source and takes back what does harm:

```python
import testtime as tt

adapter = tt.adapt(model, "tent", guard=True)
logits = adapter(x)
adapter.counts.distrusted  # batches that the source model answered
adapter.events[-1].outcome  # "adapted", or why the source answered
```

## What it does

While the guard trusts what was learnt, the adapted model answers and goes on learning; the source model
runs on all of the first 512 samples, of the stream and of each time that trust has come back, and on a
quarter of those after. While it does not know, as before it has seen 48 samples, the source model answers
and the adapter goes on learning. When it sees harm, the adapter goes back to a state of at least 512
samples before, or to the source where there is none, answers as the source model does and learns nothing,
until a trial, on every batch, shows no harm any more: two forwards, where a step of `tent` costs three. After
1,024 samples without trust the source is restored.

[`NeverWorse`][testtime.adaptation.never_worse.NeverWorse], which `True` stands for, reads logits alone. Its
rule begins with how much the input explains of a model's answers: of what these leave open on the whole, the
share that is settled once it sees an input (Theil's uncertainty coefficient, of its own probabilities of the last
256 samples). Of a stream of few classes, statistics of the batch spread the answers over all classes, and leave
each of them open; a model that knows what it sees is even and sure.

- An adapted model is trusted whose answers are as even as 0.93 of what even draws are, where the input explains
  half of them, 0.1 more than of the source's: so it may mend a source that gives nearly all samples one answer
  (as even as a third; of many classes, few of them: a tenth). Of any other it must keep 0.3 of what the answers tell.
  It must be as sure as the source, or each of its answers tell a bit more: of two classes such a source may well
  be right, since statistics of the batch split the one that comes, and are sure of both halves. What mends such
  a source and keeps enough of it begins to be trusted, by any rule below, where it is at least half as even as even
  draws are.
- Else answers that no longer tell 0.3 of what the source's tell are harm.
- Where labels come in an order, the adapted answers lead if they follow it more closely, by how often neighbours
  are equal and by what each tells of the next: in the last 1,024 samples, and in the last 256 not a standard error
  less closely.
- Where labels come in no order, they lead if those of the last 128 samples are more even; and an input that
  explains 0.1 less of them is harm. Trust begins where the input also leaves no more of them open than of the
  source's, or explains more of them, by as much as they are more even (0.75 for each share beyond a fifth), or
  half of them, 0.1 more than of the source's, if they are nearly even (0.87).

Trust takes a lead of a standard error, and where labels come in no order it lasts as long as the lead does;
two standard errors behind are harm. Between the two, and as long as both models answer alike, it does not know;
nor where the last batch alone, or 48 samples of smaller ones, says the contrary by 0.1.

Any object with `update(adapted_logits, source_logits)` is a guard, so
[`Monitor(Collapse(classes=10))`][testtime.guard.collapse.Collapse] is one, whose alarm stays until
`adapter.reset()`; it returns true for harm, and `None` while it does not know. Whatever the guard, an
answer that is NaN or infinite where the source's is not is not given, and what gave it is taken back.

## What is guaranteed

- While the guard distrusts or does not know, answers are those of the frozen model, bit for bit, also those of
  `predict` and of an export, and also before the first batch; while it distrusts, nothing is learnt.
- A rollback restores a state that was trusted, or the source. The model itself is never written to.
- The guarded error exceeds the frozen model's by at most the share of samples that the adapted model
  answered otherwise, whatever the stream.
- With `Monitor(Collapse(...))`: if the mean of each of its statistics stays within its limit and the answers
  are numbers, the
  probability that what was learnt is ever taken back is at most alpha.

No assumption is needed for the first three. That `NeverWorse` tells harm from help is heuristic: without
labels nobody can know. Its thresholds (0.3 of the information kept, 0.1 for ordered labels, 1,024 samples)
were set on six corruptions of Fashion-MNIST with the methods of this page, the window of 128 samples for
evenness on six others, what neighbours tell and its standard error on both; what the input explains, and who may
mend a source of one answer, on ten corruptions and clean images of all, one, two and three classes, with three
networks (these two with batch normalisation, and a residual one of nine layers). The table below is of a third six and
another order of
samples, but some things were changed with it in sight: that trust takes a standard error also where labels come
in no order; that the last 256 samples count where they come in one; that answers which are a little more even need
not be explained more, and nearly even ones are enough where something is kept; and what the last batch alone may
say. That an answer must tell a bit more, and that only of a source of one answer nothing need be kept, was found on
[tables of features](#tables-of-features), where statistics of the batch spread the one class that came; that
trust in who mends such a source begins at half of evenness, on [networks of other kinds](#networks-of-other-kinds),
where they did so too: the largest excess there fell from 5.7 to 2.7 points, but 20 points that `rotta` gains in fog,
whose answers spread slowly, are lost since. All the
rest is two data sets and small networks; other thresholds may suit others. Where it errs:

- evidence takes samples. On a few hundred of them, small gains and those of single samples are lost: three
  points of ten times the step size of `tent` on two hundred samples of each of two corruptions, ten of `deyo` on
  360 single samples;
- where few classes come, spread answers are trusted that are as sure as a source which is right more often: of two
  classes in noise, up to 15 points above the frozen model, or where one of them is what the source answers nearly
  always in that weather. Two or three classes out of ten without such a shift are answered within
  a point of the frozen model, where statistics of the batch make 15 points more errors at least
  (`tests/bench/test_guarded_streams.py`);
- gains that make answers rightly less even are lost, as of all methods with GroupNorm on long-tailed streams and
  of `tent` on the inverse ones: see below;
- gains are lost where labels come in an order that the frozen model follows more closely, as of statistics of the
  batch on Dirichlet streams of the digits: they take the order out of the answers, whether or not these are more
  often right. Where that comes and goes, as on Fashion-MNIST, the guarded answers are better than either model's.

## What cannot be told

Two stretches of {window} samples that `tent` with GroupNorm answered, without a guard: of all those where it
made answers of long-tailed streams better by more than three points, and of those of other streams where it
made them worse by as much, the two that look most alike (`python benchmarks/guard.py --alike`). Each column
but the first two can be seen without labels: how much more even answers are, in nats; the share that they keep
of what the source's tell; how many agree with it; how many of the others are its second choice; how much surer
the model is; and what it tells of its inputs more than the source, in nats.

{alike}

In the one, answers crowd into the classes that are frequent; in the other, into classes that are not. A rule
that reads answers and confidences treats both alike: who keeps the gain of the one takes the harm of the other.
`NeverWorse` gives up both. Who knows the shares of the classes can tell them apart.

Nor has anything else been found that can be seen without labels and tells gain from harm surely. Of all windows
of {window} samples in which an adapted model won or lost more than a point, without a guard
(`python benchmarks/guard.py --evidence MODEL`; {methods};
for the embedded models on {doubted}), the area under the ROC curve by which each signal tells those won from those lost: 1 tells all, 0.5 none, and below
that it misleads. "Left open" are those where labels come in no order, 0.3 of what the source's answers tell are
kept, and the adapted ones are not a standard error more even; "gains lost" sets those among the won whose gain is
lost in the table below against all the lost with as much kept and no order. Sets with fewer than {few} of either
are left out.

{evidence}

"Followed" asks of the {nearest} nearest neighbours of each sample what `NeverWorse` asks of neighbours in time;
source class means, and the spread about them, are of labelled source samples, after the mean shift of the window
is taken off; another adapted model is the next method's. The last line is fitted on the labels of the other
streams. Of `embedded:group`, where most gains are lost, the source's class means come nearest, and let harm
through all the same; and what tells on one model misleads on another. All signals together, fitted on labels of
other streams, come to 0.97 there and to 0.53 on the digits: such labels a guard does not have.

## What it reached

Error in percent of the frozen model, and of each method without / with a guard; Fashion-MNIST at severity 5,
and the digits of the [small checks](reproductions.md), one seed, {machine}.
**Bold**: more than a point above the frozen model, or less than 80 % of the gain kept where it is more
than a point. Empty: not run yet. `python benchmarks/guard.py` goes on where it stopped and writes the page.
"""


def page(found: Sequence[dict[str, Any]], pair: Sequence[dict[str, Any]]) -> str:
    """The page: for each model a line for each stream, a column for each method."""
    rows = [
        line([row["stream"], f"{row['gain']:+.1f}", *(f"{row[name]:.2f}" for name in SIGNS)])
        for row in pair
    ]
    table = [line(["stream", "points won", *SIGNS]), line(["---", *["--:"] * (len(SIGNS) + 1)])]
    told = "\n".join([*table, *rows])
    top = TOP.format(
        machine=found[0]["machine"], window=WINDOW, alike=told, evidence=evidence.table(),
        methods=", ".join(f"`{name}`" for name in DOUBTED_METHODS), doubted="; ".join(DOUBTED),
        nearest=evidence.NEAREST, few=evidence.FEW,
    )  # fmt: skip
    parts, cells = list[str](), list[tuple[dict[str, float], Errors]]()
    for model in dict.fromkeys(row["model"] for row in found):
        mine = {(row["method"], row["stream"]): row for row in found if row["model"] == model}
        methods = [name for name in METHODS[model] if any(name == key[0] for key in mine)]
        frozen = {
            stream: mine["source", stream]["error"]
            for stream in streams_of(model)
            if ("source", stream) in mine
        }
        errors = {
            key: (row["error"], row["guarded"]) for key, row in mine.items() if key[0] in methods
        }
        cells.append((frozen, errors))
        parts += [f"### {model}", "\n".join(errors_table(methods, frozen, errors))]
    total = said(cells)
    old = sum("guarded" in row and row.get("rule", 1) != RULE for row in found)
    if old:
        total += f" Of these, {old} were measured before the last change of the rule (`--again`)."
    more = many_classes.section(), held_out.section(), other_networks.section()
    return "\n\n".join([top.strip(), total, *parts, *more]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", help="names with commas between; default: all of the page")
    parser.add_argument("--again", action="store_true", help="guarded errors of an earlier rule")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="when to stop")
    parser.add_argument("--alike", action="store_true", help="only windows that look alike")
    parser.add_argument("--evidence", metavar="MODEL", choices=METHODS, help="only other evidence")
    parser.add_argument("--page", action="store_true", help="only write the page")
    given = parser.parse_args()
    torch.set_num_threads(1)  # the digits' networks are trained here: threads change them
    until = time.monotonic() + given.seconds
    found: list[dict[str, Any]] = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else []
    if given.alike:
        write_json(ALIKE, alike())
    elif given.evidence:
        searched(given.evidence, found)
    elif not given.page:
        for model, methods in METHODS.items():
            chosen = given.methods.split(",") if given.methods else methods
            mine = [name for name in methods if name in chosen]
            run(found, model, mine, again=given.again, until=until)
    PAGE.write_text(page(found, json.loads(ALIKE.read_text())))


def run(
    found: list[dict[str, Any]], name: str, methods: Sequence[str], *, again: bool, until: float
) -> None:
    """All cells of a model that are not there yet; each is written when it is done."""
    there = {(row["model"], row["method"], row["stream"]): row for row in found}
    model = source_of(name)
    for method in ("source", *methods):
        for stream in streams_of(name):
            row = there.get((name, method, stream))
            old = row is not None and "guarded" in row and row.get("rule", 1) != RULE
            if (row is not None and not (old and again)) or time.monotonic() > until:
                continue
            if row is None:
                machine = describe_machine(torch.device("cpu"))
                row = {"model": name, "method": method, "stream": stream, "machine": machine}
                found.append(row)
            row |= cell(model, method, name, stream, only_guarded=old) | {"rule": RULE}
            write_json(NUMBERS, found)
            print(*row.values(), flush=True)


def cell(
    model: torch.nn.Module, method: str, which: str, stream: str, *, only_guarded: bool
) -> dict[str, Any]:
    """Errors without and with a guard, and what the guard did."""
    name, options = method.partition(" ")[0], OPTIONS.get(method, {})
    source = None
    if tt.methods()[name].needs:
        source = tt.fit_source(model, labelled(64), methods=[name])
    found: dict[str, Any] = {}
    runs = (("error", None), ("guarded", True))
    for what, guard in runs[:1] if name == "source" else runs[only_guarded:]:
        adapter = tt.adapt(model, name, source=source, guard=guard, **options)
        begun = time.perf_counter()
        found[what] = error(adapter, sent(which, stream))
        found[f"{what} seconds"] = time.perf_counter() - begun
        counts = adapter.counts
        found |= {f"{what} forwards": counts.forwards / counts.samples}
        found["distrusted"] = counts.distrusted / counts.steps
    return found


def labelled(size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two thousand source samples in batches."""
    held = load_data("fashion-mnist:sample", split="train")
    index = torch.randperm(len(labels_of(held)), generator=generator(0, "guard", "draw"))[:2000]
    return [stack(held, part) for part in index.split(size)]


def alike() -> list[dict[str, Any]]:
    """Two windows of tent with GroupNorm that look most alike without labels: help, and harm."""
    model, data = load_model("embedded:group"), load_data("fashion-mnist:sample")
    found: list[dict[str, Any]] = []
    for stream in (*HELPED, *HARMED):
        adapter, parts = tt.adapt(model, "tent"), []
        for batch in Scenario.parse(STREAMS[stream]).stream(data, seed=2):
            with torch.no_grad():
                source = model(batch.inputs)
            parts.append((adapter(batch.inputs), source, batch.labels))
        ours, theirs, labels = (torch.cat(each) for each in zip(*parts, strict=True))
        for number, part in enumerate(torch.arange(len(labels)).split(WINDOW)):
            right = [(x[part].argmax(1) == labels[part]).double().mean() for x in (ours, theirs)]
            gain = 100 * float(right[0] - right[1])
            if len(part) == WINDOW and (gain > 3 if stream in HELPED else gain < -3):
                row = {"stream": stream, "window": number, "gain": gain}
                found.append(row | evidence.signs(ours[part], theirs[part]))
    shown = torch.tensor([[row[name] for name in SIGNS] for row in found], dtype=torch.float64)
    shown = (shown - shown.mean(0)) / shown.std(0)
    helped = torch.tensor([row["gain"] > 0 for row in found])
    apart = torch.cdist(shown[helped], shown[~helped])
    one, other = divmod(int(apart.argmin()), int((~helped).sum()))
    won, lost = ([row for row in found if (row["gain"] > 0) is sign] for sign in (True, False))
    return [row | {"apart": float(apart.min())} for row in (won[one], lost[other])]


def searched(name: str, found: Sequence[dict[str, Any]]) -> None:
    """Looks for other evidence in what a model's adapters do without a guard."""
    digital = name.startswith("digits:")
    model, streams = source_of(name), streams_of(name) if digital else DOUBTED
    held = digits(0, "train")
    labels = (held.images, held.labels) if digital else labelled(2000)[0]
    methods = {m: OPTIONS.get(m, {}) for m in METHODS[name] if m in DOUBTED_METHODS}
    rows = evidence.search(model, {s: list(sent(name, s)) for s in streams}, methods, labels)
    mine = {(row["method"], row["stream"]): row for row in found if row["model"] == name}
    frozen = {stream: mine["source", stream]["error"] for stream in streams_of(name)}
    cells = {key: row for key, row in mine.items() if key[0] != "source"}
    failed = {
        key for key, row in cells.items() if not kept(frozen[key[1]], row["error"], row["guarded"])
    }
    evidence.write(name, rows, failed)


if __name__ == "__main__":
    main()
