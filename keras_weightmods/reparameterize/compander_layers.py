"""Dense, EinsumDense and convolutions with a compander."""

from typing import TYPE_CHECKING, Any

import keras

from keras_weightmods.core import keras_compat, reparameterized_layer, seam
from keras_weightmods.core.reparameterization import slots
from keras_weightmods.core.targets import target_of
from keras_weightmods.reparameterize.compander import CompandedKernel, Compander

# For type checkers: the layer class that follows.
_Layer: Any = keras.layers.Layer if TYPE_CHECKING else object


class CompanderLayer(_Layer):
    """Put a `Compander` on the kernel of the layer class that follows.

    The arguments are those of the layer class and of `CompanderDense`.
    """

    kernel = reparameterized_layer.effective_weight("kernel")

    def __init__(
        self,
        *args: Any,
        a: float = 0.5,
        b: float | None = None,
        learnable: bool = False,
        function: str = "arctan",
        out_of_range: str = "clip",
        **kwargs: Any,
    ):
        item = Compander(None, a, b, learnable, function, out_of_range)
        super().__init__(*args, **kwargs)
        self._compander_to_build = item

    @property
    def compander(self) -> CompandedKernel:
        """The `CompandedKernel` of the built layer, with its a and b."""
        item: Compander = slots(self).get("kernel")
        return item.summary()

    def build(self, input_shape: Any) -> None:
        if self.quantization_mode is not None:
            raise ValueError(
                "A layer with a compander cannot be built quantized. Received: "
                f"dtype={self.dtype_policy.name!r} for layer {self.name!r}. "
                "Train it in floating point, `fold` it, then quantize."
            )
        super().build(input_shape)
        item = keras_compat.attributes(self).pop("_compander_to_build")
        item.bind(target_of(self))
        seam.install(item)

    def add_weight(self, *args: Any, **kwargs: Any) -> keras.Variable:
        # Not after the build, when the value may still be missing.
        if kwargs.get("name") == "kernel":
            item = self._compander_to_build
            draw = keras.initializers.get(
                kwargs.get("initializer") or "glorot_uniform"
            )

            def start(shape: Any, dtype: Any) -> Any:
                value = draw(shape, dtype=dtype)
                # Only a placeholder is needed here; the value is requested
                # later.
                if keras_compat.in_stateless_scope():
                    return value
                return item.start(value)

            kwargs["initializer"] = start
        return super().add_weight(*args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        item = keras_compat.attributes(self).get("_compander_to_build")
        if item is None:
            item = slots(self)["kernel"]
        config = {**super().get_config(), **item.settings()}
        if item.raised:
            # A copy gets the same `a`, whatever it draws.
            config["out_of_range"] = "clip"
        return config


class _CompanderLoraLayer(
    CompanderLayer, reparameterized_layer.ReparameterizedLoraLayer
):
    pass


@keras.saving.register_keras_serializable(package="keras_weightmods")
class CompanderDense(_CompanderLoraLayer, keras.layers.Dense):
    """`keras.layers.Dense` that trains its kernel through w = a f(v / b).

    The layer uses Weight Compander (arXiv 2306.16993) and starts as the plain
    one does. It stores the v that gives the weights drawn by the initializer.
    `kernel` is w; `fold` makes the layer a plain `Dense` again.
    `attach_compander` does the same to the layers of an existing model, and
    describes weight decay.

    Args:
        *args, **kwargs: As in `keras.layers.Dense`.
        a: Float above 0.001, the height of the function, or its start if
            learnable. Defaults to `0.5`.
        b: Float above 0.001, the width of the function, or its start if
            learnable. Defaults to `a`, and to twice that if learnable.
        learnable: Bool, whether a and b are trained. Defaults to `False`.
        function: `"arctan"`, `"arsinh"` or `"erf"`, as in `ops.compand`.
            Defaults to `"arctan"`.
        out_of_range: What to do if the initializer draws weights beyond 0.99
            of the range, which is a pi / 2 for `"arctan"`: `"clip"` them, or
            `"raise_a"`. `layer.compander` counts them. Defaults to `"clip"`.

    Raises:
        ValueError: If an argument is wrong. On build: if the dtype is
            quantized.

    Example:

    ```python
    import keras
    import keras_weightmods as kwm

    layer = kwm.CompanderDense(4, a=0.5)
    layer.build((2, 16))
    assert round(layer.compander.a, 6) == 0.5
    assert layer.compander.outside == 0
    ```
    """


@keras.saving.register_keras_serializable(package="keras_weightmods")
class CompanderEinsumDense(_CompanderLoraLayer, keras.layers.EinsumDense):
    """`keras.layers.EinsumDense` with the compander of `CompanderDense`.

    Args:
        *args, **kwargs: As in `keras.layers.EinsumDense`.
        a, b, learnable, function, out_of_range: As in `CompanderDense`.

    Raises:
        ValueError: As `CompanderDense`.

    Example:

    ```python
    import keras
    import keras_weightmods as kwm

    layer = kwm.CompanderEinsumDense("abc,cd->abd", (None, 4))
    layer.build((2, 3, 16))
    assert round(layer.compander.a, 6) == 0.5
    ```
    """


@keras.saving.register_keras_serializable(package="keras_weightmods")
class CompanderConv1D(_CompanderLoraLayer, keras.layers.Conv1D):
    """`keras.layers.Conv1D` with the compander of `CompanderDense`.

    Args:
        *args, **kwargs: As in `keras.layers.Conv1D`.
        a, b, learnable, function, out_of_range: As in `CompanderDense`.

    Raises:
        ValueError: As `CompanderDense`.

    Example:

    ```python
    import keras
    import keras_weightmods as kwm

    layer = kwm.CompanderConv1D(4, 3)
    layer.build((2, 8, 3))
    assert round(layer.compander.a, 6) == 0.5
    ```
    """


@keras.saving.register_keras_serializable(package="keras_weightmods")
class CompanderConv2D(_CompanderLoraLayer, keras.layers.Conv2D):
    """`keras.layers.Conv2D` with the compander of `CompanderDense`.

    Args:
        *args, **kwargs: As in `keras.layers.Conv2D`.
        a, b, learnable, function, out_of_range: As in `CompanderDense`.

    Raises:
        ValueError: As `CompanderDense`.

    Example:

    ```python
    import keras
    import keras_weightmods as kwm

    layer = kwm.CompanderConv2D(4, 3)
    layer.build((2, 8, 8, 3))
    assert round(layer.compander.a, 6) == 0.5
    ```
    """


@keras.saving.register_keras_serializable(package="keras_weightmods")
class CompanderConv3D(_CompanderLoraLayer, keras.layers.Conv3D):
    """`keras.layers.Conv3D` with the compander of `CompanderDense`.

    Args:
        *args, **kwargs: As in `keras.layers.Conv3D`.
        a, b, learnable, function, out_of_range: As in `CompanderDense`.

    Raises:
        ValueError: As `CompanderDense`.

    Example:

    ```python
    import keras
    import keras_weightmods as kwm

    layer = kwm.CompanderConv3D(4, 3)
    layer.build((2, 8, 8, 8, 3))
    assert round(layer.compander.a, 6) == 0.5
    ```
    """


@keras.saving.register_keras_serializable(package="keras_weightmods")
class CompanderDepthwiseConv2D(
    CompanderLayer,
    reparameterized_layer.ReparameterizedLayer,
    keras.layers.DepthwiseConv2D,
):
    """`keras.layers.DepthwiseConv2D` with the compander of `CompanderDense`.

    Args:
        *args, **kwargs: As in `keras.layers.DepthwiseConv2D`.
        a, b, learnable, function, out_of_range: As in `CompanderDense`.

    Raises:
        ValueError: As `CompanderDense`.

    Example:

    ```python
    import keras
    import keras_weightmods as kwm

    layer = kwm.CompanderDepthwiseConv2D(3)
    layer.build((2, 8, 8, 3))
    assert round(layer.compander.a, 6) == 0.5
    ```
    """
