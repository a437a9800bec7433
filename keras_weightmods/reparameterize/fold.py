"""`fold`: turn reparameterized weights into plain ones."""

import keras

from keras_weightmods.core import seam
from keras_weightmods.core.reparameterization import reparameterizations
from keras_weightmods.utils import checks
from keras_weightmods.utils.progress import Progress


def fold(
    model: keras.layers.Layer, verbose: int = 1
) -> seam.ReparameterizationReport:
    """Write the effective weights into the layers, and make them plain again.

    This ends `attach_compander`, `attach_weight_norm` and `attach_scaling`. It
    also turns `CompanderDense` and its relatives into plain Keras layers. The
    model's outputs do not change, it costs as much as a plain model, and it
    saves and loads without this package.

    A built optimizer has state of weights that no longer exist, so the model is
    left uncompiled then: compile it again to train on. Packed weights stay
    packed; `unpack` unpacks them. A copy of the stored weights is held
    meanwhile, in case of an error.

    Args:
        model: A Keras model or layer. One without reparameterized weights is
            left as it is.
        verbose: 0 or 1. 0 shows no progress bar; 1 shows one once it has
            taken two seconds. Defaults to `1`.

    Returns:
        A `ReparameterizationReport`; its `kernels` keep their last values.

    Raises:
        ValueError: If a layer is of a subclass of the library's own layers, or
            `verbose` is neither 0 nor 1. The model is unchanged then.

    Example:

    ```python
    import keras
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((16,)), kwm.CompanderDense(4)])
    report = kwm.fold(model)
    assert type(model.layers[0]) is keras.layers.Dense
    assert len(report.kernels) == 1
    ```
    """
    checks.check_verbose(verbose)
    found = [item for item in reparameterizations(model) if item.keeps_stored]
    kinds = {type(item) for item in found}
    with Progress(len(found), "kernel", verbose) as progress:
        items = seam.fold(model, tuple(kinds), progress.add)
    kernels = tuple(item.summary() for item in items)
    return seam.ReparameterizationReport(kernels)
