"""A mesh of JAX, and two devices of TensorFlow; more is in `make devices`."""

import os
import subprocess
import sys

import keras
import pytest

from keras_weightmods.ops.sparse_matmul import reason_for_dense

BACKEND = keras.backend.backend()
CHECKS = {
    "jax": ["mesh", "--checks", "products", "cast"],
    "tensorflow": ["mirrored", "lift"],
}


@pytest.mark.skipif(BACKEND == "torch", reason="in `make devices` alone")
@pytest.mark.skipif(reason_for_dense() != "", reason=reason_for_dense())
def test_devices_compute_what_one_computes():
    program, *checks = CHECKS[BACKEND]
    flags = "--xla_force_host_platform_device_count=8"
    subprocess.run(
        [sys.executable, "-m", f"tests.devices.{program}", *checks],
        env={**os.environ, "KERAS_BACKEND": BACKEND, "XLA_FLAGS": flags},
        check=True,
    )
