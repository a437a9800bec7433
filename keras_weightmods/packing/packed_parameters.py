"""What packed kernels and packed tables have in common."""

from typing import Any

from keras import ops

from keras_weightmods.core.reparameterization import Reparameterization
from keras_weightmods.utils import checks


class PackedParameters(Reparameterization):
    """A weight whose parameters stand for it: the packed arrays.

    Subclasses have `reason_to_skip(target)`, and `make(target, **config)`,
    which chooses the class to use here; `settings` are the keys of the config.

    Args:
        target: The `Target` to pack.
    """

    finish = "unpack(model)"
    keeps_stored = False
    settings: tuple[str, ...] = ()
    make: Any
    reason_to_skip: Any

    @classmethod
    def from_config(cls, target, config):
        reason = cls.reason_to_skip(target)
        if reason is not None:
            raise ValueError(f"{target.path!r} cannot be packed: {reason}")
        if set(config) != set(cls.settings):
            expected = f"a dict with the keys {cls.settings}"
            raise checks.error("config", expected, config)
        item = cls.make(target, **config)
        item.is_empty = True
        return item

    def key(self, name):
        """Return the name of the parameter that holds the array `name`."""
        return f"{self.target.attribute}_{name}"

    def add(self, add_weight, name, spec, array=None, **kwargs):
        """Add a parameter of `spec`, a shape and a dtype; zeros for None."""

        def initializer(shape, dtype):
            return ops.convert_to_tensor(array, dtype)

        # In half precision, what was packed would change.
        arguments = {"trainable": False, "autocast": False, **kwargs}
        add_weight(
            name=self.key(name),
            shape=spec[0],
            dtype=spec[1],
            initializer="zeros" if array is None else initializer,
            **arguments,
        )


class HeldDense(PackedParameters):
    """What nothing can multiply by here: rounded alike, and held dense."""

    mixin: type | None = None

    def effective(self, stored):
        return ops.convert_to_tensor(self.parameters[0])

    def folded(self):
        return self.effective(None)
