"""What `AdamS` does as it is built: it finds its targets, and warns."""

import warnings

import keras
import numpy as np
from keras import ops

from keras_weightmods.core import filters, keras_compat
from keras_weightmods.core.targets import (
    Target,
    Targets,
    find_targets,
    reason_not_nm,
)
from keras_weightmods.core.weight_keys import matching_places
from keras_weightmods.ops.matrix import contraction_size, to_matrix
from keras_weightmods.utils import checks


def check_targets(targets):
    """Return the argument `targets` of `AdamS` if it is one."""
    if isinstance(targets, str):
        filters.matcher("targets", targets)
        return targets
    if targets is None or isinstance(targets, (keras.layers.Layer, Targets)):
        return targets
    if isinstance(targets, (list, tuple)) and targets:
        for kind in (Target, dict):
            if all(isinstance(target, kind) for target in targets):
                return tuple(targets)
    raise checks.error(
        "targets",
        "a model, what `find_targets` returns, a regex or None. The other "
        "forms of `include` need the model: pass "
        "`targets=find_targets(model, include=...)`",
        targets,
    )


def find_axes(targets, variables, m):
    """Return the contraction axes of what is sparsified of `variables`.

    Args:
        targets: As `check_targets` returns it.
        variables: List of `keras.Variable`, those the optimizer is built on.
        m: Int, the size of a group.

    Returns:
        List with a tuple of ints or None for each of `variables`.

    Raises:
        ValueError: If the targets cannot be told or there are none.
    """
    if targets is None or isinstance(targets, str):
        axes = [_inferred(targets or "", variable) for variable in variables]
    elif isinstance(targets, tuple) and isinstance(targets[0], dict):
        axes = _restored(targets, variables)
    else:
        axes = _of_targets(targets, variables)
    unusable = []
    for place, variable in enumerate(variables):
        size = contraction_size(variable.shape, axes[place] or ())
        if axes[place] and (reason := reason_not_nm(size, m)):
            unusable.append(f"{variable.path}: {reason}")
            axes[place] = None
    if unusable:
        warnings.warn(
            f"AdamS leaves {len(unusable)} kernels dense: "
            f"{'; '.join(unusable[:5])}",
            stacklevel=3,
        )
    if not any(axes):
        raise ValueError(
            f"`AdamS` found no kernel to sparsify among the {len(variables)} "
            "variables it was built on. Pass `targets=model` or "
            "`targets=find_targets(model)`, or use Adam. "
            f"Received: targets={targets!r}"
        )
    return axes


def target_config(variable, axes, index=None):
    """Return what restores a target; `index` is its place, None if unknown."""
    return {
        "index": index,
        "path": variable.path,
        "shape": list(variable.shape),
        "contraction_axes": list(axes),
    }


def targets_config(targets):
    """Return `targets`, as `check_targets` returns it, ready to be saved."""
    if isinstance(targets, keras.layers.Layer):
        targets = find_targets(targets)
    if targets is None or isinstance(targets, str):
        return targets
    return [
        target
        if isinstance(target, dict)
        else target_config(target.variable, target.contraction_axes)
        for target in targets
    ]


def _inferred(pattern, variable):
    rank = len(variable.shape)
    is_kernel = variable.name == "kernel" and rank >= 2
    if not is_kernel or not filters.matcher("targets", pattern)(variable):
        return None
    if rank == 2:
        return (0,)
    raise ValueError(
        "`AdamS` without a model takes kernels of rank 2. Pass `targets=model` "
        "or `targets=find_targets(model, include=..., exclude=...)`. "
        f"Received: {variable.path!r} of shape {tuple(variable.shape)}"
    )


def _of_targets(targets, variables):
    if isinstance(targets, keras.layers.Layer):
        targets = find_targets(targets)
    by_id = {id(target.variable): target for target in targets}
    found = [by_id.pop(id(variable), None) for variable in variables]
    if by_id:
        missing = [target.path for target in by_id.values()]
        warnings.warn(
            f"AdamS leaves {len(missing)} targets as they are, because they "
            "are not among the variables it was built on (frozen, or of "
            f"another model): {missing[:5]}",
            stacklevel=4,
        )
    return [target and target.contraction_axes for target in found]


def _restored(configs, variables):
    axes = [None] * len(variables)
    found = [
        (_places(config, variables), tuple(config["contraction_axes"]))
        for config in configs
    ]
    for config, (places, own) in zip(configs, found):
        # Variables that cannot be told apart must all be targets.
        if not places or found.count((places, own)) != len(places):
            index = config["index"]
            where = "" if index is None else f", at position {index}"
            raise ValueError(
                f"The restored target {config['path']!r} of shape "
                f"{tuple(config['shape'])} must name exactly one of the "
                f"variables that `AdamS` is built on{where}. Received: "
                f"{len(places)} such variables. Build it on the model it was "
                "saved with, or pass new `targets`."
            )
        for place in places:
            axes[place] = own
    return axes


def _places(config, variables):
    """Where among `variables` the restored target may be."""
    index, shape = config["index"], tuple(config["shape"])
    if index is None:
        return matching_places(config["path"], shape, variables)
    # A path can change when a model is rebuilt, by the name of what it was
    # built in; its place and shape among the variables do not.
    fits = index < len(variables) and tuple(variables[index].shape) == shape
    return [index] if fits else []


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
