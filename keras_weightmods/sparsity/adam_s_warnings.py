"""Warnings of `AdamS` before the first step: what will not reach zero."""

import warnings

import keras
import numpy as np
from keras import ops

from keras_weightmods.core import keras_compat
from keras_weightmods.ops.matrix import to_matrix

# Travel that masked weights need, in units of their mean magnitude: below
# about 3 the largest of them do not arrive.
_TRAVEL_NEEDED = 3.0


def warn_about_low_precision(kernels):
    """Warn of kernels, pairs (variable, axes), that are stored in 16 bits."""
    low = [v.path for v, _ in kernels if v.dtype in ("bfloat16", "float16")]
    if low:
        warnings.warn(
            f"AdamS: {len(low)} kernels are stored in 16 bits, which rounds "
            "the pull to zero away as weights get small: "
            f"{low[:3]}. Keep the variables in float32 and compute in 16 "
            'bits: load the model with dtype="mixed_bfloat16".',
            stacklevel=3,
        )


def warn_about_travel(optimizer, kernels):
    """Warn if the published pull cannot bring masked weights to zero."""
    if _is_tracing():
        return
    allowed = _travel_allowed(optimizer)
    masked = (_mean_masked(v, axes, optimizer) for v, axes in kernels)
    needed = _TRAVEL_NEEDED * max(masked)
    if allowed < needed:
        warnings.warn(
            "AdamS: this schedule is too short to reach zero. Over "
            f"{optimizer.total_steps} steps it lets a masked weight travel "
            f"sum(learning rate x ramp) = {allowed:.3g}, and the masked "
            f"weights need about {needed:.3g} ({_TRAVEL_NEEDED:g} times their "
            "mean magnitude). The prune at the end will then cost quality. "
            'Use decay="relative", which is scaled to arrive, or more steps, '
            "or a higher learning rate.",
            stacklevel=3,
        )


def _travel_allowed(optimizer):
    """Integrate lr * a over the run, by the trapezoid rule."""
    total = optimizer.total_steps
    steps = np.unique(np.linspace(0, total - 1, 200).round().astype("int64"))
    batches = optimizer.gradient_accumulation_steps or 1
    schedule = keras_compat.given_learning_rate(optimizer)
    if isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
        rates = [schedule(int(step) * batches) for step in steps]
    else:
        rates = [optimizer.learning_rate] * len(steps)
    floats = [float(ops.convert_to_numpy(rate)) for rate in rates]
    ramps = np.minimum(steps / (optimizer.ramp * total), 1.0)
    heights = np.array(floats) * ramps
    means = (heights[1:] + heights[:-1]) / 2
    return float(np.sum(means * np.diff(steps)))


def _mean_masked(variable, axes, optimizer):
    """Mean |w| of the entries outside the mask, over a sample of columns."""
    n, m = optimizer.n, optimizer.m
    w = np.abs(ops.convert_to_numpy(to_matrix(variable, axes)))
    w = w[:, :: max(1, w.size // 2**18)].astype("float32")
    groups = np.sort(w.reshape(w.shape[0] // m, m, w.shape[1]), axis=1)
    return float(groups[:, : m - n].mean()) if m > n else 0.0


def _is_tracing():
    """Whether values cannot be read now, while a graph is traced."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.executing_eagerly()
