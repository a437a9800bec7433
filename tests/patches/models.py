"""The models and signatures that the tests here share."""

import keras
import numpy as np
from keras import ops

from keras_weightmods import WeightSignature


def make_model(classes=3, dtype="float32", name=None):
    """Four layers with a kernel, and a normalization after the first two."""
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            keras.layers.Conv2D(2, 3, dtype=dtype),
            keras.layers.BatchNormalization(dtype=dtype),
            keras.layers.Conv2D(3, 3, dtype=dtype),
            keras.layers.BatchNormalization(dtype=dtype),
            keras.layers.Flatten(),
            keras.layers.Dense(4, dtype=dtype),
            keras.layers.Dense(classes, dtype=dtype),
        ],
        name=name,
    )


PATHS = [
    f"{layer}/{name}"
    for layer, names in {
        "conv": ("kernel", "bias"),
        "norm": ("gamma", "beta", "moving_mean", "moving_variance"),
        "conv_b": ("kernel", "bias"),
        "norm_b": ("gamma", "beta", "moving_mean", "moving_variance"),
        "dense": ("kernel", "bias"),
        "head": ("kernel", "bias"),
    }.items()
    for name in names
]
CONV, CONV_B, DENSE, HEAD = 0, 6, 12, 14
STATISTICS = (4, 5, 10, 11)


def make_weights(model, seed):
    """Random weights for `model`, with variances above zero."""
    rng = np.random.default_rng(seed)
    return [
        np.asarray(
            np.abs(value) + 0.1
            if variable.path.endswith("variance")
            else value,
            dtype=variable_dtype(variable),
        )
        for variable in model.weights
        for value in [rng.normal(size=variable.shape)]
    ]


def variable_dtype(variable):
    return ops.convert_to_numpy(variable.value).dtype


def weights_of(model):
    """Copies: what JAX returns may be a view of the variable."""
    return [np.array(w) for w in model.get_weights()]


def make_signature(model, seed=1, **kwargs):
    """A signature from random checkpoints; depth 2 by default."""
    if "targets" not in kwargs:
        kwargs.setdefault("depth", 2)
    init, clean, robust = (
        make_weights(model, 100 * seed + i) for i in range(3)
    )
    return WeightSignature.extract(init, clean, robust, like=model, **kwargs)


def assert_same_bits(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert x.tobytes() == y.tobytes()
