"""The einsum of a layer as a product with a packed matrix."""

import math
import re
import string
from typing import Any

import keras
from keras import ops


def equation_of(layer: Any) -> str:
    """Return the einsum equation of a Dense or EinsumDense."""
    if isinstance(layer, keras.layers.Dense):
        return "...a,ab->...b"
    return layer.equation.replace(" ", "")


def is_matrix_product(equation: str) -> bool:
    """Return whether it is one but for transposes."""
    terms = inputs, kernel, outputs = _terms(equation)
    return (
        all(len(set(term)) == len(term) for term in terms)
        and all((axis in inputs) != (axis in outputs) for axis in kernel)
        and all((axis in kernel) != (axis in outputs) for axis in inputs)
    )


class PackedProduct:
    """An einsum with one kernel, as a product with a packed matrix.

    Args:
        equation: String, such as `"bquh,uhm->bqm"`.
        contraction_axes: Tuple of ints, axes of the kernel, rising.
        kernel_shape: Tuple of ints.
    """

    def __init__(self, equation, contraction_axes, kernel_shape):
        self.inputs, kernel, self.outputs = _terms(equation)
        others = [i for i in range(len(kernel)) if i not in contraction_axes]
        self.contracted = [kernel[axis] for axis in contraction_axes]
        self.units = [kernel[axis] for axis in others]
        self.contraction_size = math.prod(
            kernel_shape[axis] for axis in contraction_axes
        )
        self.units_shape = tuple(kernel_shape[axis] for axis in others)
        self.orders = {}

    def __call__(self, x, multiply):
        """Return the product; `multiply` takes (..., K) to (..., N)."""
        rank = len(x.shape)
        if rank not in self.orders:
            self.orders[rank] = self._order(rank)
        before, batch, after = self.orders[rank]
        if before is not None:
            x = ops.transpose(x, before)
        if len(self.contracted) > 1:
            x = _reshape_last(x, batch, (self.contraction_size,))
        y = multiply(x)
        if len(self.units) != 1:
            y = _reshape_last(y, batch, self.units_shape)
        return y if after is None else ops.transpose(y, after)

    def _order(self, rank):
        """Transposes before and after, None for none; number of batch axes."""
        open_axes = [("...", i) for i in range(rank - len(self.inputs) + 1)]

        def expand(term):
            return [
                axis
                for each in term
                for axis in (open_axes if each == "..." else [each])
            ]

        inputs, outputs = expand(self.inputs), expand(self.outputs)
        batch = [axis for axis in outputs if axis in inputs]
        return (
            _permutation(inputs, batch + self.contracted),
            len(batch),
            _permutation(batch + self.units, outputs),
        )


def lora_product(layer: Any, inputs: Any) -> Any:
    """Return `inputs` times the two low-rank factors, one after the other.

    Keras adds their product to the kernel: a dense kernel of all zeros'
    places, which is what packing has saved.
    """
    equation = equation_of(layer)
    operands, output = equation.split("->")
    inner, kernel = operands.split(",")
    rank = next(c for c in string.ascii_letters if c not in equation)
    left, right = kernel[:-1] + rank, rank + kernel[-1]
    factors = [(left, layer.lora_kernel_a), (right, layer.lora_kernel_b)]
    if kernel[-1] in output:
        middle = output.replace(kernel[-1], rank)
    else:
        middle = inner.replace(kernel[-1], rank)
        factors.reverse()
    # In a pure bfloat16 policy Keras makes them float32.
    (one, a), (other, b) = (
        (axes, ops.cast(factor, layer.compute_dtype))
        for axes, factor in factors
    )
    x = ops.einsum(f"{inner},{one}->{middle}", inputs, a)
    x = ops.einsum(f"{middle},{other}->{output}", x, b)
    return ops.multiply(x, layer.lora_alpha / layer.lora_rank)


def _reshape_last(x, batch, last):
    """`x` with its axes from `batch` on in the shape `last`."""
    leading = tuple(x.shape[:batch])
    if None in leading:
        leading = ops.shape(x)[:batch]
    # On torch the bookkeeping of Keras' op takes as long as a small product.
    reshape = getattr(x, "reshape", None)
    if reshape is None:
        return ops.reshape(x, (*leading, *last))
    return reshape((*leading, *last))


def _permutation(axes, wanted):
    order = [axes.index(axis) for axis in wanted]
    return None if order == sorted(order) else order


def _terms(equation):
    """Return the axes of input, kernel and output, each a letter or `...`."""
    return [
        re.findall(r"\.\.\.|\w", term) for term in re.split(",|->", equation)
    ]
