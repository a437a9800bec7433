"""What packed kernels and packed tables have in common."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.backend import backend_module
from keras_weightmods.core import keras_compat
from keras_weightmods.core.reparameterization import Reparameterization
from keras_weightmods.utils import checks


class PackedParameters(Reparameterization):
    """A weight whose parameters stand for it: the packed arrays.

    Subclasses have `reason_to_skip(target)`, and `make(target, **config)`,
    which chooses the class to use here; `settings` are the keys of the config,
    beside `"activations"`, which is left out where it is `"float32"`, as in the
    files of earlier releases.

    Attributes:
        activations: String, what the values are multiplied by, see `Packed`.
        rounding_error: Float, what rounding changed: the norm of the difference
            over that of the weights. None without rounding, or from a file.
        split: How the arrays are split over devices, under JAX; None if not.
        unused_axes: List of strings, the axes of the mesh that split the
            weight and not the arrays.
        layouts: Dict of the layouts of the arrays, by their names.

    Args:
        target: The `Target` to pack.
    """

    finish = "unpack(model)"
    keeps_stored = False
    settings: tuple[str, ...] = ()
    activations = "float32"
    rounding_error: float | None = None
    split: Any = None
    unused_axes: Sequence[str] = ()
    make: Any
    reason_to_skip: Any

    def __init__(self, target):
        super().__init__(target)
        self.layouts: dict[str, Any] = {}

    @classmethod
    def from_config(cls, target, config):
        reason = cls.reason_to_skip(target)
        if reason is not None:
            raise ValueError(f"{target.path!r} cannot be packed: {reason}")
        if set(config) - {"activations"} != set(cls.settings):
            expected = f"a dict with the keys {cls.settings}"
            raise checks.error("config", expected, config)
        item = cls.make(target, **config)
        item.is_empty = True
        return item

    @property
    def rounds_inputs(self):
        return self.activations != "float32"

    def with_activations(self, config):
        """Return the config with the activations, unless they are floats."""
        if self.activations == "float32":
            return config
        return {**config, "activations": self.activations}

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

    def split_as_weight(self, matrix_shape, dtype, arrays, sides):
        """Split the packed arrays over devices as the weight is.

        Args:
            matrix_shape: Pair of ints (K, N), the matrix that is packed.
            dtype: String, type of its values.
            arrays: What `packed_arrays` returns.
            sides: Tuple of what may be split, of `"rows"` and `"columns"`.
        """
        layout = keras_compat.layout_of(self.target.variable)
        if layout is None or keras.backend.backend() != "jax":
            return
        module = backend_module("layouts")
        axes = self.target.contraction_axes
        self.split, self.unused_axes = module.split_of(
            layout, axes, matrix_shape, dtype, sides
        )
        if self.split is not None:
            self.layouts = self.split.layouts(arrays)

    def with_split(self, packed):
        """Return a `Packed`, told of how its arrays are split."""
        if self.split is None:
            return packed
        return backend_module("layouts").SplitPacked.of(packed, self.split)


class HeldDense(PackedParameters):
    """What nothing can multiply by here: rounded alike, and held dense."""

    def effective(self, stored):
        return ops.convert_to_tensor(self.parameters[0])

    def folded(self):
        return self.effective(None)


def relative_error(rounded, weights):
    """Return the norm of `rounded - weights` over that of `weights`.

    Args:
        rounded: NumPy array of shape (rows, ...).
        weights: Array, tensor or variable of the same shape.
    """
    weights = ops.convert_to_numpy(weights)
    error = norm = 0.0
    # Not all at once: a table may be the largest array of a model.
    for start in range(0, len(weights), 256):
        part = weights[start : start + 256].astype("float32")
        difference = rounded[start : start + 256] - part
        error += float(np.sum(np.square(difference, dtype="float64")))
        norm += float(np.sum(np.square(part, dtype="float64")))
    return float(np.sqrt(error / norm)) if norm else 0.0
