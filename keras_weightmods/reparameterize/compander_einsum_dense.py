"""EinsumDense with a compander."""

import keras

from keras_weightmods.core.seam import ReparameterizedLoraLayer
from keras_weightmods.reparameterize.compander_layer import CompanderLayer


@keras.saving.register_keras_serializable(package="keras_weightmods")
class CompanderEinsumDense(
    CompanderLayer, ReparameterizedLoraLayer, keras.layers.EinsumDense
):
    """`keras.layers.EinsumDense` trained through w = a f(v / b).

    Weight Compander (arXiv 2306.16993). The layer starts as the plain one
    does: what its initializer draws becomes the v that gives it. `kernel` is
    w; `fold` makes the layer a plain `EinsumDense` again. See
    `attach_compander`, which does the same to the layers of a model that
    exists, for weight decay.

    Args:
        *args, **kwargs: As in `keras.layers.EinsumDense`.
        a: Float above 0.001, the height of the function, or its start if
            learnable. Defaults to `0.5`.
        b: Float above 0.001, the width of the function, or its start if
            learnable. Defaults to `1.0`.
        learnable: Bool, whether a and b are trained. Defaults to `True`.
        function: `"arctan"`, `"arsinh"` or `"erf"`, as in `ops.compand`.
            Defaults to `"arctan"`.
        out_of_range: What to do if the initializer draws weights beyond 0.99
            of the range, which is a pi / 2 for `"arctan"`: `"clip"` them,
            `"raise_a"`, or `"error"`. `layer.compander` counts them. Defaults
            to `"clip"`.

    Raises:
        ValueError: If an argument is wrong; on build, if a weight is out of
            range with `out_of_range="error"`, or the dtype is quantized.

    Example:

    ```python
    import keras
    import keras_weightmods as kwm

    layer = kwm.CompanderEinsumDense("abc,cd->abd", (None, 4))
    layer.build((2, 3, 16))
    assert round(layer.compander.a, 6) == 0.5
    assert layer.compander.outside == 0
    ```
    """
