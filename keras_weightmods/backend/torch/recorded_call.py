"""A function of tensors as a flat graph of the torch operations that it runs.

The function runs once while a torch mode records its operations. The graph has
no layers, checks or conversions of Keras. Values that do not depend on the
inputs are computed once, and so are repeated ones. Chains of views become one
view. The same kernels run on the same numbers, so the results are the same.

Weights are not copied. The graph holds views of them, so it sees a later
`assign`, but not a new tensor in their place.
"""

import collections
import operator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from keras_weightmods import native
from keras_weightmods.backend.torch import operators, sparse_matmul
from keras_weightmods.native.layout import pattern_of

_aten = torch.ops.aten
_PRODUCT = torch.ops.keras_weightmods.sparse_matmul.default
_COPIES = (
    _aten.clone.default,
    _aten._to_copy.default,
    _aten.lift_fresh_copy.default,
)
# The most entries of a constant that is compared with others.
_SMALL = 2**14
# The modules in which torch keeps its operators.
_PLACES = torch._C._VariableFunctions, torch._C._nn, torch._C.TensorBase
_RANDOM = torch.Tag.nondeterministic_seeded
_REFUSED = {
    torch.Tag.data_dependent_output: "reads a number out of a tensor",
    torch.Tag.dynamic_output_shape: "has a result whose shape depends on the "
    "numbers in a tensor",
}


class NotRecordable(Exception):
    """Raised for a function that a list of operations cannot repeat."""


class Recorded:
    """The recorded function.

    Attributes:
        graph: `torch.fx.GraphModule` of the held tensors and the inputs.
    """

    def __init__(self, graph, held, spec):
        self.graph = torch.fx.GraphModule({}, graph)
        self._forward = self.graph.forward
        self._held = held
        self._spec = spec

    def __call__(self, *inputs):
        """Return what the function would; an input may be written into."""
        given = [
            x
            if x.is_contiguous() and x.storage_offset() == 0
            else x.clone(memory_format=torch.contiguous_format)
            for x in inputs
        ]
        with torch.inference_mode():
            results = self._forward(*self._held, *given)
        return tree_unflatten(results, self._spec)


def record(function, inputs, weights):
    """Run a function and return it as a graph of operations.

    Args:
        function: Takes the list of weights, then the inputs, and returns a
            nest of tensors and None.
        inputs: List of tensors, contiguous, each the whole of its memory. One
            that is equal to a result in the end, as a cache that was written
            into, stands for this result from then on.
        weights: List of tensors, that may change between two calls.

    Returns:
        `Recorded`, and the results of this call.

    Raises:
        NotRecordable: With the reason.
    """
    recorder = _Recorder(weights, inputs)
    with torch.no_grad(), recorder:
        results = function(weights, *inputs)
    graph = recorder.graph
    found, spec = tree_flatten(results)
    places = [recorder.node(x) for x in inputs]
    outputs = [
        next((p for p, y in zip(places, inputs) if _is_equal(x, y)), None)
        or recorder.node(x)
        for x in found
    ]
    graph.output(outputs).meta = {"owners": {}}
    _simplify(graph)
    held = _hold(graph, len(weights))
    _prepare_products(graph)
    _take_fast_functions(graph)
    graph.set_codegen(torch.fx.graph.CodeGen())
    return Recorded(graph, held, spec), results


def _is_equal(x, y):
    return x is not None and x.dtype == y.dtype and torch.equal(x, y)


class _Recorder(TorchDispatchMode):
    """Record a graph of the operations that run in its scope.

    The `meta` of a node says what is known about its result.

    - geometry: Sizes, strides, offset and dtype of a tensor; None for others.
    - owners: Dict from the memory of results to the nodes whose memory it is.
    - varies: Bool, whether the result depends on the inputs or the weights.
    - is_weight, changed: Bools, of an owner.
    - tensor: A constant, or a view of a weight, which is not computed again.
    """

    def __init__(self, weights, inputs):
        super().__init__()
        self.graph = torch.fx.Graph()
        self.nodes = WeakIdKeyDictionary()
        self.weights = {}
        for i, x in enumerate(weights):
            self.weights[memory(x)] = self._add("placeholder", f"weight_{i}", x)
        for i, x in enumerate(inputs):
            self._add("placeholder", f"given_{i}", x)

    def node(self, x):
        """Return the node of a tensor. A tensor from outside is a constant."""
        if not isinstance(x, torch.Tensor):
            return x
        return self.nodes.get(x) or self._add("get_attr", "constant", x)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        nodes = tree_map(self.node, args), tree_map(self.node, kwargs)
        result = function(*args, **kwargs)
        node = self._add("call_function", function, result, *nodes)
        if isinstance(result, (list, tuple)):
            for i, x in enumerate(result):
                self._add("call_function", operator.getitem, x, (node, i))
        return result

    def _add(self, op, target, result, args=(), kwargs=None):
        node = self.graph.create_node(op, target, args, kwargs)
        known = dict(self.weights)
        tags = getattr(target, "tags", ())
        varies = _RANDOM in tags or op == "placeholder"
        for parent in node.all_input_nodes:
            known.update(parent.meta["owners"])
            varies |= parent.meta["varies"] or _owner(parent).meta["varies"]
        for tag in tags if varies else ():
            if tag in _REFUSED:
                raise NotRecordable(f"{target} {_REFUSED[tag]}")
        is_tensor = isinstance(result, torch.Tensor)
        node.meta = {
            "geometry": _geometry(result) if is_tensor else None,
            "owners": {
                memory(x): known.get(memory(x), node) for x in tensors(result)
            },
            "varies": varies,
            "is_weight": str(target).startswith("weight_"),
            "changed": False,
            "tensor": None,
        }
        for changed in _changed(node):
            owner = _owner(changed)
            if owner.op == "get_attr" or owner.meta["is_weight"]:
                raise NotRecordable(
                    f"{target} writes into a tensor from outside of the call"
                )
            owner.meta["changed"] = True
            owner.meta["varies"] |= varies
        if is_tensor:
            self.nodes[result] = node
            if _owner(node).meta["is_weight"] or not node.meta["varies"]:
                node.meta["tensor"] = result
        return node


def memory(tensor):
    """Return the key of a tensor's memory."""
    return tensor.untyped_storage()._cdata


def tensors(nest):
    """Return the tensors of a nest as a list."""
    return [x for x in tree_flatten(nest)[0] if isinstance(x, torch.Tensor)]


def _geometry(x):
    return tuple(x.shape), x.stride(), x.storage_offset(), x.dtype


def _owner(node):
    """Return the node in whose memory the result of a node lies."""
    owners = [*node.meta["owners"].values()]
    if not owners:
        return node
    owner = owners[0]
    # One of several results of an operation.
    if node.target is operator.getitem and owner is node.args[0]:
        return node
    while "equal" in owner.meta:
        owner = owner.meta["equal"]
    return owner


def _is_changed(node):
    return _owner(node).meta["changed"]


def _changed(node):
    """Return the nodes whose results a node writes into."""
    found = []
    schema = getattr(node.target, "_schema", None)
    for i, argument in enumerate(schema.arguments if schema else ()):
        info = argument.alias_info
        if info is not None and info.is_write:
            x = node.args[i] if i < len(node.args) else None
            x = node.kwargs.get(argument.name, x)
            found += [x for x in tree_flatten(x)[0] if x is not None]
    return found


def _simplify(graph):
    """Merge equal nodes into one, and chains of views into one view."""
    known: dict[Any, Any] = {}
    for node in list(graph.nodes):
        meta, owner = node.meta, _owner(node)
        key: Any = None
        if _is_known(node):
            x = meta["tensor"]
            if not meta["varies"] and x.numel() <= _SMALL:
                key = meta["geometry"], x.device, str(x.tolist())
        elif (
            node.op != "call_function"
            or meta["geometry"] is None
            or _changed(node)
        ):
            continue
        elif owner is not node and _dtype(node) == _dtype(owner):
            if meta["geometry"] == owner.meta["geometry"]:
                _replace(node, owner)
                continue
            node.target = _aten.as_strided.default
            node.args, node.kwargs = (owner, *meta["geometry"][:3]), {}
            key = owner, meta["geometry"]
        elif not any(map(_is_changed, [node, *node.all_input_nodes])):
            source: Any = node.args[0] if node.args else None
            is_copy = node.target in _COPIES
            if is_copy and source.meta["geometry"] == meta["geometry"]:
                _replace(node, source)
                continue
            if _RANDOM not in getattr(node.target, "tags", ()):
                key = node.target, str(node.args), str(node.kwargs)
        if key is not None and known.setdefault(key, node) is not node:
            _replace(node, known[key])


def _dtype(node):
    return node.meta["geometry"] and node.meta["geometry"][3]


def _replace(node, equal):
    node.replace_all_uses_with(equal)
    node.meta["equal"] = equal


def _is_known(node):
    return node.meta.get("tensor") is not None and not _is_changed(node)


def _hold(graph, weights):
    """Turn known tensors into arguments, and return them."""
    nodes = list(graph.nodes)
    held: list[Any] = []
    for node in nodes:
        if not _is_known(node) or all(map(_is_known, node.users)):
            continue
        with graph.inserting_before(nodes[0]):
            stand_in = graph.placeholder(f"held_{len(held)}")
        stand_in.meta = node.meta
        held.append(node.meta["tensor"])
        node.replace_all_uses_with(stand_in)
    graph.eliminate_dead_code()
    for node in nodes[:weights]:
        graph.erase_node(node)
    return held


def _prepare_products(graph):
    """Make products call the library; int8 ones with one input share a call."""
    found: Any = collections.defaultdict(list)
    for node in graph.nodes:
        if node.target is not _PRODUCT or not native.is_available():
            continue
        x, *arrays, n = node.args[:5]
        weights = [w and w.meta["tensor"] for w in arrays]
        if [w is None for w in weights] != [w is None for w in arrays]:
            continue
        if weights[0].is_cpu:
            rounded = node.args[5:6] == (True,)
            # One call takes matrices of all types, but 2:4 ones of one alone.
            is_sparse = pattern_of(weights[1]) == "2:4"
            key = x, is_sparse and _dtype(arrays[0])
            is_shared = rounded and not _is_changed(x)
            found[key if is_shared else node].append((node, (*weights, n)))
    for products in found.values():
        nodes, kernels = zip(*products)
        node, x = nodes[0], nodes[0].args[0]
        (*_, k), _, _, dtype = x.meta["geometry"]
        if node.args[5:6] != (True,):
            node.target = sparse_matmul.prepared(dtype, k, *kernels[0])
            node.args = (x,)
            continue
        together = sparse_matmul.prepared_int8(k, kernels)
        with graph.inserting_before(node):
            results = graph.call_function(together, (x,))
            for i, node in enumerate(nodes):
                one = graph.call_function(operator.getitem, (results, i))
                node.replace_all_uses_with(one)
                one.meta = node.meta
    graph.eliminate_dead_code()


def _take_fast_functions(graph):
    """Call torch's own functions for the operators, in half of the time."""
    for node in graph.nodes:
        if node.target is torch.ops.keras_weightmods.attend.default:
            node.target = operators.attend
        elif isinstance(node.target, torch._ops.OpOverload):
            namespace, name = node.target._schema.name.split("::")
            for place in _PLACES if namespace == "aten" else ():
                if hasattr(place, name):
                    node.target = getattr(place, name)
                    break
