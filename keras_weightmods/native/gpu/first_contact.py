"""What guards the products by cuSPARSELt on a card that is new to them.

Before a plan counts on cuSPARSELt, one product of the kernel's shape and type
is tried: a matrix of small integers, so that the dense product is exact. Where
the two differ or something fails, the plan goes without cuSPARSELt for as long
as the process lives. A GPU whose error ends the process cannot be guarded so:
KERAS_WEIGHTMODS_GPU_TABLE=dense is for it.
"""

import dataclasses
import warnings
from typing import Any

import numpy as np

from keras_weightmods import native
from keras_weightmods.native.gpu import dispatch

_COLUMNS = 256  # that are made; the others are multiples of them
_MOST_ROWS = 512
_WAY_OUT = (
    f"Set the environment variable {dispatch.TABLE_VARIABLE} to "
    f"'{dispatch.DENSE}' for dense products alone, or to the path of a table "
    "that `make gpu` of the repository has measured on such a card, which it "
    "tests first."
)


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """A product whose result is known: x @ (steps[:, columns] * scale).

    Args:
        x: float32 array (rows, K) of -1, 0 and 1, some of each in every row.
        steps: int8 array (K, 256), 2:4, entries -7 to 7.
        columns: int32 array (N,), indices into the columns of `steps`.
        scale: float32 array (N,) of powers of two and their negatives.
        algorithm: Int, of cuSPARSELt's.
    """

    x: Any
    steps: Any
    columns: Any
    scale: Any
    algorithm: int

    @classmethod
    def of(cls, rows, shape, algorithm=-1):
        """Return the trial for a number of rows and a kernel's shape (K, N)."""
        rng = np.random.default_rng(0)
        k, n = shape
        x = rng.integers(-1, 2, (rows, k)).astype("float32")
        x[:, 0] = 1
        steps = rng.integers(1, 8, (k, _COLUMNS))
        steps *= rng.choice([-1, 1], steps.shape)
        # Of each four entries the two of the largest random numbers.
        order = rng.random((-(-k // 4), 4, _COLUMNS)).argsort(axis=1) >= 2
        steps *= order.reshape(-1, _COLUMNS)[:k]
        scale = rng.choice([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0], n)
        return cls(
            x,
            steps.astype("int8"),
            rng.integers(0, _COLUMNS, n).astype("int32"),
            scale.astype("float32"),
            algorithm,
        )


def trusted(plan, device, shape, kind, reason_unavailable, multiply):
    """Return a plan that counts on cuSPARSELt only where its product is right.

    It is right where each entry of a result differs from the dense one, y, by
    at most 1/2 + |y| / 64: more than rounding to 16 bits does, and less than
    one wrong product of the sum for most entries.

    Args:
        plan: `dispatch.Plan`.
        device: String, the GPU's name.
        shape: Pair of ints (K, N).
        kind: String, type of the activations, `"int8"` for rounded ones.
        reason_unavailable: Callable without arguments that returns why
            cuSPARSELt is not there; empty if it is.
        multiply: Callable that takes a `Trial`, and returns its product by
            cuSPARSELt and the dense one, as NumPy arrays.

    Returns:
        `dispatch.Plan`: the same, or without cuSPARSELt, after a warning.
    """
    if "cusparselt" not in plan.companions:
        return plan
    reason = reason_unavailable()
    if reason:
        native.warn_dense(reason)
        return plan.without("cusparselt", reason)
    first = next(m for m in plan.measured if m.best == "cusparselt")
    rows = max(16, min(first.rows, _MOST_ROWS) // 16 * 16)
    what = f"{rows} rows of {kind} times a kernel of shape {shape}"
    try:
        reason = _difference(*multiply(Trial.of(rows, shape, first.algorithm)))
    except Exception as error:
        # Whatever it is: the dense product is there.
        reason = f"{type(error).__name__}: {error}"
    if not reason:
        return plan
    warnings.warn(
        f"cuSPARSELt was tried on this {device} with {what}, and failed: "
        f"{reason}. Products with kernels of this shape and type are dense in "
        f"this process, which is correct. {_WAY_OUT}"
    )
    return plan.without("cusparselt", f"tried with {what}: {reason}")


def _difference(y, expected):
    """Return how a product differs; empty if it does not."""
    y, expected = y.astype("float64"), expected.astype("float64")
    if y.shape != expected.shape:
        return f"its shape is {y.shape} in the place of {expected.shape}"
    bound = 0.5 + np.abs(expected) / 64
    wrong = ~(np.abs(y - expected) <= bound)
    if not wrong.any():
        return ""
    worst = np.where(wrong, np.abs(y - expected) / bound, 0)
    place = np.unravel_index(np.nan_to_num(worst, nan=np.inf).argmax(), y.shape)
    return (
        f"{wrong.sum()} of {y.size} entries are off by more than 1/2 + |y| / "
        f"64; at {tuple(int(i) for i in place)} it is {y[place]:g} in the "
        f"place of {expected[place]:g}"
    )


_warned: list[str] = []


def warn_published(plan, device, shape, rows, kind):
    """Warn, once in a process, of a product that was never run on such a card.

    Args:
        plan, device, shape, kind: As of `trusted`.
        rows: Int, the rows of the activations.
    """
    if _warned or not plan.is_published:
        return
    _warned.append(device)
    warnings.warn(
        f"{rows} rows of {kind} are multiplied by a 2:4 kernel of shape "
        f"{shape} by cuSPARSELt, as published figures of such cards say that "
        "it is faster. The tests of keras_weightmods have not been run on a "
        f"{device}: one product of this shape was compared with the dense one, "
        f"and agreed. {_WAY_OUT}"
    )
