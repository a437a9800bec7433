"""In which order XLA is to compute."""

import jax.numpy as jnp


def after(x, first):
    """Return a tensor as it is, but not before another is there.

    Before a step changes some entries of a weight in place, XLA copies it: once
    for what still reads it, once more for the change, all weights at the start.
    What is computed from a weight when its gradient is there, entry by entry,
    needs no memory of its own for long.

    Args:
        x: Tensor.
        first: Tensor, not empty.

    Returns:
        `x`, bit for bit.
    """
    number = jnp.reshape(first, (-1,))[0]
    # Always, also where it is NaN; but XLA does not know.
    return jnp.where(jnp.logical_not(number > jnp.abs(number)), x, -x)


def after_all(tensors):
    """Return the tensors as they are, but not before the last of them is there.

    Args:
        tensors: List of tensors that are not empty.

    Returns:
        List like `tensors`.
    """
    if not tensors:
        return tensors
    firsts = [jnp.reshape(x, (-1,))[0].astype("float32") for x in tensors]
    # Sorted, since XLA computes a sum anew in all that need it.
    last = jnp.sort(jnp.stack(firsts))
    return [after(x, last) for x in tensors]
