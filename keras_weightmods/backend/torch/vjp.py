"""A function's value together with its gradients, on torch."""

import torch


def vjp(function, *inputs):
    """Return `function(*inputs)`, and its pullback; as `vjp` on JAX."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    with torch.enable_grad():
        output = function(*inputs)

    def pullback(upstream):
        return torch.autograd.grad(
            output, inputs, upstream, materialize_grads=True
        )

    return output.detach(), pullback
