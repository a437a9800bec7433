"""Several signatures made into one."""

import numbers

import numpy as np

from keras_weightmods.patches import tensors
from keras_weightmods.patches.weight_signature import (
    WeightSignature,
    check_number,
    combined,
    linear_combination,
    map_weights,
)

_METHODS = ("sum", "mean", "ties", "dare")


def sum_signatures(
    signatures,
    method="sum",
    weights=None,
    *,
    density=0.2,
    drop_rate=0.9,
    seed=0,
):
    """Makes one signature of several of the same architecture.

    Where a signature has nothing for a weight that another one has, it counts
    as zero. Batch-norm statistics are always summed with the weights, or
    averaged where the method takes a mean.

    Args:
        signatures: List of `WeightSignature`.
        method: String:
            `"sum"`: the sum of `weight * signature` (task arithmetic, arXiv
            2212.04089). `"mean"`: that divided by the sum of the weights; with
            equal weights what RWS (arXiv 2302.12480) does with several.
            `"ties"` (arXiv 2306.01708): each signature times its weight is
            trimmed to its largest entries, and of these each entry's mean is
            taken over those that have the sign of their sum.
            `"dare"` (arXiv 2311.03099): of each signature entries are dropped
            at random and the others rescaled; then the sum.
        weights: List of floats, one for each signature. Defaults to ones.
        density: Float in (0, 1], for `"ties"`: the share of entries that the
            trimming keeps, over all of a signature's weights together.
        drop_rate: Float in [0, 1), for `"dare"`: the share that is dropped.
        seed: Int, for `"dare"`.

    Returns:
        A `WeightSignature` in float32.

    Raises:
        ValueError: If an argument is wrong or the signatures are not of one
            architecture; all mismatches are listed.

    Example:

    ```python
    import numpy as np
    from keras_weightmods import WeightSignature, sum_signatures

    rng = np.random.default_rng(0)
    clean, noise, blur = (
        [rng.normal(size=(3, 2)), rng.normal(size=2)] for _ in range(3)
    )
    signatures = [
        WeightSignature.extract(
            None, clean, robust, depth=1, like=["dense/kernel", "dense/bias"]
        )
        for robust in (noise, blur)
    ]
    both = sum_signatures(signatures, method="ties", density=0.5)
    ```
    """
    if (
        not isinstance(signatures, (list, tuple))
        or not signatures
        or not all(isinstance(each, WeightSignature) for each in signatures)
    ):
        raise ValueError(
            "`signatures` must be a list of `WeightSignature`, of one at "
            f"least. Received: signatures={signatures!r}"
        )
    if method not in _METHODS:
        raise ValueError(
            f"`method` must be one of {list(_METHODS)}. Received: "
            f"method={method!r}"
        )
    signatures = list(signatures)
    weights = _checked_weights(signatures, weights)
    if method == "sum":
        return linear_combination(signatures, weights, "sum")
    total = sum(weights)
    if method in ("mean", "ties") and total == 0:
        raise ValueError(
            f"The `weights` of method {method!r} must not sum to 0. Received: "
            f"weights={weights}"
        )
    shares = [weight / total for weight in weights] if total else weights
    if method == "mean":
        return linear_combination(signatures, shares, "mean")
    if method == "ties":
        _check_share("density", density, lambda x: 0 < x <= 1, "(0, 1]")
        trimmed = [
            map_weights(
                signature * weight, lambda xs: tensors.trimmed(xs, density)
            )
            for signature, weight in zip(signatures, weights)
        ]
        # The trimmed ones carry their weights; statistics carry them too.
        summed = [1 / total] * len(trimmed)
        return combined(trimmed, tensors.elected_mean, summed, "ties")
    _check_share("drop_rate", drop_rate, lambda x: 0 <= x < 1, "[0, 1)")
    if not isinstance(seed, numbers.Integral) or isinstance(seed, bool):
        raise ValueError(f"`seed` must be an int. Received: seed={seed!r}")
    generator = np.random.default_rng(int(seed))
    thinned = [
        map_weights(
            signature,
            lambda xs: [tensors.dropped(x, drop_rate, generator) for x in xs],
        )
        for signature in signatures
    ]
    return linear_combination(thinned, weights, "dare")


def _checked_weights(signatures, weights):
    if weights is None:
        return [1.0] * len(signatures)
    if not isinstance(weights, (list, tuple, np.ndarray)) or len(
        weights
    ) != len(signatures):
        raise ValueError(
            f"`weights` must hold one number for each of the "
            f"{len(signatures)} signatures. Received: weights={weights!r}"
        )
    for weight in weights:
        check_number("weights", weight)
    return [float(weight) for weight in weights]


def _check_share(name, value, is_valid, interval):
    check_number(name, value)
    if not is_valid(value):
        raise ValueError(
            f"`{name}` must lie in {interval}. Received: {name}={value!r}"
        )
