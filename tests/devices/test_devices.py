"""A mesh of JAX, and two devices of TensorFlow; more is in `make devices`."""

import keras
import pytest

from keras_weightmods.ops.sparse_matmul import reason_for_dense
from tests.backends import run_python

BACKEND = keras.backend.backend()
HEAVY = pytest.mark.heavy


@pytest.mark.skipif(reason_for_dense() != "", reason=reason_for_dense())
@pytest.mark.parametrize(
    ("backend", "program", "checks"),
    [
        ("jax", "mesh", "--checks products"),
        pytest.param("jax", "mesh", "--checks lift cast", marks=HEAVY),
        ("tensorflow", "mirrored", "lift"),
    ],
)
def test_devices_compute_what_one_computes(backend, program, checks):
    if backend != BACKEND:
        pytest.skip(f"for {backend}")
    flags = "--xla_force_host_platform_device_count=8"
    program = "-m", f"tests.devices.{program}", *checks.split()
    run_python(*program, XLA_FLAGS=flags)
