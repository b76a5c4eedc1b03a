"""Does the entropy of an answer tell that it is wrong? Gemma 3 270M on questions of four options.

    python benchmarks/answer_entropy.py

Writes `benchmarks/answer_entropy.json`, after each topic; what stands there is not asked again.

Knowledge: names of Unicode characters, and meanings of HTTP status codes.
Reasoning: sums of two to four numbers. All are made from Python's standard library,
and the answer is read as the likeliest of the four numbers.
"""

import argparse
import json
import random
import time
import unicodedata
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

import torch

from testtime._core.files import atomic
from testtime.bench.machine import describe_machine
from testtime.decode.labels import Question, answer_questions
from testtime.decode.models import load_language_model
from testtime.decode.uncertainty import error_prediction

NUMBERS = Path(__file__).with_suffix(".json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gemma:270m")
    parser.add_argument("--questions", type=int, default=100, help="of each topic")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--topics", default=",".join(TOPICS))
    given = parser.parse_args()
    settings = {
        "model": given.model, "questions": given.questions, "seed": given.seed,
        "machine": describe_machine(torch.device("cpu")),
    }  # fmt: skip
    known = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
    rows = known.get("topics", {}) if {**known, **settings} == known else {}
    for name in given.topics.split(","):
        if name not in rows:
            rows[name] = asked(name, given)
            with atomic(NUMBERS) as part:
                part.write_text(json.dumps({**settings, "topics": rows}, indent=1) + "\n")
    print("| topic | right | no number | AUROC of the entropy |\n|---|--:|--:|--:|")
    for name, row in rows.items():
        right = 1 - row["wrong"] / given.questions
        print(f"| {name} | {right:.0%} | {row['no number']} | {row['auroc']:.2f} |")


def asked(name: str, given: argparse.Namespace) -> dict[str, float]:
    """How well the entropy tells the wrong answers of a topic."""
    chance = random.Random(f"{given.seed} {name}")
    questions = [TOPICS[name](chance) for _ in range(given.questions)]
    model, tokenizer = load_language_model(given.model)
    began = time.process_time()
    found = answer_questions(model, tokenizer, questions)
    seconds = time.process_time() - began
    wrong = torch.tensor([a.likely != q.right for a, q in zip(found, questions, strict=True)])
    scores = torch.tensor([each.entropy for each in found])
    worth = error_prediction(scores, wrong)["all"]
    return {
        "wrong": worth.wrong,
        "no number": sum(each.greedy is None for each in found),
        "auroc": worth.auroc,
        "average precision": worth.average_precision,
        "mean entropy": float(scores.mean()),
        "processor seconds": round(seconds, 1),
    }


def character(chance: random.Random) -> Question:
    """The name of a Latin, Greek or Cyrillic character, or of a sign."""
    ranges = [*range(0x21, 0x7F), *range(0xA1, 0x180), *range(0x391, 0x3CA), *range(0x410, 0x450)]
    named = [chr(code) for code in ranges if unicodedata.name(chr(code), "")]
    four = chance.sample(named, 4)
    return question(f"What is the character {four[0]} called?",
                    [unicodedata.name(each).lower() for each in four], chance)  # fmt: skip


def status(chance: random.Random) -> Question:
    """The phrase of an HTTP status code."""
    four = chance.sample(list(HTTPStatus), 4)
    return question(f"What does the HTTP status code {four[0].value} mean?",
                    [each.phrase for each in four], chance)  # fmt: skip


def total(chance: random.Random) -> Question:
    """A sum of two to four numbers of two digits, among sums that are off by 1, 2 or 10."""
    terms = [chance.randint(10, 99) for _ in range(chance.randint(2, 4))]
    right = sum(terms)
    options = [str(right + off) for off in (0, chance.choice((-10, 10)), -1, 2)]
    return question(f"What is {' + '.join(map(str, terms))}?", options, chance)


def question(text: str, options: list[str], chance: random.Random) -> Question:
    """A question whose first option is the right one, with its options mixed."""
    mixed = chance.sample(options, len(options))
    return Question(text, tuple(mixed), mixed.index(options[0]))


TOPICS: dict[str, Callable[[random.Random], Question]] = {
    "characters": character, "HTTP": status, "sums": total,
}  # fmt: skip


if __name__ == "__main__":
    main()
