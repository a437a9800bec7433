"""What the layers with a compander have in common."""

from typing import TYPE_CHECKING, Any

import keras

from keras_weightmods.core import keras_private, seam
from keras_weightmods.core.targets import Target
from keras_weightmods.reparameterize.compander import Compander

# What a type checker is told of the class behind.
_Layer: Any = keras.layers.Layer if TYPE_CHECKING else object


class CompanderLayer(_Layer):
    """Puts a `Compander` on the kernel of the layer class behind it.

    Args:
        *args, **kwargs: As in the layer class.
        a: Float above 0.001, the height of the function, or its start.
            Defaults to `0.5`.
        b: Float above 0.001, the width of the function, or its start.
            Defaults to `1.0`.
        learnable: Bool, whether a and b are trained. Defaults to `True`.
        function: `"arctan"`, `"arsinh"` or `"erf"`, as in `ops.compand`.
            Defaults to `"arctan"`.
        out_of_range: What to do if the initializer draws weights beyond 0.99
            of the range, which is a pi / 2 for `"arctan"`: `"clip"` them,
            `"raise_a"`, or `"error"`. Defaults to `"clip"`.
    """

    kernel = seam.effective_weight("kernel")

    def __init__(
        self,
        *args,
        a=0.5,
        b=1.0,
        learnable=True,
        function="arctan",
        out_of_range="clip",
        **kwargs,
    ):
        item = Compander(None, a, b, learnable, function, out_of_range)
        super().__init__(*args, **kwargs)
        self._compander_to_build = item

    @property
    def compander(self):
        """The `CompandedKernel` of the built layer, with its a and b."""
        return seam.reparameterization(self, "kernel").summary()

    def build(self, input_shape):
        if self.quantization_mode is not None:
            raise ValueError(
                "A layer with a compander cannot be built quantized. Received: "
                f"dtype={self.dtype_policy.name!r} for layer {self.name!r}. "
                "Train it in floating point, `fold` it, then quantize."
            )
        super().build(input_shape)
        item = keras_private.attributes(self).pop("_compander_to_build")
        variable = self.kernel  # the stored one, until the item is installed
        item.bind(
            Target(self, variable, "kernel", (), (), (), 0, variable.path)
        )
        seam.install(item)

    def add_weight(self, *args, **kwargs):
        # Here and not after the build, where the value may not be there yet.
        if kwargs.get("name") == "kernel":
            item = self._compander_to_build
            draw = keras.initializers.get(
                kwargs.get("initializer") or "glorot_uniform"
            )

            def start(shape, dtype):
                value = draw(shape, dtype=dtype)
                # There it is asked for once more, as a mere placeholder.
                if keras_private.in_stateless_scope():
                    return value
                return item.start(value)

            kwargs["initializer"] = start
        return super().add_weight(*args, **kwargs)

    def get_config(self):
        item = keras_private.attributes(self).get("_compander_to_build")
        if item is None:
            item = seam.reparameterization(self, "kernel")
        return {
            **super().get_config(),
            "a": item.a,
            "b": item.b,
            "learnable": item.learnable,
            "function": item.function,
            # A raised `a` is to be the same in a copy, whatever is drawn.
            "out_of_range": "clip" if item.raised else item.out_of_range,
        }
