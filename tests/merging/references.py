"""Slow NumPy references, an entry at a time, written from the papers."""

import math

import numpy as np

from tests.patches.references import dare as dare
from tests.patches.references import ties as ties


def task_arithmetic(base, models, weights, scale=1.0):
    """Task arithmetic (arXiv 2212.04089) of flat vectors."""
    return [
        b + scale * math.fsum(w * (x - b) for w, x in zip(weights, values))
        for b, *values in zip(base, *models)
    ]


def breadcrumbs(change, density, gamma):
    """Model Breadcrumbs (arXiv 2312.06795): without both tails."""
    order = sorted(range(len(change)), key=lambda i: -abs(change[i]))
    removed = math.floor(gamma * len(change))
    kept = order[removed : removed + math.ceil(density * len(change))]
    return [x if i in kept else 0.0 for i, x in enumerate(change)]


def della(rows, density, epsilon, uniform):
    """MagPrune of DELLA (arXiv 2406.11617), a row at a time."""
    found = []
    for row, numbers in zip(rows, uniform):
        ranks = sorted(range(len(row)), key=lambda i: abs(row[i]))
        pruned = [0.0] * len(row)
        for rank, i in enumerate(ranks):
            step = 2 * epsilon / (len(row) - 1) * rank if len(row) > 1 else 0
            keep = density - epsilon * (len(row) > 1) + step
            if numbers[i] < keep:
                pruned[i] = row[i] / keep
        found.append(pruned)
    return found


def model_stock(base, models):
    """Model Stock (arXiv 2403.19522), equation 5, of flat vectors."""
    changes = [[x - b for x, b in zip(model, base)] for model in models]

    def product(x, y):
        return math.fsum(a * b for a, b in zip(x, y))

    cosines = [
        product(x, y) / math.sqrt(product(x, x) * product(y, y))
        for i, x in enumerate(changes)
        for y in changes[:i]
    ]
    cosine = min(1.0, max(0.0, sum(cosines) / len(cosines)))
    count = len(models)
    ratio = count * cosine / (1 + (count - 1) * cosine)
    return [
        ratio * sum(values) / count + (1 - ratio) * b
        for b, *values in zip(base, *models)
    ]


def slerp(x, y, t):
    """Points of the plane of two vectors, the angle from the first t of all."""
    x, y = np.asarray(x, "float64"), np.asarray(y, "float64")
    norms = np.linalg.norm(x), np.linalg.norm(y)
    angle = np.arccos((x / norms[0]) @ (y / norms[1]))
    if np.sin(angle) < 1e-9:
        return (1 - t) * x + t * y
    return (np.sin((1 - t) * angle) * x + np.sin(t * angle) * y) / np.sin(angle)


def moved_statistics(base, models, weights, is_whole=False):
    """A batch normalization's, from the base to the models' average."""
    step = np.clip(np.sum(weights), 0, 1)
    if is_whole and max(weights) > 0:
        step = 1
    if step == 0:
        return np.asarray(base, "float64")
    voting = np.maximum(weights, 0)
    average = np.average(np.asarray(models, "float64"), 0, voting)
    return base + step * (average - base)


def iso_c(matrix):
    """Iso-C (arXiv 2502.04959) by eigenvectors: s (M M^T)^(-1/2) M."""
    matrix = np.asarray(matrix, "float64")
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    values, vectors = np.linalg.eigh(wide @ wide.T)
    singular = np.sqrt(values)
    root = vectors @ np.diag(1 / singular) @ vectors.T
    found = singular.mean() * root @ wide
    return found if wide is matrix else found.T
