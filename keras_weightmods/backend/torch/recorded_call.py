"""A function of tensors as the flat list of torch's operations that it runs.

The function runs once, and what it asks of torch is written down. Replayed,
there is nothing of Keras left: no layers, no checks, no conversions. What does
not depend on the inputs is computed once, what is asked for twice is computed
once, and chains of views become one view. The numbers are those of the
function, as the same kernels run on the same numbers.

Weights are not copied: a view of them is held, so that a later `assign` is
seen. Another tensor in their place is not.
"""

import collections
import dataclasses
import operator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from keras_weightmods import native
from keras_weightmods.backend.torch import attention, sparse_matmul

_aten = torch.ops.aten
_PRODUCTS = (
    torch.ops.keras_weightmods.sparse_matmul.default,
    torch.ops.keras_weightmods.sparse_matmul_int8.default,
)
_COPIES = (_aten.clone, _aten._to_copy, _aten.lift_fresh_copy)
# Entries of a constant that is compared with others.
_SMALL = 2**14
# Where torch keeps the functions of its operators.
_PLACES = torch._C._VariableFunctions, torch._C._nn, torch._C.TensorBase
_REFUSED = {
    torch.Tag.data_dependent_output: "reads a number out of a tensor",
    torch.Tag.dynamic_output_shape: "has a result whose shape depends on the "
    "numbers in a tensor",
}


class NotRecordable(Exception):
    """The function does what a list of operations cannot repeat."""


@dataclasses.dataclass(eq=False)
class _Value:
    """A tensor of the recording: where it lies, and what is known of it."""

    geometry: tuple[Any, ...]  # sizes, strides, offset, dtype
    is_input: bool = False
    is_weight: bool = False
    varies: bool = False  # with the inputs or the weights
    owner: Any = None  # the value whose memory it lies in
    tensor: Any = None  # where it need not be computed anew


@dataclasses.dataclass(eq=False)
class _Operation:
    function: Any
    args: Any  # a nest, with values for tensors
    kwargs: Any
    results: list[Any]  # values, and None for what is no new tensor
    changed: list[Any]  # values that it writes into


class Recorded:
    """The recorded function.

    Args:
        graph: `torch.fx.GraphModule` of the held tensors and the inputs.
        held: List of tensors.
        inputs: List of the tensors that were recorded.
        spec: Tree of the results.

    Attributes:
        rounds_inputs: Bool, whether it multiplies by inputs rounded to int8.
    """

    def __init__(self, graph, held, inputs, spec, rounds_inputs):
        self.graph = graph
        self.rounds_inputs = rounds_inputs
        self._forward = graph.forward
        self._held = held
        self._strides = [x.stride() for x in inputs]
        self._spec = spec

    def __call__(self, *inputs):
        """Return what the function would; an input may be written into."""
        given = [
            x
            if x.stride() == strides and x.storage_offset() == 0
            else x.clone(memory_format=torch.contiguous_format)
            for x, strides in zip(inputs, self._strides)
        ]
        with torch.inference_mode():
            results = self._forward(*self._held, *given)
        return tree_unflatten(results, self._spec)


def record(function, inputs, weights):
    """Run a function and return it as a list of operations.

    Args:
        function: Takes a `Recorder`, then the inputs, and returns a nest of
            tensors and None. Each result that lies in an input in the end
            should be a view of it, or a `stack` of such views.
        inputs: List of tensors, contiguous, each the whole of its memory.
        weights: Iterable of tensors, that may change between two calls.

    Returns:
        `Recorded`, and the results of this call.

    Raises:
        NotRecordable: With the reason.
    """
    recorder = Recorder(inputs, weights)
    with torch.no_grad(), recorder:
        results = function(recorder, *inputs)
    flat, spec = tree_flatten(results)
    values = [x if x is None else recorder.value(x) for x in flat]
    operations, standing_for = _simplify(recorder.operations)
    makers = {v: op for op in recorder.operations for v in op.results if v}
    values = [_input_for(v, makers) for v in values]
    values = [standing_for(v) for v in values]
    graph, held = _graph(operations, recorder.inputs, values)
    rounds_inputs = any(op.function is _PRODUCTS[1] for op in operations)
    return Recorded(graph, held, inputs, spec, rounds_inputs), results


class Recorder(TorchDispatchMode):
    """Writes down what torch is asked for within."""

    def __init__(self, inputs, weights):
        super().__init__()
        self.operations = []
        self._values = WeakIdKeyDictionary()
        self._owners = {}
        self.inputs = []
        for x in inputs:
            value = self._new(x, is_input=True, varies=True)
            self._owners[_memory(x)] = value
            self.inputs.append(value)
        # All alive: a weight's memory is that of no other.
        self._weights = {_memory(w): w for w in weights}

    def is_in_input(self, tensor):
        """Return whether a tensor lies in the memory of an input."""
        value = self._values.get(tensor)
        return value is not None and value.owner.is_input

    def value(self, tensor):
        """Return the value of a tensor, which may come from outside."""
        value = self._values.get(tensor)
        if value is None:
            memory = _memory(tensor)
            is_weight = memory in self._weights
            value = self._new(
                tensor, is_weight=is_weight, varies=is_weight, tensor=tensor
            )
            value.owner = self._owners.setdefault(memory, value)
        return value

    def _new(self, x, **kwargs):
        value = _Value(_geometry(x), **kwargs)
        value.owner = value
        self._values[x] = value
        return value

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        outputs = function(*args, **kwargs)
        given = [x for x in tree_flatten((args, kwargs))[0] if _is_tensor(x)]
        values = [self.value(x) for x in given]
        varies = any(v.varies or v.owner.varies for v in values)
        for tag in function.tags if varies else ():
            if tag in _REFUSED:
                raise NotRecordable(f"{function} {_REFUSED[tag]}")
        is_random = torch.Tag.nondeterministic_seeded in function.tags
        varies |= is_random
        changed = []
        if function._schema.is_mutable:
            changed = _changed(function, args, kwargs)
            changed = [self.value(x) for x in changed]
        for value in changed:
            if value.owner.tensor is not None:
                raise NotRecordable(
                    f"{function} writes into a tensor from outside of the call"
                )
            value.owner.varies |= varies
        owners = {_memory(x): v.owner for x, v in zip(given, values)}
        results: list[Any] = []
        for tensor in tree_flatten(outputs)[0]:
            if not _is_tensor(tensor) or any(tensor is x for x in given):
                results.append(None)
                continue
            value = self._new(tensor, varies=varies)
            value.owner = owners.get(_memory(tensor), value)
            value.varies |= value.owner.varies
            value.is_weight = value.owner.is_weight
            if value.is_weight or not value.varies:
                value.tensor = tensor
            results.append(value)
        args, kwargs = tree_map(
            lambda x: self.value(x) if _is_tensor(x) else x, (args, kwargs)
        )
        self.operations.append(
            _Operation(function, args, kwargs, results, changed)
        )
        return outputs


def _is_tensor(x):
    return isinstance(x, torch.Tensor)


def _memory(tensor):
    return tensor.untyped_storage()._cdata


def _geometry(x):
    return tuple(x.shape), x.stride(), x.storage_offset(), x.dtype


def _changed(function, args, kwargs):
    """Return the tensors that an operation writes into."""
    found = []
    for i, argument in enumerate(function._schema.arguments):
        info = argument.alias_info
        if info is not None and info.is_write:
            x = args[i] if i < len(args) else kwargs.get(argument.name)
            found += [x for x in tree_flatten(x)[0] if _is_tensor(x)]
    return found


def _simplify(operations):
    """Return fewer operations, and what stands for values left out."""
    changed = {v.owner for op in operations for v in op.changed}
    for op in operations:
        # What is written into is computed anew in each call.
        for v in op.results:
            if v is not None and v.owner in changed:
                v.tensor = None
    kept: list[Any] = []
    known: dict[Any, Any] = {}
    replaced = _equal_constants(operations)

    def is_fixed(value):
        return value.owner not in changed

    def standing_for(value):
        while value in replaced:
            value = replaced[value]
        return value

    def add(key, op):
        """Keep an operation, or use the results of an equal one."""
        if key is not None:
            try:
                earlier = known.setdefault(key, op)
            except TypeError:  # not hashable
                earlier = op
            if earlier is not op:
                replaced.update(zip(op.results, earlier.results))
                return
        kept.append(op)

    for op in operations:
        results = [v for v in op.results if v is not None]
        if not op.changed and not results:
            continue
        if not op.changed and all(v.tensor is not None for v in results):
            continue
        op.args, op.kwargs = _map_values(standing_for, (op.args, op.kwargs))
        given = _values_in((op.args, op.kwargs))
        if op.changed:
            kept.append(op)
        elif all(_is_view(v) for v in results):
            for v in results:
                owner = standing_for(v.owner)
                if v.geometry == v.owner.geometry:
                    replaced[v] = owner
                else:
                    args = owner, *v.geometry[:3]
                    view = _Operation(
                        _aten.as_strided.default, args, {}, [v], []
                    )
                    add((owner, v.geometry), view)
        elif (
            op.function.overloadpacket in _COPIES
            and results[0].geometry == given[0].geometry
            and is_fixed(results[0])
            and is_fixed(given[0])
        ):
            replaced[results[0]] = given[0]
        else:
            fixed = all(map(is_fixed, [*given, *results]))
            fixed &= torch.Tag.nondeterministic_seeded not in op.function.tags
            add(_key(op) if fixed else None, op)
    return kept, standing_for


def _equal_constants(operations):
    """Return one constant for each that holds the same numbers."""
    first: dict[Any, Any] = {}
    replaced: dict[Any, Any] = {}
    for op in operations:
        for v in _values_in((op.args, op.kwargs)):
            x = v.tensor
            if x is None or v.is_weight or v.varies or x.numel() > _SMALL:
                continue
            key = *v.geometry[:2], x.dtype, x.device, str(x.tolist())
            if first.setdefault(key, v) is not v:
                replaced[v] = first[key]
    return replaced


def _is_view(value):
    """Whether it is a view that one `as_strided` can make."""
    owner = value.owner
    return owner is not value and owner.geometry[3] == value.geometry[3]


def _key(op):
    flat, spec = tree_flatten((op.args, op.kwargs))
    return op.function, str(spec), tuple((type(x), x) for x in flat)


def _map_values(function, nest):
    return tree_map(lambda x: function(x) if isinstance(x, _Value) else x, nest)


def _values_in(nest):
    return [x for x in tree_flatten(nest)[0] if isinstance(x, _Value)]


def _input_for(value, makers):
    """The input that a value is equal to in the end, or the value."""
    if value is None:
        return None
    found = _place_of(value, makers)
    if found is None:
        return value
    owner, sizes, strides, offset = found
    own_sizes, own_strides, own_offset, dtype = owner.geometry
    is_whole = (sizes, offset) == (own_sizes, own_offset) and all(
        stride == own or size == 1
        for size, stride, own in zip(sizes, strides, own_strides)
    )
    return owner if is_whole and dtype == value.geometry[3] else value


def _place_of(value, makers):
    """Where in an input the numbers of a value lie in the end, or None.

    Returns:
        The input, sizes, strides, offset.
    """
    if value.owner.is_input:
        return value.owner, *value.geometry[:3]
    op = makers.get(value)
    if op is None or op.function is not _aten.stack.default:
        return None
    parts = [_place_of(v, makers) for v in op.args[0]]
    if None in parts or len({part[:3] for part in parts}) > 1:
        return None
    owner, sizes, strides, start = parts[0]
    offsets = [part[3] for part in parts]
    step = offsets[1] - start if len(parts) > 1 else 0
    if offsets != [start + i * step for i in range(len(parts))]:
        return None
    axis = (op.args[1] if len(op.args) > 1 else 0) % (len(sizes) + 1)
    sizes = *sizes[:axis], len(parts), *sizes[axis:]
    strides = *strides[:axis], step, *strides[axis:]
    return owner, sizes, strides, start


def _graph(operations, inputs, values):
    """Return a `GraphModule`, and the tensors that come before its inputs."""
    graph = torch.fx.Graph()
    live = _live(operations, values)
    held: dict[Any, Any] = {}
    for op in live:
        for v in _values_in((op.args, op.kwargs)):
            if v.tensor is not None:
                held[v] = v.tensor
    held.update({v: v.tensor for v in values if v and v.tensor is not None})
    nodes = {v: graph.placeholder(f"held_{i}") for i, v in enumerate(held)}
    for i, v in enumerate(inputs):
        nodes[v] = graph.placeholder(f"input_{i}")
    shared = _sharing(live)
    done = set()
    for op in live:
        if op in done:
            continue
        if op in shared:
            done.update(shared[op])
            products = _products_of(shared[op])
            node = graph.call_function(products, (nodes[op.args[0]],))
            for i, other in enumerate(shared[op]):
                get = operator.getitem, (node, i)
                nodes[other.results[0]] = graph.call_function(*get)
            continue
        function, (args, kwargs) = _fast(op)
        args, kwargs = _map_values(nodes.__getitem__, (args, kwargs))
        node = graph.call_function(function, tuple(args), kwargs)
        if len(op.results) == 1 and not isinstance(
            op.function._schema.returns[0].type, torch.ListType
        ):
            nodes[op.results[0]] = node
            continue
        for i, v in enumerate(op.results):
            if v is not None:
                nodes[v] = graph.call_function(lambda x, i: x[i], (node, i))
    graph.output([v if v is None else nodes[v] for v in values])
    return torch.fx.GraphModule({}, graph), list(held.values())


def _live(operations, values):
    """Return the operations that the results, or inputs, depend on."""
    needed = {v for v in values if v is not None}
    owners = {v.owner for v in needed}
    live = []
    for op in reversed(operations):
        if any(v in needed for v in op.results) or any(
            v.owner in owners or v.owner.is_input for v in op.changed
        ):
            live.append(op)
            given = _values_in((op.args, op.kwargs))
            needed.update(given)
            owners.update(v.owner for v in given)
    return live[::-1]


def _sharing(operations):
    """Return {the first: all} of int8 products with one input."""
    changed = {v.owner for op in operations for v in op.changed}
    found = collections.defaultdict(list)
    for op in operations:
        if op.function is not _PRODUCTS[1] or not native.is_available():
            continue
        x, values, meta, scale, _ = op.args
        weights = [w for w in (values, meta, scale) if w is not None]
        if x.owner not in changed and all(
            w.tensor is not None and w.tensor.is_cpu for w in weights
        ):
            found[x, values.geometry[3], meta is None].append(op)
    return {ops[0]: ops for ops in found.values() if len(ops) > 1}


def _products_of(operations):
    k = operations[0].args[0].geometry[0][-1]
    kernels = [
        (*(w if w is None else w.tensor for w in op.args[1:4]), op.args[4])
        for op in operations
    ]
    return sparse_matmul.prepared_many(k, kernels)


def _fast(op):
    """The function to call, and its arguments.

    Those in the namespace of torch take half the time of the operators, to
    which they lead.
    """
    function, arguments = op.function, (op.args, op.kwargs)
    if function in _PRODUCTS:
        x, *weights, n = op.args
        if all(w is None or w.tensor is not None for w in weights):
            tensors = [w if w is None else w.tensor for w in weights]
            kind = x.geometry[3], x.geometry[0][-1], n
            return sparse_matmul.prepared(function, *kind, *tensors), ((x,), {})
    if function is torch.ops.keras_weightmods.attend.default:
        return attention.attend, arguments
    namespace, name = function._schema.name.split("::")
    if namespace == "aten":
        for place in _PLACES:
            if hasattr(place, name):
                return getattr(place, name), arguments
    return function, arguments
