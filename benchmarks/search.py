"""What kept keys and values save in a search: beams of a language model, with them and without.

    python benchmarks/search.py --json benchmarks/search.json

Both searches draw with the same seeds, and are counted by the tokens that the models have read. The
verifier is the same model, asked whether the text so far is good.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from between import write_json
from testtime.bench.machine import describe_machine
from testtime.decode import prefixes
from testtime.decode.labels import yes_verifier
from testtime.decode.language import Sampler
from testtime.decode.models import load_language_model
from testtime.decode.padding import bears_company, bears_padding
from testtime.decode.search import Found
from testtime.decode.strategies import beam_search

PROMPT = (
    "A short history of the lighthouse, written for visitors who come up the long road from the "
    "harbour and want to know who built it, when, and why its lamp still burns.\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gemma:270m")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6, help="steps of a path")
    parser.add_argument("--tokens", type=int, default=16, help="of a step at most")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, tokenizer = load_language_model(args.model)
    read = 0
    bears_padding(model), bears_company(model)  # asked once, and not counted

    def count(_module: Any, _args: Any, given: dict[str, Any]) -> None:
        nonlocal read
        read += given["input_ids"].numel()

    model.register_forward_pre_hook(count, with_kwargs=True)

    def search() -> Found[Any]:
        sampler = Sampler(model, tokenizer, PROMPT, stop=".", max_new_tokens=args.tokens, seed=0)
        judge = yes_verifier(
            model, tokenizer, lambda path: f"{PROMPT}{sampler.text(path)}\nIs this text good?"
        )
        return beam_search(
            sampler, judge, samples=args.samples, width=args.width, rounds=args.rounds
        )

    rows: dict[str, dict[str, Any]] = {}
    keeps = prefixes._keeps_keys
    for name, able in (("kept", keeps), ("read anew", lambda _: False)):
        prefixes._keeps_keys = able
        read, began = 0, time.perf_counter()
        found = search()
        rows[name] = {
            "seconds": round(time.perf_counter() - began, 2),
            "tokens read": read,
            "tokens written": found.spent.tokens,
            "best": [list(step.content) for step in found.best.steps],
        }
    same = rows["kept"].pop("best") == rows["read anew"].pop("best")
    for name, row in rows.items():
        print(name, row)
    print("the same best path:", same)
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        settings |= {
            "machine": describe_machine(torch.device("cpu")),
            "threads": torch.get_num_threads(),
        }
        write_json(args.json, {**settings, **rows, "same": same})


if __name__ == "__main__":
    main()
