"""The gradients of a compiled model's loss on one batch."""

from typing import Any

import keras
from keras import ops

from keras_weightmods.backend import backend_module


def loss_gradients(model: Any, variables: list[Any], data: Any) -> list[Any]:
    """Return the gradients of the loss, with the model as it infers.

    Args:
        model: A compiled Keras model.
        variables: List of its `keras.Variable`s.
        data: `(x, y)` or `(x, y, sample_weight)`, one batch.

    Returns:
        List of tensors, one for each variable.

    Example:

    ```python
    import keras
    import numpy as np
    from keras_weightmods.core.loss_gradients import loss_gradients

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    data = np.ones((2, 3)), np.ones((2, 1))
    kernel, bias = loss_gradients(model, model.trainable_variables, data)
    assert kernel.shape == (3, 1)
    ```
    """
    x, y, *weight = keras.tree.map_structure(ops.convert_to_tensor, data)
    return backend_module("loss_gradients").loss_gradients(
        model, variables, x, y, weight[0] if weight else None
    )
