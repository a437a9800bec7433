"""Which variables of an optimizer `AdamS` sparsifies, saved ones included."""

import contextlib
import re
import warnings

import keras

from keras_weightmods.core.targets import (
    Target,
    Targets,
    find_targets,
    reason_not_nm,
)
from keras_weightmods.core.weight_keys import matching_places
from keras_weightmods.ops.matrix import contraction_size
from keras_weightmods.utils import checks


def check_targets(targets):
    """Return the argument `targets` of `AdamS` if it is one."""
    if isinstance(targets, str):
        with contextlib.suppress(re.error):
            return re.compile(targets).pattern
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
    if not is_kernel or not re.search(pattern, variable.path):
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
