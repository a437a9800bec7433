"""A weight of a layer as the arrays of a format."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods import backend
from keras_weightmods.core import keras_compat, seam
from keras_weightmods.core.layer_kinds import (
    kind_with_call,
    reason_dense,
)
from keras_weightmods.core.products import Products
from keras_weightmods.core.reparameterization import Reparameterization, slots
from keras_weightmods.native import quantize
from keras_weightmods.ops.matrix import (
    from_stack,
    stack_shape,
    to_matrix,
    to_stack,
)
from keras_weightmods.ops.sparse_matmul import gpu_plan, reason_for_dense
from keras_weightmods.packing.formats import FORMATS, NativeFormat
from keras_weightmods.utils import checks


def packed_parameters(target, form, trainable=False, activations="float32"):
    """Return the `PackedParameters` of a target, of the class to use here.

    Args:
        target: `Target` without a `reason_to_skip`.
        form: String, name of a `Format`.
        trainable: Bool, whether the values are trained.
        activations: String, what they are multiplied by.
    """
    checks.check_choice("format", form, tuple(FORMATS))
    known = FORMATS[form]
    checks.check_choice("activations", activations, known.activations)
    checks.check_bool("trainable", trainable)
    if trainable and not known.trainable:
        raise ValueError(
            "Only float32 values can be trained. Received: trainable=True, "
            f"format={form!r}"
        )
    make, plan = PackedParameters, None
    # Training changes the values in each step: nothing to prepare once.
    if isinstance(known, NativeFormat) and not trainable:
        shape = stack_shape(target.shape, target.contraction_axes)[1:]
        is_matrix = known.pattern is not None and not target.stack_axes
        plan = gpu_plan(
            shape, target.layer.compute_dtype, known.dtype, activations
        )
        # On a GPU nothing multiplies by stacks, by dense integers, or by parts
        # that are split over devices.
        is_dense = plan is not None and (
            not is_matrix
            or not plan.is_sparse
            or keras_compat.layout_of(target.variable) is not None
        )
        # Compiled kernels multiply by dense integers in integers alone.
        is_float = known.pattern is None and activations == "float32"
        if reason_for_dense() or is_dense or is_float:
            make = HeldParameters
        elif plan is not None and keras.backend.backend() == "jax":
            make = PreparedParameters
    item = make(target, known, trainable, activations)
    item.plan = plan
    return item


def reason_to_skip(target):
    """Return why a weight cannot be packed; None if it can."""
    layer, name = target.layer, target.attribute
    if isinstance(layer, keras.layers.Embedding):
        if name == "embeddings":
            if not getattr(layer, "tie_weights", False):
                return "its head has weights of its own"
            if layer.lora_enabled:
                return "LoRA is enabled"
        if layer.mask_zero:
            return "mask_zero is set"
    reason = reason_dense(layer, name)
    if reason is None and target.variable.dtype == "float64":
        reason = "float64, where packed values have float32 at most"
    return reason or seam.reason_to_skip(target)


class _PackedCall:
    """The `call` of a layer with packed weights."""

    def call(self: Any, *args, **kwargs):
        items = slots(self).values()
        kind: Any = next(
            i.kind for i in items if isinstance(i, PackedParameters)
        )
        return kind.call(self, _PackedProducts(self), *args, **kwargs)


class _FrozenTable:
    """A layer with a packed table, which no LoRA is added to."""

    def enable_lora(self: Any, *args, **kwargs):
        raise ValueError(
            f"LoRA needs the table of layer '{self.name}', which is packed to "
            f"{slots(self)['embeddings'].form.dtype}. Call `unpack(model)` "
            "first."
        )


class _PackedTableCall(_FrozenTable, _PackedCall):
    """Both."""


class _PackedProducts(Products):
    """The products with packed weights, and with those that are not."""

    def __call__(self, attribute, rows, stacked=False):
        item = slots(self.layer).get(attribute)
        if not isinstance(item, PackedParameters):
            return super().__call__(attribute, rows, stacked)
        y = item.multiply(rows, stacked)
        if attribute == "kernel" and getattr(self.layer, "lora_enabled", False):
            y = ops.add(y, _low_rank_product(item.target, rows, stacked))
        return y

    def look_up(self, attribute, indices):
        item = slots(self.layer).get(attribute)
        if not isinstance(item, PackedParameters):
            return super().look_up(attribute, indices)
        rows = item.stored.look_up(ops.cast(indices, "int32"))
        return ops.cast(rows, self.layer.compute_dtype)


class PackedParameters(Reparameterization):
    """A weight whose parameters stand for it: the arrays of a format.

    Attributes:
        rounding_error: Float, what rounding changed: the norm of the difference
            over that of the weights. None without rounding, or from a file.
        split: How the arrays are split over devices, under JAX; None if not.
        unused_axes: List of strings, the axes of the mesh that split the
            weight and not the arrays.
        layouts: Dict of the layouts of the arrays, by their names.
        stored: The `Stored` to multiply by.
        plan: The `Plan` of its products on a GPU; None if they are on a CPU.

    Args:
        target: `Target` without a `reason_to_skip`.
        form: `Format`.
        trainable: Bool, whether the values are trained.
        activations: String, what they are multiplied by.
    """

    name = "packed"
    finish = "unpack(model)"
    keeps_stored = False
    rounding_error: float | None = None
    split: Any = None
    plan: Any = None
    unused_axes: Sequence[str] = ()

    def __init__(self, target, form, trainable, activations):
        super().__init__(target)
        self.form, self.trainable = form, trainable
        self.activations = activations
        self.pattern = form.pattern
        self.kind = kind_with_call(target.layer)
        is_embedding = isinstance(target.layer, keras.layers.Embedding)
        self.is_table = is_embedding and target.attribute == "embeddings"
        self.mixin = _PackedTableCall if self.is_table else _PackedCall
        axes = target.contraction_axes, target.stack_axes
        self.stacks, rows, self.units = stack_shape(target.shape, *axes)
        # Of several kernels each begins a block of the format.
        width = self.units
        if target.stack_axes:
            width = -(-width // form.columns) * form.columns
        self.width, self.shape = width, (rows, self.stacks * width)
        self.arrays = form.arrays(self.shape)
        self.layouts: dict[str, Any] = {}
        self.stored: Any = None
        self._split_as_weight()

    @classmethod
    def from_config(cls, target, config):
        reason = reason_to_skip(target)
        if reason is not None:
            raise ValueError(f"{target.path!r} cannot be packed: {reason}")
        if set(config) != {"format", "trainable", "activations"}:
            expected = "a dict of `format`, `trainable` and `activations`"
            raise checks.error("config", expected, config)
        item = packed_parameters(target, *(config[k] for k in _SETTINGS))
        item.is_empty = True
        return item

    def get_config(self):
        values = self.form.name, self.trainable, self.activations
        return dict(zip(_SETTINGS, values))

    @property
    def rounds_inputs(self):
        return self.activations != "float32"

    def create_parameters(self, add_weight):
        arrays = {}
        if not self.is_empty:
            arrays = self.pack(self.target.variable)
        for name, spec in self.arrays.items():
            trainable = self.trainable and name == "values"
            array = arrays.get(name)
            self.add(add_weight, name, spec, array, trainable=trainable)
        self.stored = self.form.stored(
            dict(zip(self.arrays, self.parameters)),
            self.shape,
            self.activations,
        )
        if self.split is not None:
            self.stored.packed = (
                backend.current()
                .layouts()
                .SplitPacked.of(self.stored.packed, self.split)
            )

    def multiply(self, x, stacked=False):
        """Return `x`, (..., K) or (..., S, K), times the matrix."""
        if not stacked:
            return self.stored.multiply(x)
        if x.shape[-2] == 1:
            # All have the same rows: one product, with the kernels side by
            # side.
            y = self.stored.multiply(x[..., 0, :])
            leading = ops.shape(y)[:-1]
            y = ops.reshape(y, (*leading, self.stacks, self.width))
            return y[..., : self.units]
        parts = [
            self.stored.multiply(x[..., i, :], slice(at, at + self.units))
            for i, at in enumerate(range(0, self.shape[1], self.width))
        ]
        return ops.stack(parts, axis=-2)

    def why(self, rows):
        """Return the product taken for a number of rows on a GPU, and why."""
        return self.plan.why(rows)

    def effective(self, stored):
        return ops.cast(self.to_kernel(self.stored.tensor()), self.dtype)

    def folded(self):
        # Without a large tensor for each step of it.
        return self._contiguous(self.stored.numpy())

    def pack(self, kernel):
        """Return the arrays of a dense kernel."""
        matrix = ops.convert_to_numpy(self.to_matrix(kernel))
        matrix = np.ascontiguousarray(matrix, np.float32)
        arrays = self.form.pack(matrix)
        if self.form.dtype != "float32":
            kept = self.form.unpack(arrays, self.shape, np)
            self.rounding_error = relative_error(kept, matrix)
        return arrays

    def to_matrix(self, kernel):
        """Return a kernel of the target's shape as the matrix (K, N)."""
        target = self.target
        if not target.stack_axes:
            return to_matrix(kernel, target.contraction_axes)
        stack = to_stack(kernel, target.contraction_axes, target.stack_axes)
        missing = self.width - self.units
        stack = ops.pad(stack, ((0, 0), (0, 0), (0, missing)))
        return ops.reshape(ops.transpose(stack, (1, 0, 2)), self.shape)

    def to_kernel(self, matrix):
        """Return a kernel of the target's shape, in float32."""
        target = self.target
        stack = ops.reshape(matrix, (self.shape[0], self.stacks, self.width))
        stack = ops.transpose(stack[:, :, : self.units], (1, 0, 2))
        axes = target.contraction_axes, target.stack_axes
        return from_stack(stack, target.shape, *axes)

    def _contiguous(self, matrix):
        """Return a kernel of the target's shape and type, in order in memory.

        On torch transposes give strides, by which sums differ.
        """
        kernel = ops.convert_to_numpy(self.to_kernel(matrix))
        return ops.cast(np.ascontiguousarray(kernel), self.dtype)

    def saved_arrays(self):
        return {self.key(name): spec for name, spec in self.arrays.items()}

    def key(self, name):
        """Return the name of the parameter that holds the array `name`."""
        return f"{self.target.attribute}_{name}"

    def add(self, add_weight, name, spec, array=None, **kwargs):
        """Add a parameter of `spec`, a shape and a dtype; zeros for None."""

        def initializer(shape, dtype):
            return ops.convert_to_tensor(array, dtype)

        layout = self.layouts.get(name)
        # In half precision, what was packed would change.
        arguments = {"trainable": False, "autocast": False, **kwargs}
        is_zero = array is None or layout is not None
        parameter = keras_compat.add_laid_out(
            add_weight,
            layout,
            name=self.key(name),
            shape=spec[0],
            dtype=spec[1],
            initializer="zeros" if is_zero else initializer,
            **arguments,
        )
        if is_zero and array is not None:
            parameter.assign(array)

    def _split_as_weight(self):
        """Split the arrays over devices as the weight is, under JAX."""
        layout = keras_compat.layout_of(self.target.variable)
        is_native = isinstance(self.form, NativeFormat)
        layouts = backend.current().layouts()
        if layout is None or not is_native or layouts is None:
            return
        sides: tuple[str, ...] = ("rows", "columns")
        if self.is_table:
            # Rows are looked up in the columns, each in one place.
            sides = ("columns",)
        elif self.target.stack_axes:
            # A kernel's own columns would be those of one device.
            sides = ("rows",)
        axes = self.target.contraction_axes
        self.split, self.unused_axes = layouts.split_of(
            layout, axes, self.shape, self.form.dtype, sides
        )
        if self.split is not None:
            self.layouts = self.split.layouts(self.arrays)


_SETTINGS = "format", "trainable", "activations"


class HeldParameters(PackedParameters):
    """A packed weight where nothing can multiply by it: held dense.

    It differs in memory only. The values are rounded alike and frozen alike,
    and so are int8 activations; a checkpoint holds the packed arrays. Integers
    keep their scales and places, which the weight does not tell.
    """

    def __init__(self, *args):
        super().__init__(*args)
        if self.activations == "float32":
            self.mixin: Any = _FrozenTable if self.is_table else None
        self.kept = [name for name in ("scale", "meta") if name in self.arrays]
        if not self.form.needs_finite:
            self.kept = []
        if self.split is not None:
            layout = keras_compat.layout_of(self.target.variable)
            self.layouts["unpacked"] = layout

    def create_parameters(self, add_weight):
        arrays, kernel = {}, None
        if not self.is_empty:
            arrays = self.pack(self.target.variable)
            matrix = self.form.unpack(arrays, self.shape, np)
            kernel = self._contiguous(matrix)
        spec = self.target.shape, self.dtype
        # Without int8 activations the layer's own call casts it.
        autocast = self.activations == "float32"
        self.add(add_weight, "unpacked", spec, kernel, autocast=autocast)
        for name in self.kept:
            self.add(add_weight, name, self.arrays[name], arrays.get(name))
        self.stored = self

    def multiply(self, x, stacked=False):
        rounded = ops.cast(x, "float32")
        if self.activations == "int8":
            rounded = quantize.round_activations(rounded)
        weight = ops.cast(self.parameters[0], "float32")
        axes = self.target.contraction_axes, self.target.stack_axes
        if not stacked:
            y = ops.matmul(rounded, to_matrix(weight, axes[0]))
            return ops.cast(y, x.dtype)
        stack = to_stack(weight, *axes)
        parts = [
            ops.matmul(rounded[..., i % x.shape[-2], :], stack[i])
            for i in range(self.stacks)
        ]
        return ops.cast(ops.stack(parts, axis=-2), x.dtype)

    def look_up(self, indices):
        return ops.take(self.parameters[0], indices, axis=0)

    def why(self, rows):
        if self.plan.is_sparse:
            return "dense: the weight is held dense"
        return self.plan.why(rows)

    def effective(self, stored):
        return ops.convert_to_tensor(self.parameters[0])

    def folded(self):
        return self.effective(None)

    def saved(self):
        weight, *kept = self.parameters
        matrix = self.to_matrix(weight)
        if kept:
            named = dict(zip(self.kept, kept))
            arrays = self.form.values_at(matrix, named)
        else:
            matrix = ops.convert_to_numpy(matrix)
            arrays = self.form.pack(np.ascontiguousarray(matrix, np.float32))
        return {self.key(name): arrays[name] for name in self.arrays}

    def load(self, saved):
        arrays = {name: saved[self.key(name)] for name in self.arrays}
        matrix = self.form.unpack(arrays, self.shape, np)
        self.parameters[0].assign(self._contiguous(matrix))
        for parameter, name in zip(self.parameters[1:], self.kept):
            parameter.assign(arrays[name])


class PreparedParameters(PackedParameters):
    """A packed kernel on a GPU under JAX, with its companions.

    See `keras_weightmods.backend.jax.sparse_matmul_gpu`. Companions are
    variables, so that a compiled function sees them change with a load; a
    checkpoint leaves them out. Not yet run on a GPU.
    """

    def create_parameters(self, add_weight):
        super().create_parameters(add_weight)
        gpu = backend.current().gpu_products()
        about = self.shape, self.target.layer.compute_dtype
        plan = gpu.plan(*about, self.form.dtype, self.activations)
        self.companions: dict[str, Any] = {}
        for kind in plan.companions:
            spec = gpu.companion_spec(kind, *about, self.activations)
            self.add(add_weight, f"companion_{kind}", spec)
            self.companions[kind] = self.parameters[-1]
        self.stored.packed = gpu.PreparedPacked(
            **vars(self.stored.packed),
            companions=self.companions,
            x_dtype=about[1],
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
        gpu, packed = backend.current().gpu_products(), self.stored.packed
        for kind, variable in self.companions.items():
            variable.assign(gpu.companion(kind, packed, packed.x_dtype))


def relative_error(rounded, weights):
    """Return the norm of `rounded - weights` over that of `weights`.

    Args:
        rounded, weights: float32 NumPy arrays of shape (rows, ...).
    """
    error = norm = 0.0
    # Not all at once: a table may be the largest array of a model.
    for start in range(0, len(weights), 256):
        part = weights[start : start + 256]
        difference = rounded[start : start + 256] - part
        error += float(np.sum(np.square(difference, dtype="float64")))
        norm += float(np.sum(np.square(part, dtype="float64")))
    return float(np.sqrt(error / norm)) if norm else 0.0


def _low_rank_product(target, rows, stacked):
    """Return rows times what LoRA adds to a kernel.

    One factor after the other: their product, a dense kernel, is what packing
    has saved. Keras' factors share the last axis of the kernel.
    """
    layer, axes = target.layer, target.contraction_axes
    # In a pure bfloat16 policy Keras makes them float32.
    a, b = (
        ops.cast(factor, layer.compute_dtype)
        for factor in (layer.lora_kernel_a, layer.lora_kernel_b)
    )
    rate, last = layer.lora_alpha / layer.lora_rank, len(target.shape) - 1
    if stacked:
        stack = to_stack(ops.matmul(a, b), axes, target.stack_axes)
        y = ops.stack(
            [
                ops.matmul(rows[..., i % rows.shape[-2], :], matrix)
                for i, matrix in enumerate(stack)
            ],
            axis=-2,
        )
    elif last in axes:
        leading, size = ops.shape(rows)[:-1], target.shape[last]
        x = ops.reshape(rows, (*leading, -1, size))
        x = ops.matmul(x, ops.transpose(b))
        x = ops.reshape(x, (*leading, -1))
        y = ops.matmul(x, to_matrix(a, axes))
    else:
        y = ops.matmul(rows, to_matrix(a, axes))
        leading = ops.shape(rows)[:-1]
        y = ops.reshape(y, (*leading, -1, layer.lora_rank))
        y = ops.reshape(ops.matmul(y, b), (*leading, -1))
    return ops.multiply(y, rate)
