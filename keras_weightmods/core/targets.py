"""The weights of a model that a method acts on, and their axes."""

import collections.abc
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras

from keras_weightmods.core import filters, keras_compat, layer_kinds
from keras_weightmods.core.execution_order import execution_order
from keras_weightmods.core.reparameterization import slots
from keras_weightmods.core.weight_keys import weight_keys
from keras_weightmods.utils.checks import check_int, check_model, cut, error
from keras_weightmods.utils.report import Report, Skipped, Table


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A kernel of a model, with the axes that its matrix product contracts.

    Attributes:
        layer: The layer that owns the kernel.
        variable: `keras.Variable`, the stored kernel. LoRA or a scaling may
            make the property `layer.kernel` return something else.
        attribute: String, the public name under which `layer` reads the
            kernel, mostly `"kernel"`.
        contraction_axes: Tuple of ints, rising: the axes summed over.
        output_axes: Tuple of ints, rising: the axes of the output units.
        stack_axes: Tuple of ints, rising: the axes that index whole kernels,
            such as the experts of a mixture.
        depth: Int, place in the order of execution among all targets of the
            model, from 0.
        key: String, `"{position}:{path}"` with the variable's position in
            `model.weights`. Unique where paths are not.
    """

    layer: Any = dataclasses.field(repr=False)
    variable: Any = dataclasses.field(repr=False)
    attribute: str
    contraction_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    stack_axes: tuple[int, ...]
    depth: int
    key: str

    @property
    def path(self) -> str:
        """String, the path of the variable."""
        return str(self.variable.path)

    @property
    def shape(self) -> tuple[int, ...]:
        """Tuple of ints, the shape of the kernel."""
        return tuple(self.variable.shape)

    @property
    def contraction_size(self) -> int:
        """Int, the number of weights that one output unit sums over."""
        return math.prod(self.shape[axis] for axis in self.contraction_axes)

    def reason_not_nm(self, m: int) -> str | None:
        """Return why the kernel has no whole groups of m, or None if it has."""
        check_int("m", m, 1)
        return reason_not_nm(self.contraction_size, m)


def reason_not_nm(size: int, m: int) -> str | None:
    """Return why a contraction of `size` has no whole groups of m, or None."""
    reason = f"its contraction size {size} is not a multiple of m={m}"
    return reason if size % m else None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Targets(Report, collections.abc.Sequence[Any]):
    """An immutable sequence of `Target`, in the order of execution.

    Indexed by place, slice or `Target.key`. Prints as a table of at most 30
    lines; `table()` has all rows.

    Args:
        targets: Tuple of `Target`.
        skipped: Tuple of `Skipped`: the weights left out, with reasons.
    """

    targets: tuple[Target, ...]
    skipped: tuple[Skipped, ...] = ()

    def __len__(self) -> int:
        return len(self.targets)

    def __iter__(self) -> Iterator[Target]:
        return iter(self.targets)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return {target.key: target for target in self}[index]
        found = self.targets[index]
        return Targets(found, self.skipped) if type(index) is slice else found

    def select(self, reason: Callable[[Target], str | None]) -> "Targets":
        """Return the targets that have no reason to be skipped.

        Args:
            reason: Callable from a `Target` to the reason to skip it, or to
                None.

        Returns:
            `Targets`, with the others in `skipped`.
        """
        is_function = not isinstance(reason, (type, keras.layers.Layer))
        if not (is_function and callable(reason)):
            expected = "a callable from `Target` to a string or None"
            raise error("reason", expected, reason)
        left = {target: why for target in self if (why := reason(target))}
        return Targets(
            tuple(target for target in self if target not in left),
            self.skipped + tuple(Skipped(t.path, left[t]) for t in left),
        )

    def tables(self) -> Iterable[Table]:
        rows = []
        for t in self:
            axes = t.shape, t.contraction_axes, t.stack_axes or ""
            rows.append((t.path, *map(str, axes)))
        columns = "kernel shape contracts stacks"
        yield Table(f"{len(rows)} targets", rows, columns)

    __repr__ = Report.__str__


def find_targets(
    model: Any,
    include: Any = None,
    exclude: Any = None,
    depthwise: bool = False,
) -> Targets:
    """Find the kernels of a model that a method may act on.

    It knows these kernels:

    - Dense, and EinsumDense, with the axes from its equation;
    - Conv1D, Conv2D, Conv3D and their transposes, which contract the channels
      of a pixel of the input;
    - the pointwise part of separable convolutions;
    - both kernels of the cells of SimpleRNN, LSTM, GRU and ConvLSTM;
    - layers built of these: MultiHeadAttention, KerasHub backbones, nested
      models;
    - the experts of KerasHub's mixtures, which are stacks of kernels;
    - layers made known with `register_layer_kind`.

    Embeddings, heads tied to them, norms and biases are left out. Depthwise
    kernels are left out unless asked for.

    Args:
        model: A built `keras.Model` or layer. It is not changed.
        include: Which targets to take, all by default: a regex searched for
            in the variable's path; a layer or a layer type, which stand for
            all layers inside of them too; a callable from `Target` to bool;
            or a list of these, of which one must match.
        exclude: Which targets to leave out of those, in the same forms.
        depthwise: Bool, whether depthwise kernels are targets too, which
            contract their window. Defaults to `False`.

    Returns:
        `Targets`, in the order of execution, or in the declared order if the
        model cannot run on symbols. A shared weight appears once. `.skipped`
        lists the other weights, with reasons.

    Raises:
        ValueError: If `model` or a layer in it that should hold a target is not
            built. If `include` or `exclude` has another form, or an element of
            `include` matches nothing. If the registered axes do not fit the
            weight.

    Example:

    ```python
    import keras
    from keras_weightmods import find_targets

    model = keras.Sequential(
        [
            keras.Input((8, 4)),
            keras.layers.EinsumDense("btd,dhk->bthk", (None, 2, 3)),
            keras.layers.EinsumDense("bthk,hkd->btd", (None, 4)),
        ]
    )
    first, second = find_targets(model)
    assert first.contraction_axes == (0,)
    assert second.contraction_axes == (0, 1)
    ```
    """
    found = _find_all(model, depthwise)
    taken = filters.included("include", include, found, model, found.skipped)
    taken = filters.excluded("exclude", exclude, taken, model)
    return Targets(tuple(taken), found.skipped)


def resolve_targets(
    model: Any, targets: Any = None, depthwise: bool = False
) -> Targets:
    """Return the `Targets` for an argument `targets`.

    Args:
        model: A built `keras.Model` or layer.
        targets: `Targets`, or a list of `Target`; or what `find_targets` takes
            as `include`. `None` for all that it finds.
        depthwise: Bool, as in `find_targets`.

    Returns:
        `Targets`, each weight once.

    Raises:
        ValueError: If `targets` is something else, one of them is not a
            weight of `model`, or matches none.

    Example:

    ```python
    import keras
    from keras_weightmods import find_targets
    from keras_weightmods.core.targets import resolve_targets

    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(4),
            keras.layers.Dense(2, name="head"),
        ]
    )
    first, second = resolve_targets(model)
    assert resolve_targets(model, [second])[0] is second
    assert resolve_targets(model, "head/")[0].path == second.path
    ```
    """
    given = isinstance(targets, (list, tuple, Targets))
    if not given or not all(isinstance(each, Target) for each in targets):
        found = _find_all(model, depthwise)
        left = found.skipped
        taken = filters.included("targets", targets, found, model, left)
        return Targets(tuple(taken), left)
    check_model(model)
    known = {id(variable) for variable in model.weights}
    foreign = [t.path for t in targets if id(t.variable) not in known]
    if foreign:
        raise ValueError(
            "`targets` must be weights of the model. Received: "
            f"model={model.name!r} and {len(foreign)} targets that it does "
            f"not hold, the first being {foreign[0]!r}. Call "
            "`find_targets(model)` on this model, and again after it was "
            "quantized or packed."
        )
    once: dict[int, Target] = {}
    for target in targets:
        once.setdefault(id(target.variable), target)
    return Targets(tuple(once.values()), getattr(targets, "skipped", ()))


def target_of(
    layer: Any,
    attribute: str = "kernel",
    *,
    keys: dict[int, str] | None = None,
    depth: int = 0,
) -> Target:
    """Return the `Target` of one weight, even one that is none by default.

    An example is a depthwise kernel. An embedding contracts the axes that a
    tied head contracts.

    Args:
        layer: A layer that holds the weight.
        attribute: String, the name under which the layer reads it. Defaults
            to `"kernel"`.
        keys: `weight_keys(model)` of the model that holds the layer; `None`
            for a layer by itself.
        depth: Int, `Target.depth`, where it is known. Defaults to `0`.

    Raises:
        ValueError: If nothing is known of the axes, or there is no such
            variable.

    Example:

    ```python
    import keras
    from keras_weightmods.core.targets import target_of

    layer = keras.layers.Embedding(16, 4)
    layer.build()
    target = target_of(layer, "embeddings")
    assert target.contraction_axes == (1,)
    ```
    """
    rule = layer_kinds.kernels_of(layer).get(attribute)
    variable = None if rule is None else _stored_variable(layer, attribute)
    if rule is None or variable is None:
        expected = (
            "the name of a `keras.Variable` that `register_layer_kind` knows"
        )
        raise error("attribute", f"{expected} in {layer.name!r}", attribute)
    axes = layer_kinds.axes_of(layer, attribute, len(variable.shape))
    key = (keys or weight_keys(layer))[id(variable)]
    return Target(layer, variable, attribute, **axes, depth=depth, key=key)


def _unused_layers(model: Any) -> list[Any]:
    """Return the layers that may hold a target and that the model never calls.

    KerasHub's EfficientNet has blocks with layers for each way to use them. Its
    SAM has a mask decoder that only its tasks call.

    Raises:
        ValueError: If `model`, or another layer that may hold a target, is not
            built.
    """
    check_model(model)
    parts = [x for x in keras_compat.layers_of(model) if x is not model]
    unbuilt = [
        layer
        for layer in parts
        if not layer.built
        and any(
            rule.reason is None
            for rule in layer_kinds.kernels_of(layer).values()
        )
    ]
    called: Any = set(map(id, unbuilt))
    if model.built and unbuilt:
        # Without an order, the layers in a graph count as called.
        called = execution_order(model, parts) or _layers_of_graph(model)
    missing = [layer.name for layer in unbuilt if id(layer) in called]
    if missing or not model.built:
        raise ValueError(
            "The model must be built, so that its weights exist. Call it on "
            "data once, or `model.build(input_shape)`. Received: "
            f"model={model.name!r}, of which these are not built: "
            + cut(", ".join((missing or [model.name])[:5]), 1000)
        )
    return unbuilt


def _layers_of_graph(layer: Any) -> set[int]:
    """Return the ids of the layers in `layer` that its graphs may call."""
    graph = keras_compat.graph_of(layer)
    if graph is None:
        return set(map(id, keras_compat.layers_of(layer)))
    parts = (x for x in graph.operations if isinstance(x, keras.Layer))
    return set().union(*map(_layers_of_graph, parts))


def kernel_axes(model: Any) -> dict[int, Any]:
    """Return {id of variable: pair of the contraction and the stack axes}."""
    return {
        id(t.variable): (t.contraction_axes, t.stack_axes)
        for t in _find_unordered(model, depthwise=False)[0]
    }


def _find_all(model: Any, depthwise: bool) -> Targets:
    """Return all targets of a model."""
    found, skipped = _find_unordered(model, depthwise)
    order = execution_order(model, [target.layer for target in found])
    found.sort(key=lambda target: order.get(id(target.layer), len(order)))
    return Targets(
        tuple(dataclasses.replace(t, depth=i) for i, t in enumerate(found)),
        skipped,
    )


def _find_unordered(
    model: Any, depthwise: bool
) -> tuple[list[Target], tuple[Skipped, ...]]:
    """Return the targets, in the declared order, and the other weights."""
    unused = _unused_layers(model)
    targets: dict[int, Target] = {}
    skipped: dict[Any, Skipped] = {}
    unknown: dict[int, Skipped] = {}
    keys = weight_keys(model)
    for layer in keras_compat.layers_of(model):
        # Layers without weights do not matter.
        rules = layer_kinds.kernels_of(layer) if layer.built else {}
        known = set()
        for attribute, rule in rules.items():
            variable = _stored_variable(layer, attribute)
            known.add(id(variable))
            if variable is None and rule.optional:
                continue
            reason = _reason_to_skip(layer, attribute, rule, depthwise)
            if reason is None:
                target = target_of(layer, attribute, keys=keys)
                targets.setdefault(id(variable), target)
                if not target.contraction_axes:
                    reason = "its layer contracts none of the axes"
            # A quantized layer may hold its kernel under another name, and an
            # embedding that is tied has no reverse one.
            if reason and variable is not None:
                skipped[id(variable)] = Skipped(variable.path, reason)
            elif reason and layer.quantization_mode is not None:
                path = f"{layer.path}/{attribute}"
                skipped[id(layer), attribute] = Skipped(path, reason)
        if layer.quantization_mode is None:
            for variable in _other_matrices(layer, known):
                reason = _unknown_reason(layer, variable, rules)
                unknown[id(variable)] = Skipped(variable.path, reason)
    for layer in unused:
        reason = "not built, as the model does not call it"
        skipped[id(layer), ""] = Skipped(layer.path, reason)
    # A weight shared with an embedding is left out. A weight that an unknown
    # layer shares with a known one is known.
    found = [targets[k] for k in keys if k in targets and k not in skipped]
    for key, skip in unknown.items():
        if key not in targets:
            skipped.setdefault(key, skip)
    return found, tuple(skipped.values())


def _reason_to_skip(layer: Any, name: str, rule: Any, depthwise: bool) -> Any:
    item = slots(layer).get(name)
    if item is not None and not item.keeps_stored:
        return f"packed; `{item.finish}` makes it dense again"
    if rule.reason is not None and not (depthwise and rule.depthwise):
        return rule.reason
    if layer.quantization_mode is not None:
        return f"quantized to {layer.quantization_mode}"
    return None


def _stored_variable(layer: Any, attribute: str) -> Any:
    if attribute in slots(layer):
        return slots(layer)[attribute].target.variable
    # Avoid `getattr`, which may compute an effective weight.
    variable = keras_compat.stored_variable(layer, attribute)
    if variable is None and layer.quantization_mode is None:
        variable = getattr(layer, attribute, None)
    return variable if isinstance(variable, keras.Variable) else None


def _other_matrices(layer: Any, known: set[int]) -> list[Any]:
    """Return the trainable weights of rank 2 or more, without biases.

    In a frozen layer all of them count, because trainable ones are unknown.
    """
    for item in slots(layer).values():
        known = known.union(map(id, item.parameters))
    return [
        variable
        for variable in keras_compat.own_variables(layer)
        if id(variable) not in known
        and len(variable.shape) >= 2
        and (variable.trainable or not layer.trainable)
        and not variable.name.endswith("bias")
        and not variable.name.startswith("lora_")
    ]


def _unknown_reason(layer: Any, variable: Any, rules: Any) -> str:
    if "embedding" in variable.name or "embedding" in layer.name:
        return layer_kinds.EMBEDDING
    name = type(layer).__name__
    if rules:
        return (
            f"of {name}, find_targets knows {', '.join(rules)} only; "
            "register_layer_kind makes this one known"
        )
    return (
        f"find_targets does not know {name}; register_layer_kind makes it known"
    )
