"""Files of each kind, which each release writes once and all later ones read.

    KERAS_BACKEND=torch python -m tests.releases.files

writes those of this version to a folder of its name.
"""

import pathlib

import keras
import numpy as np

import keras_weightmods as kwm
from tests.models import normal, numpy, outputs

FOLDER = pathlib.Path(__file__).parent
X = normal(3, 32, seed=9)


def net(seed=0):
    """Return a model whose weights are the same on every backend."""
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((32,)),
            layers.Dense(16, activation="relu", name="hidden"),
            layers.Dense(8, name="head"),
        ],
        name="net",
    )
    model.set_weights(weights_of(seed))
    return model


def weights_of(seed):
    shapes = (32, 16), (16,), (16, 8), (8,)
    return [
        0.1 * normal(*shape, seed=10 * seed + i)
        for i, shape in enumerate(shapes)
    ]


def write(folder):
    """Write the files, and what is expected of them, to a folder."""
    folder.mkdir(exist_ok=True)
    expected = {}
    for name, dtype in (("int8", "int8"), ("int4", "int4"), ("float", None)):
        model = net()
        kwm.sparsify(model, "2:4", targets=[model.layers[0]], verbose=0)
        only = kwm.find_targets(model, include=[model.layers[0]])
        targets = only if dtype is None else None
        kwm.pack(model, dtype, targets=targets)
        kwm.save_model(model, folder / f"packed_{name}.safetensors")
        expected[f"packed_{name}"] = outputs(model, X)

    model = net()
    kwm.attach_scaling(model)
    for weight in model.weights:
        if weight.name.endswith("_scale"):
            weight.assign(np.exp(0.1 * normal(*weight.shape, seed=3)))
    kwm.save_model(model, folder / "scaled.safetensors")
    expected["scaled"] = outputs(model, X)

    signature = kwm.WeightSignature.extract(*map(net, (0, 1, 2)), depth=2)
    for bits in (None, 4):
        name = "signature" if bits is None else f"signature_{bits}"
        changed = signature if bits is None else signature.quantize(bits)
        changed.save(folder / f"{name}.safetensors")
        model = net(1)
        changed.apply(model)
        expected[name] = outputs(model, X)

    model = net(1)
    weights = model.get_weights()
    weights[0][::5] += 0.5
    model.set_weights(weights)
    path = folder / "delta.safetensors"
    patch = kwm.Patch.from_models(model, weights_of(1))
    patch.save(path)
    model = net(1)
    patch.apply(model)
    expected["delta"] = outputs(model, X)
    arrays = {key: numpy(value) for key, value in expected.items()}
    np.savez_compressed(folder / "outputs.npz", **arrays)


if __name__ == "__main__":
    write(FOLDER / kwm.__version__)
