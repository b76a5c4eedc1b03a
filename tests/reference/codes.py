"""Watermarks, arithmetic coding, shortening of code and sorting again, from the papers' boxes."""

import io
import math
import tokenize
from fractions import Fraction

import numpy as np
import torch


def green_list(previous, vocabulary, gamma, key=15485863):
    torch.manual_seed(key * previous)
    return set(torch.randperm(vocabulary)[: int(gamma * vocabulary)].tolist())


def mark(previous, scores, gamma, delta, tau):
    """One row of scores, a list; the scores that generation goes on with."""
    p = np.exp(np.array(scores) - max(scores))
    p = p / p.sum()
    if tau is not None and -sum(q * math.log(q) for q in p if q > 0) <= tau:
        return list(scores)
    green = green_list(previous, len(scores), gamma)
    return [s + delta if v in green else s for v, s in enumerate(scores)]


def z(tokens, vocabulary, gamma, *, entropies=None, tau=None, prompt=1):
    counted = [i for i in range(prompt, len(tokens)) if tau is None or entropies[i] > tau]
    hits = sum(tokens[i] in green_list(tokens[i - 1], vocabulary, gamma) for i in counted)
    n = len(counted)
    return (hits - gamma * n) / math.sqrt(n * gamma * (1 - gamma))


def arithmetic_bits(symbols, probs):
    """Bits of a number inside the interval that exact arithmetic coding ends with."""
    width = Fraction(1)
    for symbol, row in zip(symbols, probs, strict=True):
        exact = [Fraction(float(p)) for p in row]
        width *= exact[symbol] / sum(exact)
    return math.ceil(-math.log2(width)) + 1


def ranks(probs, symbols):
    return [sorted(range(len(p)), key=lambda v: (-p[v], v)).index(s)
            for p, s in zip(probs, symbols, strict=True)]  # fmt: skip


def words(source):
    """Texts of the tokens of Python code."""
    read = tokenize.generate_tokens(io.StringIO(source).readline)
    return [t.string for t in read if t.string.strip() and t.type != tokenize.ENDMARKER]


def shortened(texts, kinds, ratio, order):
    """The kept texts: kind after kind, frequent ones first, from the end, until enough are gone."""
    target, gone = round(len(texts) * (1 - ratio)), set()
    for kind in [*order, *({*kinds} - {*order})]:
        of_kind = [i for i in reversed(range(len(texts))) if kinds[i] == kind]
        for i in sorted(of_kind, key=lambda i: texts.count(texts[i]), reverse=True):
            if len(texts) - len(gone) > target:
                gone.add(i)
    return [text for i, text in enumerate(texts) if i not in gone]


def quicksort_inferences(scores, k, b):
    """Calls of a partial quicksort with the middle item as pivot: sum of ceil((m - 1) / b)."""
    if len(scores) <= 1 or k <= 0:
        return 0
    pivot = scores[len(scores) // 2]
    others = scores[: len(scores) // 2] + scores[len(scores) // 2 + 1 :]
    better = [s for s in others if s > pivot]
    worse = [s for s in others if s <= pivot]
    calls = math.ceil(len(others) / b) + quicksort_inferences(better, k, b)
    return calls + quicksort_inferences(worse, k - len(better) - 1, b)


def bubble_comparisons(scores, k):
    """Comparisons, and different pairs among them, of k passes from the end."""
    items, asked = list(enumerate(scores)), []
    for done in range(min(k, len(items) - 1)):
        swapped = False
        for i in range(len(items) - 1, done, -1):
            asked.append(frozenset((items[i][0], items[i - 1][0])))
            if items[i][1] > items[i - 1][1]:
                items[i], items[i - 1], swapped = items[i - 1], items[i], True
        if not swapped:
            break
    return len(asked), len(set(asked))
