"""What packed kernels and packed tables have in common."""

from typing import Any

from keras import ops

from keras_weightmods.core.reparameterization import Reparameterization


class PackedParameters(Reparameterization):
    """A weight whose parameters stand for it: the packed arrays.

    Args:
        target: The `Target` to pack.
    """

    finish = "unpack(model)"
    keeps_stored = False
    value_dtype: str

    def key(self, name):
        """Return the name of the parameter that holds the array `name`."""
        return f"{self.target.attribute}_{name}"

    def add(self, add_weight, name, spec, array=None, **kwargs: Any):
        """Add a parameter of `spec`, a shape and a dtype; zeros for None."""
        # In half precision, what was packed would change.
        arguments = {"trainable": False, "autocast": False, **kwargs}
        shape, dtype = spec
        initializer = "zeros" if array is None else _Fixed(array)
        add_weight(
            name=self.key(name),
            shape=shape,
            dtype=dtype,
            initializer=initializer,
            **arguments,
        )


class _Fixed:
    """Initializer that returns an array."""

    def __init__(self, array):
        self.array = array

    def __call__(self, shape, dtype=None):
        return ops.convert_to_tensor(self.array, dtype)
