"""The order in which the layers of a model run."""

import contextlib
from collections.abc import Sequence
from typing import Any

import keras

from keras_weightmods.core import keras_compat
from keras_weightmods.core.watched import called_by


def execution_order(model: Any, layers: Sequence[Any]) -> dict[int, int]:
    """Return {id of layer: place} of those of `layers` that run.

    The declared order is another: a block often creates its output
    projection before its query. So the model is run once on symbols.

    Args:
        model: A built Keras model or layer. It is not changed.
        layers: Sequence of layers in it.

    Returns:
        Dict, empty where the model cannot be run on symbols.
    """
    if not layers:
        return {}
    parts = keras_compat.layers_of(model)
    for size in (4, 64, 256):
        order: dict[int, int] = {}
        try:
            inputs = _symbolic_inputs(model, size)
            if inputs is None:
                break
            args, kwargs = inputs
            with (
                keras_compat.restored_attributes(parts),
                contextlib.ExitStack() as stack,
            ):
                for layer in layers:
                    # A model keeps its class.
                    if not isinstance(layer, keras.Model):
                        stack.enter_context(_noted(layer, order))
                _Run(model).compute_output_spec(*args, **kwargs)
        # What a model's own code raises on symbols or on this size is not
        # known. Without an order, the declared one remains.
        except Exception:
            continue
        return order
    return {}


class _Run(keras.Operation):
    """A model as an operation whose `call` runs it, without a trace in it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def call(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def _noted(layer: Any, order: dict[int, int]) -> Any:
    def call(plain: Any, *args: Any, **kwargs: Any) -> Any:
        order.setdefault(id(layer), len(order))
        return plain(*args, **kwargs)

    return called_by(layer, call)


def _symbolic_inputs(model: Any, size: int) -> Any:
    """Return the pair (args, kwargs) to call `model` with, or None.

    Open dimensions become `size`, an open batch 1. Keras itself would put in
    large numbers, and two of them; on torch, where a model that cannot run
    on the meta device runs eagerly, that takes minutes for an LLM.
    """

    def symbol(shape: Any, dtype: Any) -> keras.KerasTensor:
        filled = [size if dim is None else dim for dim in shape]
        if shape and shape[0] is None:
            filled[0] = 1
        return keras.KerasTensor(filled, dtype=dtype)

    def of_tensor(x: Any) -> keras.KerasTensor:
        return symbol(x.shape, x.dtype)

    def of_shape(shape: Any) -> Any:
        if isinstance(shape, dict):
            return {name: of_shape(each) for name, each in shape.items()}
        if any(isinstance(each, (tuple, list, dict)) for each in shape):
            return [of_shape(each) for each in shape]
        return symbol(shape, model.compute_dtype)

    if isinstance(model, keras.Sequential):
        return [of_tensor(model.inputs[0])], {}
    if getattr(model, "inputs", None):
        return [keras.tree.map_structure(of_tensor, model.input)], {}
    config = model.get_build_config() or {}
    if config.get("input_shape"):
        return [of_shape(config["input_shape"])], {}
    if config.get("shapes_dict"):
        return [], {
            name.removesuffix("_shape"): of_shape(shape)
            for name, shape in config["shapes_dict"].items()
        }
    return None
