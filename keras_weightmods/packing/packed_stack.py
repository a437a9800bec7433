"""Stacks of packed 2:4 kernels: experts, and EinsumDense with several."""

import dataclasses
from typing import Any

import keras
from keras import ops

from keras_weightmods.core import expert_banks, seam
from keras_weightmods.ops.matrix import from_stack, stack_shape, to_stack
from keras_weightmods.ops.sparse_matmul import (
    gpu_plan,
    reason_for_dense,
    sparse_matmul,
)
from keras_weightmods.packing import product
from keras_weightmods.packing.packed_dense import (
    PackedKernel,
    UnpackedKernel,
    check_values,
)

_BLOCK = 16  # columns of a block of the packed format


def packed_stack(target, dtype, trainable, activations="float32"):
    """Return the `PackedStack` of a target, of the class to use here."""
    check_values(dtype, trainable, activations)
    plan = gpu_plan((1, 1), target.layer.compute_dtype, dtype)
    # On a GPU a product for each kernel has not been measured.
    if not trainable and (plan is not None or reason_for_dense()):
        return UnpackedStack(target, dtype, trainable, activations)
    return PackedStack(target, dtype, trainable, activations)


def reason_to_skip(target):
    """Return why a stack of kernels cannot be packed; None if it can."""
    layer = target.layer
    name = type(layer).__name__
    if target.contraction_size % 4:
        size = target.contraction_size
        return f"contraction size {size} is not a multiple of 4"
    if target.variable.dtype == "float64":
        return "float64, where packed values have float32 at most"
    if _is_bank(target):
        return seam.reason_to_skip(target)
    if (
        target.attribute != "kernel"
        or type(layer).call is not keras.layers.EinsumDense.call
    ):
        return (
            f"a stack of kernels of {name}; packed are those of EinsumDense "
            "and of KerasHub's experts"
        )
    axes = target.stack_axes, target.output_axes
    if not product.is_stack_product(product.equation_of(layer), *axes):
        return f"its equation {layer.equation!r} is more than matrix products"
    return seam.reason_to_skip(target)


class PackedStack(PackedKernel):
    """A stack of kernels, packed side by side as one matrix.

    The columns of each begin a new block of the format, so that each is a
    range of the arrays.
    """

    name = "packed_stack"
    # A kernel's own columns would be those of one device.
    sides = ("rows",)
    make = staticmethod(packed_stack)
    reason_to_skip = staticmethod(reason_to_skip)

    def __init__(self, target, *args):
        axes = target.contraction_axes, target.stack_axes
        self.axes = axes
        self.count, _, self.units = stack_shape(target.shape, *axes)
        self.products: dict[str, Any] = {}
        super().__init__(target, *args)
        if _is_bank(target):
            self.mixin = expert_banks.BankCall

    @staticmethod
    def shape_of(target):
        axes = target.contraction_axes, target.stack_axes
        count, size, units = stack_shape(target.shape, *axes)
        return size, count * _padded(units)

    def product_of(self, target):
        # A bank tells its equations as it is called.
        if _is_bank(target):
            return None
        return self._product(product.equation_of(target.layer))

    def einsum(self, equation, x):
        """Return the einsum of a tensor and the stack."""
        if equation not in self.products:
            self.products[equation] = self._product(equation)
        return self.products[equation](x, self.multiply)

    def multiply(self, x, index=None):
        """Return `x`, of shape (..., K), times all kernels or one of them."""
        if index is not None:
            return sparse_matmul(x, self.packed_kernel_at(index))
        return self._without_padding(sparse_matmul(x, self.packed))

    def packed_kernel_at(self, index):
        """Return the `Packed` of one kernel, of parts of the arrays."""
        whole = self.packed
        blocks = _padded(self.units) // _BLOCK
        own = slice(index * blocks, (index + 1) * blocks)
        return dataclasses.replace(
            whole,
            values=whole.values[own],
            meta=whole.meta[own],
            scale=None if whole.scale is None else whole.scale[own],
            shape=(self.matrix_shape[0], self.units),
        )

    def to_matrix(self, kernel):
        stack = to_stack(kernel, *self.axes)
        missing = _padded(self.units) - self.units
        stack = ops.pad(stack, ((0, 0), (0, 0), (0, missing)))
        return ops.reshape(ops.transpose(stack, (1, 0, 2)), self.matrix_shape)

    def to_kernel(self, matrix):
        size = self.matrix_shape[0]
        stack = ops.reshape(matrix, (size, self.count, -1))
        stack = ops.transpose(stack[:, :, : self.units], (1, 0, 2))
        return ops.cast(
            from_stack(stack, self.target.shape, *self.axes), self.dtype
        )

    def _product(self, equation):
        target = self.target
        (axis,) = target.stack_axes
        return product.StackProduct(
            equation, target.contraction_axes, axis, target.shape
        )

    def _without_padding(self, y):
        if self.units % _BLOCK == 0:
            return y
        leading = ops.shape(y)[:-1]
        y = ops.reshape(y, (*leading, self.count, _padded(self.units)))
        y = y[..., : self.units]
        return ops.reshape(y, (*leading, self.count * self.units))


class UnpackedStack(UnpackedKernel, PackedStack):
    """A stack of packed kernels where nothing can multiply by it."""

    def multiply(self, x, index=None):
        matrix = self.to_matrix(self.parameters[0])
        if index is None:
            return self._without_padding(self.multiply_by(x, matrix))
        start = index * _padded(self.units)
        matrix = matrix[:, start : start + self.units]
        return self.multiply_by(x, matrix)


def _is_bank(target):
    return target.attribute in expert_banks.stacks_of(target.layer)


def _padded(units):
    return -(-units // _BLOCK) * _BLOCK
