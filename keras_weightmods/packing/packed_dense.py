"""Dense and EinsumDense with a packed 2:4 kernel."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.backend import backend_module
from keras_weightmods.core import seam
from keras_weightmods.core.reparameterization import slots
from keras_weightmods.native import packed as packed_format
from keras_weightmods.ops.matrix import from_matrix, stack_shape, to_matrix
from keras_weightmods.ops.sparse_matmul import gpu_plan, reason_for_dense
from keras_weightmods.packing import product
from keras_weightmods.packing.packed_parameters import (
    HeldDense,
    PackedParameters,
)
from keras_weightmods.utils import checks


def check_values(dtype, trainable):
    """Raise ValueError unless such values can be packed."""
    checks.check_choice("dtype", dtype, packed_format.VALUE_TYPES)
    checks.check_bool("trainable", trainable)
    if trainable and dtype != "float32":
        raise ValueError(
            "Only float32 values can be trained. Received: trainable=True, "
            f"dtype={dtype!r}"
        )


def packed_kernel(target, dtype, trainable):
    """Return the `PackedKernel` of a target, of the class to use here."""
    check_values(dtype, trainable)
    kernel_class = PackedKernel
    # Training changes the values in each step: nothing to prepare once.
    if not trainable:
        shape = _matrix_shape(target)
        plan = gpu_plan(shape, target.layer.compute_dtype, dtype)
        if reason_for_dense() or (plan and not plan.is_sparse):
            kernel_class = UnpackedKernel
        elif plan and keras.backend.backend() == "jax":
            kernel_class = PreparedKernel
    return kernel_class(target, dtype, trainable)


def reason_to_skip(target):
    """Return why a kernel cannot be packed; None if it can."""
    layer = target.layer
    # A layer with a call of its own may do anything with its kernel.
    if target.attribute != "kernel" or type(layer).call not in (
        keras.layers.Dense.call,
        keras.layers.EinsumDense.call,
    ):
        name = type(layer).__name__
        return f"of {name}; packed are the kernels of Dense and EinsumDense"
    if target.stack_axes:
        return "a stack of kernels"
    if target.contraction_size % 4:
        size = target.contraction_size
        return f"contraction size {size} is not a multiple of 4"
    if target.variable.dtype == "float64":
        return "float64, where packed values have float32 at most"
    if not product.is_matrix_product(product.equation_of(layer)):
        return f"its equation {layer.equation!r} is more than a matrix product"
    return seam.reason_to_skip(target)


class _PackedDenseCall:
    """The `call` of a Dense or EinsumDense with a packed kernel."""

    def call(self: Any, inputs, training=None):
        item = slots(self)["kernel"]
        x = item.product(inputs, item.packed)
        if self.lora_enabled:
            x = ops.add(x, product.lora_product(self, inputs))
        if self.bias is not None:
            x = ops.add(x, self.bias)
        if self.activation is not None:
            x = self.activation(x)
        return x


class PackedKernel(PackedParameters):
    """A kernel as packed values and their places.

    Args:
        target: `Target` without a `reason_to_skip`.
        dtype: String, type of the kept values.
        trainable: Bool, whether the values are trained.
    """

    name = "packed"
    pattern = "2:4"
    settings = "dtype", "trainable"
    mixin = _PackedDenseCall
    make = staticmethod(packed_kernel)
    reason_to_skip = staticmethod(reason_to_skip)

    def __init__(self, target, dtype, trainable):
        super().__init__(target)
        self.matrix_shape = _matrix_shape(target)
        self.value_dtype = dtype
        self.trainable = trainable
        self.arrays = packed_format.packed_arrays(self.matrix_shape, dtype)
        equation = product.equation_of(target.layer)
        self.product = product.PackedProduct(
            equation, target.contraction_axes, target.shape
        )
        self.packed: Any = None

    def get_config(self):
        return {"dtype": self.value_dtype, "trainable": self.trainable}

    def create_parameters(self, add_weight):
        packed = None if self.is_empty else self.pack(self.target.variable)
        for name, spec in self.arrays.items():
            trainable = self.trainable and name == "values"
            array = getattr(packed, name, None)
            self.add(add_weight, name, spec, array, trainable=trainable)
        self.packed = self.packed_of(*self.parameters)

    def effective(self, stored):
        return self.to_kernel(packed_format.unpack_tensor(self.packed))

    def folded(self):
        # Without a large tensor for each step of it.
        return self.to_kernel(packed_format.unpack_kernel(self.packed))

    def pack(self, kernel):
        """Pack a dense kernel of the target's shape."""
        matrix = to_matrix(kernel, self.target.contraction_axes)
        return packed_format.pack_kernel(matrix, self.value_dtype)

    def packed_of(self, values, meta, scale=None):
        """Return the `Packed` of these arrays."""
        return packed_format.Packed(
            values, meta, scale, self.matrix_shape, self.value_dtype
        )

    def to_kernel(self, matrix):
        """Return a kernel of the target's shape and type."""
        target = self.target
        kernel = from_matrix(matrix, target.shape, target.contraction_axes)
        return ops.cast(kernel, self.dtype)

    def saved_arrays(self):
        return {self.key(name): spec for name, spec in self.arrays.items()}


class UnpackedKernel(HeldDense, PackedKernel):
    """A packed kernel where nothing can multiply by it: held dense.

    It differs in memory only. The values are rounded alike and frozen alike,
    and a checkpoint holds the packed arrays.
    """

    def create_parameters(self, add_weight):
        kernel = scale = None
        if not self.is_empty:
            packed = self.pack(self.target.variable)
            kernel = self.to_kernel(packed_format.unpack_kernel(packed))
            scale = packed.scale
        spec = self.target.shape, self.dtype
        self.add(add_weight, "unpacked", spec, kernel, autocast=True)
        if "scale" in self.arrays:
            self.add(add_weight, "scale", self.arrays["scale"], scale)

    def saved(self):
        kernel, *scale = self.parameters
        matrix = to_matrix(kernel, self.target.contraction_axes)
        if not scale:
            packed = packed_format.pack_kernel(matrix, self.value_dtype)
            arrays = [packed.values, packed.meta]
        else:
            # Not `pack_kernel(matrix, "int8")`, which would choose new scales.
            steps = ops.convert_to_numpy(matrix)
            scale = ops.convert_to_numpy(scale[0])
            steps = steps / scale.reshape(-1)[: steps.shape[1]]
            packed = packed_format.pack_kernel(np.rint(steps), "float32")
            arrays = [_int8_layout(packed.values), packed.meta, scale]
        return dict(zip(self.saved_arrays(), arrays))

    def load(self, saved):
        packed = self.packed_of(*(saved[key] for key in self.saved_arrays()))
        kernel = packed_format.unpack_kernel(packed)
        self.parameters[0].assign(self.to_kernel(kernel))
        if packed.scale is not None:
            self.parameters[1].assign(packed.scale)


class PreparedKernel(PackedKernel):
    """A packed kernel on a GPU under JAX, with its companion.

    See `keras_weightmods.backend.jax.sparse_matmul_gpu`. The companion is a
    variable, so that a compiled function sees it change with a load; a
    checkpoint leaves it out.
    """

    def create_parameters(self, add_weight):
        super().create_parameters(add_weight)
        gpu = backend_module("sparse_matmul_gpu")
        plain, x_dtype = self.packed, self.target.layer.compute_dtype
        kind = gpu.plan(self.matrix_shape, x_dtype, self.value_dtype).companion
        spec = gpu.companion_spec(kind, self.matrix_shape, x_dtype)
        self.add(add_weight, "companion", spec)
        self.packed = gpu.PreparedPacked(
            **vars(plain),
            companion=self.parameters[-1],
            companion_kind=kind,
            x_dtype=x_dtype,
        )
        if not self.is_empty:
            self._prepare()

    def saved(self):
        return {p.name: p for p in self.parameters[:-1]}

    def load(self, saved):
        for parameter in self.parameters[:-1]:
            parameter.assign(saved[parameter.name])
        self._prepare()

    def _prepare(self):
        gpu = backend_module("sparse_matmul_gpu")
        self.parameters[-1].assign(gpu.companion(self.packed))


def _matrix_shape(target):
    return stack_shape(target.shape, target.contraction_axes)[1:]


def _int8_layout(values):
    """Values in the layout of float32 ones in that of int8 ones."""
    blocks, slots, columns = values.shape
    values = values.reshape(blocks, slots // 16, 4, 4, columns)
    return values.transpose(0, 1, 3, 4, 2).astype(np.int8)
