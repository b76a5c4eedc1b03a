"""Docstrings of methods, taken apart."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LABELS = ("Use when", "Not when", "Args", "Raises", "Example", "Reference")


@dataclass(frozen=True)
class Docstring:
    """The parts of a docstring: its first sentence, its labelled parts, and what else it says."""

    summary: str
    parts: dict[str, str]
    notes: tuple[str, ...]

    @property
    def options(self) -> dict[str, str]:
        """Option -> what it means; options that are described together share the text."""
        found: dict[str, str] = {}
        for item in re.split(r"\n(?=\S)", inspect.cleandoc(self.parts.get("Args", ""))):
            names, _, text = item.partition(":")
            found |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
        return found


def parse(text: str) -> Docstring:
    """Takes a docstring apart at its blank lines.

    Example:
        >>> parse("Does it.\\n\\nUse when: it is\\nneeded.\\n\\nArgs:\\n    a, b: c.").options
        {'a': 'c.', 'b': 'c.'}
    """
    summary, *blocks = re.split(r"\n\s*\n", inspect.cleandoc(text))
    parts: dict[str, str] = {}
    notes: list[str] = []
    for block in blocks:
        label, _, body = block.partition(":")
        if label in parts:
            raise ValueError(f"a docstring says {label!r} twice: {summary}")
        if label in LABELS:
            parts[label] = body if body.startswith("\n") else " ".join(body.split())
        else:
            notes.append(block)
    return Docstring(" ".join(summary.split()), parts, tuple(notes))


def box(factory: Callable[..., Any]) -> tuple[str, str]:
    """The title and the algorithm box that a method's file opens with."""
    title, _, algorithm = (inspect.getdoc(inspect.getmodule(factory)) or "").partition("\n")
    return title.rstrip("."), algorithm.strip("\n")
