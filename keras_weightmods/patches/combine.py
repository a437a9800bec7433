"""The arithmetic of signatures: sums, TIES, DARE, similarity."""

import math
from typing import Any

import numpy as np

from keras_weightmods.patches.checkpoint import mismatches
from keras_weightmods.utils import checks

# The default shares of entries that methods keep, from the papers.
_DENSITY = {"ties": 0.2, "dare": 0.1}


def summed(signatures, method, weights, density, seed):
    """Return one signature of several; see `WeightSignature.sum`."""
    checks.check_choice("method", method, ("sum", "mean", *_DENSITY))
    count = len(signatures)
    weights = [1.0] * count if weights is None else weights
    checks.check_list("weights", weights, count, "numbers")
    weights = [checks.check_float("weights", each) for each in weights]
    if density is None:
        density = _DENSITY.get(method, 1.0)
    elif method not in _DENSITY:
        expected = f'None for method {method!r}: it is for "ties" and "dare"'
        raise checks.error("density", expected, density)
    density = checks.check_float("density", density, above=0, most=1)
    generator = np.random.default_rng(checks.check_int("seed", seed, least=0))
    shares = weights
    if method in ("mean", "ties"):
        total = sum(weights)
        if total == 0:
            expected = f"numbers that do not sum to 0 for method {method!r}"
            raise checks.error("weights", expected, weights)
        shares = [weight / total for weight in weights]
    if method == "ties":
        if min(weights) < 0:
            expected = (
                'numbers >= 0 for method "ties", which takes a mean; negate a '
                "signature, `-1 * signature`, to take it away"
            )
            raise checks.error("weights", expected, weights)
        signatures = [
            _map_weights(each, lambda arrays: trimmed(arrays, density))
            for each in signatures
        ]
    elif method == "dare":
        signatures = [
            _map_weights(
                each,
                lambda arrays: [dropped(x, density, generator) for x in arrays],
            )
            for each in signatures
        ]
    entries = []
    for found in _aligned(signatures):
        arrays = [entry.dequantized("float64") for entry in found]
        if method == "ties" and not found[0].info.is_statistic:
            tensor = elected_mean(arrays, weights)
        else:
            tensor = weighted_sum(arrays, shares)
        replaced = math.fsum(w * e.replaced for w, e in zip(shares, found))
        entries.append(found[0].with_tensor(tensor, replaced=replaced))
    only = signatures[0].name if count == 1 else None
    return signatures[0].with_entries(entries, method=method, name=only)


def cosine_similarity(first: Any, second: Any) -> float:
    """Return the cosine of two signatures, 0 where one is zero."""
    ab = aa = bb = 0.0
    for pair in _aligned([first, second]):
        if not pair[0].info.is_statistic:
            a, b = (entry.dequantized("float64").ravel() for entry in pair)
            ab, aa, bb = ab + a @ b, aa + a @ a, bb + b @ b
    norm = math.sqrt(aa * bb)
    return float(ab / norm) if norm else 0.0


def elected_mean(arrays: list[np.ndarray], weights: Any) -> np.ndarray:
    """Return the mean of the entries that have the sign of their sum.

    This is TIES (arXiv 2306.01708), steps 2 and 3. Zeros have no vote and do
    not count in the mean. The result is zero where the votes cancel out. The
    vote is that of `weight * entry`, and the sum of those that agree is divided
    by the sum of their weights.

    Args:
        arrays: List of arrays of one shape and floating dtype.
        weights: List of floats, 0 or more.
    """
    votes = weighted_sum(arrays, weights)
    rises, falls = votes > 0, votes < 0
    total, divisor = np.zeros_like(votes), np.zeros_like(votes)
    for x, weight in zip(arrays, weights):
        # Ten times as fast as `np.where`, and NaN stays NaN.
        share = ((x > 0) & rises | (x < 0) & falls).astype(x.dtype)
        share *= x.dtype.type(weight)
        divisor += share
        share *= x
        total += share
    # If none agree, the total is 0 too.
    divisor += divisor == 0
    total /= divisor
    return total


def dropped(
    x: np.ndarray, density: float, generator: np.random.Generator
) -> np.ndarray:
    """Keep a random share of the entries, divided by the share.

    DARE (arXiv 2311.03099), equation 1: the expectation stays.

    Args:
        x: Array of a floating dtype.
        density: Float in (0, 1], the share.
        generator: A `numpy.random.Generator`.
    """
    keep = generator.random(x.shape) >= 1 - density
    # Five times as fast as `np.where`.
    return x * keep / x.dtype.type(density)


def weighted_sum(arrays: list[np.ndarray], weights: Any) -> np.ndarray:
    """Return the sum of arrays times their weights, in their dtype."""
    total = arrays[0] * arrays[0].dtype.type(weights[0])
    for x, weight in zip(arrays[1:], weights[1:]):
        total += x * x.dtype.type(weight)
    return total


def trimmed(arrays, density):
    """Keep the share `density` of the largest weights, and zero the others.

    TIES (arXiv 2306.01708), step 1, over all arrays of one signature together.
    Weights as large as the smallest one kept are kept too.

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


def _map_weights(signature, function):
    """Return the signature with `function` of the list of its arrays.

    Statistics stay as they are.
    """
    weights = [entry for entry in signature if not entry.info.is_statistic]
    arrays = function([entry.dequantized("float64") for entry in weights])
    statistics = [entry for entry in signature if entry.info.is_statistic]
    changed = [entry.with_tensor(x) for entry, x in zip(weights, arrays)]
    return signature.with_entries(changed + statistics)


def _aligned(signatures):
    """Return the entries of each weight, zero if a signature has none.

    Raises:
        ValueError: If the signatures are not of one architecture.
    """
    lookups = [{entry.position: entry for entry in s} for s in signatures]
    positions = sorted(set().union(*lookups))
    problems = [
        problem
        for number, other in enumerate(signatures[1:], start=2)
        for problem in mismatches(
            signatures[0].architecture,
            other.architecture,
            f"signature {number}",
            positions,
        )
    ]
    checks.raise_all("The signatures do not match:", problems)
    aligned = []
    for position in positions:
        found = [lookup.get(position) for lookup in lookups]
        present = next(entry for entry in found if entry is not None)
        zero = present.with_tensor(np.zeros(present.info.shape), replaced=0.0)
        aligned.append([entry or zero for entry in found])
    return aligned
