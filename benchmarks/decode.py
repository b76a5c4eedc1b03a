"""Tokens per second of each decoding method against plain `generate`, same model, same run.

    python benchmarks/decode.py --tokens 32 --rounds 5      as many rounds as are missing to five
    python benchmarks/decode.py --page                      only the table in docs/decode.md

In a round plain `generate` and all methods write one after another, so that a slow moment of the
machine meets all alike; ratios are formed within a round, and their median is shown. Times are those of
the processor, all threads together, in which a busy machine counts for less. Each round is written down
when it is done, and the same command goes on from there. Tokens that end a text are forbidden, so that
all write as many.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import testtime as tt
from between import write_between, write_json
from testtime.bench.machine import describe_machine
from testtime.decode.decoding import Decoding
from testtime.decode.models import end_tokens
from testtime.decode.watermark import Watermark

PROMPT = "The history of the city begins with"
PLAIN = "plain generate"
NOTES = {
    "greedy": "",
    "sample": "a draw here is quicker than that of torch, with 262,144 tokens",
    "min-p": "",
    "edt": "",
    "adaptive-temperature": "a pass over the vocabulary for each round of its bisection",
    "em-inf": "five steps of Adam at most, for all rows at once, where a token is unsure",
    "top-p": "transformers sorts the vocabulary",
    "typical": "the same",
    "uscd": "two prompts are read",
    "ead": "with the same model in both places",
    "watermark": "a green list is made for each token; those of the last 256 tokens are kept",
    "sweet": "the same, where a token is unsure",
}
NUMBERS = Path(__file__).with_name("decode.json")
PAGE = Path(__file__).parents[1] / "docs/decode.md"


def contestants(model: Any, tokenizer: Any, prompts: list[str], tokens: int) -> dict[str, Any]:
    """What is measured, by name: each writes so many tokens after each prompt."""
    model.generation_config.suppress_tokens = end_tokens(model, tokenizer)
    inputs = tokenizer(prompts, return_tensors="pt")
    needs = {"ead": {"large": model}, "uscd": {"lame": ["The"] * len(prompts)}}
    taus, keys = {"watermark": None, "sweet": 0.9}, itertools.count(1)

    def plain() -> None:
        model.generate(**inputs, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=tokens)

    def ours(method: str) -> Callable[[], None]:
        def write() -> None:
            chosen: str | Decoding = method
            if method in taus:  # with a new key, for green lists are kept
                mark = Watermark(vocabulary=len(tokenizer), tau=taus[method], key=next(keys))
                chosen = Decoding(steps=(mark,))
            found = tt.decode.generate(
                model, tokenizer, prompts, chosen, max_new_tokens=tokens, **needs.get(method, {})
            )
            if any(len(each.tokens) != tokens for each in found):
                raise RuntimeError(f"{method} has not written {tokens} tokens")

        return write

    return {PLAIN: plain} | {method: ours(method) for method in NOTES}


def summary(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of each method its tokens per second, and its time against plain `generate`."""
    written, plain = found["tokens"] * found["prompts"], found["seconds"][PLAIN]
    return {
        name: {
            "tokens per second": written / statistics.median(own),
            "time against plain": statistics.median(
                a / b for a, b in zip(own, plain, strict=False)
            ),
        }
        for name, own in found["seconds"].items()
    }


def page(path: Path, found: dict[str, Any]) -> None:
    """Writes the table between the marks of a page."""
    rows, rounds = summary(found), len(found["seconds"][PLAIN])
    lines = ["| method | time | tokens a processor second | |", "|---|--:|--:|---|"]
    for name, own in rows.items():
        shown, note = name if name == PLAIN else f"`{name}`", NOTES.get(name, "")
        lines.append(
            f"| {shown} | {own['time against plain']:.2f} | {own['tokens per second']:.1f} | {note} |"
        )
    lines += [
        "",
        f"{found['model']} in float32, {found['tokens']} tokens after each of {found['prompts']} prompts,",
        f"median of {rounds} rounds; {found['machine']},",
        f"threads: {found['threads']}.",
    ]
    write_between(path, "decode", lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="gemma:270m")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="in all, those of --out among them")
    parser.add_argument("--out", type=Path, default=NUMBERS)
    parser.add_argument("--page", action="store_true", help="measure nothing, write the table")
    asked = parser.parse_args()
    if asked.page:
        page(PAGE, json.loads(asked.out.read_text("utf-8")))
        return
    about = {
        "machine": describe_machine(torch.device("cpu")), "threads": torch.get_num_threads(),
        "model": asked.model, "tokens": asked.tokens, "prompts": asked.prompts,
    }  # fmt: skip
    held = json.loads(asked.out.read_text("utf-8")) if asked.out.exists() else {}
    names = [PLAIN, *NOTES]
    if {**held, **about} != held or list(held["seconds"]) != names:
        held = {**about, "seconds": {name: [] for name in names}}
    todo: dict[str, Callable[[], None]] = {}
    if len(held["seconds"][PLAIN]) < asked.rounds:
        loaded = tt.decode.load_language_model(asked.model)
        todo = contestants(*loaded, [PROMPT] * asked.prompts, asked.tokens)
        todo[PLAIN]()  # the first call of all is slower
    while len(held["seconds"][PLAIN]) < asked.rounds:
        times: dict[str, float] = {}
        for name, write in todo.items():
            begun = time.process_time()
            write()
            times[name] = time.process_time() - begun
        for name, value in times.items():
            held["seconds"][name].append(value)
        write_json(asked.out, held)
        print(f"round {len(held['seconds'][PLAIN])} of {asked.rounds}", flush=True)
    for name, row in summary(held).items():
        print(f"{name:<22}{row['tokens per second']:8.2f}{row['time against plain']:8.3f}")


if __name__ == "__main__":
    main()
