"""A mesh of 8 devices; more, and other backends, are in `make devices`."""

import os
import subprocess
import sys

import keras
import pytest

from keras_weightmods.ops.sparse_matmul import reason_for_dense

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="for JAX"
)


@pytest.mark.skipif(reason_for_dense() != "", reason=reason_for_dense())
def test_a_device_holds_its_share_and_computes_the_same():
    command = [sys.executable, "-m", "tests.devices.mesh"]
    flags = "--xla_force_host_platform_device_count=8"
    subprocess.run(
        [*command, "--checks", "products", "lift", "cast"],
        env={**os.environ, "KERAS_BACKEND": "jax", "XLA_FLAGS": flags},
        check=True,
    )
