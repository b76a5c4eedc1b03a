"""Votes, searches and costs of test-time compute, from their definitions, in plain Python."""

import itertools
import math


def shortest_majority(answers, lengths):
    weight = {}
    for a in dict.fromkeys(answers):
        if a is not None:
            own = [n for b, n in zip(answers, lengths, strict=True) if b == a]
            weight[a] = len(own) / math.log(sum(own) / len(own))
    return max(weight, key=weight.get) if weight else None


def weighted(answers, weights):
    total = {}
    for a, w in zip(answers, weights, strict=True):
        if a is not None:
            total[a] = total.get(a, 0) + w
    return max(total, key=total.get) if total else None


def beams(children, value, samples, width, depth):
    """Beam search in a tree whose n-th sampled child of a node is `children(node)[n]`."""
    live = [(each,) for each in children(())[:samples]]
    for _ in range(1, depth):
        order = sorted(range(len(live)), key=lambda i: (-value(live[i]), i))[: samples // width]
        live = [live[i] for i in sorted(order)]
        live = [(*node, each) for node in live for each in children(node)[:width]]
    return live


def every_leaf(branching, depth):
    return list(itertools.product(range(branching), repeat=depth))


def dense_cost(p, heads, kv, width, c, length, n, intensity):
    compute = traffic = 0.0
    for t in range(length):
        context = c + t + 0.5
        compute += n * (2 * p + 4 * context * heads * width)
        traffic += 4 * kv * width * (c + n * (t + 0.5))  # keys and values, two bytes each
    return compute + intensity * traffic


def top_k_cost(p, heads, kv, width, c, length, n, intensity, budget):
    total = 0.0
    for t in range(length):
        seen = min(c + t + 0.5, budget)
        total += n * (2 * p + 4 * seen * heads * width + intensity * 4 * seen * kv * width)
    return total


def sparse_mask(scores, kv_heads, local, top_k, sinks, block):
    heads, keys = len(scores), len(scores[0])
    group = heads // kv_heads
    kept = [[k < sinks or k >= keys - local for k in range(keys)] for _ in range(heads)]
    middle = [k for k in range(keys) if k >= sinks and k < keys - local]
    blocks = [middle[i : i + block] for i in range(0, len(middle), block)]
    for g in range(kv_heads):
        members = range(g * group, (g + 1) * group)
        mean = [sum(scores[h][k] for h in members for k in b) / (group * len(b)) for b in blocks]
        for i in sorted(range(len(blocks)), key=lambda i: -mean[i])[:top_k]:
            for h in members:
                for k in blocks[i]:
                    kept[h][k] = True
    return kept
