"""Several signatures made into one."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from keras_weightmods.patches import combine
from keras_weightmods.patches.weight_signature import WeightSignature
from keras_weightmods.utils import checks
from keras_weightmods.utils.progress import Progress


def sum_signatures(
    signatures: Sequence[WeightSignature],
    method: str = "sum",
    weights: Sequence[float] | None = None,
    *,
    density: float | None = None,
    drop_rate: float | None = None,
    seed: int = 0,
    verbose: int = 1,
) -> WeightSignature:
    """Make one signature of several of the same architecture.

    Where a signature has nothing for a weight that another one has, it counts
    as zero. Batch-norm statistics are always summed with the weights, or
    averaged where the method takes a mean; where their shares sum to more than
    1, the model gets their mean.

    Args:
        signatures: List of `WeightSignature`.
        method: String:
            `"sum"`: the sum of `weight * signature` (task arithmetic, arXiv
            2212.04089). `"mean"`: that divided by the sum of the weights; with
            equal weights what RWS (arXiv 2302.12480) does with several.
            `"ties"` (arXiv 2306.01708): each signature is trimmed to its
            largest entries, and of these each entry's weighted mean is taken
            over those that have the sign of their weighted sum: the sum of
            those is divided by the sum of their weights.
            `"dare"` (arXiv 2311.03099): of each signature entries are dropped
            at random and the others rescaled; then the sum.
        weights: List of floats, one for each signature; 0 or more for
            `"ties"`. Defaults to ones.
        density: Float in (0, 1], for `"ties"`: the share of entries that the
            trimming keeps, over all of a signature's weights together.
            Defaults to 0.2 there.
        drop_rate: Float in [0, 1), for `"dare"`: the share that is dropped.
            Defaults to 0.9 there.
        seed: Int, for `"dare"`.
        verbose: 0 or 1. 0 shows no progress bar; 1 shows one once it has
            taken two seconds. Defaults to `1`.

    Returns:
        A `WeightSignature` in float32.

    Raises:
        ValueError: If an argument is wrong or not for the method, or the
            signatures are not of one architecture; all mismatches are listed.

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
    is_list = isinstance(signatures, (list, tuple)) and len(signatures) > 0
    if not is_list or not all(
        isinstance(s, WeightSignature) for s in signatures
    ):
        expected = "a list of `WeightSignature`, of one at least"
        raise checks.error("signatures", expected, signatures)
    checks.check_choice("method", method, ("sum", "mean", "ties", "dare"))
    checks.check_verbose(verbose)
    count = len(signatures)
    weights = [1.0] * count if weights is None else weights
    is_list = isinstance(weights, (list, tuple, np.ndarray))
    if not is_list or getattr(weights, "ndim", 1) == 0 or len(weights) != count:
        raise checks.error("weights", f"a list of {count} numbers", weights)
    weights = [checks.check_float("weights", each) for each in weights]
    density = _of_method("density", density, method, "ties", 0.2)
    drop_rate = _of_method("drop_rate", drop_rate, method, "dare", 0.9)
    merge, options = _chosen(method, weights, density, drop_rate, seed)
    with Progress(1, "step", verbose):
        return merge(signatures, *options)


def _of_method(
    name: str, value: float | None, method: str, taker: str, default: float
) -> float:
    """Return an argument, which other methods would ignore, or its default."""
    if value is not None and method != taker:
        expected = f'None for method {method!r}: it is for "{taker}"'
        raise checks.error(name, expected, value)
    return default if value is None else value


def _chosen(
    method: str,
    weights: list[float],
    density: float,
    drop_rate: float,
    seed: int,
) -> tuple[Callable[..., WeightSignature], tuple[Any, ...]]:
    """Return a function of `combine`, and its arguments after the first."""
    if method == "sum":
        return combine.linear_combination, (weights, "sum")
    if method == "dare":
        drop_rate = checks.check_float("drop_rate", drop_rate, least=0, below=1)
        seed = checks.check_int("seed", seed, least=0)
        return combine.dare, (weights, drop_rate, seed)
    total = sum(weights)
    if total == 0:
        expected = f"numbers that do not sum to 0 for method {method!r}"
        raise checks.error("weights", expected, weights)
    if method == "mean":
        shares = [weight / total for weight in weights]
        return combine.linear_combination, (shares, "mean")
    density = checks.check_float("density", density, above=0, most=1)
    if min(weights) < 0:
        expected = (
            'numbers >= 0 for method "ties", which takes a mean; negate a '
            "signature, `-1 * signature`, to take it away"
        )
        raise checks.error("weights", expected, weights)
    return combine.ties, (weights, density)
