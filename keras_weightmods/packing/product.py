"""The einsum of a layer as a product with a packed matrix."""

import functools
import math
import re
import string
from typing import Any

import keras
from keras import ops


def equation_of(layer: Any) -> str:
    """Return the einsum equation of a Dense, an EinsumDense or a cell."""
    if isinstance(layer, keras.layers.EinsumDense):
        return layer.equation.replace(" ", "")
    return "...a,ab->...b"


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


class StackProduct:
    """An einsum with a stack of kernels, as products with packed matrices.

    Args:
        equation: String, such as `"bge,geh->bgh"` or `"th,ehm->etm"`.
        contraction_axes: Tuple of ints, axes of the stack, rising.
        stack_axis: Int, the axis that indexes the kernels.
        shape: Tuple of ints, the shape of the stack.
    """

    def __init__(self, equation, contraction_axes, stack_axis, shape):
        inputs, kernel, outputs = _terms(equation)
        letter = kernel[stack_axis]
        self.count = shape[stack_axis]
        self.whole = self.each = None
        if letter not in inputs:
            # All have the same inputs: one product, with the kernels side by
            # side, as the units of one.
            self.whole = PackedProduct(equation, contraction_axes, shape)
            return
        self.axes = _place(letter, inputs), _place(letter, outputs)
        self.each = PackedProduct(
            equation.replace(letter, ""),
            tuple(axis - (axis > stack_axis) for axis in contraction_axes),
            (*shape[:stack_axis], *shape[stack_axis + 1 :]),
        )

    def __call__(self, x, multiply):
        """Return the einsum.

        Args:
            x: Tensor.
            multiply: Callable from a tensor (..., K) to (..., S * R), the
                products with all S kernels; with an int as a second argument
                to (..., R), that with one of them.
        """
        if self.whole is not None:
            return self.whole(x, multiply)
        before, after = self.axes
        before %= len(x.shape)
        parts = []
        for index in range(self.count):
            part = x[(slice(None),) * before + (index,)]
            own = functools.partial(multiply, index=index)
            parts.append(self.each(part, own))
        return ops.stack(parts, axis=after)


def is_stack_product(
    equation: str, stack_axes: tuple[int, ...], output_axes: tuple[int, ...]
) -> bool:
    """Return whether an einsum is as many matrix products as kernels."""
    inputs, kernel, outputs = _terms(equation)
    if len(stack_axes) != 1 or kernel[stack_axes[0]] not in outputs:
        return False
    letter = kernel[stack_axes[0]]
    if letter not in inputs:
        # Then the kernels side by side are one matrix.
        return stack_axes < output_axes and is_matrix_product(equation)
    return is_matrix_product(equation.replace(letter, ""))


def _place(letter, term):
    """The axis of a letter, from the end where an ellipsis is before it."""
    place = term.index(letter)
    return place - len(term) if "..." in term[:place] else place


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
