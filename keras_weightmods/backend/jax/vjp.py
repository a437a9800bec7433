"""A function's value together with its gradients, on JAX."""

import jax


def vjp(function, *inputs):
    """Return `function(*inputs)`, and its pullback.

    The gradients can so be taken within a forward pass.

    Args:
        function: Callable from float tensors to one.
        *inputs: Its inputs.

    Returns:
        The output, and a function from the gradient of the output to those of
        the inputs, to be called once.
    """
    return jax.vjp(function, *inputs)
