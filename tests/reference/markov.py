"""Markov chains again: counting along a path, and a row of the matrix, by hand."""

from itertools import pairwise


def transition_counts(path, states):
    table = [[0] * states for _ in range(states)]
    for now, then in pairwise(path):
        table[now][then] += 1
    return table


def transition_row(count, smoothing):
    """A row of the matrix from its counts."""
    added = (
        [n + ([0.5, 1, 0.75][min(n, 2)]) for n in count]
        if smoothing == "braess-sauer"
        else [n + smoothing for n in count]
    )
    return [n / sum(added) for n in added]
