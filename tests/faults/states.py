"""All that a call may change in models, optimizers, files and Keras."""

import pathlib
import threading
import time

import keras
import numpy as np

import keras_weightmods as kwm
from keras_weightmods.core import keras_compat
from keras_weightmods.core.reparameterization import slots


def state_of(objects, threads):
    """Return what models, optimizers and the folder are, as a flat dict.

    With the number of threads that are not among `threads`.
    """
    found = {
        f"file {path}": path.is_file() and path.read_bytes()
        for path in sorted(pathlib.Path().rglob("*"))
    }
    end = time.monotonic() + 1
    # One that ends is not left.
    while {*threading.enumerate()} - threads and time.monotonic() < end:
        time.sleep(0.01)
    found["threads"] = len({*threading.enumerate()} - threads)
    found["scopes of Keras"] = (
        keras.Variable(0.0, name="probe").path,
        keras_compat.in_stateless_scope(),
        keras_compat.get_autocast_scope(),
        keras.distribution.distribution(),
    )
    for number, each in enumerate(objects):
        own = {}
        if isinstance(each, keras.optimizers.Optimizer):
            own = optimizer_state(each)
        elif isinstance(each, keras.Model):
            own = model_state(each)
        found.update({f"{number} {key}": value for key, value in own.items()})
    return found


def model_state(model):
    """Return what a model is, as a flat dict."""
    on_torch = keras.backend.backend() == "torch"
    found = {}
    for number, layer in enumerate(keras_compat.layers_of(model)):
        own = vars(layer)
        functions = [own.get(f"{n}_function") for n in _FUNCTIONS]
        found[f"layer {number}"] = (
            layer.name,
            [(c.__module__, c.__name__) for c in type(layer).__mro__],
            sorted(own),
            layer._tracker.locked,
            layer.trainable,
            {a: type(item).__name__ for a, item in slots(layer).items()},
            [getattr(f, "__name__", f is None) for f in functions],
            [(v.path, v.name) for v in keras_compat.own_variables(layer)],
            {name: len(ids) for name, ids in layer._tracker.stored_ids.items()},
            getattr(layer, "lora_enabled", None),
            [(name, p.requires_grad) for name, p in layer.named_parameters()]
            if on_torch
            else (),
        )
    for number, variable in enumerate(model.variables):
        found[f"variable {number}"] = variable_state(variable)
    if on_torch:
        listed = set(map(id, model.parameters()))
        held = {id(v.value) for v in model.variables}
        found["not listed"] = len(held - listed), len(listed - held)
    found["compiled"] = getattr(model, "compiled", None)
    optimizer = getattr(model, "optimizer", None)
    found["optimizer"] = type(optimizer).__name__
    if optimizer is not None:
        found.update(optimizer_state(optimizer))
    patches = kwm.Patch.on(model) if isinstance(model, keras.Model) else {}
    found["patches"] = {n: each.scale for n, each in patches.items()}
    return found


_FUNCTIONS = "train", "test", "predict"


def optimizer_state(optimizer):
    found = {
        "optimizer attributes": (sorted(vars(optimizer)), optimizer.built),
        "optimizer locked": optimizer._tracker.locked,
    }
    for number, variable in enumerate(optimizer.variables):
        # Keras numbers the optimizers of a process in their paths.
        found[f"optimizer variable {number}"] = variable_state(variable)[1:]
    return found


def variable_state(variable):
    regularizer = variable.regularizer
    return (
        variable.path,
        variable.dtype,
        tuple(variable.shape),
        bool(variable.trainable),
        type(variable.constraint).__name__,
        getattr(regularizer, "__name__", type(regularizer).__name__),
        sorted(vars(variable)),
        np.asarray(keras.ops.convert_to_numpy(variable)).tobytes(),
    )


def differences(first, second):
    """Say what is different in two states."""
    rows = []
    for key in [*first, *(second.keys() - first.keys())]:
        pair = first.get(key), second.get(key)
        if pair[0] != pair[1]:
            parts = (x if isinstance(x, tuple) else (x,) for x in pair)
            texts = [
                f"{str(a)[:150]} -> {str(b)[:150]}"
                for a, b in zip(*parts)
                if a != b
            ]
            rows.append(f"{key}: {'; '.join(texts)}")
    return "\n    ".join(rows)
