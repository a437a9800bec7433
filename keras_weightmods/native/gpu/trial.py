"""Which product is faster on this GPU, cuSPARSELt's or the dense one.

Both are timed on the card, for a few numbers of rows, once in a process for
each shape and type. The environment variable KERAS_WEIGHTMODS_GPU=dense makes
every product dense: a card on which cuSPARSELt ends the process needs it.

Nothing here has been run on a GPU yet.
"""

import dataclasses
import functools
import os
import time
import warnings
from typing import Any

import numpy as np

VARIABLE = "KERAS_WEIGHTMODS_GPU"
ROWS = (1, 16, 64, 256, 1024, 4096)
# Types of activations, and what sizes must be a multiple of.
_MULTIPLES = {"bfloat16": 16, "float16": 16, "int8": 32}
_MARGIN = 0.95  # a smaller gain may be noise
_CACHE_BYTES = 200 * 2**20  # more than a GPU's cache
_CALLS = 10


@dataclasses.dataclass(frozen=True)
class Tried:
    """Microseconds of both products for a number of rows."""

    rows: int
    dense: float
    sparse: float

    @property
    def method(self):
        gains = self.sparse <= _MARGIN * self.dense
        return "cusparselt" if gains else "dense"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which product a kernel takes, for any number of rows.

    Args:
        tried: Tuple of `Tried`, in rising order of rows. The times stand for
            fewer rows too, down to the one before, and those of the last one
            for more.
        reason: String, why nothing was tried.
    """

    tried: tuple = ()
    reason: str = ""

    @functools.cached_property
    def companions(self):
        """What to make of the kernel: `"dense"`, `"cusparselt"` or both."""
        used = {tried.method for tried in self.tried} or {"dense"}
        return tuple(sorted(used, reverse=True))

    @functools.cached_property
    def is_sparse(self):
        """Whether cuSPARSELt is faster for any number of rows."""
        return "cusparselt" in self.companions

    def method(self, rows):
        """Return the product to take: `"dense"` or `"cusparselt"`."""
        tried = self._at(rows)
        return tried.method if tried else "dense"

    def why(self, rows):
        """Return which product is taken for a number of rows, and why."""
        tried = self._at(rows)
        if tried is None:
            return f"dense: {self.reason}"
        return (
            f"{tried.method}: with {tried.rows} rows cuSPARSELt took "
            f"{tried.sparse:.1f} us on this GPU, the dense product "
            f"{tried.dense:.1f} us"
        )

    def _at(self, rows):
        found = (tried for tried in self.tried if tried.rows >= rows)
        return next(found, self.tried[-1] if self.tried else None)


def reason_for_dense(shape, kind, value_dtype):
    """Return why cuSPARSELt is not tried; empty if it can be.

    Args:
        shape: Pair of ints (K, N).
        kind: String, type of the activations; `"int8"` for rounded ones.
        value_dtype: String, type of the packed values.
    """
    if os.environ.get(VARIABLE) == "dense":
        return f"the environment variable {VARIABLE} is 'dense'"
    if kind == "int8" and value_dtype != "int8":
        # A row of rounded activations has one scale, as a column must have.
        return "int8 activations are multiplied by int8 values alone"
    multiple = _MULTIPLES.get(kind)
    if multiple is None:
        return f"cuSPARSELt does not multiply {kind} activations"
    if 0 in shape or any(size % multiple for size in shape):
        return f"{shape} are not multiples of {multiple}"
    return ""


@dataclasses.dataclass(frozen=True)
class Product:
    """A product to time.

    Args:
        multiply: Callable, from an input and weights to the result.
        weights: List of the same weights, several times: a model's weights are
            not in the cache when a product begins.
    """

    multiply: Any
    weights: list


def trial(inputs, dense, sparse, seconds, rows):
    """Time both products for a few numbers of rows, and compare the results.

    cuSPARSELt's result may differ from the dense one, y, by 1/2 + |y| / 64:
    more than rounding to 16 bits does, and less than one wrong product of the
    sum. Where it differs by more, or anything is raised, a warning says so,
    and the kernel is multiplied dense.

    Args:
        inputs: Callable from a number of rows to an input.
        dense, sparse: `Product`s.
        seconds: Callable from a `Product` and an input to the time of one
            call, such as `seconds_by(wait)`.
        rows: Tuple of ints, in rising order.

    Returns:
        `Plan`.
    """
    tried = []
    try:
        for count in rows:
            x = inputs(count)
            y, expected = (p.multiply(x, p.weights[0]) for p in (sparse, dense))
            excess = abs(y - expected) - abs(expected) / 64
            worst = float(excess.max())
            if not worst <= 0.5:
                raise ArithmeticError(f"a result is off by {worst:g} too much")
            times = (1e6 * seconds(product, x) for product in (dense, sparse))
            tried.append(Tried(count, *times))
    except Exception as error:
        # Whatever it is: the dense product is there.
        reason = f"cuSPARSELt failed: {type(error).__name__}: {error}"
        warnings.warn(
            f"cuSPARSELt was tried on this GPU with {count} rows. {reason}. "
            "Kernels of this shape and type are multiplied dense in this "
            f"process. Set the environment variable {VARIABLE} to 'dense' to "
            "skip the trial."
        )
        return Plan((), reason)
    return Plan(tuple(tried))


def seconds_by(wait):
    """Return the clock of `trial`: the least of three rounds.

    Args:
        wait: Callable that waits until a result is there.
    """

    def seconds(product, x):
        own = product.weights
        calls = max(_CALLS, len(own))
        weights = [own[i % len(own)] for i in range(calls)]
        rounds = []
        for _ in range(4):
            began = time.perf_counter()
            for some in weights:
                y = product.multiply(x, some)
            wait(y)
            rounds.append((time.perf_counter() - began) / calls)
        return min(rounds[1:])

    return seconds


def copies(size):
    """Return how many weights of a size in bytes do not fit into the cache."""
    return min(max(2, -(-_CACHE_BYTES // max(size, 1))), 24)


def sample(rows, shape):
    """Return factors whose product is exact in float32, and small.

    Args:
        rows: Int.
        shape: Pair of ints (K, N).

    Returns:
        Float32 `x` (rows, K) of -1, 0 and 1, some of each in every row, int8
        `steps` (K, N), 2:4, and float32 scales (N,), powers of two.
    """
    rng = np.random.default_rng(0)
    k, n = shape
    x = rng.integers(-1, 2, (rows, k)).astype("float32")
    x[:, 0] = 1
    # Columns repeat: random numbers for all would take seconds.
    steps = rng.integers(1, 8, (k // 4, 4, 256)) * rng.choice([-1, 1], 256)
    # Of each four entries the two of the largest random numbers.
    steps *= rng.random(steps.shape).argsort(axis=1) >= 2
    columns = rng.integers(0, 256, n)
    steps = steps.reshape(k, 256).astype("int8")[:, columns]
    return x, steps, rng.choice([0.5, 1.0, 2.0], n).astype("float32")
