"""Single entries of weights that are split over devices.

By their coordinates: a flattened weight would be gathered first. Each device
takes what it holds, and what is exchanged are the entries.
"""

import jax.numpy as jnp


def taken(x, indices):
    """Return the entries of an array at places in its flattened form.

    Args:
        x: Array.
        indices: int32 array (k,). Those beyond the array give zero.

    Returns:
        Array (k,).
    """
    places = _coordinates(x.shape, indices)
    return jnp.asarray(x).at[places].get(mode="fill", fill_value=0)


def put(x, indices, values):
    """Return the array with other entries at these places, none beyond it."""
    places = _coordinates(x.shape, indices)
    return jnp.asarray(x).at[places].set(values, mode="drop")


def _coordinates(shape, indices):
    indices = jnp.asarray(indices)
    found = []
    for size in reversed(shape[1:]):
        found.append(indices % size)
        indices = indices // size
    return indices, *reversed(found)
