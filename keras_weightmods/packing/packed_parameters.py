"""A weight of a layer as the arrays of a format."""

import math
import string
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods import backend
from keras_weightmods.core import keras_compat, seam
from keras_weightmods.core.layer_kinds import kind_with_call, reason_dense
from keras_weightmods.core.products import Products
from keras_weightmods.core.reparameterization import Reparameterization, slots
from keras_weightmods.native import quantize
from keras_weightmods.ops.sparse_matmul import gpu_plan, reason_for_dense
from keras_weightmods.packing.formats import FORMATS, NativeFormat
from keras_weightmods.packing.onnx_format import OnnxFormat
from keras_weightmods.utils import checks
from keras_weightmods.utils.matrix import from_stack, stack_shape, to_stack

# The keys of a packed weight in files.
_SETTINGS = "format", "trainable", "activations"
# Models with a warning that `fit` does not train everything.
_WARNED: Any = weakref.WeakSet()


def reason_to_skip(target):
    """Return why a weight cannot be packed; None if it can."""
    layer, name = target.layer, target.attribute
    if isinstance(layer, keras.layers.Embedding):
        if name == "embeddings":
            if not isinstance(layer, keras.layers.ReversibleEmbedding):
                return "looked up, and not multiplied by"
            if layer.lora_enabled:
                return "LoRA is enabled"
        if layer.mask_zero:
            return "mask_zero is set"
    reason = reason_dense(layer, name)
    if reason is None and target.variable.dtype == "float64":
        reason = "float64, where packed values have float32 at most"
    return reason or seam.reason_to_skip(target)


class PackedParameters(Reparameterization):
    """A weight that is replaced by parameters, the arrays of a format.

    If nothing can multiply by these, the parameter is the dense weight, and
    NumPy holds the arrays for a file. Under JAX on a GPU the companions that it
    multiplies by follow the arrays. No file has these.

    Attributes:
        rounding_error: Float, what rounding changed: the norm of the difference
            over that of the weights. None without rounding, or from a file.
        integers: String, as of `PackedWeight`.
        is_held: Bool, whether nothing can multiply by the arrays.
        plan: The `Plan` of its products on a GPU; None if they are on a CPU.
        packed: With a `NativeFormat` what `ops.sparse_matmul` takes.
        split: How the arrays are split over devices, under JAX; None if not.
        unused_axes: List of strings, the axes of the mesh that split the
            weight and not the arrays.
        layouts: Dict of the layouts of the arrays, by their names.

    Args:
        target: `Target` without a `reason_to_skip`.
        form: `Format`.
        trainable: Bool, whether the values are trained.
        activations: String, what they are multiplied by where the format
            knows it; else the first that it knows.

    Raises:
        ValueError: If values of the format cannot be trained.
    """

    name = "packed"
    finish = "unpack(model)"
    keeps_stored = False
    rounding_error: float | None = None
    integers = ""
    is_held = False
    plan: Any = None
    packed: Any = None
    split: Any = None
    unused_axes: Sequence[str] = ()

    def __init__(self, target, form, trainable, activations):
        super().__init__(target)
        if trainable and not form.trainable:
            raise ValueError(
                "Only float32 values of 2:4 kernels can be trained. Received: "
                "trainable=True, "
                f"format={form.name!r}"
            )
        own = form.activations
        activations = activations if activations in own else own[0]
        self.form, self.trainable = form, trainable
        self.activations = activations
        self.pattern = form.pattern
        self.kind = kind_with_call(target.layer)
        axes = target.contraction_axes, target.stack_axes
        self.stacks, rows, self.units = stack_shape(target.shape, *axes)
        # Each of several kernels begins a block of the format.
        self.width = self.units
        if target.stack_axes:
            self.width = -(-self.units // form.columns) * form.columns
        self.shape = rows, self.stacks * self.width
        self.arrays = form.arrays(self.shape)
        self.layouts: dict[str, Any] = {}
        self.named: dict[str, Any] = {}
        self.companions: dict[str, Any] = {}
        is_embedding = isinstance(target.layer, keras.layers.Embedding)
        is_table = is_embedding and target.attribute == "embeddings"
        self.mixin: Any = _PackedTableCall if is_table else _PackedCall
        if not isinstance(form, NativeFormat):
            return
        layout = keras_compat.layout_of(target.variable)
        # Training changes the values in each step, so preparing them is
        # useless.
        if not trainable:
            self.plan = gpu_plan(
                self.shape, target.layer.compute_dtype, activations
            )
            # On a GPU only 2:4 kernels have sparse products, not stacks, nor
            # parts that are split over devices.
            is_dense = self.plan is not None and (
                form.pattern != "2:4"
                or target.stack_axes
                or not self.plan.is_sparse
                or layout is not None
            )
            # Compiled kernels multiply by other patterns only in integers.
            is_float = activations == "float32"
            self.is_held = bool(
                reason_for_dense()
                or is_dense
                or (is_float and form.pattern != "2:4")
            )
            if self.is_held and is_float and not is_table:
                # The layer's own call multiplies.
                self.mixin = None
        if self.is_held:
            self.layouts["unpacked"] = layout
        elif layout is not None:
            self._split_as(layout, is_table)

    @classmethod
    def from_config(cls, target, config):
        reason = reason_to_skip(target)
        if reason is not None:
            raise ValueError(f"{target.path!r} cannot be packed: {reason}")
        if set(config) != set(_SETTINGS):
            expected = "a dict of `format`, `trainable` and `activations`"
            raise checks.error("config", expected, config)
        name, trainable, activations = map(config.get, _SETTINGS)
        form = FORMATS[checks.check_choice("format", name, tuple(FORMATS))]
        checks.check_choice("activations", activations, form.activations)
        checks.check_bool("trainable", trainable)
        item = cls(target, form, trainable, activations)
        item.is_empty = True
        return item

    def get_config(self):
        values = self.form.name, self.trainable, self.activations
        return dict(zip(_SETTINGS, values))

    @property
    def rounds_inputs(self):
        return self.activations != "float32"

    def pack(self, weight=None):
        """Pack the weight, before `create_parameters` does it.

        Args:
            weight: Array, where Keras has rounded it and the variable has no
                value.
        """
        is_float = weight is None
        self.integers = "" if is_float else "rounded again"
        matrix = self.matrix(self.target.variable if is_float else weight)
        self.named = dict(self.form.pack(matrix))
        self._measure(matrix)

    def pack_integers(self, codes, scale):
        """Pack a weight that Keras has rounded; return whether it worked.

        Args:
            codes, scale: Arrays whose product the weight is. The first are
                integers, and are kept as they are.
        """
        codes, scale = self.matrix(codes), self.matrix(scale)
        named = self.form.pack_integers(codes, scale)
        if named is not None:
            self.named, self.integers = dict(named), "kept"
            self._measure(codes * scale)
        return named is not None

    def _measure(self, matrix):
        if self.form.dtype != "float32":
            rest = self.form.unpack(self.named, self.shape, np)
            rest -= matrix
            error, norm = (
                np.sqrt(np.einsum("ij,ij", x, x, dtype="float64"))
                for x in (rest, matrix)
            )
            self.rounding_error = float(error / norm) if norm else 0.0

    def create_parameters(self, add_weight):
        def add(name, spec, trainable=False, autocast=False):
            return keras_compat.add_laid_out(
                add_weight,
                self.layouts.get(name),
                name=self.key(name),
                shape=spec[0],
                dtype=spec[1],
                initializer="zeros",
                trainable=trainable,
                # In half precision, the packed values would change.
                autocast=autocast,
            )

        if not (self.is_empty or self.named):
            self.pack()
        current, form = backend.current(), self.form
        if self.is_held:
            spec = self.target.shape, self.dtype
            # The layer's own call casts it.
            dense = add("unpacked", spec, autocast=not self.rounds_inputs)
            self.companions["unpacked"] = dense
        else:
            for name, spec in self.arrays.items():
                packed = self.named.get(name)
                trained = self.trainable and name == "values"
                self.named[name] = add(name, spec, trained)
                if packed is not None:
                    self.named[name].assign(packed)
            if isinstance(form, NativeFormat):
                self.packed = form.packed(
                    self.named, self.shape, self.activations
                )
            if self.split is not None:
                cls = current.layouts().SplitPacked
                self.packed = cls(**vars(self.packed), split=self.split)
            if self.plan is not None and keras.backend.backend() == "jax":
                gpu = current.gpu_products()
                x_dtype = self.target.layer.compute_dtype
                for kind in self.plan.companions:
                    spec = gpu.companion_spec(kind, self.shape, x_dtype)
                    self.companions[kind] = add(f"companion_{kind}", spec)
                more = {"companions": self.companions, "x_dtype": x_dtype}
                self.packed = gpu.PreparedPacked(**vars(self.packed), **more)
        if not self.is_empty:
            self._prepare()

    def _prepare(self):
        """Compute the companions, or the dense weight, from the arrays."""
        for kind, variable in self.companions.items():
            if self.is_held:
                made = self._from_arrays()
            else:
                gpu, packed = backend.current().gpu_products(), self.packed
                made = gpu.companion(kind, packed, packed.x_dtype)
            variable.assign(made)

    def key(self, name):
        """Return the name of the parameter that holds the array `name`."""
        return f"{self.target.attribute}_{name}"

    def saved_arrays(self):
        return {self.key(name): spec for name, spec in self.arrays.items()}

    def saved(self):
        if self.is_held:
            dense = backend.whole(self.companions["unpacked"])
            same = ops.convert_to_numpy(self._from_arrays())
            # Other code may have set the weight.
            if not np.array_equal(same, dense, equal_nan=True):
                self.named = dict(self.form.pack(self.matrix(dense)))
        return {self.key(name): array for name, array in self.named.items()}

    def load(self, saved):
        for name in self.arrays:
            array = saved[self.key(name)]
            if self.is_held:
                self.named[name] = array
            else:
                self.named[name].assign(array)
        self._prepare()

    def multiply(self, x, stacked=False):
        """Return `x`, (..., K) or (..., S, K), times the matrix."""
        if not stacked:
            return self.form.multiply(self, x)
        if x.shape[-2] == 1:
            # All have the same rows: make one product with the kernels side by
            # side.
            y = self.form.multiply(self, x[..., 0, :])
            leading = ops.shape(y)[:-1]
            y = ops.reshape(y, (*leading, self.stacks, self.width))
            return y[..., : self.units]
        parts = [
            self.form.multiply(self, x[..., i, :], slice(at, at + self.units))
            for i, at in enumerate(range(0, self.shape[1], self.width))
        ]
        return ops.stack(parts, axis=-2)

    def effective(self, stored):
        self.warn_in_training()
        if self.is_held:
            return ops.convert_to_tensor(self.companions["unpacked"])
        return ops.cast(self._kernel(self.tensor()), self.dtype)

    def warn_in_training(self):
        """Warn, once a model, that a fit leaves the packed weights alone."""
        if self.trainable or not keras_compat.is_training():
            return
        model, layer = self.get_model(), self.target.layer
        has_lora = getattr(layer, "lora_enabled", False)
        if has_lora or not layer.trainable or model is None or model in _WARNED:
            return
        _WARNED.add(model)
        weights = model.trainable_variables
        count = sum(math.prod(variable.shape) for variable in weights)
        warnings.warn(
            f"The model {model.name!r} is called with `training=True`, as by "
            "`fit`, and has packed weights, which no training changes. The "
            f"first is {self.target.path!r}. Without them it trains {count:,} "
            "numbers, of biases, norms and other weights. Train it before "
            "`pack`, or after `unpack(model)`. Or train the values of 2:4 "
            "kernels with `pack(model, trainable=True)`, or LoRA on the packed "
            "layers with `layer.enable_lora`. To train only the rest, set "
            "`trainable = False` on the packed layers.",
            stacklevel=2,
        )

    def tensor(self):
        """Return the matrix (K, N) of the arrays, a float32 tensor."""
        arrays = {k: ops.convert_to_tensor(v) for k, v in self.named.items()}
        return self.form.unpack(arrays, self.shape, ops)

    def folded(self):
        if self.is_held:
            return self.effective(None)
        return self._from_arrays()

    def exact(self):
        """Return the weight in float32: integers times scales, not rounded."""
        self.saved()  # Someone else may have set one that is held.
        return self._from_arrays("float32")

    def to_integers(self):
        """Return the integers of the weight, and the scale of each.

        Returns:
            Pair of float32 arrays of the weight's shape; None if the format
            holds no integers.
        """
        self.saved()  # See `exact`.
        arrays = {k: ops.convert_to_numpy(v) for k, v in self.named.items()}
        pair = self.form.unpack_integers(arrays, self.shape)
        if pair is not None:
            pair = tuple(ops.convert_to_numpy(self._kernel(x)) for x in pair)
        return pair

    def for_onnx(self, target, activations):
        """Return the same integers for a copy of the model, for ONNX.

        Args:
            target: The same target in the copy.
            activations: As above.

        Returns:
            `PackedParameters`, not attached; None if there are no integers.
        """
        pair = self.to_integers()
        if pair is None:
            return None
        form = OnnxFormat(self.form.dtype)
        item = PackedParameters(target, form, False, activations)
        item.named = form.pack_integers(*map(item.matrix, pair))
        return item

    def _from_arrays(self, dtype=None):
        # In NumPy there is no large tensor for each step. The result is
        # contiguous: on torch the strides of a transpose change sums.
        arrays = {k: ops.convert_to_numpy(v) for k, v in self.named.items()}
        kernel = self._kernel(self.form.unpack(arrays, self.shape, np))
        kernel = np.ascontiguousarray(ops.convert_to_numpy(kernel))
        return ops.cast(kernel, dtype or self.dtype)

    def matrix(self, weight):
        """Return a dense weight as a float32 NumPy matrix (K, N)."""
        axes = self.target.contraction_axes, self.target.stack_axes
        stack = to_stack(weight, *axes)
        if self.width > self.units:
            missing = self.width - self.units
            stack = ops.pad(stack, ((0, 0), (0, 0), (0, missing)))
        matrix = ops.reshape(ops.transpose(stack, (1, 0, 2)), self.shape)
        return np.ascontiguousarray(ops.convert_to_numpy(matrix), np.float32)

    def _kernel(self, matrix):
        """Return a matrix (K, N) as a kernel of the target's shape."""
        target = self.target
        stack = ops.reshape(matrix, (self.shape[0], self.stacks, self.width))
        stack = ops.transpose(stack[:, :, : self.units], (1, 0, 2))
        axes = target.contraction_axes, target.stack_axes
        return from_stack(stack, target.shape, *axes)

    def _split_as(self, layout, is_table):
        """Split the arrays over devices as the weight is, under JAX."""
        layouts = backend.current().layouts()
        if layouts is None:
            return
        sides: tuple[str, ...] = ("rows", "columns")
        if is_table:
            # The rows that are looked up are columns here, each in one place.
            sides = ("columns",)
        elif self.target.stack_axes:
            # Otherwise the columns of one kernel would be on one device.
            sides = ("rows",)
        axes = self.target.contraction_axes
        self.split, self.unused_axes = layouts.split_of(
            layout, axes, self.shape, self.form.dtype, sides
        )
        if self.split is not None:
            self.layouts = self.split.layouts(self.arrays)


class _PackedCall:
    """The `call` of a layer with packed weights."""

    def call(self: Any, *args, **kwargs):
        items = slots(self).values()
        kind: Any = next(
            i.kind for i in items if isinstance(i, PackedParameters)
        )
        return kind.call(self, _PackedProducts(self), *args, **kwargs)


class _PackedTableCall(_PackedCall):
    """The `call` of a layer with a packed table, which takes no LoRA."""

    def enable_lora(self: Any, *args, **kwargs):
        raise ValueError(
            "LoRA needs a dense table. Received: a packed one in layer "
            f"{self.name!r}. Call `unpack(model)` first."
        )


class _PackedProducts(Products):
    """The products with packed weights, and with all others."""

    def __call__(self, attribute, rows, stacked=False):
        item = slots(self.layer).get(attribute)
        if not isinstance(item, PackedParameters):
            return super().__call__(attribute, rows, stacked)
        item.warn_in_training()
        if item.is_held:
            dtype = rows.dtype
            if item.rounds_inputs:
                rows = quantize.round_activations(ops.cast(rows, "float32"))
            return ops.cast(super().__call__(attribute, rows, stacked), dtype)
        y = item.multiply(rows, stacked)
        if attribute == "kernel" and getattr(self.layer, "lora_enabled", False):
            y = ops.add(y, _low_rank_product(item, rows, stacked))
        return y

    def look_up(self, attribute, indices):
        item = slots(self.layer).get(attribute)
        if not isinstance(item, PackedParameters) or item.is_held:
            return super().look_up(attribute, indices)
        item.warn_in_training()
        rows = item.form.look_up(item, ops.cast(indices, "int32"))
        return ops.cast(rows, self.layer.compute_dtype)


def _low_rank_product(item, rows, stacked):
    """Return rows times what LoRA adds to a kernel.

    Multiply by one factor after the other. Their product is a dense kernel,
    which packing is to avoid. Keras' factors share the last axis of the kernel.
    """
    target, layer = item.target, item.target.layer
    contraction, stack = target.contraction_axes, target.stack_axes
    letters = string.ascii_lowercase[: len(target.shape)]
    inner, outer = (
        "".join(letters[axis] for axis in (*stack, *axes))
        for axes in (contraction, target.output_axes)
    )
    # In a pure bfloat16 policy Keras makes them float32.
    factors = [
        (f"{letters[:-1]}z", ops.cast(layer.lora_kernel_a, rows.dtype)),
        (f"z{letters[-1]}", ops.cast(layer.lora_kernel_b, rows.dtype)),
    ]
    if letters[-1] in inner:
        factors.reverse()
    leading = ops.shape(rows)[:-1]
    ends: tuple[int, ...] = (-1,)
    if stacked:
        rows = ops.broadcast_to(
            rows, (*leading[:-1], item.stacks, rows.shape[-1])
        )
        leading, ends = leading[:-1], (item.stacks, -1)
    sizes = [target.shape[axis] for axis in (*stack, *contraction)]
    rows = ops.reshape(rows, (*leading, *sizes))
    (first, a), (second, b) = factors
    # In one step, torch could not trace it with a free size.
    every = dict.fromkeys(inner + first)
    middle = "".join(letter for letter in every if letter in second + outer)
    rows = ops.einsum(f"...{inner},{first}->...{middle}", rows, a)
    y = ops.einsum(f"...{middle},{second}->...{outer}", rows, b)
    y = ops.reshape(y, (*leading, *ends))
    return ops.multiply(y, layer.lora_alpha / layer.lora_rank)
