"""Find whether cuSPARSELt's product or the dense one is faster on this GPU.

Each process times both on the card once for each shape and type, at a few
numbers of rows. The environment variable KERAS_WEIGHTMODS_GPU=dense makes every
product dense, for cards on which cuSPARSELt ends the process.

Nothing here has been run on a GPU yet.
"""

import copy
import dataclasses
import functools
import os
import time
import warnings

import numpy as np

from keras_weightmods import native

VARIABLE = "KERAS_WEIGHTMODS_GPU"
ROWS = (1, 16, 64, 256, 1024, 4096)
# Sizes must be multiples of this, and rows are padded to one.
MULTIPLE = 16
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
    """The product that a kernel takes, for any number of rows.

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
        """The forms of the kernel to make: `"dense"`, `"cusparselt"`, both."""
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


def plan(shape, kind, reason_unavailable, attempt):
    """Return the `Plan` of a kernel.

    Args:
        shape: Pair of ints (K, N).
        kind: String, the type of what the kernel is multiplied by.
        reason_unavailable: Callable to a string, why cuSPARSELt cannot be used.
        attempt: Callable to the plan, by a `trial`.
    """
    if not (reason := reason_for_dense(shape, kind)):
        if not (reason := reason_unavailable()):
            return attempt()
        native.warn_dense(reason)
    return Plan((), reason)


def reason_for_dense(shape, kind):
    """Return why cuSPARSELt is not tried; empty if it can be."""
    if os.environ.get(VARIABLE) == "dense":
        return f"the environment variable {VARIABLE} is 'dense'"
    if kind not in ("bfloat16", "float16"):
        return f"cuSPARSELt does not multiply {kind} activations"
    if 0 in shape or any(size % MULTIPLE for size in shape):
        return f"{shape} are not multiples of {MULTIPLE}"
    return ""


def trial(x, dense, sparse, wait):
    """Time both products for a few numbers of rows, and compare the results.

    cuSPARSELt's result may differ from the dense one, y, by 1/2 + |y| / 64.
    This is more than rounding to 16 bits, and less than one wrong product in
    the sum. If it differs by more, or anything is raised, a warning says so,
    and the kernel is multiplied dense.

    Args:
        x: Tensor of an input, its first rows are tried.
        dense, sparse: Pairs of a callable, from an input and a weight to their
            product, and the weight.
        wait: Callable that waits until a result is there.

    Returns:
        `Plan`.
    """
    tried: list[Tried] = []
    count = 0
    try:
        # In a model, the weights are not in the cache when a product begins.
        copies = [
            [weight, *(copy.deepcopy(weight) for _ in range(_copies(weight)))]
            for _, weight in (dense, sparse)
        ]
        for count in ROWS:
            if count > len(x):
                break
            rows = x[:count]
            y, expected = (f(rows, weight) for f, weight in (sparse, dense))
            excess = abs(y - expected) - abs(expected) / 64
            worst = float(excess.max())
            if not worst <= 0.5:
                raise ArithmeticError(f"a result is off by {worst:g} too much")
            times = (
                1e6 * seconds(multiply, weights, rows, wait)
                for (multiply, _), weights in zip((dense, sparse), copies)
            )
            tried.append(Tried(count, *times))
    except Exception as error:
        # Any error will do: the dense product is there.
        reason = f"cuSPARSELt failed: {type(error).__name__}: {error}"
        warnings.warn(
            f"cuSPARSELt was tried on this GPU with {count} rows. {reason}. "
            "Kernels of this shape and type are multiplied dense in this "
            f"process. Set the environment variable {VARIABLE} to 'dense' to "
            "skip the trial."
        )
        return Plan((), reason)
    return Plan(tuple(tried))


def _copies(weight):
    """Return how many further copies of a weight exceed the cache with it."""
    return min(max(1, -(-_CACHE_BYTES // max(weight.nbytes, 1)) - 1), 23)


def seconds(multiply, weights, x, wait):
    """Return the time of one call of a product: the least of three rounds."""
    calls = max(_CALLS, len(weights))
    rounds = []
    for _ in range(4):
        began = time.perf_counter()
        for i in range(calls):
            y = multiply(x, weights[i % len(weights)])
        wait(y)
        rounds.append((time.perf_counter() - began) / calls)
    return min(rounds[1:])


def sample(rows, shape):
    """Return factors whose product is exact in float32, and small.

    Args:
        rows: Int.
        shape: Pair of ints (K, N).

    Returns:
        Float32 `x` (rows, K) of -1, 0 and 1, some of each in every row, and a
        float32 2:4 kernel (K, N).
    """
    rng = np.random.default_rng(0)
    k, n = shape
    x = rng.integers(-1, 2, (rows, k)).astype("float32")
    x[:, 0] = 1
    # Columns repeat: random numbers for all would take seconds.
    kernel = rng.integers(1, 8, (k // 4, 4, 256)) * rng.choice([-1, 1], 256)
    # Keep two entries of each four, chosen by random numbers.
    kernel *= rng.random(kernel.shape).argsort(axis=1) >= 2
    columns = rng.integers(0, 256, n)
    kernel = kernel.reshape(k, 256).astype("float32")[:, columns]
    return x, kernel * rng.choice([0.5, 1.0, 2.0], n).astype("float32")
