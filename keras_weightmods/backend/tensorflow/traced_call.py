"""A traced function of tensors, rewritten to run faster with the same result.

- A language model's step splits its cache of keys and values by layers, and
  stacks the results into the next cache. This copies the whole cache for each
  token, although only one place is new. Here a stack stays a `Stack` of its
  parts while the function does nothing else with it.
- An attention is computed by the kernel of `backend.tensorflow.attention`.
- Products of one input with several packed kernels and int8 activations become
  one call. It rounds the input once and wakes the threads once.
"""

import collections

import tensorflow as tf

from keras_weightmods.backend import xla_products
from keras_weightmods.backend.stack import Stack, whole
from keras_weightmods.backend.tensorflow import attention, xla_calls


class Traced:
    """A function of tensors, traced once.

    Args:
        function: Takes tensors, and returns a tuple of tensors.
        inputs: List of tensors and stacks, of the shapes and dtypes that the
            function will be called on.
        key_shape: Tuple (places, key heads, size), the shape of the keys whose
            attention the kernel computes; None for none.

    Attributes:
        results: Tuple of what the function returned, with a stack for each
            tensor that it stacked. The tensors are of the trace alone.
    """

    def __init__(self, function, inputs, key_shape):
        graph = tf.__internal__.FuncGraph("traced")
        with graph.as_default():
            self.inputs = [
                tf.compat.v1.placeholder(_dtype(x), x.shape) for x in inputs
            ]
            results = function(*self.inputs)
            replaced = _shared_products(graph)
            if key_shape:
                replaced |= attention.replacements(graph, key_shape)
        self.captures = graph.captures
        self.operations = graph.get_operations()
        stacks: dict[str, Stack] = {}
        for operation in self.operations:
            if operation.type == "Pack":
                axis = operation.get_attr("axis")
                parts = [stacks.get(x.name, x) for x in operation.inputs]
                stacks[operation.outputs[0].name] = Stack(axis, parts)
        self.results = tuple(stacks.get(x.name, x) for x in results)
        self.names = tf.nest.map_structure(
            lambda x: replaced.get(x.name, x.name), self.results
        )
        self.definition = graph.as_graph_def()
        for node in self.definition.node:
            for i, name in enumerate(node.input):
                node.input[i] = replaced.get(_full(name), name)

    def __call__(self, *inputs):
        """Return what the function does, for tensors and stacks, in a graph."""
        graph = tf.compat.v1.get_default_graph()
        known = {x.name: graph.capture(own) for own, x in self.captures}
        known.update((x.name, own) for x, own in zip(self.inputs, inputs))
        for operation in self.operations:
            part = _part_of(operation, known)
            if part is not None:
                known[operation.outputs[0].name] = part
        names = [x for x in tf.nest.flatten(self.names) if x not in known]
        read, definition = self._graph_for(names, known)
        computed = tf.import_graph_def(
            definition, read, return_elements=names, name=""
        )
        known.update(zip(names, computed))
        return tf.nest.map_structure(lambda x: whole(known[x]), self.names)

    def _graph_for(self, names, known):
        """Return what is read of the known tensors, and the graph that does."""
        nodes = {node.name: node for node in self.definition.node}
        definition = tf.compat.v1.GraphDef(
            versions=self.definition.versions, library=self.definition.library
        )
        read, names, seen = {}, [*names], set()
        while names:
            name = _full(names.pop())
            if name in known:
                read[name] = whole(known[name])
            elif (own := name.partition(":")[0].lstrip("^")) not in seen:
                seen.add(own)
                definition.node.append(nodes[own])
                names.extend(nodes[own].input)
        return read, definition


def _dtype(x):
    return tf.nest.flatten(x)[0].dtype


def _full(name):
    return name if ":" in name else f"{name}:0"


def _part_of(operation, known):
    """Return the part of a stack that an operation takes, or None."""
    if operation.type != "StridedSlice":
        return None
    stack = known.get(operation.inputs[0].name)
    if not isinstance(stack, Stack):
        return None
    begin = tf.get_static_value(operation.inputs[1])
    masks = {
        name: operation.get_attr(f"{name}_mask")
        for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")
    }
    # All of the axes before, and an index.
    axis, before = stack.axis, (1 << stack.axis) - 1
    later = (1 << len(begin)) - (2 << axis)
    is_index = (
        len(begin) > axis
        and masks["shrink_axis"] == 1 << axis
        and not masks["new_axis"]
        and masks["begin"] & masks["end"] & before == before
        and masks["ellipsis"] & (2 << axis) - 1 == 0
        and (masks["begin"] & masks["end"] | masks["ellipsis"]) & later == later
    )
    return stack.parts[begin[axis]] if is_index else None


def _shared_products(graph):
    """Add calls that products share, like `attention.replacements`."""
    target = f'@"{xla_calls.name_of(xla_products.INT8)}"'.encode()
    found = collections.defaultdict(list)
    for operation in graph.get_operations():
        if operation.type == "XlaCallModule" and target in operation.get_attr(
            "module"
        ):
            x, values, meta, _ = operation.inputs
            # Each product has a cast of its own of an input in 16 bits.
            source = x.op.inputs[0] if x.op.type == "Cast" else x
            # One call takes matrices of all types, but 2:4 ones of one alone.
            key = source.name, meta.shape.rank == 3 and values.dtype
            found[key].append(operation)
    names: dict[str, str] = {}
    for group in found.values():
        if len(group) > 1:
            outs = [operation.outputs[0] for operation in group]
            arrays = [x for operation in group for x in operation.inputs[1:]]
            products = xla_calls.results(
                xla_products.INT8,
                [out.shape for out in outs],
                group[0].inputs[0],
                *arrays,
            )
            pairs = zip(outs, products)
            names.update((out.name, y.name) for out, y in pairs)
    return names
