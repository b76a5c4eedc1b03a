"""Which method holds on which kind of stream, on the embedded classifiers.

    python benchmarks/choose.py --out runs/choose

Three streams of the fifteen corruptions of ImageNet-C at severity 5, both embedded classifiers,
three seeds. Goes on where it was interrupted, and prints the tables as Markdown.
"""

import argparse
from pathlib import Path

from testtime.bench.metrics import summarise
from testtime.bench.runner import plan, run
from testtime.streams.scenarios import Scenario

METHODS = ("bn-adapt", "tent", "eta", "rdumb", "sar", "deyo", "ostta", "lame", "rotta")
MODELS = ("embedded:batch", "embedded:group")
NOT_FOR = {"embedded:group": ("bn-adapt", "rotta")}
STREAMS = {
    "shuffled labels, batches of 64": "continual,batch_size=64,samples=200",
    "sorted labels, batches of 16": "sorted,batch_size=16,samples=200",
    "batches of one": "single,samples=40",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/choose"))
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    error: dict[tuple[str, str, str], str] = {}
    for name, text in STREAMS.items():
        for model in MODELS:
            methods = [method for method in METHODS if method not in NOT_FOR.get(model, ())]
            cells = plan(
                methods=methods, models=[model], data="fashion-mnist:sample",
                streams=[Scenario.parse(text)], seeds=given.seeds,
            )  # fmt: skip
            for record in summarise(run(cells, given.out)):
                mean, spread = record["error"], record["error_std"]
                error[record["method"], model, name] = f"{mean:.1f} ± {spread:.1f}"
    for model in MODELS:
        print(f"\n| {model} | {' | '.join(STREAMS)} |\n|---|{'---|' * len(STREAMS)}")
        for method in ("source", *METHODS):
            if method not in NOT_FOR.get(model, ()):
                row = " | ".join(error[method, model, name] for name in STREAMS)
                print(f"| `{method}` | {row} |")


if __name__ == "__main__":
    main()
