"""Files of companded and weight-normalized models."""

import keras
import numpy as np
import pytest

import keras_weightmods as kwm


def convolutional(layer=keras.layers.Dense, **kwargs):
    return keras.Sequential(
        [
            keras.Input((6, 6, 4)),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.DepthwiseConv2D(3),
            keras.layers.Flatten(),
            layer(3, **kwargs),
        ]
    )


def companded(**kwargs):
    model = convolutional()
    kwm.attach_compander(model, **kwargs)
    return model


def normalized():
    model = convolutional()
    kwm.attach_weight_norm(model)
    return model


def own_layers(**kwargs):
    return convolutional(kwm.CompanderDense, **kwargs)


def own_layers_and_attached():
    model = own_layers(learnable=False)
    targets = kwm.find_targets(model, include=keras.layers.Conv2D)
    kwm.attach_compander(model, targets=targets, function="erf")
    return model


CASES = {
    "learnable": companded,
    "fixed": lambda: companded(learnable=False, a=0.7, function="arsinh"),
    "raised": lambda: companded(a=0.002, b=0.002, learnable=False),
    "weight norm": normalized,
    "own": own_layers,
    "own, raised": lambda: own_layers(a=0.002, out_of_range="raise_a"),
    "own and attached": own_layers_and_attached,
}


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name, tmp_path):
    model = CASES[name]()
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 4)).astype("float32")
    model.compile("sgd", "mse")
    model.fit(x, np.ones((2, 3)), verbose=0)
    expected = keras.ops.convert_to_numpy(model(x))

    kwm.save_model(model, tmp_path / "model.kwm")
    loaded = kwm.load_model(tmp_path / "model.kwm")

    for old, new in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    found = keras.ops.convert_to_numpy(loaded(x))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    count = len(kwm.fold(model).kernels)
    assert len(kwm.fold(loaded).kernels) == count > 0
    for old, new in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_fold_leaves_packed_weights():
    model = keras.Sequential(
        [
            keras.Input((32,)),
            keras.layers.Dense(16, name="packed"),
            keras.layers.Dense(16, name="companded"),
        ]
    )
    packed = kwm.find_targets(model, include="packed")
    kwm.SemiStructuredSparse.attach(model, targets=packed)
    kwm.attach_compander(
        model, targets=kwm.find_targets(model, include="companded")
    )
    kwm.pack(model, targets=packed)
    assert len(kwm.fold(model).kernels) == 1
    assert len(kwm.unpack(model).weights) == 1
    assert not kwm.fold(model).kernels
