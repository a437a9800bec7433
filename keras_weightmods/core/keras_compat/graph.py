"""Functional models, and the ops that they call."""

from collections.abc import Callable
from typing import Any

import keras
from keras.src import backend

# How a functional model calls its layers.
from keras.src.models.functional import Functional, operation_fn


def producer(tensor: Any) -> tuple[Any, list[Any]]:
    """Return the operation that made a symbolic tensor, and its inputs."""
    operation, index, _ = tensor._keras_history
    return operation, operation._inbound_nodes[index].input_tensors


def graph_of(operation: Any) -> Any:
    """Return the functional graph that calling `operation` runs, or None."""
    if isinstance(operation, keras.Sequential):
        return operation._functional
    is_plain = getattr(type(operation), "call", None) is Functional.call
    return operation if is_plain and "call" not in vars(operation) else None


def nodes_of(graph: Any) -> list[Any]:
    """Return the calls of a graph that compute something, in order."""
    known = {id(x) for x in graph.inputs}
    nodes = []
    for _, nodes_there in sorted(graph._nodes_by_depth.items(), reverse=True):
        for node in nodes_there:
            inputs = set(map(id, node.input_tensors))
            if not node.is_input and inputs <= known:
                known.update(map(id, node.outputs))
                nodes.append(node)
    return nodes


def constants_of(graph: Any) -> list[Any]:
    """Return the constant tensors that a graph passes to its calls."""
    given = [
        (node.arguments.args, node.arguments.kwargs) for node in nodes_of(graph)
    ]
    return [x for x in keras.tree.flatten(given) if backend.is_tensor(x)]


def graph_inputs(graph: Any, inputs: Any) -> list[Any]:
    """Return `inputs` as the flat list that `graph.inputs` stand for."""
    return graph._standardize_inputs(in_order(graph, inputs))


def graph_outputs(graph: Any, flat: list[Any]) -> Any:
    """Return flat outputs in the structure that the graph returns."""
    return keras.tree.pack_sequence_as(graph._outputs_struct, flat)


def graph_call(operation: Any, training: bool = False) -> Callable[..., Any]:
    """Return `operation` as a functional model calls it."""
    call = operation_fn(operation, training=training)
    graph = graph_of(operation)

    def ordered(*args: Any, **kwargs: Any) -> Any:
        if len(args) == 1:
            args = (in_order(graph, args[0]),)
        return call(*args, **kwargs)

    return call if graph is None else ordered


def wrapped_call(
    operation: Any, wrap: Callable[..., Any]
) -> Callable[..., Any]:
    """Return `graph_call`, with `wrap` around the calls that it consists of.

    Args:
        operation: Keras operation. A functional model consists of the calls in
            its graph, and of those in the graphs that it calls.
        wrap: Callable from one of these calls to another.
    """
    call, graph = graph_call(operation), graph_of(operation)

    def within(own: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if operation.compute_dtype == operation.variable_dtype:
                return own(*args, **kwargs)
            # Outside of the model `autocast=False` would have no effect.
            with backend.AutocastScope(operation.compute_dtype):
                return own(*args, **kwargs)

        return wrap(run)

    def run(*args: Any, **kwargs: Any) -> Any:
        inputs = None if graph is None else inputs_alone(args, kwargs)
        if inputs is None:
            return wrap(call)(*args, **kwargs)
        return graph._run_through_graph(
            graph_inputs(graph, inputs),
            operation_fn=lambda each: wrapped_call(each, within),
        )

    return run


def inputs_alone(args: Any, kwargs: Any) -> Any:
    """Return the only argument of a call, by its place or as `inputs`.

    Masks of None do not count. None if there are more arguments.
    """
    rest = dict(kwargs)
    given = args or (rest.pop("inputs", None),)
    is_alone = len(given) == 1 and not any(
        value is not None for value in keras.tree.flatten(rest)
    )
    return given[0] if is_alone else None


def in_order(graph: Any, inputs: Any) -> Any:
    """Return `inputs`, if a dict, in the order of those of the graph."""
    own = graph._inputs_struct
    if isinstance(own, dict) and isinstance(inputs, dict):
        # On torch Keras sorts the keys of dicts, and warns of another order.
        inputs = {key: inputs[key] for key in own if key in inputs}
    return inputs
