"""Training under `tf.distribute.MirroredStrategy`, on two devices."""

import os
import subprocess
import sys
import textwrap

import keras
import pytest

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="for TensorFlow"
)

SCRIPT = textwrap.dedent(
    """
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    half = tf.config.LogicalDeviceConfiguration()
    tf.config.set_logical_device_configuration(cpu, [half, half])

    import contextlib
    import keras
    import numpy as np
    import keras_weightmods as kwm
    from tests import models

    X, Y = models.normal(16, 8), models.normal(16, 4, seed=1)
    OPTIONS = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}

    def lift(scope, inside):
        with scope():
            model = models.mlp(8, 16, 4)
            model.compile(kwm.SparseAdamW(0.05), "mse")
        mask = kwm.PrincipalMaskCallback(0.25, None, 2, 2, seed=0)
        with inside():
            model.fit(X, Y, callbacks=[mask], **OPTIONS)
        return model

    def cast(scope, inside):
        with scope():
            cast = kwm.CAST(models.mlp(8, 16, 4))
            cast.compile(loss="mse")
        with inside():
            cast.fit(X, Y, **OPTIONS)
        model = cast.finalize()
        kwm.assert_sparse(model)
        return model

    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    outside = contextlib.nullcontext
    # Keras' own fit, which CAST's is, is tested outside of the scope alone.
    for train, places in (
        (lift, (outside, strategy.scope)),
        (cast, (outside,)),
    ):
        alone = train(outside, outside).get_weights()
        for inside in places:
            model = train(strategy.scope, inside)
            for weight, expected in zip(model.weights, alone):
                first, second = (v.numpy() for v in weight.value.values)
                np.testing.assert_array_equal(first, second)
                np.testing.assert_allclose(first, expected, atol=1e-6)
    print("all is well")
    """
)


def test_lift_and_cast_are_those_of_one_device():
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "KERAS_BACKEND": "tensorflow"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "all is well" in result.stdout, result.stderr[-3000:]
