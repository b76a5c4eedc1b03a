"""The catalogue: one record for each paper, and what it became here."""

import csv
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

from testtime._core.errors import unknown
from testtime._core.registry import entries


@dataclass(frozen=True)
class Record:
    """A paper: `works` when something here came of it, else `planned`.

    Attributes:
        slug: short name.
        title: of the paper.
        family: part of the field.
        state: `works` or `planned`.
        symbols: what implements it.
        check: whether `testtime reproduce` has a small check of it.
    """

    slug: str
    title: str
    family: str
    state: Literal["works", "planned"]
    symbols: tuple[str, ...]
    check: bool


def catalogue() -> list[Record]:
    """All records. What a paper became is read off the methods that name it, and else off its line.

    Example:
        >>> next(r.symbols for r in catalogue() if r.slug == "eata")
        ('testtime.adaptation.methods.eata.eata', 'testtime.adaptation.methods.eta.eta')
    """
    symbols: dict[str, list[str]] = {}
    for entry in entries("method").values():
        where = f"{entry.factory.__module__}.{entry.factory.__name__}"
        symbols.setdefault(entry.paper, []).append(where)
    checks = {entry.paper for entry in entries("check").values()}
    text = (files("testtime.papers") / "catalogue.tsv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    for row in rows:
        symbols.setdefault(row["slug"], []).extend(row["symbols"].split())
    return [
        Record(
            row["slug"],
            row["title"],
            row["family"],
            "works" if symbols[row["slug"]] else "planned",
            tuple(symbols[row["slug"]]),
            row["slug"] in checks,
        )
        for row in rows
    ]


def search(query: str) -> list[Record]:
    """Records whose slug, title, family or symbols hold every word of the query.

    Example:
        >>> [record.slug for record in search("sharpness anything-else")]
        []
    """
    words = query.lower().split()
    return [
        record
        for record in catalogue()
        if all(
            word in " ".join((record.slug, record.title, record.family, *record.symbols)).lower()
            for word in words
        )
    ]


def record(slug: str) -> Record:
    """The record of one paper; an unknown slug is answered with the nearest."""
    found = {each.slug: each for each in catalogue()}
    if slug not in found:
        raise unknown("paper", slug, found)
    return found[slug]
