"""Slow NumPy references, an entry at a time, written from the papers."""

import math

import numpy as np


def rws(init, clean, robust):
    """RWS (arXiv 2302.12480), one tensor."""
    pairs = [
        (float(c) - float(i), float(r) - float(i))
        for i, c, r in zip(init.flat, clean.flat, robust.flat)
    ]
    inner = math.fsum(std * c for std, c in pairs)
    norm = math.fsum(std * std for std, _ in pairs)
    share = inner / norm if norm else 0.0
    return np.array([c - share * std for std, c in pairs]).reshape(init.shape)


def ties(signatures, density, weights=None):
    """TIES (arXiv 2306.01708) of flat vectors: trim, elect, merge.

    With weights: the vote is weighted, and what agrees is divided by the sum
    of its weights.
    """
    weights = weights or [1.0] * len(signatures)
    trimmed = []
    for vector in signatures:
        kept = math.ceil(density * len(vector))
        order = sorted(range(len(vector)), key=lambda i: -abs(vector[i]))
        keep = set(order[:kept])
        trimmed.append([v if i in keep else 0.0 for i, v in enumerate(vector)])
    merged = []
    for values in zip(*trimmed):
        total = sum(w * v for w, v in zip(weights, values))
        agree = [(w, v) for w, v in zip(weights, values) if v * total > 0]
        divisor = sum(w for w, _ in agree)
        found = sum(w * v for w, v in agree)
        merged.append(found / divisor if divisor else 0.0)
    return merged


def dare(vector, drop_rate, uniform):
    """DARE (arXiv 2311.03099) for given uniform random numbers."""
    return [
        v / (1 - drop_rate) if u >= drop_rate else 0.0
        for v, u in zip(vector, uniform)
    ]


def quantize(values, bits):
    """The symmetric integers nearest to a list of floats, and the scale.

    Tries all places of the largest level that the library tries.
    """
    levels = 2 ** (bits - 1) - 1
    values = [float(v) for v in values]
    largest = max(abs(v) for v in values)
    if largest == 0:
        return [0] * len(values), 0.0
    found = None
    for clip in range(32, 0 if bits < 8 else 31, -1):
        scale = float(np.float32(clip / 32 * largest / levels))
        codes = [min(levels, max(-levels, round(v / scale))) for v in values]
        error = math.fsum((c * scale - v) ** 2 for c, v in zip(codes, values))
        if found is None or error < found[0]:
            found = error, codes, scale
    return found[1:]


def statistic(clean, parts):
    """A batch-norm statistic: the mixture of the clean one and others.

    Each of `parts` is a share and the statistic that replaces it. Shares of
    more than 1 in all leave nothing of the clean one, and are made to sum to 1.
    """
    total = math.fsum(share for share, _ in parts)
    if total > 1:
        parts = [(share / total, value) for share, value in parts]
        total = 1.0
    return (1 - total) * clean + sum(share * value for share, value in parts)


def pack(codes, bits):
    """Bytes that hold the codes, the first in the lowest bits."""
    levels = 2 ** (bits - 1) - 1
    number = 0
    for place, code in enumerate(codes):
        number |= (code + levels) << (bits * place)
    return number.to_bytes(-(-len(codes) * bits // 8), "little")
