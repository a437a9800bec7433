"""Dense and EinsumDense with a packed 2:4 kernel."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.backend import backend_module
from keras_weightmods.core import seam
from keras_weightmods.core.reparameterization import slots
from keras_weightmods.native.packed import (
    VALUE_TYPES,
    Packed,
    pack_kernel,
    packed_arrays,
    unpack_kernel,
    unpack_tensor,
)
from keras_weightmods.ops.matrix import from_matrix, stack_shape, to_matrix
from keras_weightmods.ops.sparse_matmul import gpu_plan, reason_for_dense
from keras_weightmods.packing.packed_parameters import PackedParameters
from keras_weightmods.packing.product import (
    PackedProduct,
    equation_of,
    is_matrix_product,
    lora_product,
)
from keras_weightmods.utils import checks


def check_values(dtype: str, trainable: bool) -> None:
    """Raise ValueError unless such values can be packed."""
    checks.check_choice("dtype", dtype, VALUE_TYPES)
    checks.check_bool("trainable", trainable)
    if trainable and dtype != "float32":
        raise ValueError(
            "Only float32 values can be trained. Received: trainable=True, "
            f"dtype={dtype!r}"
        )


def packed_kernel(target: Any, dtype: str, trainable: bool = False) -> Any:
    """Return the `PackedKernel` of a target, of the class to use here."""
    kernel_class: type[PackedKernel] = PackedKernel
    # Training changes the values in each step: nothing to prepare once.
    if not trainable:
        plan = gpu_plan(
            _matrix_shape(target), target.layer.compute_dtype, dtype
        )
        if reason_for_dense() or (plan and not plan.is_sparse):
            kernel_class = UnpackedKernel
        elif plan and keras.backend.backend() == "jax":
            kernel_class = PreparedKernel
    return kernel_class(target, dtype, trainable)


def reason_to_skip(target: Any) -> str | None:
    """Return why a kernel cannot be packed; None if it can."""
    layer = target.layer
    # A layer with a call of its own may do anything with its kernel.
    if target.attribute != "kernel" or type(layer).call not in (
        keras.layers.Dense.call,
        keras.layers.EinsumDense.call,
    ):
        return (
            f"of {type(layer).__name__}; packed are the kernels of Dense and "
            "EinsumDense"
        )
    if target.stack_axes:
        return "a stack of kernels"
    if target.contraction_size % 4:
        return (
            f"contraction size {target.contraction_size} is not a multiple of 4"
        )
    if target.variable.dtype == "float64":
        return "float64, where packed values have float32 at most"
    if not is_matrix_product(equation_of(layer)):
        return f"its equation {layer.equation!r} is more than a matrix product"
    return seam.reason_to_skip(target)


class _PackedDenseCall:
    """The `call` of a Dense or EinsumDense with a packed kernel."""

    def call(self: Any, inputs, training=None):
        item = slots(self)["kernel"]
        x = item.product(inputs, item.packed)
        if self.lora_enabled:
            x = ops.add(x, lora_product(self, inputs))
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
    mixin: type | None = _PackedDenseCall

    def __init__(self, target, dtype, trainable=False):
        super().__init__(target)
        self.matrix_shape = _matrix_shape(target)
        self.value_dtype = dtype
        self.trainable = trainable
        self.arrays = packed_arrays(self.matrix_shape, dtype)
        self.product = PackedProduct(
            equation_of(target.layer), target.contraction_axes, target.shape
        )
        self.packed: Any = None

    def get_config(self):
        return {"dtype": self.value_dtype, "trainable": self.trainable}

    @classmethod
    def from_config(cls, target, config):
        reason = reason_to_skip(target)
        if reason is not None:
            raise ValueError(f"{target.path!r} cannot be packed: {reason}")
        if set(config) != {"dtype", "trainable"}:
            raise ValueError(
                "The config of a packed kernel must hold `dtype` and "
                f"`trainable`. Received: {config!r}"
            )
        check_values(**config)
        item = packed_kernel(target, **config)
        item.is_empty = True
        return item

    def create_parameters(self, add_weight):
        packed = None if self.is_empty else self.pack(self.target.variable)
        for name, spec in self.arrays.items():
            trainable = self.trainable and name == "values"
            array = getattr(packed, name, None)
            self.add(add_weight, name, spec, array, trainable=trainable)
        self.packed = self.packed_of(*self.parameters)

    def effective(self, stored):
        del stored
        return self.to_kernel(unpack_tensor(self.packed))

    def folded(self):
        # Without a large tensor for each step of it.
        return self.to_kernel(unpack_kernel(self.packed))

    def pack(self, kernel):
        """Pack a dense kernel of the target's shape."""
        matrix = to_matrix(kernel, self.target.contraction_axes)
        return pack_kernel(matrix, self.value_dtype)

    def packed_of(self, values, meta, scale=None):
        """Return the `Packed` of these arrays."""
        return Packed(values, meta, scale, self.matrix_shape, self.value_dtype)

    def to_kernel(self, matrix):
        """Return a kernel of the target's shape and type."""
        target = self.target
        kernel = from_matrix(matrix, target.shape, target.contraction_axes)
        return ops.cast(kernel, self.dtype)

    def saved_arrays(self):
        return {self.key(name): spec for name, spec in self.arrays.items()}


class UnpackedKernel(PackedKernel):
    """A packed kernel where nothing can multiply by it: held dense.

    It differs in memory only. The values are rounded alike and frozen alike,
    and a checkpoint holds the packed arrays.
    """

    mixin = None

    def folded(self):
        return self.effective(None)

    def create_parameters(self, add_weight):
        kernel = scale = None
        if not self.is_empty:
            packed = self.pack(self.target.variable)
            kernel, scale = self.to_kernel(unpack_kernel(packed)), packed.scale
        spec = self.target.shape, self.dtype
        self.add(add_weight, "unpacked", spec, kernel, autocast=True)
        if "scale" in self.arrays:
            self.add(add_weight, "scale", self.arrays["scale"], scale)

    def effective(self, stored):
        del stored
        return ops.convert_to_tensor(self.parameters[0])

    def saved(self):
        kernel, *scale = self.parameters
        matrix = to_matrix(kernel, self.target.contraction_axes)
        if not scale:
            packed = pack_kernel(matrix, self.value_dtype)
            arrays = [packed.values, packed.meta]
        else:
            # Not `pack_kernel(matrix, "int8")`, which would choose new scales.
            steps = ops.convert_to_numpy(matrix)
            scale = ops.convert_to_numpy(scale[0])
            steps = steps / scale.reshape(-1)[: steps.shape[1]]
            packed = pack_kernel(np.rint(steps), "float32")
            arrays = [_int8_layout(packed.values), packed.meta, scale]
        return dict(zip(self.saved_arrays(), arrays))

    def load(self, saved):
        packed = self.packed_of(*(saved[key] for key in self.saved_arrays()))
        self.parameters[0].assign(self.to_kernel(unpack_kernel(packed)))
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
    _, *shape = stack_shape(
        target.shape, target.contraction_axes, target.stack_axes
    )
    return tuple(shape)


def _int8_layout(values):
    """Values in the layout of float32 ones in that of int8 ones."""
    blocks, slots, columns = values.shape
    values = values.reshape(blocks, slots // 16, 4, 4, columns)
    return values.transpose(0, 1, 3, 4, 2).astype(np.int8)
