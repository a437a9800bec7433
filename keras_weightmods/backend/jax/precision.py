"""Products of float32 matrices in float32, also on a GPU."""

import jax


def full_precision():
    """Return a context in which JAX rounds no factor of a product."""
    return jax.default_matmul_precision("highest")
