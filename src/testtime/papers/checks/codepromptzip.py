"""CodePromptZip's claim: what is deleted from code examples should depend on the kind of token.

The task stands in for retrieval with a language model: of which module is this function, by its
nearest neighbour among functions that were shortened.
"""

import ast
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import copy
from functools import cache
from pathlib import Path

import torch

from testtime._core.errors import MissingExtra
from testtime._core.registry import register
from testtime._core.seeds import generator
from testtime.decode.code_prompts import Kind, compress_code, tokens
from testtime.papers.reproduction import Progress, Reproduction, reproduce

CLAIM = (
    "Module of a function of Python's standard library by its nearest neighbour, 1200 functions "
    "shortened by 0.7 and 300 asked: removal by kind is more than 3 points above random removal and "
    "more than 30 above the reverse order of kinds."
)
ORDER: tuple[Kind, ...] = (
    "symbol", "structure", "other", "signature", "invocation", "identifier",
)  # fmt: skip
BASE, ASKED, RATIO = 1200, 300, 0.7
SHORTEST, LONGEST, EACH = 40, 400, 12
"""Tokens that a function has, and functions that a module has at least, to take part."""


@register("check", paper="codepromptzip", name="codepromptzip")
def check(*, seeds: Sequence[int] = (0, 1, 2), on_progress: Progress | None = None) -> Reproduction:
    """Accuracy of retrieval from shortened functions."""
    return reproduce(
        "codepromptzip", CLAIM, measure=measure, holds=holds, seeds=seeds, on_progress=on_progress
    )


def measure(seed: int) -> Iterator[tuple[str, float]]:
    """Accuracy in percent with whole and with shortened functions to look in."""
    known = _functions()
    draw = generator(seed, "codepromptzip")
    order = torch.randperm(len(known), generator=draw).tolist()[: BASE + ASKED]
    chosen = [known[place] for place in order]
    base, asked = chosen[:-ASKED], chosen[-ASKED:]
    ways = {
        "whole": [code for _, code in base],
        "by kind": [compress_code(code, RATIO, order=ORDER) for _, code in base],
        "random": [_random(code, draw) for _, code in base],
        "reverse": [compress_code(code, RATIO, order=ORDER[::-1]) for _, code in base],
    }
    for way, codes in ways.items():
        nearest = _nearest(codes, [code for _, code in asked])
        right = [base[place][0] == name for place, (name, _) in zip(nearest, asked, strict=True)]
        yield way, 100 * sum(right) / ASKED


@cache
def _functions() -> list[tuple[str, str]]:
    """Module and code of the functions and methods of the standard library that take part."""
    found: list[tuple[str, str]] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                code = _bare(node)
                if SHORTEST <= len(tokens(code)) <= LONGEST:
                    found.append((path.stem, code))
    held = Counter(name for name, _ in found)
    return [(name, code) for name, code in found if held[name] >= EACH]


def _bare(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """A function without comments and docstring, which the paper's examples do not have either."""
    body = node.body[ast.get_docstring(node, clean=False) is not None :]
    bare = copy(node)
    bare.body = body or [ast.Pass()]
    return ast.unparse(bare)


def _random(code: str, draw: torch.Generator) -> str:
    texts = [token.text for token in tokens(code)]
    left = round(len(texts) * (1 - RATIO))
    kept = torch.randperm(len(texts), generator=draw)[:left].sort().values.tolist()
    return " ".join(texts[place] for place in kept)


def _nearest(base: Sequence[str], asked: Sequence[str]) -> list[int]:
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("scikit-learn", "digits") from error
    weigh = TfidfVectorizer()
    vectors = weigh.fit_transform(base)
    return (weigh.transform(asked) @ vectors.T).toarray().argmax(1).tolist()


def holds(found: dict[str, float]) -> bool:
    """The claim, for one seed."""
    return found["by kind"] > found["random"] + 3 and found["by kind"] > found["reverse"] + 30
