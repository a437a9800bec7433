"""Files of models, written on one backend and loaded on another.

    python -m tests.saving.across FOLDER NAME ...

saves models of these families of the matrix to a folder, and loads those that
other backends have saved there. It prints a list of what went wrong, of JSON.
"""

import json
import pathlib
import sys

import keras
import numpy as np

import keras_weightmods as kwm
from tests import models
from tests.matrix.families import Family, families


def two_branches():
    """Return a model that calls a layer on a dict that is not in order.

    Keras lists the layers before it in another order on torch than elsewhere.
    """
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8,))
    parts = {
        key: keras.layers.Dense(8, name=key)(inputs)
        for key in ("value", "query")
    }
    return keras.Model(inputs, Weighed()(inputs=parts))


@keras.saving.register_keras_serializable("tests.saving")
class Weighed(keras.layers.Layer):
    """Has two inputs that are not alike, and places of the type "int"."""

    def build(self, input_shape):
        self.places = self.add_weight(
            (3,), "zeros", dtype="int", trainable=False, name="places"
        )

    def call(self, inputs):
        return inputs["value"] - 2 * inputs["query"]


OWN = {
    "two branches": Family("two branches", "own", two_branches),
    "gemma3": Family(
        "gemma3", "language", lambda: models.causal_lm("gemma3", num_layers=1)
    ),
}


def made(name):
    """Return a model, the same weights of which differ all, and inputs."""
    family = OWN.get(name) or families()[name]
    model = family.make()
    for i, variable in enumerate(model.weights):
        if "float" in variable.dtype:
            noise = 0.05 * models.normal(*variable.shape, seed=i)
            variable.assign(keras.ops.convert_to_numpy(variable) + noise)
    return model, family.inputs(model)


def save(folder, name):
    """Save a model, and its outputs."""
    model, x = made(name)
    path = pathlib.Path(folder, f"{name}.{keras.backend.backend()}")
    kwm.save_model(model, path, verbose=0)
    outputs = keras.tree.flatten(models.outputs(model, x))
    np.savez(f"{path}.npz", *outputs)


def load(path):
    """Load a model, and compare its outputs with those that were saved."""
    name = path.name.rpartition(".")[0]
    family = OWN.get(name) or families()[name]
    model = kwm.load_model(path, verbose=0)
    found = models.outputs(model, family.inputs(model))
    with np.load(f"{path}.npz") as saved:
        for y, key in zip(keras.tree.flatten(found), saved, strict=True):
            expected = saved[key].astype("float64")
            error = np.abs(y - expected).max(initial=0)
            size = max(1.0, np.abs(expected).max(initial=0))
            assert error <= 1e-3 * size, f"outputs differ by {error:.1g}"


def main(folder, *names):
    backend, wrong = keras.backend.backend(), []
    for name in names:
        paths = sorted(pathlib.Path(folder).glob(f"{name}.*[!z]"))
        for call, *arguments in (
            *((load, path) for path in paths),
            (save, folder, name),
        ):
            try:
                call(*arguments)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"[:500]
                wrong.append([name, backend, str(arguments[0]), reason])
    print(json.dumps(wrong))


if __name__ == "__main__":
    main(*sys.argv[1:])
