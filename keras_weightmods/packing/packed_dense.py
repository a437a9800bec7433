"""Dense and EinsumDense with a packed 2:4 kernel."""

import math
import re
import string
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.core import seam
from keras_weightmods.native.packed import (
    Packed,
    pack_kernel,
    packed_arrays,
    unpack_kernel,
    unpack_tensor,
)
from keras_weightmods.ops.matrix import from_matrix, stack_shape, to_matrix
from keras_weightmods.ops.sparse_matmul import (
    gpu_plan,
    reason_for_dense,
    sparse_matmul,
)


def check_values(dtype, trainable):
    """Raises ValueError unless such values can be packed."""
    if dtype not in ("float32", "bfloat16", "int8"):
        raise ValueError(
            "`dtype` must be None, 'float32', 'bfloat16' or 'int8', the type "
            f"of the kept values. Received: dtype={dtype!r}"
        )
    if not isinstance(trainable, bool):
        raise ValueError(
            f"`trainable` must be a bool. Received: trainable={trainable!r}"
        )
    if trainable and dtype != "float32":
        raise ValueError(
            "Only float32 values can be trained. Received: trainable=True, "
            f"dtype={dtype!r}"
        )


def packed_kernel(target, dtype, trainable=False):
    """The `PackedKernel` of a target, of the class to use here."""
    kernel_class: type[PackedKernel] = PackedKernel
    # Training changes the values in each step: nothing to prepare once.
    if not trainable:
        plan = gpu_plan(
            stack_shape(
                target.shape, target.contraction_axes, target.stack_axes
            )[1:],
            target.layer.compute_dtype,
            dtype,
        )
        if reason_for_dense() or (plan and not plan.is_sparse):
            kernel_class = UnpackedKernel
        elif plan and keras.backend.backend() == "jax":
            kernel_class = PreparedKernel
    return kernel_class(target, dtype, trainable)


def obstacle(target):
    """Says why a kernel cannot be packed; None if it can."""
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
    if not _Product.knows(equation_of(layer)):
        return f"its equation {layer.equation!r} is more than a matrix product"
    return seam.reason_to_skip(target)


def equation_of(layer):
    """The einsum equation of a Dense or EinsumDense."""
    if isinstance(layer, keras.layers.Dense):
        return "...a,ab->...b"
    return layer.equation.replace(" ", "")


class PackedDenseCall:
    """The `call` of a Dense or EinsumDense with a packed kernel."""

    def call(self: Any, inputs, training=None):
        item = seam.reparameterization(self, "kernel")
        x = item.product(inputs, item.packed)
        if self.lora_enabled:
            x = ops.add(x, _lora_product(self, inputs))
        if self.bias is not None:
            x = ops.add(x, self.bias)
        if self.activation is not None:
            x = self.activation(x)
        return x


class PackedKernel(seam.Reparameterization):
    """A kernel as packed values and their places.

    Args:
        target: `Target`, without an `obstacle`.
        dtype: String, type of the kept values.
        trainable: Bool, whether the values are trained.
    """

    name = "packed"
    finish = "unpack(model)"
    keeps_stored = False
    pattern = "2:4"
    mixin: type | None = PackedDenseCall

    def __init__(self, target, dtype, trainable=False):
        super().__init__(target)
        self.matrix_shape = stack_shape(
            target.shape, target.contraction_axes, target.stack_axes
        )[1:]
        self.value_dtype = dtype
        self.trainable = trainable
        self.arrays = packed_arrays(self.matrix_shape, dtype)
        self.product = _Product(
            equation_of(target.layer), target.contraction_axes, target.shape
        )
        self.packed: Packed | None = None

    def get_config(self):
        return {"dtype": self.value_dtype, "trainable": self.trainable}

    @classmethod
    def from_config(cls, target, config):
        reason = obstacle(target)
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
        for name, (shape, dtype) in self.arrays.items():
            add_weight(
                name=self._key(name),
                shape=shape,
                dtype=dtype,
                initializer=Given(getattr(packed, name, None)),
                trainable=self.trainable and name == "values",
                # Half precision would change what was packed.
                autocast=False,
            )
        values, meta, *scale = self.parameters
        self.packed = Packed(
            values,
            meta,
            scale[0] if scale else None,
            self.matrix_shape,
            self.value_dtype,
        )

    def effective(self, stored):
        del stored
        return self.to_kernel(unpack_tensor(self.packed))

    def folded(self):
        # Without a large tensor for each step of it.
        return self.to_kernel(unpack_kernel(self.packed))

    def pack(self, kernel):
        """Packs a dense kernel of the target's shape."""
        matrix = to_matrix(kernel, self.target.contraction_axes)
        return pack_kernel(matrix, self.value_dtype)

    def to_kernel(self, matrix):
        """A kernel of the target's shape and type."""
        target = self.target
        kernel = from_matrix(matrix, target.shape, target.contraction_axes)
        return ops.cast(kernel, self.dtype)

    def _key(self, name):
        return f"{self.target.attribute}_{name}"


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
        add_weight(
            name=self._key("unpacked"),
            shape=self.target.shape,
            dtype=self.dtype,
            initializer=Given(kernel),
            trainable=False,
        )
        if "scale" in self.arrays:
            shape, dtype = self.arrays["scale"]
            add_weight(
                name=self._key("scale"),
                shape=shape,
                dtype=dtype,
                initializer=Given(scale),
                trainable=False,
                autocast=False,
            )

    def effective(self, stored):
        del stored
        return ops.convert_to_tensor(self.parameters[0])

    def saved_arrays(self):
        return {self._key(name): spec for name, spec in self.arrays.items()}

    def saved(self):
        kernel, *scale = self.parameters
        matrix = to_matrix(kernel, self.target.contraction_axes)
        if not scale:
            packed = pack_kernel(matrix, self.value_dtype)
            return {
                self._key("values"): packed.values,
                self._key("meta"): packed.meta,
            }
        # Not `pack_kernel(matrix, "int8")`, which would choose new scales.
        steps = ops.convert_to_numpy(matrix)
        scale = ops.convert_to_numpy(scale[0])
        steps = steps / scale.reshape(-1)[: steps.shape[1]]
        packed = pack_kernel(np.rint(steps), "float32")
        return {
            self._key("values"): _int8_layout(packed.values),
            self._key("meta"): packed.meta,
            self._key("scale"): scale,
        }

    def load(self, saved):
        arrays = {name: saved[self._key(name)] for name in self.arrays}
        packed = Packed(
            arrays["values"],
            arrays["meta"],
            arrays.get("scale"),
            self.matrix_shape,
            self.value_dtype,
        )
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
        from keras_weightmods.backend.jax import sparse_matmul_gpu

        super().create_parameters(add_weight)
        plain, x_dtype = self.packed, self.target.layer.compute_dtype
        plan = sparse_matmul_gpu.plan(
            self.matrix_shape, x_dtype, self.value_dtype
        )
        shape, dtype = sparse_matmul_gpu.companion_spec(
            plan.companion, self.matrix_shape, x_dtype
        )
        add_weight(
            name=self._key("companion"),
            shape=shape,
            dtype=dtype,
            initializer=Given(None),
            trainable=False,
            autocast=False,
        )
        self.packed = sparse_matmul_gpu.PreparedPacked(
            **vars(plain),
            companion=self.parameters[-1],
            companion_kind=plan.companion,
            x_dtype=x_dtype,
        )
        if not self.is_empty:
            self._prepare()

    def saved_arrays(self):
        return {self._key(name): spec for name, spec in self.arrays.items()}

    def saved(self):
        return {p.name: p for p in self.parameters[:-1]}

    def load(self, saved):
        for parameter in self.parameters[:-1]:
            parameter.assign(saved[parameter.name])
        self._prepare()

    def _prepare(self):
        from keras_weightmods.backend.jax import sparse_matmul_gpu

        self.parameters[-1].assign(sparse_matmul_gpu.companion(self.packed))


class _Product:
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

    @staticmethod
    def knows(equation):
        """Whether the equation is a matrix product but for transposes."""
        terms = _terms(equation)
        inputs, kernel, outputs = terms
        return (
            all(len(set(term)) == len(term) for term in terms)
            and all((axis in inputs) != (axis in outputs) for axis in kernel)
            and all((axis in kernel) != (axis in outputs) for axis in inputs)
        )

    def __call__(self, x, packed):
        rank = len(x.shape)
        if rank not in self.orders:
            self.orders[rank] = self._order(rank)
        before, batch, after = self.orders[rank]
        if before is not None:
            x = ops.transpose(x, before)
        if len(self.contracted) > 1:
            x = _reshape_last(x, batch, (self.contraction_size,))
        y = sparse_matmul(x, packed)
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
    """The axes of input, kernel and output, each a letter or `...`."""
    return [
        re.findall(r"\.\.\.|\w", term) for term in re.split(",|->", equation)
    ]


def _lora_product(layer, inputs):
    """`inputs` times the two low-rank factors, one after the other.

    Keras adds their product to the kernel: a dense kernel of all zeros'
    places, which is what packing has saved.
    """
    equation = equation_of(layer)
    operands, output = equation.split("->")
    inner, kernel = operands.split(",")
    rank = next(c for c in string.ascii_letters if c not in equation)
    a, b = layer.lora_kernel_a, layer.lora_kernel_b
    *first, last = kernel
    left, right = "".join(first) + rank, rank + last
    if last in output:
        middle = output.replace(last, rank)
        x = ops.einsum(f"{inner},{left}->{middle}", inputs, a)
        x = ops.einsum(f"{middle},{right}->{output}", x, b)
    else:
        middle = inner.replace(last, rank)
        x = ops.einsum(f"{inner},{right}->{middle}", inputs, b)
        x = ops.einsum(f"{middle},{left}->{output}", x, a)
    return ops.multiply(x, layer.lora_alpha / layer.lora_rank)


class Given:
    """Initializer that gives an array; zeros where it is None."""

    def __init__(self, array):
        self.array = array

    def __call__(self, shape, dtype=None):
        if self.array is None:
            return ops.zeros(shape, dtype)
        return ops.convert_to_tensor(self.array, dtype)


def _int8_layout(values):
    """Values in the layout of float32 ones in that of int8 ones."""
    blocks, slots, columns = values.shape
    values = values.reshape(blocks, slots // 16, 4, 4, columns)
    return values.transpose(0, 1, 3, 4, 2).astype(np.int8)
