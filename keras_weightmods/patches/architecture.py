"""Which weights a model has: their layers, depths and roles."""

from typing import Any

import numpy as np

from keras_weightmods.core import keras_compat
from keras_weightmods.core.execution_order import execution_order
from keras_weightmods.core.reparameterization import reparameterizations
from keras_weightmods.core.weight_keys import same_path
from keras_weightmods.patches.checkpoint import FLOATS

# Of Normalization, which `adapt` fills. Never touched.
_ADAPTED = ("mean", "variance", "count")
# What training changes, "recurrent_kernel" too, whatever is frozen now.
_TRAINED = ("kernel", "bias", "gamma", "beta", "embeddings")


def owners(model):
    """Return {id of variable: layer that holds it}, the first one if shared."""
    found: dict[int, Any] = {}
    for layer in keras_compat.layers_of(model):
        # Not `layer.weights`, which counts those of inner layers in.
        for variable in keras_compat.own_variables(layer):
            found.setdefault(id(variable), layer)
    return found


def roles(checkpoint, frozen=False):
    """Return for each weight `"weight"`, `"statistic"` or `"other"`.

    Statistics are those of batch normalization. Other is what is not trained:
    no floats, the state of Normalization, and whatever is not trainable in a
    layer that is; with `frozen` this leaves kernels and the like out, which
    training changes when they are not frozen.

    Args:
        checkpoint: `Checkpoint` of a model.
        frozen: Bool.
    """
    layers = owners(checkpoint.model)
    found = []
    for info, variable in zip(checkpoint.infos, checkpoint.variables):
        role = "weight"
        # Estimates from data, not trained.
        if info.is_statistic:
            role = "statistic"
        elif info.dtype not in FLOATS or info.name in _ADAPTED:
            role = "other"
        elif not (frozen and info.name.endswith(_TRAINED)):
            layer_trains = getattr(layers.get(id(variable)), "trainable", True)
            if layer_trains and not variable.trainable:
                role = "other"
        found.append(role)
    return found


def depths(checkpoint, roles):
    """Return for each weight its depth: the place of its layer, from 0.

    What counts are the layers with a kernel, a weight of two axes or more, in
    the order of execution. A layer without one, such as a normalization, has
    the depth of the layer with a kernel that runs before it.
    """
    holders = owners(checkpoint.model)
    groups: dict[Any, list[int]] = {}
    for info, variable in zip(checkpoint.infos, checkpoint.variables):
        groups.setdefault(holders[id(variable)], []).append(info.position)
    order = execution_order(checkpoint.model, list(groups))
    found, depth = [0] * len(roles), -1
    # Sorting is stable: what never runs comes last, as declared.
    for layer in sorted(groups, key=lambda x: order.get(id(x), len(order))):
        depth += any(
            roles[i] == "weight" and len(checkpoint.infos[i].shape) > 1
            for i in groups[layer]
        )
        for i in groups[layer]:
            found[i] = max(depth, 0)
    return found


def problems(expected, infos, argument, changed=()) -> list[str]:
    """Return what keeps `infos` from being of the architecture `expected`.

    Compares count, order, names and numbers of axes. Sizes may differ, as
    those of heads do, except for the weights that are changed.

    Args:
        expected, infos: Sequences of `WeightInfo`.
        argument: String, what `infos` are in messages.
        changed: Sequence of `WeightInfo`, those of `expected` that must have
            their shapes, and be floats.

    Returns:
        List of strings, empty if nothing is wrong.
    """
    if len(expected) != len(infos):
        return [
            f"{argument} has {len(infos)} weights, and {len(expected)} are "
            "expected: another architecture"
        ]
    named = all(info.path for info in (*expected, *infos))
    positions = {info.position for info in changed}
    wrong = []
    for a, b in zip(expected, infos):
        is_changed = a.position in positions
        if named and not same_path(a.path, b.path):
            wrong.append(
                f"{argument}, weight {a.position}: {b.path!r}, and {a.path!r} "
                "is expected"
            )
        if a.shape != b.shape and is_changed:
            wrong.append(
                f"{argument}, {a.key}: shape {b.shape}, and {a.shape} is "
                "expected"
            )
        elif len(a.shape) != len(b.shape):
            wrong.append(
                f"{argument}, {a.key}: shape {b.shape}, and {len(a.shape)} "
                "axes are expected"
            )
        if is_changed and b.dtype not in FLOATS:
            wrong.append(
                f"{argument}, {a.key}: dtype {b.dtype}, and one of "
                f"{', '.join(FLOATS)} is expected"
            )
    return wrong


def reparameterized(checkpoint) -> dict[str, str]:
    """Return {position: how} of the variables that stand for other weights.

    As those of fixed companders do. What has parameters among the weights is
    left out: these tell already. Of a list nothing is known.
    """
    if checkpoint.model is None:
        return {}
    positions = {id(v): i for i, v in enumerate(checkpoint.variables)}
    found = {}
    for item in reparameterizations(checkpoint.model):
        position = positions.get(id(item.target.variable))
        if item.parameters or position is None:
            continue
        saved = item.saved().items()
        fixed = [f"{key} = {np.ravel(value).tolist()}" for key, value in saved]
        name = item.name or type(item).__name__
        found[str(position)] = f"{name} ({', '.join(fixed)})"
    return found


def reparameterization_problems(expected, checkpoint, infos) -> list[str]:
    """Return what keeps a change of reparameterized weights from fitting.

    Args:
        expected: Dict, what `reparameterized` returned for the change.
        checkpoint: `Checkpoint`; for a list there are no problems.
        infos: Sequence of `WeightInfo` of the weights that are changed.
    """
    if checkpoint.model is None:
        return []
    found, argument = reparameterized(checkpoint), f"`{checkpoint.argument}`"
    return [
        f"{argument}, {info.key}: {found.get(at, 'a plain weight')}, and "
        f"{expected.get(at, 'a plain weight')} is expected. "
        + (
            f"Fold {argument} first"
            if at in found
            else f"Attach the same to {argument}, or fold the other first"
        )
        for at, info in ((str(i.position), i) for i in infos)
        if found.get(at) != expected.get(at)
    ]
