"""The build of `AdamS`: it finds the targets, and warns."""

import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.core import keras_compat
from keras_weightmods.core.targets import (
    Target,
    Targets,
    find_targets,
    reason_not_nm,
)
from keras_weightmods.core.weight_keys import matching_places
from keras_weightmods.utils import checks
from keras_weightmods.utils.matrix import contraction_size, to_matrix


def check_targets(targets):
    """Return the argument `targets` of `AdamS` if it is one."""
    if targets is None or isinstance(targets, (keras.layers.Layer, Targets)):
        return targets
    given = targets if isinstance(targets, (list, tuple)) else ()
    if set(map(type, given)) in ({Target}, {dict}):
        return tuple(targets)
    raise checks.error(
        "targets",
        "a model, what `find_targets` returns, or None. The forms of `include` "
        "need the model: pass `targets=find_targets(model, include=...)`",
        targets,
    )


def find_axes(targets, variables, m):
    """Return the contraction axes of those `variables` that are sparsified.

    Args:
        targets: As `check_targets` returns it.
        variables: List of `keras.Variable`, those the optimizer is built on.
        m: Int, the size of a group.

    Returns:
        List with a tuple of ints or None for each of `variables`.

    Raises:
        ValueError: If the targets cannot be told or there are none.
    """
    if targets is None:
        axes = _inferred(variables)
    elif isinstance(targets, tuple) and isinstance(targets[0], dict):
        axes = _restored(targets, variables)
    else:
        axes = _of_targets(targets, variables)
    unusable = []
    for place, variable in enumerate(variables):
        size = contraction_size(variable.shape, axes[place] or ())
        if axes[place] and size % m:
            unusable.append(f"{variable.path}: {reason_not_nm(size, m)}")
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
            f"Received: targets={checks.shown(targets)}"
        )
    return axes


def target_config(variable, axes, index=None):
    """Return the record that restores a target; `index` may be None."""
    return {
        "index": index,
        "path": variable.path,
        "shape": list(variable.shape),
        "contraction_axes": list(axes),
    }


def targets_config(targets):
    """Return `targets`, as `check_targets` returns it, ready to be saved."""
    if targets is None:
        return None
    return [
        each
        if isinstance(each, dict)
        else target_config(each.variable, each.contraction_axes)
        for each in _targets_of(targets)
    ]


def _targets_of(targets):
    is_layer = isinstance(targets, keras.layers.Layer)
    return find_targets(targets) if is_layer else targets


def _inferred(variables):
    kernels = [v for v in variables if v.name == "kernel" and len(v.shape) > 1]
    for variable in kernels:
        if len(variable.shape) > 2:
            raise ValueError(
                "`AdamS` without a model takes kernels of rank 2. Pass "
                "`targets=model` or `targets=find_targets(model, include=...)`."
                f" Received: {variable.path!r} of shape {variable.shape}"
            )
    ids = set(map(id, kernels))
    return [(0,) if id(variable) in ids else None for variable in variables]


def _of_targets(targets, variables):
    by_id = {id(each.variable): each for each in _targets_of(targets)}
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
    axes: list[Any] = [None] * len(variables)
    found = []
    for config in configs:
        index, shape = config["index"], tuple(config["shape"])
        # A path can change when a model is rebuilt elsewhere. Its place and
        # shape among the variables do not.
        places = matching_places(config["path"], shape, variables)
        if index is not None:
            fits = index < len(variables) and variables[index].shape == shape
            places = [index] if fits else []
        found.append((places, tuple(config["contraction_axes"])))
    for config, (places, own) in zip(configs, found):
        # Variables that cannot be told apart must all be targets.
        if not places or found.count((places, own)) != len(places):
            raise ValueError(
                "Each restored target must name one of the variables that "
                "`AdamS` is built on. Build it on the model it was saved with, "
                f"or pass new `targets`. Received: {config}, which fits "
                f"{len(places)} variables"
            )
        for place in places:
            axes[place] = own
    return axes


# The distance that masked weights need to travel, in units of their mean
# magnitude. Below about 3 the largest do not arrive.
_TRAVEL_NEEDED = 3.0


def warn_about_travel(optimizer, kernels):
    """Warn if the published pull cannot bring masked weights to zero."""
    total = optimizer.total_steps
    steps = np.unique(np.linspace(0, total - 1, 200).astype("int64"))
    rate = keras_compat.given_learning_rate(optimizer)
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        batches = optimizer.gradient_accumulation_steps or 1
        rates = [float(rate(int(step) * batches)) for step in steps]
    else:
        rates = [float(ops.convert_to_numpy(optimizer.learning_rate))]
    ramps = np.minimum(steps / (optimizer.ramp * total), 1.0)
    allowed = total * np.mean(np.array(rates) * ramps)
    masked = (_mean_masked(v, axes, optimizer) for v, axes in kernels)
    needed = _TRAVEL_NEEDED * max(masked)
    if allowed < needed:
        warnings.warn(
            "AdamS: this schedule is too short to reach zero. Over "
            f"{total} steps it lets a masked weight travel "
            f"sum(learning rate x ramp) = {allowed:.3g}, and the masked "
            f"weights need about {needed:.3g} ({_TRAVEL_NEEDED:g} times their "
            "mean magnitude). The prune at the end will then cost quality. "
            'Use decay="relative", which is scaled to arrive, or more steps, '
            "or a higher learning rate.",
            stacklevel=3,
        )


def _mean_masked(variable, axes, optimizer):
    """Mean |w| of the entries outside the mask, over a sample of columns."""
    n, m = optimizer.n, optimizer.m
    w = np.abs(ops.convert_to_numpy(to_matrix(variable, axes)))
    w = w[:, :: max(1, w.size // 2**18)].astype("float32")
    masked = np.sort(w.reshape(-1, m, w.shape[1]), axis=1)[:, : m - n]
    return float(masked.sum() / max(1, masked.size))
