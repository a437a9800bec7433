"""The arithmetic of signatures: sums, TIES, DARE, similarity."""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from keras_weightmods.patches import architecture
from keras_weightmods.patches.report import Similarity
from keras_weightmods.utils.checks import raise_all

S = TypeVar("S")


def linear_combination(
    signatures: Sequence[S], weights: Sequence[float], method: str
) -> S:
    """Return the sum of `weights[i] * signatures[i]`, computed in float64."""
    found: S = combined(
        signatures,
        lambda parts: sum(w * x for w, x in zip(weights, parts)),
        weights,
        method,
    )
    return found


def ties(
    signatures: Sequence[S], weights: Sequence[float], density: float
) -> S:
    """Return the TIES merge (arXiv 2306.01708) of weighted signatures."""
    parts = [
        map_weights(
            linear_combination([signature], [weight], "ties"),
            lambda arrays: trimmed(arrays, density),
        )
        for signature, weight in zip(signatures, weights)
    ]
    # Statistics carry their weights already, as the others do.
    shares = [1 / sum(weights)] * len(parts)
    found: S = combined(parts, elected_mean, shares, "ties")
    return found


def dare(
    signatures: Sequence[S],
    weights: Sequence[float],
    drop_rate: float,
    seed: int,
) -> S:
    """Return the sum of signatures of which entries were dropped at random."""
    generator = np.random.default_rng(seed)
    parts = [
        map_weights(
            signature,
            lambda arrays: [dropped(x, drop_rate, generator) for x in arrays],
        )
        for signature in signatures
    ]
    return linear_combination(parts, weights, "dare")


def combined(signatures, function, weights, method):
    """Combine signatures, weight by weight.

    Args:
        signatures: List of `WeightSignature`, compatible.
        function: Callable from a list of float64 arrays, one for each
            signature and zero where it has nothing, to an array. Statistics
            are summed with `weights` instead.
        weights: List of floats.
        method: String, the `method` of the result.

    Returns:
        A signature in float32, of the type of the first.
    """
    check_compatible(signatures)
    lookups = [_by_position(signature) for signature in signatures]
    entries = []
    for position in sorted(set().union(*lookups)):
        found = [lookup.get(position) for lookup in lookups]
        first = next(entry for entry in found if entry is not None)
        parts = [
            np.zeros(first.info.shape)
            if entry is None
            else entry.dequantized("float64")
            for entry in found
        ]
        if first.is_statistic:
            tensor = sum(w * x for w, x in zip(weights, parts))
        else:
            tensor = function(parts)
        replaced = math.fsum(
            w * entry.replaced
            for w, entry in zip(weights, found)
            if entry is not None
        )
        entries.append(first.with_tensor(tensor, replaced=replaced))
    first = signatures[0]
    return type(first)(
        entries,
        first.architecture,
        method=method,
        name=first.name if len(signatures) == 1 else None,
        model_class=first.model_class,
        fingerprints={
            key: value
            for key, value in first.fingerprints.items()
            if all(s.fingerprints.get(key) == value for s in signatures)
        },
    )


def map_weights(signature, function):
    """Return the signature with `function` of the list of its arrays.

    Statistics stay as they are.
    """
    weights = [entry for entry in signature if not entry.is_statistic]
    arrays = function([entry.dequantized("float64") for entry in weights])
    statistics = [entry for entry in signature if entry.is_statistic]
    return signature.with_entries(
        [entry.with_tensor(x) for entry, x in zip(weights, arrays)] + statistics
    )


def check_compatible(signatures):
    """Raise ValueError unless all signatures are of one architecture."""
    first = signatures[0]
    shapes = {e.position: e.info.shape for e in first}
    problems = []
    for number, other in enumerate(signatures[1:], start=2):
        argument = f"signature {number}"
        problems += architecture.architecture_problems(
            first.architecture, other.architecture, argument
        )
        for entry in other:
            shape = shapes.setdefault(entry.position, entry.info.shape)
            if shape != entry.info.shape:
                problems.append(
                    f"{argument}, {entry.key}: shape {entry.info.shape}, and "
                    f"{shape} is expected"
                )
    raise_all("The signatures do not match:", problems)


def cosine_similarity(first: Any, second: Any) -> Similarity:
    """Return the `Similarity` of two signatures."""
    check_compatible([first, second])
    lookups = [_by_position(signature) for signature in (first, second)]
    whole = np.zeros(3)
    layers = {}
    for group in architecture.layer_groups(first.architecture):
        products = np.zeros(3)
        taken = [p for p in group if p in lookups[0] or p in lookups[1]]
        for position in taken:
            pair = [lookup.get(position) for lookup in lookups]
            if any(entry is not None and entry.is_statistic for entry in pair):
                continue
            a, b = (
                np.zeros(1) if e is None else e.dequantized("float64").ravel()
                for e in pair
            )
            if None not in pair:
                products[0] += a @ b
            products[1:] += a @ a, b @ b
        if taken:
            info = first.architecture[group[0]]
            layer = info.path.rpartition("/")[0]
            layers[f"{info.position}:{layer}"] = _cosine(products)
            whole += products
    return Similarity(_cosine(whole), layers)


def trimmed(arrays, density):
    """The `density` of the weights that are largest; zero for the rest.

    TIES (arXiv 2306.01708), step 1, over all arrays of one signature together.
    Weights that are as large as the smallest one kept are kept as well.

    Args:
        arrays: List of arrays.
        density: Float in (0, 1].

    Returns:
        List of arrays.
    """
    magnitudes = np.concatenate([np.abs(x).reshape(-1) for x in arrays])
    kept = max(1, math.ceil(density * magnitudes.size))
    place = magnitudes.size - kept
    threshold = np.partition(magnitudes, place)[place]
    return [np.where(np.abs(x) >= threshold, x, 0.0) for x in arrays]


def elected_mean(arrays):
    """The mean of those entries that have the sign of their sum.

    TIES (arXiv 2306.01708), steps 2 and 3: zeros have no vote and do not
    count in the mean; zero where the votes cancel out.

    Args:
        arrays: List of arrays of one shape.

    Returns:
        A float64 array.
    """
    stacked = np.stack([np.asarray(x, "float64") for x in arrays])
    elected = np.sign(np.sum(stacked, axis=0))
    agree = (np.sign(stacked) == elected) & (stacked != 0)
    total = np.sum(np.where(agree, stacked, 0.0), axis=0)
    return total / np.maximum(1, np.sum(agree, axis=0))


def dropped(x, drop_rate, generator):
    """Drops entries at random and rescales the rest by `1 / (1 - rate)`.

    DARE (arXiv 2311.03099), equation 1: the expectation stays.

    Args:
        x: Array.
        drop_rate: Float in [0, 1).
        generator: A `numpy.random.Generator`.

    Returns:
        A float64 array.
    """
    keep = generator.random(x.shape) >= drop_rate
    return np.where(keep, np.asarray(x, "float64"), 0.0) / (1.0 - drop_rate)


def _by_position(signature):
    return {entry.position: entry for entry in signature}


def _cosine(products):
    norms = math.sqrt(products[1] * products[2])
    return float(products[0] / norms) if norms else 0.0
