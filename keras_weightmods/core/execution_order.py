"""The order in which the layers of a model run."""

import contextlib
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import keras

from keras_weightmods.core.restored import RestoredOnError
from keras_weightmods.core.watched import called_by


def execution_order(model: Any, layers: Sequence[Any]) -> dict[int, int]:
    """Return {id of layer: place} of those of `layers` that run.

    The declared order can differ: a block often creates its output projection
    before its query. So the model runs once on symbolic tensors.

    Args:
        model: A built Keras model or layer. It is not changed.
        layers: Sequence of layers in it.

    Returns:
        Dict, empty where the model cannot be run on symbols.
    """
    for size in (4, 64, 256) if layers else ():
        order: dict[int, int] = {}
        # A model's own code may raise anything on symbolic tensors or on this
        # size. The declared order is then used.
        with (
            contextlib.suppress(Exception),
            RestoredOnError(model) as restored,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            _note_order(model, layers, size, order)
            # Keras on torch continues after Ctrl-C in a symbolic run.
            restored.structure.restore_attributes()
            return order
    return {}


def _note_order(
    model: Any, layers: Sequence[Any], size: int, order: dict[int, int]
) -> None:
    with contextlib.ExitStack() as stack:
        inputs, named_inputs = _symbolic_inputs(model, size)
        for layer in layers:
            # A model keeps its class.
            if not isinstance(layer, keras.Model):
                note = functools.partial(_noted, order, layer)
                stack.enter_context(called_by(layer, note))
        # An operation whose `call` is the model leaves no trace in it.
        run: Any = keras.Operation("run")
        run.call = model
        run.compute_output_spec(*inputs, **named_inputs)


def _noted(
    order: Any, layer: Any, plain: Any, *args: Any, **kwargs: Any
) -> Any:
    order.setdefault(id(layer), len(order))
    return plain(*args, **kwargs)


def _symbolic_inputs(model: Any, size: int) -> Any:
    """Return the pair (args, kwargs) to call `model` with.

    Open dimensions become `size`, an open batch 1. Keras itself would run the
    model twice, with large sizes. On torch, a model that cannot run on the meta
    device runs eagerly, which takes minutes for an LLM.
    """

    def symbol(shape: Any, dtype: str = model.compute_dtype) -> Any:
        filled = [size if dim is None else dim for dim in shape]
        if shape and shape[0] is None:
            filled[0] = 1
        return keras.KerasTensor(filled, dtype=dtype)

    def of_shapes(shape: Any) -> Any:
        # Not by `keras.tree`: a dict that Keras tracks is no input on JAX.
        if isinstance(shape, dict):
            return {name: of_shapes(each) for name, each in shape.items()}
        if any(isinstance(each, (tuple, list, dict)) for each in shape):
            return [of_shapes(each) for each in shape]
        return symbol(shape)

    if getattr(model, "inputs", None):
        is_list = isinstance(model, keras.Sequential)
        tensors = model.inputs[0] if is_list else model.input
        symbols = keras.tree.map_structure(
            lambda x: symbol(x.shape, x.dtype), tensors
        )
        return [symbols], {}
    config = model.get_build_config()
    if "shapes_dict" not in config:
        return [of_shapes(config["input_shape"])], {}
    return [], {
        name.removesuffix("_shape"): of_shapes(shapes)
        for name, shapes in config["shapes_dict"].items()
    }
