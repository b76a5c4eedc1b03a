"""Tokens per second of each decoding method against plain `generate`, same model, same run.

python benchmarks/decode.py --model gemma:270m --json benchmarks/decode.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import testtime as tt
from testtime.bench.machine import describe_machine

PROMPT = "The history of the city begins with"
METHODS = ("greedy", "sample", "top-p", "typical", "min-p", "edt", "em-inf", "uscd", "ead")


def main() -> None:
    """Rounds in turn, so that a busy moment of the machine meets all; the median of their ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="gemma:270m")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    model, tokenizer = tt.decode.load_language_model(asked.model)
    model.generation_config.eos_token_id = None  # all write as many tokens
    prompts = [PROMPT] * asked.rows
    inputs = tokenizer(prompts, return_tensors="pt")

    def plain() -> int:
        out = model.generate(
            **inputs, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=asked.tokens,
            min_new_tokens=asked.tokens,
        )  # fmt: skip
        return (out.shape[1] - inputs["input_ids"].shape[1]) * asked.rows

    def ours(method: str) -> int:
        more = {"ead": {"large": model}, "uscd": {"lame": "The"}}.get(method, {})
        if "lame" in more:
            more = {"lame": ["The"] * asked.rows}
        found = tt.decode.generate(
            model, tokenizer, prompts, method, max_new_tokens=asked.tokens, **more
        )
        return sum(len(each.tokens) for each in found)

    names = ["plain generate", *asked.methods.split(",")]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    plain()
    for _ in range(asked.rounds):
        for name in names:
            begun = time.perf_counter()
            written = plain() if name == names[0] else ours(name)
            seconds[name].append((time.perf_counter() - begun) / written)
    rows = [
        {
            "method": name,
            "tokens per second": 1 / statistics.median(each),
            "time against plain": statistics.median(
                a / b for a, b in zip(each, seconds[names[0]], strict=True)
            ),
        }
        for name, each in seconds.items()
    ]
    for row in rows:
        print(f"{row['method']:<16}{row['tokens per second']:8.2f}{row['time against plain']:8.3f}")
    if asked.json:
        settings = {"model": asked.model, "tokens": asked.tokens, "prompts": asked.rows,
                    "rounds": asked.rounds, "threads": torch.get_num_threads()}  # fmt: skip
        asked.json.write_text(
            json.dumps(
                {"machine": describe_machine(torch.device("cpu")), **settings, "rows": rows},
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
