"""Does the entropy of an answer, or a judge, tell that it is wrong? Gemma 3 270M, four options.

    python benchmarks/answer_entropy.py

Writes `benchmarks/answer_entropy.json`, after each topic; what stands there is not asked again.
The judge is the same model. It rates the first of the questions, asked by `judge_prompt` alone and after
four questions that were rated by hand; replies that do not say something are counted and left out.

Knowledge: names of Unicode characters, and meanings of HTTP status codes.
Reasoning: sums of two to four numbers. All are made from Python's standard library,
and the answer is read as the likeliest of the four numbers.
"""

import argparse
import json
import math
import random
import time
import unicodedata
from collections.abc import Callable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

import torch

from between import write_json
from names import names_of
from testtime.bench.machine import describe_machine
from testtime.decode.api import generate
from testtime.decode.labels import Question, answer_questions
from testtime.decode.models import load_language_model
from testtime.decode.uncertainty import Rating, error_prediction, judge

NUMBERS = Path(__file__).with_suffix(".json")
RATED = """Question: What is the capital of Sweden? Oslo; Stockholm; Turku; Malmo
complexity: 0.1
level: school
knowledge: yes
reasoning: no
steps: low

Question: A train leaves at 9:40 and arrives at 13:05. How long is it under way? 3:25; 4:25; 3:35; 2:25
complexity: 0.3
level: high school
knowledge: no
reasoning: yes
steps: medium

Question: Which enzyme joins Okazaki fragments? ligase; helicase; primase; gyrase
complexity: 0.6
level: undergraduate
knowledge: yes
reasoning: no
steps: low

Question: Which of these groups is not amenable? integers; free group of rank 2; circle; reals
complexity: 0.9
level: postgraduate
knowledge: yes
reasoning: yes
steps: high

"""
"""Questions that were rated by hand, put before a question: the model was never taught to obey."""
TOGETHER = 10
"""Questions that the judge reads at a time."""
SAYS: dict[str, Callable[[Rating], float | None]] = {
    "complexity": lambda r: r.complexity,
    "level": lambda r: r.level,
    "knowledge": lambda r: r.knowledge,
    "reasoning": lambda r: r.reasoning,
    "steps": lambda r: ("low", "medium", "high").index(r.steps) if r.steps else None,
}
"""What a rating says, as a number that is higher where an error is likelier."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gemma:270m")
    parser.add_argument("--questions", type=int, default=100, help="of each topic")
    parser.add_argument("--judged", type=int, default=30, help="of them, by the judge")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--topics", type=names_of(TOPICS), default=",".join(TOPICS))
    given = parser.parse_args()
    settings = {
        "model": given.model, "questions": given.questions, "seed": given.seed,
        "machine": describe_machine(torch.device("cpu")),
    }  # fmt: skip
    known = json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}
    rows = known.get("topics", {}) if {**known, **settings} == known else {}
    for name in given.topics:
        if name not in rows:
            rows[name] = asked(name, given)
            keep(settings, rows)
        if rows[name].get("judge", {}).get("questions") != given.judged:
            rows[name]["judge"] = judged(name, given)
            keep(settings, rows)
    print("| topic | right | no number | AUROC of the entropy |\n|---|--:|--:|--:|")
    for name, row in rows.items():
        right = 1 - row["wrong"] / given.questions
        print(f"| {name} | {right:.0%} | {row['no number']} | {row['auroc']:.2f} |")
    print(
        f"\nThe first {given.judged} of each topic: AUROC, and in brackets how many replies do not"
    )
    print("say it, and how many different values the others give.")
    print(
        "\n| topic | judge | entropy |", " | ".join(SAYS), "|\n|---|---|" + "--:|" * (1 + len(SAYS))
    )
    for name, row in rows.items():
        for way in ("asked alone", "after four"):
            own = row["judge"][way]
            cells = [
                f"{shown(own[each]['auroc'])} ({own[each]['without']}, {own[each]['values']})"
                for each in SAYS
            ]
            print("|", " | ".join([name, way, shown(row["judge"]["entropy"]), *cells]), "|")


def shown(auroc: float | None) -> str:
    """An AUROC, or that there is none."""
    return "none" if auroc is None else f"{auroc:.2f}"


def keep(settings: dict[str, Any], rows: dict[str, Any]) -> None:
    """Writes down what has been found so far."""
    write_json(NUMBERS, {**settings, "topics": rows})


def judged(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """How well the ratings of a judge tell the wrong answers, among the first of a topic."""
    questions = drawn(name, given)[: given.judged]
    model, tokenizer = load_language_model(given.model)
    began = time.process_time()
    found = answer_questions(model, tokenizer, questions)
    wrong = [a.likely != q.right for a, q in zip(found, questions, strict=True)]
    texts = [f"{q.text} {'; '.join(q.options)}" for q in questions]

    def ask(prompts: Sequence[str], before: str = "") -> list[str]:
        whole = []
        for prompt in prompts:
            rules, _, question = prompt.partition("Question: ")
            whole.append(f"{rules}{before}Question: {question}\n")
        replies: list[str] = []
        for start in range(0, len(whole), TOGETHER):
            part = whole[start : start + TOGETHER]
            replies += [
                each.text
                for each in generate(
                    model, tokenizer, part, "greedy", max_new_tokens=40, stop="\n\n"
                )
            ]
        return replies

    return {
        "questions": len(questions),
        "wrong": sum(wrong),
        "entropy": told([each.entropy for each in found], wrong)["auroc"],
        **{
            way: {
                each: told([say(rating) for rating in ratings], wrong) for each, say in SAYS.items()
            }
            for way, ratings in (
                ("asked alone", judge(ask, texts)),
                ("after four", judge(lambda prompts: ask(prompts, RATED), texts)),
            )
        },
        "processor seconds": round(time.process_time() - began, 1),
    }


def told(scores: Sequence[float | None], wrong: Sequence[bool]) -> dict[str, Any]:
    """The AUROC of those scores that there are, how many there are not, and how many values they have."""
    both = [(float(s), w) for s, w in zip(scores, wrong, strict=True) if s is not None]
    own = torch.tensor([each for each, _ in both])
    auroc = error_prediction(own, torch.tensor([w for _, w in both], dtype=torch.bool))["all"].auroc
    return {
        "auroc": None if math.isnan(auroc) else auroc,
        "without": len(scores) - len(both),
        "values": len(own.unique()),
    }


def drawn(name: str, given: argparse.Namespace) -> list[Question]:
    """The questions of a topic."""
    chance = random.Random(f"{given.seed} {name}")
    return [TOPICS[name](chance) for _ in range(given.questions)]


def asked(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """How well the entropy tells the wrong answers of a topic."""
    questions = drawn(name, given)
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
