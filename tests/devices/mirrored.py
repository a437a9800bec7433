"""Training under `tf.distribute.MirroredStrategy`, on two devices.

    KERAS_BACKEND=tensorflow python -m tests.devices.mirrored

Each model is compiled in the scope and fitted outside of it; both devices must
hold the weights that one device ends with.
"""

import contextlib
import sys
import tempfile

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_weightmods as kwm
from tests.models import mlp, normal

X, Y = normal(16, 8), normal(16, 4, seed=1)
OPTIONS = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}


def main():
    names = sys.argv[1:] or [*CHECKS, "checkpoint"]
    strategy = tf.distribute.MirroredStrategy(two_devices())
    for name in names:
        if name == "checkpoint":
            checkpoint_is_refused(strategy)
            continue
        alone = fitted(CHECKS[name], contextlib.nullcontext).get_weights()
        model = fitted(CHECKS[name], strategy.scope)
        for weight, expected in zip(model.weights, alone, strict=True):
            first, second = (value.numpy() for value in weight.value.values)
            np.testing.assert_array_equal(first, second)
            np.testing.assert_allclose(first, expected, atol=1e-6)
        print(f"{name}: equal to one device", flush=True)


def two_devices():
    (cpu,) = tf.config.list_physical_devices("CPU")
    half = tf.config.LogicalDeviceConfiguration()
    tf.config.set_logical_device_configuration(cpu, [half, half])
    return ["CPU:0", "CPU:1"]


def fitted(make, scope):
    callbacks = []
    with scope():
        model = fit = mlp(8, 16, 4)
        optimizer = make(model, callbacks)
        if optimizer is None:
            fit = kwm.CAST(model)
        fit.compile(optimizer, "mse")
    fit.fit(X, Y, callbacks=callbacks, **OPTIONS)
    return model if fit is model else fit.finalize()


def adam_s(model, callbacks):
    return kwm.AdamS(0.01, total_steps=4, decay="relative", targets=model)


def sparse(model, callbacks):
    kwm.SemiStructuredSparse.attach(model)
    return "adam"


def lift(model, callbacks):
    masked(model, callbacks)
    return kwm.SparseAdamW(0.05)


def masked(model, callbacks):
    callbacks.append(kwm.PrincipalMaskCallback(0.25, None, 2, 2, seed=0))
    return keras.optimizers.Adam(0.01)


def companders(model, callbacks):
    kwm.attach_compander(model, learnable=True)
    return kwm.CompanderOptimizer(keras.optimizers.Adam(0.01))


def weight_norm(model, callbacks):
    kwm.attach_weight_norm(model)
    return "adam"


def cast(model, callbacks):
    """None: `CAST` has its own."""


def checkpoint_is_refused(strategy):
    def with_checkpoint(model, callbacks):
        callbacks.append(kwm.Checkpoint(folder))
        return "sgd"

    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(ValueError, match="BackupAndRestore"):
            fitted(with_checkpoint, strategy.scope)
    print("Checkpoint: refused")


FITS = adam_s, sparse, lift, masked, companders, weight_norm, cast
CHECKS = {fit.__name__: fit for fit in FITS}

if __name__ == "__main__":
    main()
