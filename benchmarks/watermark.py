"""How surely the watermarks are found: false alarms on human text, power against length and threshold.

    python benchmarks/watermark.py                    all, some twenty minutes on one core
    python benchmarks/watermark.py --only "sweet 0.9" one set of texts, to be done bit by bit
    python benchmarks/watermark.py --page             only numbers and plot, from the texts made before

200 texts of 60 tokens are generated, 50 for each setting, as bodies of functions of Python's standard
library from their heads; human text is 50 other functions of it and 50 passages of Python's help.
The model may have read both; that lowers their entropy, which SWEET must bear. Texts lie in `--work`
and are not made again. Writes `benchmarks/watermark.json` and `docs/watermark.svg`.
"""

import argparse
import ast
import json
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean
from typing import Any

import torch

from testtime.bench.machine import describe_machine
from testtime.decode.models import load_language_model
from testtime.decode.watermark import Watermark, detect, token_entropies
from testtime.measures.entropy import entropy

ROOT = Path(__file__).resolve().parents[1]
TAUS = {"plain": None, "sweet 0.6": 0.6, "sweet 0.9": 0.9, "sweet 1.2": 1.2}
TEXTS, LENGTH = 50, 60
LENGTHS = (15, 30, 45, 60)
LEVELS = (0.05, 0.01)
KEYS = (15485863, 7919, 104729, 1299709, 32452843)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gemma:270m")
    parser.add_argument("--only", default="", help=f"one of {', '.join([*TAUS, 'human'])}")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--work", default=Path(tempfile.gettempdir()) / "testtime-watermark")
    args = parser.parse_args()
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    wanted = [] if args.page else [args.only] if args.only else [*TAUS, "human"]
    missing = [name for name in wanted if not (work / f"{name}.json").exists()]
    if missing:
        model, tokenizer = load_language_model(args.model)
        for name in missing:
            made = human(model, tokenizer) if name == "human" else marked(name, model, tokenizer)
            (work / f"{name}.json").write_text(json.dumps(made))
            print(f"{name}: {len(made)} texts", file=sys.stderr)
    if not args.only:
        texts = {name: json.loads((work / f"{name}.json").read_text()) for name in [*TAUS, "human"]}
        found = {
            "model": args.model,
            "texts": TEXTS,
            "tokens": LENGTH,
            "machine": describe_machine(torch.device("cpu")),
            "false alarms": false_alarms(texts["human"]),
            "power": {name: power(texts[name], tau) for name, tau in TAUS.items()},
            "power without the prompt": power(texts["sweet 0.9"], 0.9, "entropies alone"),
        }
        (ROOT / "benchmarks/watermark.json").write_text(json.dumps(found, indent=1) + "\n")
        (ROOT / "docs/watermark.svg").write_text(plot(found))


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


def marked(name: str, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Texts that the model wrote with the watermark, and the entropies that a detector finds."""
    heads = [head for head, _ in list(heads_and_bodies())[::5] if len(head) <= 300]
    prompts = [tokenizer.bos_token + head for head in heads[:TEXTS]]
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    mark = Watermark(vocabulary=len(tokenizer), tau=TAUS[name])
    seen: list[torch.Tensor] = []

    def processor(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(entropy(scores))  # what the detector finds again with the prompt in front
        return mark(input_ids, scores)

    torch.manual_seed(0)
    with torch.inference_mode():
        written = model.generate(
            **batch, do_sample=True, temperature=0.8, top_k=0, min_new_tokens=LENGTH,
            max_new_tokens=LENGTH, logits_processor=[processor],
        )  # fmt: skip
    made: list[dict[str, Any]] = []
    for row, own in zip(written.tolist(), torch.stack(seen, 1).tolist(), strict=True):
        each = {"tokens": row[-LENGTH:], "prompt": row[-LENGTH - 1], "entropies": own}
        if name == "sweet 0.9":
            alone = [tokenizer.bos_token_id, *each["tokens"]]
            each["entropies alone"] = token_entropies(model, alone)[1:]
        made.append(each)
    return made


def human(model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Bodies of functions that were not asked for, and passages of Python's help."""
    bodies = [body for _, body in list(heads_and_bodies())[2::5]]
    texts = [*bodies, *(topics[name] for name in sorted(topics))]
    made: list[dict[str, Any]] = []
    for place, text in enumerate(texts):
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"][:LENGTH]
        kind = "code" if place < len(bodies) else "prose"
        if len(tokens) == LENGTH and sum(each["kind"] == kind for each in made) < TEXTS:
            entropies = token_entropies(model, [tokenizer.bos_token_id, *tokens])[1:]
            made.append({"tokens": tokens, "entropies": entropies, "kind": kind,
                         "prompt": tokenizer.bos_token_id})  # fmt: skip
    return made


def p_value(
    text: dict[str, Any], mark: Watermark, entropies: str, *, length: int, repeats: bool
) -> float:
    """Of the first tokens of a text; the token before them is known and not counted."""
    known = text.get(entropies, [0.0] * LENGTH)[:length]
    tokens = [text["prompt"], *text["tokens"][:length]]
    return detect(tokens, mark, entropies=[0.0, *known], prompt=1, repeats=repeats).p_value


def false_alarms(texts: list[dict[str, Any]]) -> dict[str, Any]:
    """Share of human texts called watermarked, over five keys, at each level."""
    found: dict[str, Any] = {}
    for name, tau in TAUS.items():
        for repeats in (True, False):
            p = [
                p_value(text, Watermark(vocabulary=262144, tau=tau, key=key), "entropies",
                        length=LENGTH, repeats=repeats)
                for key in KEYS for text in texts
            ]  # fmt: skip
            rates = {str(level): fmean(value < level for value in p) for level in LEVELS}
            found[f"{name}, {'each time' if repeats else 'once'}"] = rates
    return found


def power(
    texts: list[dict[str, Any]], tau: float | None, entropies: str = "entropies"
) -> dict[str, Any]:
    """Share of watermarked texts that are found at level 0.01, by length; and tokens that counted."""
    mark = Watermark(vocabulary=262144, tau=tau)
    found: dict[str, Any] = {
        str(length): fmean(
            p_value(text, mark, entropies, length=length, repeats=False) < 0.01 for text in texts
        )
        for length in LENGTHS
    }
    if tau is not None:
        found["share scored"] = fmean(h > tau for text in texts for h in text[entropies])
    return found


def plot(found: dict[str, Any]) -> str:
    """Power against length, a line for each threshold; readable on light and on dark."""
    colours = {"plain": "#888888", "sweet 0.6": "#e07b39", "sweet 0.9": "#3a86c8",
               "sweet 1.2": "#4fa35a"}  # fmt: skip
    wide, high, left, top = 460, 240, 60, 20

    def at(length: float, share: float) -> str:
        return f"{left + (length - LENGTHS[0]) / (LENGTH - LENGTHS[0]) * wide:.1f},{top + (1 - share) * high:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + wide + 130} {high + 80}" '
        'font-family="sans-serif" font-size="13" fill="#888888">'
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = at(LENGTHS[0], share).split(",")
        parts.append(
            f'<path d="M{x},{y}h{wide}" stroke="#888888" stroke-opacity=".3"/>'
            f'<text x="{left - 8}" y="{float(y) + 4}" text-anchor="end">{share:.0%}</text>'
        )
    for length in LENGTHS:
        x = at(length, 0).split(",")[0]
        parts.append(f'<text x="{x}" y="{top + high + 20}" text-anchor="middle">{length}</text>')
    parts.append(
        f'<text x="{left + wide / 2}" y="{top + high + 44}" text-anchor="middle">'
        "tokens of text</text>"
    )
    ends = sorted(TAUS, key=lambda name: found["power"][name][str(LENGTH)])
    place = {name: min(1.0, max(found["power"][name][str(LENGTH)], 0.0)) for name in ends}
    lowest = -1.0
    for name in ends:  # names stand at the ends of their lines, apart from each other
        lowest = max(place[name], lowest + 0.075)
        place[name] = lowest
    shift = max(0.0, lowest - 1.05)
    for name in TAUS:
        points = " ".join(at(n, found["power"][name][str(n)]) for n in LENGTHS)
        y = float(at(LENGTH, place[name] - shift).split(",")[1]) + 4
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colours[name]}" stroke-width="2.5"/>'
            f'<text x="{left + wide + 10}" y="{y:.1f}" fill="{colours[name]}">{name}</text>'
        )
    return "".join(parts) + "</svg>\n"


if __name__ == "__main__":
    main()
