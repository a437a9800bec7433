"""Rounding to integers, with the same bits everywhere.

int8 values are multiples of max |w| / 127 of the column. Integers of fewer bits
b, -2^(b-1) to 2^(b-1) - 1, have one scale for each column and group of 64 rows.
Let m be the largest |w| of the group. The candidates for the scale are m / q
for the q of `_candidates`, divided in float32 and rounded to bfloat16. The
first with the least sum of squared errors is taken. A kernel that already lies
on such a grid does not change.

For the same bits everywhere, values are divided by the scale in float32,
rounded to even, and clipped. Squares are summed in float64, one row after the
other. Candidates that are 0 or not finite are skipped. If none is left, the
values are 0, and the scale is NaN if m is not finite, else 1.
"""

from typing import Any

import ml_dtypes
import numpy as np
from keras import ops

from keras_weightmods.native.layout import (
    GROUP,
    INTEGERS,
    ROWS,
    bits_of,
    is_grouped,
)
from keras_weightmods.utils import checks

_CHUNK = 1 << 11  # groups that are rounded at a time, in a cache


def round_matrix(matrix: Any, dtype: str, group: int = GROUP) -> Any:
    """Round a matrix to integers.

    Args:
        matrix: float32 NumPy array of shape (K, N), K the contraction.
        dtype: String, `"int8"`, or `"int2"` to `"int6"`.
        group: Int, the rows that share a scale, but of int8. Defaults to 64.

    Returns:
        Pair of an int8 array (K, N), the values, and their scales: float32
        (1, N) with int8, else bfloat16 (ceil(K / group), N).
    """
    checks.check_choice("dtype", dtype, INTEGERS)
    if is_grouped(dtype):
        return _round_groups(matrix, group, bits_of(dtype))
    largest = np.abs(matrix).max(axis=0, initial=0)
    scale = np.where(np.isfinite(largest), largest / np.float32(127), np.nan)
    scale[scale == 0] = 1
    scale = scale.astype(np.float32)
    steps = np.nan_to_num(np.rint(matrix / scale))
    return np.clip(steps, -127, 127).astype(np.int8), scale[None]


def round_activations(x: Any) -> Any:
    """Round each row in blocks of 32 entries, as int8 activations are.

    A block becomes multiples, -127 to 127, of s = max |x| / 127. A block with
    NaN or infinity becomes NaN. Gradients pass as if nothing was rounded.

    Args:
        x: float32 tensor of shape (..., K).

    Returns:
        float32 tensor of the same shape.
    """
    size = x.shape[-1]
    leading, count = ops.shape(x)[:-1], -(-size // ROWS)
    pads = [(0, 0)] * len(leading) + [(0, count * ROWS - size)]
    blocks = ops.pad(ops.stop_gradient(x), pads)
    blocks = ops.reshape(blocks, (*leading, count, ROWS))
    scale = ops.max(ops.abs(blocks), axis=-1, keepdims=True) / 127
    scale = ops.where(ops.equal(scale, 0), ops.ones_like(scale), scale)
    rounded = ops.round(blocks / scale) * scale
    rounded = ops.reshape(rounded, (*leading, count * ROWS))[..., :size]
    return x + (rounded - ops.stop_gradient(x))


def _round_groups(matrix: Any, size: int, bits: int) -> Any:
    """Return steps, and a scale for each `size` rows of a column."""
    rows, columns = matrix.shape
    count = -(-rows // size)
    padded = np.pad(matrix, ((0, count * size - rows), (0, 0)))
    # Equal rows of all groups next to one another.
    apart = padded.reshape(count, size, columns).swapaxes(0, 1)
    groups = apart.reshape(size, count * columns)
    steps = np.empty(groups.shape, np.int8)
    scale = np.empty(groups.shape[1], ml_dtypes.bfloat16)
    for start in range(0, len(scale), _CHUNK):
        part = slice(start, start + _CHUNK)
        chosen = _round_group(np.ascontiguousarray(groups[:, part]), bits)
        steps[:, part], scale[part] = chosen
    together = steps.reshape(size, count, columns).swapaxes(0, 1)
    rounded = together.reshape(count * size, columns)[:rows]
    return rounded, scale.reshape(count, columns)


def _candidates(bits: int) -> tuple[float, ...]:
    """Return the ratios of the largest |w| to the scales that are tried.

    With a negative scale the largest can be -2^(bits - 1) times it.
    """
    high = 2 ** (bits - 1) - 1
    ends = high + 0.5, high + 1, high + 1.5, high + 2
    return *range(1, high + 1), *ends, *(-end for end in ends)


def _round_group(group: Any, bits: int) -> Any:
    """Return steps of rows with one scale for each column, and the scales."""
    largest = np.abs(group).max(axis=0, initial=0)
    best = np.full(largest.shape, np.inf)
    chosen = np.where(np.isfinite(largest), 1, np.nan).astype(np.float32)
    with np.errstate(all="ignore"):
        for step in _candidates(bits):
            scale = (largest / np.float32(step)).astype(ml_dtypes.bfloat16)
            scale = scale.astype(np.float32)
            left = _steps(group, scale, bits).astype(np.float64)
            left *= scale
            np.subtract(group, left, out=left)
            left *= left
            error = left[0]
            for row in left[1:]:
                error += row
            usable = np.isfinite(scale) & (scale != 0) & (error < best)
            best = np.where(usable, error, best)
            chosen = np.where(usable, scale, chosen)
        steps = _steps(group, chosen, bits)
        steps = np.where(np.isfinite(best), steps, 0)
    return steps.astype(np.int8), chosen.astype(ml_dtypes.bfloat16)


def _steps(values: Any, scale: Any, bits: int) -> Any:
    size = 2 ** (bits - 1)
    return np.clip(np.rint(values / scale), -size, size - 1)
