"""Layers with a packed kernel, 2:4 or in integers."""

from typing import Any

import keras
from keras import ops

from keras_weightmods.backend import backend_module
from keras_weightmods.core import keras_compat, seam
from keras_weightmods.core.reparameterization import slots
from keras_weightmods.native import layout, quantize
from keras_weightmods.native import packed as packed_format
from keras_weightmods.ops.matrix import from_matrix, stack_shape, to_matrix
from keras_weightmods.ops.sparse_matmul import (
    gpu_plan,
    reason_for_dense,
    sparse_matmul,
)
from keras_weightmods.packing import convolution, product, recurrent
from keras_weightmods.packing.packed_parameters import (
    HeldDense,
    PackedParameters,
    relative_error,
)
from keras_weightmods.utils import checks


def check_values(dtype, trainable, activations="float32"):
    """Raise ValueError unless such values can be packed."""
    layout.check_activations(activations, dtype)
    checks.check_bool("trainable", trainable)
    if trainable and dtype != "float32":
        raise ValueError(
            "Only float32 values can be trained. Received: trainable=True, "
            f"dtype={dtype!r}"
        )


def packed_kernel(target, dtype, trainable, activations="float32"):
    """Return the `PackedKernel` of a target, of the class to use here."""
    check_values(dtype, trainable, activations)
    kernel_class = PackedKernel
    # Training changes the values in each step: nothing to prepare once.
    if not trainable:
        shape = PackedKernel.shape_of(target)
        plan = gpu_plan(shape, target.layer.compute_dtype, dtype, activations)
        # On a GPU nothing multiplies by parts that are split over devices.
        is_dense = plan and (
            not plan.is_sparse
            or keras_compat.layout_of(target.variable) is not None
        )
        if reason_for_dense() or is_dense:
            kernel_class = UnpackedKernel
        elif plan and keras.backend.backend() == "jax":
            kernel_class = PreparedKernel
    return kernel_class(target, dtype, trainable, activations)


def integer_kernel(target, dtype, activations):
    """Return the `IntegerKernel` of a target, of the class to use here."""
    checks.check_choice("dtype", dtype, layout.INTEGERS)
    layout.check_activations(activations, dtype)
    # Compiled kernels multiply by it with int8 activations alone, on a CPU.
    is_held = activations == "float32" or reason_for_dense()
    shape = PackedKernel.shape_of(target)
    if gpu_plan(shape, target.layer.compute_dtype, dtype) is not None:
        is_held = True
    kernel_class = UnpackedIntegerKernel if is_held else IntegerKernel
    return kernel_class(target, dtype, False, activations)


def reason_to_skip(target):
    """Return why a kernel cannot be packed as 2:4; None if it can."""
    reason = integers_reason_to_skip(target)
    if reason is None and target.contraction_size % 4:
        size = target.contraction_size
        return f"contraction size {size} is not a multiple of 4"
    return reason


def integers_reason_to_skip(target):
    """Return why a kernel cannot be packed in integers; None if it can."""
    layer = target.layer
    is_convolution = convolution.is_convolution(layer)
    is_cell = recurrent.packed_call(layer) is not None
    kernels = recurrent.KERNELS if is_cell else ("kernel",)
    # A layer with a call of its own may do anything with its kernel.
    if target.attribute not in kernels or not (
        is_cell
        or is_convolution
        or type(layer).call
        in (keras.layers.Dense.call, keras.layers.EinsumDense.call)
    ):
        name = type(layer).__name__
        return (
            f"of {name}; packed are the kernels of Dense, EinsumDense, "
            "Conv1D to Conv3D and the cells of LSTM, GRU and SimpleRNN"
        )
    if target.stack_axes:
        return "a stack of kernels, which is packed as 2:4 alone"
    if target.variable.dtype == "float64":
        return "float64, where packed values have float32 at most"
    if is_convolution:
        reason = convolution.reason_to_skip(target)
        return reason or seam.reason_to_skip(target)
    if not product.is_matrix_product(product.equation_of(layer)):
        return f"its equation {layer.equation!r} is more than a matrix product"
    return seam.reason_to_skip(target)


class _PackedDenseCall:
    """The `call` of a Dense or EinsumDense with a packed kernel."""

    def call(self: Any, inputs, training=None):
        item = slots(self)["kernel"]
        x = item.product(inputs, item.multiply)
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
        activations: String, what they are multiplied by, see `Packed`.
    """

    name = "packed"
    pattern: str | None = "2:4"
    settings: tuple[str, ...] = ("dtype", "trainable")
    mixin: type | None = _PackedDenseCall
    is_dense = False
    sides: tuple[str, ...] = ("rows", "columns")
    make: Any = staticmethod(packed_kernel)
    reason_to_skip = staticmethod(reason_to_skip)

    def __init__(self, target, dtype, trainable, activations):
        super().__init__(target)
        self.matrix_shape = self.shape_of(target)
        self.value_dtype = dtype
        self.trainable = trainable
        self.activations = activations
        self.arrays = layout.packed_arrays(
            self.matrix_shape, dtype, self.is_dense
        )
        self.product = self.product_of(target)
        if isinstance(self.product, convolution.ConvProduct):
            self.mixin = convolution.PackedConvCall
        self.mixin = recurrent.packed_call(target.layer) or self.mixin
        self.packed: Any = None
        self.split_as_weight(self.matrix_shape, dtype, self.arrays, self.sides)

    @staticmethod
    def shape_of(target):
        """Return the shape (K, N) of the matrix that is packed."""
        return stack_shape(target.shape, target.contraction_axes)[1:]

    def product_of(self, target):
        """Return what turns the layer's product into that of the matrix."""
        if convolution.is_convolution(target.layer):
            return convolution.ConvProduct(target)
        return product.PackedProduct(
            product.equation_of(target.layer),
            target.contraction_axes,
            target.shape,
        )

    def get_config(self):
        config = {"dtype": self.value_dtype, "trainable": self.trainable}
        return self.with_activations(config)

    def create_parameters(self, add_weight):
        packed = None if self.is_empty else self.pack(self.target.variable)
        for name, spec in self.arrays.items():
            trainable = self.trainable and name == "values"
            array = getattr(packed, name, None)
            self.add(add_weight, name, spec, array, trainable=trainable)
        self.packed = self.packed_of(*self.parameters)

    def multiply(self, x):
        """Return `x`, of shape (..., K), times the packed matrix."""
        return sparse_matmul(x, self.packed)

    def effective(self, stored):
        return self.to_kernel(packed_format.unpack_tensor(self.packed))

    def folded(self):
        # Without a large tensor for each step of it.
        return self.to_kernel(packed_format.unpack_kernel(self.packed))

    def pack(self, kernel):
        """Pack a dense kernel of the target's shape."""
        matrix = self.to_matrix(kernel)
        packed = self.pack_matrix(matrix)
        if self.value_dtype != "float32":
            kept = packed_format.unpack_kernel(packed)
            self.rounding_error = relative_error(kept, matrix)
        return packed

    def pack_matrix(self, matrix):
        """Return the `Packed` of a matrix (K, N)."""
        return packed_format.pack_kernel(
            matrix, self.value_dtype, self.activations
        )

    def packed_of(self, *arrays):
        """Return the `Packed` of these, in the order of `self.arrays`."""
        named = dict(zip(self.arrays, arrays))
        packed = packed_format.Packed(
            named["values"],
            named.get("meta"),
            named.get("scale"),
            self.matrix_shape,
            self.value_dtype,
            "int8" if self.is_dense else self.activations,
        )
        return self.with_split(packed)

    def to_matrix(self, kernel):
        """Return a kernel of the target's shape as the matrix (K, N)."""
        return to_matrix(kernel, self.target.contraction_axes)

    def to_kernel(self, matrix):
        """Return a kernel of the target's shape and type."""
        target = self.target
        kernel = from_matrix(matrix, target.shape, target.contraction_axes)
        return ops.cast(kernel, self.dtype)

    def saved_arrays(self):
        return {self.key(name): spec for name, spec in self.arrays.items()}


class IntegerKernel(PackedKernel):
    """A kernel of any pattern, all its weights in int8 or int4."""

    name = "packed_integers"
    pattern = None
    settings = ("dtype",)
    is_dense = True
    make = staticmethod(integer_kernel)
    reason_to_skip = staticmethod(integers_reason_to_skip)

    def get_config(self):
        return self.with_activations({"dtype": self.value_dtype})

    def pack_matrix(self, matrix):
        return packed_format.pack_dense(matrix, self.value_dtype)


class UnpackedKernel(HeldDense, PackedKernel):
    """A packed kernel where nothing can multiply by it: held dense.

    It differs in memory only. The values are rounded alike and frozen alike,
    and so are int8 activations; a checkpoint holds the packed arrays. Integers
    keep their scales and places, which the kernel does not tell: a kept value
    may be zero.
    """

    def __init__(self, target, *args):
        super().__init__(target, *args)
        if self.activations == "float32":
            self.mixin = None
        self.kept = [name for name in ("scale", "meta") if name in self.arrays]
        if self.value_dtype not in layout.INTEGERS:
            self.kept = []
        if self.split is not None:
            self.layouts["unpacked"] = keras_compat.layout_of(target.variable)

    def create_parameters(self, add_weight):
        kernel = packed = None
        if not self.is_empty:
            packed = self.pack(self.target.variable)
            kernel = self.to_kernel(packed_format.unpack_kernel(packed))
        spec = self.target.shape, self.dtype
        # Without int8 activations the layer's own call casts it.
        autocast = self.activations == "float32"
        self.add(add_weight, "unpacked", spec, kernel, autocast=autocast)
        for name in self.kept:
            array = getattr(packed, name, None)
            self.add(add_weight, name, self.arrays[name], array)

    def multiply(self, x):
        return self.multiply_by(x, self.to_matrix(self.parameters[0]))

    def multiply_by(self, x, matrix):
        """Return the product with a dense matrix, `x` rounded if it is so."""
        rounded = ops.cast(x, "float32")
        if self.activations == "int8":
            rounded = quantize.round_activations(rounded)
        y = ops.matmul(rounded, ops.cast(matrix, "float32"))
        return ops.cast(y, x.dtype)

    def saved(self):
        kernel, *kept = self.parameters
        matrix = self.to_matrix(kernel)
        if not kept:
            packed = packed_format.pack_kernel(matrix, self.value_dtype)
            arrays = [packed.values, packed.meta]
        else:
            # Not `pack_kernel`, which would choose new scales and places.
            named = dict(zip(self.kept, map(ops.convert_to_numpy, kept)))
            named["values"] = packed_format.values_at(
                ops.convert_to_numpy(matrix),
                named.get("meta"),
                self.value_dtype,
                named["scale"],
            )
            arrays = [named[name] for name in self.arrays]
        return dict(zip(self.saved_arrays(), arrays))

    def load(self, saved):
        packed = self.packed_of(*(saved[key] for key in self.saved_arrays()))
        kernel = packed_format.unpack_kernel(packed)
        self.parameters[0].assign(self.to_kernel(kernel))
        for parameter, name in zip(self.parameters[1:], self.kept):
            parameter.assign(getattr(packed, name))


class UnpackedIntegerKernel(UnpackedKernel, IntegerKernel):
    """Integers where nothing can multiply by them: held dense."""


class PreparedKernel(PackedKernel):
    """A packed kernel on a GPU under JAX, with its companions.

    See `keras_weightmods.backend.jax.sparse_matmul_gpu`. Companions are
    variables, so that a compiled function sees them change with a load; a
    checkpoint leaves them out. Not yet run on a GPU.
    """

    def create_parameters(self, add_weight):
        super().create_parameters(add_weight)
        gpu = backend_module("sparse_matmul_gpu")
        plain, x_dtype = self.packed, self.target.layer.compute_dtype
        kind = x_dtype, self.value_dtype, self.activations
        plan = gpu.plan(self.matrix_shape, *kind)
        self.companions: dict[str, Any] = {}
        for kind in plan.companions:
            about = self.matrix_shape, x_dtype, self.activations
            spec = gpu.companion_spec(kind, *about)
            self.add(add_weight, f"companion_{kind}", spec)
            self.companions[kind] = self.parameters[-1]
        self.packed = gpu.PreparedPacked(
            **vars(plain), companions=self.companions, x_dtype=x_dtype
        )
        if not self.is_empty:
            self._prepare()

    def saved(self):
        return {p.name: p for p in self.parameters[: len(self.arrays)]}

    def load(self, saved):
        for parameter in self.parameters[: len(self.arrays)]:
            parameter.assign(saved[parameter.name])
        self._prepare()

    def _prepare(self):
        gpu = backend_module("sparse_matmul_gpu")
        for kind, variable in self.companions.items():
            made = gpu.companion(kind, self.packed, self.packed.x_dtype)
            variable.assign(made)
