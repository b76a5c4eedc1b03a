"""How surely the watermarks are found: false alarms on human text, power against length and tau.

    python benchmarks/watermark.py                     an n-gram as model, a minute on one core
    python benchmarks/watermark.py --model gemma:270m --seconds 240    a real model, in pieces

Every piece that is done is kept in a folder (`--work`), so that a call with `--seconds` begins no
further piece after that time, and the next call goes on. The numbers are those of all lines that
are done.

200 texts are generated, 50 for each setting; human text is 100 others. The n-gram (order 5, bytes,
Witten-Bell) has read 300 kB of Python's help topics and goes on from ten bytes of it; human text is
other topics. The real model writes bodies of functions of Python's standard library from their heads;
human text is other bodies and topics, which it may have read: that lowers their entropy, and SWEET must
bear it. Writes `benchmarks/watermark-MODEL.json` and `docs/watermark-MODEL.svg`.
"""

import argparse
import ast
import json
import math
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean
from typing import Any, Protocol

import torch

from between import write_json
from testtime._core.files import atomic
from testtime._core.seeds import derive, generator
from testtime.bench.machine import describe_machine
from testtime.decode import watermark as library
from testtime.decode.drawing import Drawer
from testtime.decode.models import load_language_model
from testtime.decode.watermark import Watermark, detect, token_entropies
from testtime.measures.entropy import entropy, entropy_of_probs
from testtime.papers.checks import llmzip

ROOT = Path(__file__).resolve().parents[1]
TAUS = {"plain": None, "sweet 0.6": 0.6, "sweet 0.9": 0.9, "sweet 1.2": 1.2}
TEXTS, PIECE = 50, 25
LEVELS = (0.05, 0.01)
KEYS = (15485863, 7919, 104729, 1299709, 32452843)
Text = dict[str, Any]
"""Tokens, the token before them, and entropies with and without what stood before."""


class Writer(Protocol):
    """A model that writes marked texts, and knows human ones."""

    vocabulary: int
    lengths: Sequence[int]

    def marked(self, mark: Watermark, places: range) -> list[Text]: ...

    def human(self, places: range) -> list[Text]: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ngram")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights of a real model")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing after them")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "testtime-watermark"
    )
    parser.add_argument("--keys", type=int, default=len(KEYS), help="for false alarms")
    args = parser.parse_args()
    # the lists after all tokens that occur, and not of the last few alone
    library._green = lru_cache(maxsize=8192)(library._green.__wrapped__)
    writer: Writer = (
        NGram() if args.model == "ngram" else Causal(args.model, getattr(torch, args.dtype))
    )
    short = args.model.partition(":")[0]
    pieces = Pieces(args.work / short, time.monotonic() + args.seconds)
    try:
        human = pieces.all("human", 2 * TEXTS, writer.human)
    except TimeoutError:
        print("not done yet: call again to go on")
        return
    marked: dict[str, list[Text]] = {}
    for name, tau in TAUS.items():
        mark = Watermark(vocabulary=writer.vocabulary, tau=tau)
        try:
            marked[name] = pieces.all(name, TEXTS, partial(writer.marked, mark))
        except TimeoutError:
            print(f"{name} is not done yet: call again to go on")
            break
    found: dict[str, Any] = {
        "model": args.model,
        "dtype": "float64" if args.model == "ngram" else args.dtype,
        "texts": TEXTS,
        "lengths": list(writer.lengths),
        "machine": describe_machine(torch.device("cpu")),
        "seconds": pieces.seconds(),
        "keys": args.keys,
        "false alarms": false_alarms(writer, human, KEYS[: args.keys]),
        "power": {},
        "power without the prompt": {},
    }
    for name, texts in marked.items():
        tau = TAUS[name]
        mark = Watermark(vocabulary=writer.vocabulary, tau=tau)
        found["power"][name] = power(texts, mark, writer.lengths)
        found["power without the prompt"][name] = power(texts, mark, writer.lengths, "alone")
        if tau is not None:
            share = fmean(h > tau for text in texts for h in text["entropies"])
            found["power"][name]["share scored"] = share
    write_json(ROOT / f"benchmarks/watermark-{short}.json", found)
    (ROOT / f"docs/watermark-{short}.svg").write_text(plot(found))


class Pieces:
    """What is done, as files in a folder; nothing new is begun after a time."""

    def __init__(self, folder: Path, end: float) -> None:
        self._folder, self._end = folder, end
        folder.mkdir(parents=True, exist_ok=True)

    def all(self, name: str, count: int, make: Callable[[range], list[Text]]) -> list[Text]:
        """All texts of a kind, those made that are not there.

        Raises:
            TimeoutError: the time is over before all are there.
        """
        texts: list[Text] = []
        for start in range(0, count, PIECE):
            place = self._folder / f"{name} {start}.json"
            if not place.exists():
                if time.monotonic() > self._end:
                    raise TimeoutError
                began = time.process_time()
                row = {"texts": make(range(start, start + PIECE))}
                row["seconds"] = time.process_time() - began
                with atomic(place) as part:
                    part.write_text(json.dumps(row))
                print(f"{name} {start}: {row['seconds']:.0f} s", file=sys.stderr)
            texts += json.loads(place.read_text())["texts"]
        return texts

    def seconds(self) -> float:
        """Processor seconds of all pieces."""
        return round(sum(json.loads(p.read_text())["seconds"] for p in self._folder.iterdir()), 1)


class NGram:
    """Bytes by the five before them."""

    vocabulary, lengths = 256, (50, 100, 150, 200)

    def __init__(self) -> None:
        self._known, self._held = llmzip._texts(0)
        self._counts = llmzip._counted(self._known)

    def marked(self, mark: Watermark, places: range) -> list[Text]:
        made: list[Text] = []
        for place in places:
            draw = generator(place, "watermark", str(mark.tau))
            before = list(self._known[place * 1000 : place * 1000 + 10])
            model = llmzip._NGram(self._counts, 5)
            probs = model.start(1)
            for token in before:
                probs = model.step(torch.tensor([token]))
            tokens: list[int] = []
            entropies: list[float] = []
            while len(tokens) < self.lengths[-1]:
                entropies.append(float(entropy_of_probs(probs)))
                scores = mark(torch.tensor([before + tokens]), probs.log())
                tokens.append(int(torch.multinomial(scores.softmax(-1), 1, generator=draw)))
                probs = model.step(torch.tensor(tokens[-1:]))
            alone = self._entropies(tokens)
            made.append({"tokens": tokens, "prompt": before[-1], "entropies": entropies,
                         "alone": alone})  # fmt: skip
        return made

    def human(self, places: range) -> list[Text]:
        length = self.lengths[-1]
        made: list[Text] = []
        for place in places:
            tokens = list(self._held[place * length : (place + 1) * length])
            made.append({"tokens": tokens, "prompt": 10, "alone": self._entropies(tokens)})
        return made

    def _entropies(self, tokens: list[int]) -> list[float]:
        model = llmzip._NGram(self._counts, 5)
        model.start(1)
        for token in tokens[:-1]:
            model.step(torch.tensor([token]))
        return entropy_of_probs(torch.cat(model.given)).tolist()


class Causal:
    """A causal model by name."""

    lengths = (25, 50, 100)

    def __init__(self, name: str, kind: torch.dtype) -> None:
        self._model, self._tokenizer = load_language_model(name)
        self._model.to(kind)
        self.vocabulary = len(self._tokenizer)

    def marked(self, mark: Watermark, places: range) -> list[Text]:
        length, tokenizer = self.lengths[-1], self._tokenizer
        heads = [head for head, _ in list(heads_and_bodies())[::5] if len(head) <= 300]
        prompts = [tokenizer.bos_token + head for head in heads[places.start : places.stop]]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left",
                          add_special_tokens=False)  # fmt: skip
        seen: list[torch.Tensor] = []

        draw = Drawer([derive(0, "watermark", str(mark.tau), place) for place in places])

        def processor(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append(entropy(scores))  # what the detector finds with the prompt in front
            chosen = draw(mark(input_ids, scores) / 0.8)[:, None]
            return torch.full_like(scores, -torch.inf).scatter_(-1, chosen, 0)

        with torch.inference_mode():
            written = self._model.generate(
                **batch, do_sample=False, min_new_tokens=length, max_new_tokens=length,
                logits_processor=[processor],
            )  # fmt: skip
        return [
            {"tokens": row[-length:], "prompt": row[-length - 1], "entropies": own,
             "alone": self._entropies(row[-length:]) if mark.tau is not None else [0.0] * length}
            for row, own in zip(written.tolist(), torch.stack(seen, 1).tolist(), strict=True)
        ]  # fmt: skip

    def human(self, places: range) -> list[Text]:
        length, chosen = self.lengths[-1], {"code": [], "prose": []}
        bodies = [("code", body) for _, body in list(heads_and_bodies())[2::5]]
        for kind, text in [*bodies, *(("prose", topics[name]) for name in sorted(topics))]:
            if len(chosen[kind]) < TEXTS and len(text) > 2 * length:
                tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"][:length]
                chosen[kind] += [tokens] if len(tokens) == length else []
        both = chosen["code"] + chosen["prose"]
        return [
            {"tokens": tokens, "prompt": self._tokenizer.bos_token_id,
             "alone": self._entropies(tokens)}
            for tokens in both[places.start : places.stop]
        ]  # fmt: skip

    def _entropies(self, tokens: list[int]) -> list[float]:
        all_ = [self._tokenizer.bos_token_id, *tokens]
        return token_entropies(self._model, all_, chunk=len(all_))[1:]


def heads_and_bodies() -> Iterator[tuple[str, str]]:
    """Functions of the standard library with a docstring: up to its end, and what follows."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        for node in ast.parse("".join(lines)).body:
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
                first = node.body[0].end_lineno or 0
                yield (
                    "".join(lines[node.lineno - 1 : first]),
                    "".join(lines[first : node.end_lineno]),
                )


def p_value(text: Text, mark: Watermark, entropies: str, *, length: int, repeats: bool) -> float:
    """Of the first tokens of a text; without its prompt the first token has none before it."""
    known, tokens = text[entropies][:length], text["tokens"][:length]
    before = [] if entropies == "alone" else [text["prompt"]]
    found = detect(
        [*before, *tokens], mark, entropies=[*(0.0 for _ in before), *known],
        prompt=1, repeats=repeats,
    )  # fmt: skip
    return found.p_value


def false_alarms(writer: Writer, texts: list[Text], keys: Sequence[int]) -> dict[str, Any]:
    """Share of human texts called watermarked, over some keys, at each level."""
    p: dict[str, list[float]] = {}
    for key in keys:  # one after another, so that their green lists are kept
        for name, tau in TAUS.items():
            mark = Watermark(vocabulary=writer.vocabulary, tau=tau, key=key)
            for repeats in (True, False):
                p.setdefault(f"{name}, {'each time' if repeats else 'once'}", []).extend(
                    p_value(text, mark, "alone", length=writer.lengths[-1], repeats=repeats)
                    for text in texts
                )
    return {
        name: {str(level): fmean(value < level for value in values) for level in LEVELS}
        for name, values in p.items()
    }


def power(
    texts: list[Text], mark: Watermark, lengths: Sequence[int], entropies: str = "entropies"
) -> dict[str, Any]:
    """Share of watermarked texts that are found at level 0.01, by length; a pair counts once."""
    return {
        str(length): fmean(
            p_value(text, mark, entropies, length=length, repeats=False) < 0.01 for text in texts
        )
        for length in lengths
    }


def plot(found: dict[str, Any]) -> str:
    """Power against length, a line for each threshold; readable on light and on dark."""
    colours = {"plain": "#888888", "sweet 0.6": "#e07b39", "sweet 0.9": "#3a86c8",
               "sweet 1.2": "#4fa35a"}  # fmt: skip
    wide, high, left, top = 460, 240, 60, 20
    lengths = found["lengths"]

    def at(length: float, share: float) -> str:
        return f"{left + (length - lengths[0]) / (lengths[-1] - lengths[0]) * wide:.1f},{top + (1 - share) * high:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + wide + 130} {high + 80}" '
        'font-family="sans-serif" font-size="13" fill="#888888">'
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = at(lengths[0], share).split(",")
        parts.append(
            f'<path d="M{x},{y}h{wide}" stroke="#888888" stroke-opacity=".3"/>'
            f'<text x="{left - 8}" y="{float(y) + 4}" text-anchor="end">{share:.0%}</text>'
        )
    for length in lengths:
        x = at(length, 0).split(",")[0]
        parts.append(f'<text x="{x}" y="{top + high + 20}" text-anchor="middle">{length}</text>')
    parts.append(
        f'<text x="{left + wide / 2}" y="{top + high + 44}" text-anchor="middle">'
        "tokens of text</text>"
    )
    ends = sorted(found["power"], key=lambda name: found["power"][name][str(lengths[-1])])
    place = {name: min(1.0, max(found["power"][name][str(lengths[-1])], 0.0)) for name in ends}
    lowest = -1.0
    for name in ends:  # names stand at the ends of their lines, apart from each other
        lowest = max(place[name], lowest + 0.075)
        place[name] = lowest
    shift = max(0.0, lowest - 1.05)
    for name in found["power"]:
        points = " ".join(at(n, found["power"][name][str(n)]) for n in lengths)
        y = float(at(lengths[-1], place[name] - shift).split(",")[1]) + 4
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colours[name]}" stroke-width="2.5"/>'
            f'<text x="{left + wide + 10}" y="{y:.1f}" fill="{colours[name]}">{name}</text>'
        )
    return "".join(parts) + "</svg>\n"


if __name__ == "__main__":
    main()
