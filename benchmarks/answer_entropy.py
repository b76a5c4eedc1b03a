"""Does the entropy of an answer tell that it is wrong? Gemma 3 270M on questions of four options.

    python benchmarks/answer_entropy.py --questions 40

Knowledge: names of Unicode characters, and meanings of HTTP status codes.
Reasoning: sums of two to four numbers. All are made from Python's standard library,
and the answer is read as the likeliest of the four numbers.
"""

import argparse
import random
import time
import unicodedata
from collections.abc import Callable
from http import HTTPStatus

import torch

from testtime.decode.language import Question, answer_questions
from testtime.decode.models import load_language_model
from testtime.decode.uncertainty import error_prediction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    topics: dict[str, Callable[[random.Random], Question]] = {
        "characters": character, "HTTP": status, "sums": total,
    }  # fmt: skip
    asked = [(name, make(chance)) for name, make in topics.items() for _ in range(given.questions)]
    model, tokenizer = load_language_model("gemma:270m")
    start = time.perf_counter()
    found = answer_questions(model, tokenizer, [question for _, question in asked])
    seconds = time.perf_counter() - start
    wrong = torch.tensor(
        [each.likely != question.right for each, (_, question) in zip(found, asked, strict=True)]
    )
    scores = torch.tensor([each.entropy for each in found])
    print(f"{len(asked)} questions, {seconds:.0f} s")
    print(f"likeliest token is no number: {sum(each.greedy is None for each in found)}")
    print("| topic | questions | wrong | AUROC of the entropy |\n|---|--:|--:|--:|")
    for name, worth in error_prediction(scores, wrong, [name for name, _ in asked]).items():
        print(f"| {name} | {worth.questions} | {worth.wrong} | {worth.auroc:.2f} |")


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


if __name__ == "__main__":
    main()
