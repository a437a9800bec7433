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


def ties(signatures, density):
    """TIES (arXiv 2306.01708) of flat vectors: trim, elect, merge."""
    trimmed = []
    for vector in signatures:
        kept = math.ceil(density * len(vector))
        order = sorted(range(len(vector)), key=lambda i: -abs(vector[i]))
        keep = set(order[:kept])
        trimmed.append([v if i in keep else 0.0 for i, v in enumerate(vector)])
    merged = []
    for values in zip(*trimmed):
        total = sum(values)
        agree = [v for v in values if v * total > 0]
        merged.append(sum(agree) / len(agree) if agree else 0.0)
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


def pack(codes, bits):
    """Bytes that hold the codes, the first in the lowest bits."""
    levels = 2 ** (bits - 1) - 1
    number = 0
    for place, code in enumerate(codes):
        number |= (code + levels) << (bits * place)
    return number.to_bytes(-(-len(codes) * bits // 8), "little")
