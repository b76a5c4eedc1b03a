"""CodePromptZip: shorter code examples for a prompt, by deleting the least harmful kinds of token.

    kinds    identifier, structure, invocation, symbol, signature: marked in this order, the later
             mark wins; what has no mark is `other`
    order    delete all tokens of one kind from the examples; loss gained per share of tokens removed;
             least harm first
    removal  keep round(n (1 - ratio)) of n tokens: kind after kind, inside a kind the most frequent
             text first, among equals the last in the code first

The code is Python, read by the standard library's `ast` and `tokenize`. What counts as a token has
text of its own: names, numbers, strings, operators, comments.

Reference: CodePromptZip: Code-specific Prompt Compression for Retrieval-Augmented Generation in
Coding Tasks with LMs, 2025.
"""

import ast
import io
import keyword
import math
import tokenize
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, get_args

from testtime._core.errors import InputError, OptionError, unknown

Kind = Literal["identifier", "structure", "invocation", "symbol", "signature", "other"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ORDER: tuple[Kind, ...] = ("symbol", "structure", "signature", "invocation", "identifier", "other")
"""An order to begin with; the paper finds one for each task, see `rank_kinds`."""

HEADS = frozenset(("if", "elif", "else", "for", "while", "try", "except", "finally", "with"))
INVOCATION: Kind = "invocation"
CONTROL = HEADS | {"async", "break", "continue"}
WORD_OPERATORS = frozenset(("and", "or", "not", "in", "is"))
WITHOUT_TEXT = frozenset((
    tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
    tokenize.ENCODING,
))  # fmt: skip


@dataclass(frozen=True)
class Token:
    """A token of a source: its kind and where it stands, `source[start:end]`."""

    text: str
    kind: Kind
    start: int
    end: int


def tokens(source: str) -> list[Token]:
    """The tokens of Python code with their kinds; indented code, such as a method, is allowed.

    Raises:
        InputError: it is no Python code that this interpreter can read.

    Example:
        >>> [(t.text, t.kind) for t in tokens("if ready: go(x)")]
        [('if', 'structure'), ('ready', 'structure'), (':', 'symbol'), ('go', 'invocation'),
         ('(', 'symbol'), ('x', 'invocation'), (')', 'symbol')]
    """
    lead = "if True:\n" if source[:1] in (" ", "\t") else ""  # makes a block of indented code
    if "\r" in source.replace("\r\n", ""):
        raise InputError("the code has a carriage return inside a line; expected \\n or \\r\\n")
    try:
        tree = ast.parse(lead + source)
        lexed = list(tokenize.generate_tokens(io.StringIO(lead + source, newline="\n").readline))
    except (SyntaxError, ValueError, tokenize.TokenError, RecursionError) as error:
        raise InputError(
            f"this is not Python code: {error}. Expected whole statements, e.g. one function."
        ) from error
    where = _Places(lead + source)
    kinds: list[Kind] = [_kind_of_word(token) for token in lexed]
    heads = list(_heads(lexed, _soft_keywords(tree)))
    starts = [where.at(*token.start) for token in lexed]
    for first, last, kind in heads:
        if kind == "structure":
            kinds[first:last] = [kind for _ in range(first, last)]
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        first = bisect_left(starts, where.at_bytes(call.lineno, call.col_offset))
        last = bisect_left(starts, where.at_bytes(call.end_lineno or 0, call.end_col_offset or 0))
        kinds[first:last] = [INVOCATION for _ in range(first, last)]
    for place, token in enumerate(lexed):
        if token.type == tokenize.OP or token.string in WORD_OPERATORS:
            kinds[place] = "symbol"
    for first, last, kind in heads:
        if kind == "signature":
            kinds[first:last] = [kind for _ in range(first, last)]
    cut = len(lead)
    return [
        Token(token.string, kind, start - cut, start - cut + len(token.string))
        for token, kind, start in zip(lexed, kinds, starts, strict=True)
        if token.type not in WITHOUT_TEXT and token.string and start >= cut
    ]


def compress_code(source: str, ratio: float, *, order: Sequence[Kind] = ORDER) -> str:
    """Python code without its least needed tokens; what is left stands in its old order and lines.

    Args:
        source: Python code.
        ratio: share of tokens to remove, 0 to 1.
        order: kinds, the first to go in front; a kind that is not named goes last.

    Raises:
        OptionError: ratio or order cannot be.
        InputError: the source is not Python.

    Example:
        >>> compress_code("def double(x):\\n    return add(x, x)", 0.4)
        'def double( :\\n    return add x x'

    Reference: CodePromptZip, 2025.
    """
    if not 0 <= ratio <= 1:
        raise OptionError(f"ratio={ratio}: expected the share of tokens to remove, 0 to 1")
    if len(set(order)) != len(order):
        raise OptionError(f"order={tuple(order)} names a kind twice")
    for kind in order:
        if kind not in KINDS:
            raise unknown("kind of token", kind, KINDS)
    found = tokens(source)
    left = round(len(found) * (1 - ratio))
    count = Counter(token.text for token in found)
    rank = {kind: place for place, kind in enumerate(order)}
    going = sorted(
        range(len(found)),
        key=lambda at: (rank.get(found[at].kind, len(rank)), -count[found[at].text], -at),
    )
    removed = set(going[: len(found) - left])
    return _written(source, found, [at for at in range(len(found)) if at not in removed])


def without_kind(source: str, kind: Kind) -> tuple[str, float]:
    """The code without all tokens of a kind, and the share of tokens that it lost.

    Example:
        >>> without_kind("x = f(1)", "symbol")
        ('x f 1', 0.5)
    """
    found = tokens(source)
    kept = [at for at, token in enumerate(found) if token.kind != kind]
    return _written(source, found, kept), 1 - len(kept) / max(len(found), 1)


def rank_kinds(examples: Sequence[str], loss: Callable[[list[str]], float]) -> dict[Kind, float]:
    """Kinds of token from least to most harmful, with the harm of removing them.

        harm = (loss without the kind - loss of the whole) / share of tokens removed

    Args:
        examples: Python codes.
        loss: of the task with these examples in its prompts, e.g. 1 - exact match.

    Returns:
        Kind -> harm, in the order of removal; a kind that no example has comes last, with nan.

    Raises:
        InputError: no example, or one that is not Python.

    Example:
        >>> rank_kinds(["a = f(b)"], lambda codes: 1 - ("f" in codes[0]))
        {'identifier': 0.0, 'symbol': 0.0, 'invocation': 3.0, 'structure': nan, 'signature': nan,
         'other': nan}

    Reference: CodePromptZip, 2025.
    """
    if not examples:
        raise InputError("no example was given; expected one at least")
    whole = loss(list(examples))
    harm: dict[Kind, float] = {}
    for kind in KINDS:
        cut = [without_kind(example, kind) for example in examples]
        counts = [len(tokens(example)) for example in examples]
        gone = sum(share * n for (_, share), n in zip(cut, counts, strict=True)) / max(
            sum(counts), 1
        )
        harm[kind] = (loss([code for code, _ in cut]) - whole) / gone if gone else math.nan
    return dict(sorted(harm.items(), key=lambda item: (math.isnan(item[1]), item[1])))


def _kind_of_word(token: tokenize.TokenInfo) -> Kind:
    if token.type != tokenize.NAME:
        return "other"
    if token.string in CONTROL:
        return "structure"
    return "other" if keyword.iskeyword(token.string) else "identifier"


def _soft_keywords(tree: ast.AST) -> set[int]:
    """Lines on which `match` and `case` begin a statement; elsewhere they are names."""
    lines = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.Match)}
    cases = (node.pattern for node in ast.walk(tree) if isinstance(node, ast.match_case))
    return lines | {pattern.lineno for pattern in cases}


def _heads(lexed: Sequence[tokenize.TokenInfo], soft: set[int]) -> Iterator[tuple[int, int, Kind]]:
    """First token of the head of each compound statement, the one after its colon, and its kind.

    A decorator belongs to the signature of what it decorates.
    """
    fresh, kind, first, depth, lambdas = True, None, 0, 0, 0
    for place, token in enumerate(lexed):
        if token.type == tokenize.NEWLINE:
            if kind:
                yield first, place, kind
            fresh, kind = True, None
        elif token.type in WITHOUT_TEXT or token.type == tokenize.COMMENT:
            continue
        elif fresh:
            fresh, kind, first, depth, lambdas = (
                False,
                _kind_of_head(lexed, place, soft),
                place,
                0,
                0,
            )
        if token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
        lambdas += token.string == "lambda" and depth == 0
        if kind and token.string == ":" and depth == 0:
            if lambdas:
                lambdas -= 1
            else:
                yield first, place + 1, kind
                kind = None


def _kind_of_head(lexed: Sequence[tokenize.TokenInfo], place: int, soft: set[int]) -> Kind | None:
    token, following = lexed[place], lexed[place + 1].string
    word = following if token.string == "async" else token.string
    if word in ("def", "class", "@"):
        return "signature"
    if word in ("match", "case"):
        return "structure" if token.start[0] in soft else None
    return "structure" if word in HEADS else None


class _Places:
    """Where lines and columns of a source stand in it."""

    def __init__(self, source: str) -> None:
        self._lines = source.split("\n")
        self._starts = [0, *accumulate(len(line) + 1 for line in self._lines)]

    def at(self, line: int, column: int) -> int:
        """Index of a line, from 1, and a column in characters, as `tokenize` counts."""
        return self._starts[line - 1] + column

    def at_bytes(self, line: int, column: int) -> int:
        """Index of a line, from 1, and a column in bytes of UTF-8, as `ast` counts."""
        return self.at(line, len(self._lines[line - 1].encode()[:column].decode()))


def _written(source: str, found: Sequence[Token], kept: Sequence[int]) -> str:
    """The kept tokens as text: untouched where neighbours stayed, else a blank, or a new line."""
    if not kept:
        return ""
    parts = [source[: found[0].start]] if kept[0] == 0 else [_indent(source, found[kept[0]].start)]
    for at, following in pairwise(kept):
        parts.append(found[at].text)
        gap = source[found[at].end : found[following].start]
        if following == at + 1:
            parts.append(gap)
        elif "\n" in gap:
            parts.append("\n" + _indent(source, found[following].start))
        else:
            parts.append(" ")
    parts.append(found[kept[-1]].text)
    if kept[-1] == len(found) - 1:
        parts.append(source[found[-1].end :])
    return "".join(parts)


def _indent(source: str, start: int) -> str:
    """The blanks that begin the line of a place."""
    line = source[source.rfind("\n", 0, start) + 1 : start]
    return line[: len(line) - len(line.lstrip())]
