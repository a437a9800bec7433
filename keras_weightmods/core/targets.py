"""Which weights of a model a method acts on, and along which axes."""

import collections.abc
import contextlib
import dataclasses
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_weightmods.core.seam import (
    check_model,
    is_reparameterized,
    reparameterization,
    reparameterizations,
)
from keras_weightmods.utils.report import Skipped as Skipped


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """A kernel of a model, with the axes that its matrix product contracts.

    Attributes:
        layer: The layer that owns the kernel.
        variable: `keras.Variable`, the stored kernel. Not what the property
            `layer.kernel` returns, which LoRA or a scaling may have changed.
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

    layer: keras.layers.Layer = dataclasses.field(repr=False)
    variable: keras.Variable = dataclasses.field(repr=False)
    attribute: str
    contraction_axes: tuple[int, ...]
    output_axes: tuple[int, ...]
    stack_axes: tuple[int, ...]
    depth: int
    key: str

    @property
    def path(self):
        """String, the path of the variable."""
        return self.variable.path

    @property
    def shape(self):
        """Tuple of ints, the shape of the kernel."""
        return tuple(self.variable.shape)

    @property
    def contraction_size(self):
        """Int, the number of weights that one output unit sums over."""
        return math.prod(self.shape[axis] for axis in self.contraction_axes)


class Targets(collections.abc.Sequence):
    """An immutable sequence of `Target`, in the order of execution.

    Indexed by place, slice or `Target.key`. Prints as a table.

    Args:
        targets: Iterable of `Target`.
        skipped: Iterable of `Skipped`: the weights left out, with reasons.
    """

    def __init__(self, targets, skipped=()):
        self._targets = tuple(targets)
        self._skipped = tuple(skipped)

    @property
    def skipped(self):
        """Tuple of `Skipped`: the weights left out, with reasons."""
        return self._skipped

    def __len__(self):
        return len(self._targets)

    def __getitem__(self, index):
        if isinstance(index, str):
            for target in self._targets:
                if target.key == index:
                    return target
            raise KeyError(index)
        if isinstance(index, slice):
            return Targets(self._targets[index], self._skipped)
        return self._targets[index]

    def __repr__(self):
        rows = [
            (
                str(t.depth),
                t.path,
                str(t.shape),
                f"contracts {t.contraction_axes}"
                + (f", stacks {t.stack_axes}" if t.stack_axes else ""),
            )
            for t in self._targets
        ]
        lines = [f"{len(self)} targets", *_columns(rows)]
        if self._skipped:
            rows = [("-", s.path, s.reason) for s in self._skipped]
            lines += [f"{len(rows)} skipped", *_columns(rows)]
        return "\n".join(lines)


def find_targets(model, include=None, exclude=None, depthwise=False):
    """Finds the kernels of a model that a method may act on.

    Known are Dense, EinsumDense (the axes come from its equation), Conv1D,
    Conv2D, Conv3D, the pointwise part of separable convolutions, what is
    built of these (MultiHeadAttention, KerasHub backbones, nested models),
    and layers made known with `register_target`. Embeddings, heads tied to
    them, norms and biases are left out, and depthwise kernels unless asked for.

    Args:
        model: A built `keras.Model` or layer. It is not changed.
        include: Which targets to take, all by default: a regex searched for
            in the variable's path; a layer or a layer type, which stand for
            all layers inside of them too; a callable from `Target` to bool;
            or a list of these, of which one must match.
        exclude: Which targets to leave out of those, in the same forms.
        depthwise: Bool, whether depthwise kernels are targets too, with the
            window as what they contract. Defaults to `False`.

    Returns:
        `Targets`, in the order of execution, or in the declared order where
        the model cannot be run on symbols. A shared weight appears once.
        `.skipped` lists the weights that are no targets, with reasons.

    Raises:
        ValueError: If `model` or a layer in it that should hold a target is
            not built, `include` or `exclude` has another form, an element of
            `include` matches nothing, or the axes that were registered do
            not fit the weight.

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
    _check_built(model)
    layers = _layers_of(model)
    candidates, skipped = _candidates(layers, depthwise)
    order = execution_order(model, [c["layer"] for c in candidates])
    position = {id(v): place for place, v in enumerate(model.weights)}
    candidates.sort(
        key=lambda c: (
            order.get(id(c["layer"]), len(order)),
            position[id(c["variable"])],
        )
    )
    targets = [
        Target(
            **candidate,
            depth=depth,
            key=f"{position[id(candidate['variable'])]}"
            f":{candidate['variable'].path}",
        )
        for depth, candidate in enumerate(candidates)
    ]
    included = _tests("include", include, layers)
    excluded = _tests("exclude", exclude, layers)
    if included is not None:
        for pattern, test in included:
            if not any(test(target) for target in targets):
                raise ValueError(_nothing_matches(pattern, targets, skipped))
        targets = [t for t in targets if any(test(t) for _, test in included)]
    if excluded is not None:
        targets = [
            t for t in targets if not any(test(t) for _, test in excluded)
        ]
    return Targets(targets, skipped)


def register_target(
    layer_class,
    attribute="kernel",
    *,
    contraction_axes,
    output_axes=None,
    stack_axes=(),
):
    """Makes a kernel of a layer class known to `find_targets`.

    Serves the subclasses too; where several classes say something of one
    attribute, the most derived one is heard. Overrides what the library knows
    itself. Call it once for each attribute that holds a kernel.

    Args:
        layer_class: A subclass of `keras.layers.Layer`.
        attribute: String, the attribute that holds the `keras.Variable`, or
            the property that returns what the layer keeps under the same name
            with an underscore in front, as in Keras' own layers. Defaults to
            `"kernel"`.
        contraction_axes: Tuple of ints, or a callable from the built layer
            to one: the axes that the layer sums over. Negative ones count
            from the end.
        output_axes: The same, for the axes of the output units. `None` takes
            all that remain.
        stack_axes: The same, for the axes that index whole kernels, such as
            the experts of a mixture. Defaults to none.

    Raises:
        ValueError: If `layer_class` is no layer class, `attribute` no string,
            or the axes are not tuples of different ints, with one to
            contract at least.

    Example:

    ```python
    import keras
    from keras_weightmods import find_targets, register_target

    class Experts(keras.layers.Layer):
        def build(self, input_shape):
            self.up = self.add_weight(shape=(2, input_shape[-1], 3), name="up")

        def call(self, x):
            return keras.ops.einsum("ebi,eio->ebo", x, self.up)

    register_target(Experts, "up", contraction_axes=(1,), stack_axes=(0,))
    layer = Experts()
    layer.build((2, None, 8))
    (target,) = find_targets(layer)
    assert target.output_axes == (2,)
    ```
    """
    if not (
        isinstance(layer_class, type)
        and issubclass(layer_class, keras.layers.Layer)
    ):
        raise ValueError(
            "`layer_class` must be a subclass of `keras.layers.Layer`. "
            f"Received: layer_class={layer_class!r}"
        )
    if not isinstance(attribute, str) or not attribute.isidentifier():
        raise ValueError(
            "`attribute` must be the name of an attribute of the layer. "
            f"Received: attribute={attribute!r}"
        )
    axes = {
        "contraction_axes": contraction_axes,
        "output_axes": output_axes,
        "stack_axes": stack_axes,
    }
    fixed: list[int] = []
    for name, value in axes.items():
        if callable(value) or (name == "output_axes" and value is None):
            continue
        if not _are_ints(value):
            raise ValueError(
                f"`{name}` must be a tuple of ints, or a callable from the "
                f"layer to one. Received: {name}={value!r}"
            )
        fixed.extend(value)
    if not callable(contraction_axes) and not contraction_axes:
        raise ValueError(
            "`contraction_axes` must name the axes that the layer sums over, "
            f"one at least. Received: contraction_axes={contraction_axes!r}"
        )
    if len(set(fixed)) != len(fixed):
        raise ValueError(
            "An axis must be named once. Received: "
            + ", ".join(f"{name}={value!r}" for name, value in axes.items())
        )
    _RULES.setdefault(layer_class, {})[attribute] = _Rule(**axes)


def resolve_targets(model, targets=None):
    """Returns `targets` as the `Targets` of `model` that they should be.

    Args:
        model: A built `keras.Model` or layer.
        targets: `Targets`, or a list of `Target`; `None` for all that
            `find_targets(model)` finds.

    Returns:
        `Targets`, each weight once.

    Raises:
        ValueError: If `targets` is something else, or one of them is not a
            weight of `model`.

    Example:

    ```python
    import keras
    from keras_weightmods import find_targets
    from keras_weightmods.core.targets import resolve_targets

    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(4), keras.layers.Dense(2)]
    )
    first, second = resolve_targets(model, None)
    assert resolve_targets(model, [second])[0] is second
    ```
    """
    if targets is None:
        return find_targets(model)
    if not isinstance(targets, (list, tuple, Targets)) or not all(
        isinstance(target, Target) for target in targets
    ):
        raise ValueError(
            "`targets` must be what `find_targets(model)` returns, a list of "
            f"its elements, or None. Received: targets={targets!r}"
        )
    known = {id(variable) for variable in model.weights}
    strange = [t.path for t in targets if id(t.variable) not in known]
    if strange:
        raise ValueError(
            "`targets` must be weights of the model. Received: "
            f"model={model.name!r} and {len(strange)} targets that it does "
            f"not hold, the first being {strange[0]!r}. Call "
            "`find_targets(model)` on this model, and again after it was "
            "quantized or packed."
        )
    once: dict[int, Target] = {}
    for target in targets:
        once.setdefault(id(target.variable), target)
    return Targets(once.values(), getattr(targets, "skipped", ()))


def quantized_kernels(model):
    """The kernels that Keras has quantized to int8 or int4, as they act.

    Args:
        model: A built `keras.Model` or layer.

    Returns:
        List of pairs of a `Target`, whose `variable` holds the codes, and a
        tensor of the kernel's shape: the codes, unpacked and less the zero
        points. It is zero exactly where the weight is.

    Example:

    ```python
    import keras
    from keras_weightmods.core.targets import quantized_kernels

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.quantize("int4")
    ((target, steps),) = quantized_kernels(model)
    assert target.contraction_axes == (0,)
    assert steps.shape == (8, 4)
    ```
    """
    _check_built(model)
    position = {id(v): place for place, v in enumerate(model.weights)}
    found: list[tuple[Target, Any]] = []
    for layer in _layers_of(model):
        rule = _rules_of(layer).get("kernel")
        if (
            rule is None
            or rule.reason is not None
            or layer.quantization_mode not in ("int8", "int4")
        ):
            continue
        variable, steps = layer._kernel, _steps(layer)
        target = Target(
            layer=layer,
            variable=variable,
            attribute="kernel",
            **_axes(layer, "kernel", rule, len(steps.shape)),
            depth=len(found),
            key=f"{position[id(variable)]}:{variable.path}",
        )
        found.append((target, steps))
    return found


def _steps(layer):
    """The weights of a quantized layer in multiples of its scales."""
    codes = layer._kernel.value
    if layer.quantization_mode == "int4":
        columns = layer.kernel_scale.shape[-1]
        codes = keras.quantizers.unpack_int4(codes, columns, axis=-1)
        if hasattr(layer, "kernel_zero"):
            group = ops.cast(layer.g_idx, "int32")
            codes = ops.subtract(
                ops.cast(codes, "int32"),
                ops.take(ops.cast(layer.kernel_zero, "int32"), group, axis=0),
            )
        # Two-dimensional for EinsumDense too.
        shape = getattr(layer, "original_kernel_shape", codes.shape)
        codes = ops.reshape(codes, shape)
    return ops.cast(codes, "int32")


@dataclasses.dataclass(frozen=True)
class _Rule:
    """How a layer class uses one attribute: the axes, or why it is left out.

    Axes are tuples, or callables from the layer to one.
    """

    contraction_axes: Any = ()
    output_axes: Any = None
    stack_axes: Any = ()
    reason: str | None = None
    depthwise: bool = False


def _einsum_axes(role):
    """A callable from an EinsumDense to the axes that play `role` in it.

    A letter of the kernel is contracted where it stands in the input and not
    in the output, is a stack of kernels where it stands in both, and is of
    the output units otherwise.
    """

    def axes(layer):
        operands, output = layer.equation.replace(" ", "").split("->")
        inputs, kernel = operands.split(",")
        return tuple(
            axis
            for axis, letter in enumerate(kernel)
            if (letter in inputs, letter in output) == role
        )

    return axes


_DEPTHWISE = _Rule(
    contraction_axes=lambda layer: tuple(range(layer.rank)),
    reason="a depthwise kernel contracts no channels",
    depthwise=True,
)
_POINTWISE = _Rule(contraction_axes=lambda layer: tuple(range(layer.rank + 1)))
_EMBEDDING = "an embedding, whose rows are looked up and not contracted"

# {layer class: {attribute: rule}}; `register_target` adds to it.
_RULES: dict[type, dict[str, _Rule]] = {
    keras.layers.Dense: {"kernel": _Rule(contraction_axes=(0,))},
    keras.layers.EinsumDense: {
        "kernel": _Rule(
            contraction_axes=_einsum_axes((True, False)),
            stack_axes=_einsum_axes((True, True)),
        )
    },
    # (spatial..., in, out), whatever the data format.
    keras.layers.Conv1D: {"kernel": _POINTWISE},
    keras.layers.Conv2D: {"kernel": _POINTWISE},
    keras.layers.Conv3D: {"kernel": _POINTWISE},
    keras.layers.SeparableConv1D: {
        "depthwise_kernel": _DEPTHWISE,
        "pointwise_kernel": _POINTWISE,
    },
    keras.layers.SeparableConv2D: {
        "depthwise_kernel": _DEPTHWISE,
        "pointwise_kernel": _POINTWISE,
    },
    keras.layers.DepthwiseConv1D: {"kernel": _DEPTHWISE},
    keras.layers.DepthwiseConv2D: {"kernel": _DEPTHWISE},
    # The heads tied to an embedding are in this class as well.
    keras.layers.Embedding: {
        "embeddings": _Rule(reason=_EMBEDDING),
        "reverse_embeddings": _Rule(reason="the reverse of an embedding"),
    },
}


def _rules_of(layer):
    rules: dict[str, _Rule] = {}
    for cls in reversed(type(layer).__mro__):
        rules.update(_RULES.get(cls, {}))
    return rules


def _layers_of(layer):
    # Not in the public API, where `Model.layers` stops at the first level.
    return layer._flatten_layers()


def _check_built(model):
    check_model(model)
    unbuilt = [
        layer
        for layer in _layers_of(model)
        if not layer.built
        and (
            layer is model
            or any(rule.reason is None for rule in _rules_of(layer).values())
        )
    ]
    if unbuilt:
        names = [layer.name for layer in unbuilt[:5]]
        raise ValueError(
            "The model must be built, so that its weights exist. Call it on "
            "data once, or `model.build(input_shape)`. Received: "
            f"model={model.name!r}, of which {len(unbuilt)} layers are not "
            f"built: {', '.join(names)}"
            + (", ..." if len(unbuilt) > len(names) else "")
        )


def _candidates(layers, depthwise=False):
    """What `layers` hold: targets without their place, and the skipped.

    Returns:
        Pair of a list of dicts with the first fields of `Target`, in the
        declared order, and a list of `Skipped`.
    """
    candidates: dict[int, dict[str, Any]] = {}
    left_out: dict[Any, Skipped] = {}
    unknown: dict[int, Skipped] = {}
    for layer in layers:
        rules = _rules_of(layer)
        known = set()
        for attribute, rule in rules.items():
            variable = _stored_variable(layer, attribute)
            known.add(id(variable))
            reason = None if depthwise and rule.depthwise else rule.reason
            if reason is None and layer.quantization_mode is not None:
                reason = f"quantized to {layer.quantization_mode}"
            if variable is None and is_reparameterized(layer, attribute):
                variable = reparameterization(layer, attribute).target.variable
                reason = "packed; `unpack(model)` makes it dense again"
            if reason is not None:
                # A quantized layer may hold its kernel under another name,
                # and an embedding that is tied has no reverse one.
                if variable is not None:
                    left_out[id(variable)] = Skipped(variable.path, reason)
                elif layer.quantization_mode is not None:
                    path = f"{layer.path}/{attribute}"
                    left_out[id(layer), attribute] = Skipped(path, reason)
                continue
            if variable is None:
                raise ValueError(
                    f"`register_target` was told that {type(layer).__name__} "
                    f"holds a `keras.Variable` in `{attribute}`. Received: "
                    f"{attribute}={getattr(layer, attribute, None)!r} in "
                    f"layer {layer.name!r}"
                )
            axes = _axes(layer, attribute, rule, len(variable.shape))
            if axes is None:
                reason = "its layer contracts none of the axes"
                left_out[id(variable)] = Skipped(variable.path, reason)
                continue
            candidates.setdefault(
                id(variable),
                {
                    "layer": layer,
                    "variable": variable,
                    "attribute": attribute,
                    **axes,
                },
            )
        if layer.quantization_mode is not None:
            continue
        for variable in _other_matrices(layer, known):
            reason = _unknown_reason(layer, variable, rules)
            unknown[id(variable)] = Skipped(variable.path, reason)
    # What is shared with an embedding is left out; what an unknown layer
    # shares with a known one is known.
    return (
        [c for key, c in candidates.items() if key not in left_out],
        [
            *left_out.values(),
            *(
                skip
                for key, skip in unknown.items()
                if key not in left_out and key not in candidates
            ),
        ],
    )


def _stored_variable(layer, attribute):
    # Not `getattr` first: it may compute an effective weight.
    for name in (f"_{attribute}", attribute):
        value = vars(layer).get(name)
        if isinstance(value, keras.Variable):
            return value
    if attribute in vars(layer) or layer.quantization_mode is not None:
        return None
    value = getattr(layer, attribute, None)
    return value if isinstance(value, keras.Variable) else None


def _axes(layer, attribute, rule, rank):
    """The three kinds of axes as a dict; None where none is contracted."""

    def resolved(axes):
        axes = axes(layer) if callable(axes) else axes
        if not _are_ints(axes):
            return axes
        return tuple(sorted(a + rank if -rank <= a < 0 else a for a in axes))

    contraction = resolved(rule.contraction_axes)
    stack = resolved(rule.stack_axes)
    output = resolved(rule.output_axes)
    if contraction == ():
        return None
    valid = _are_ints(contraction) and _are_ints(stack)
    if valid and output is None:
        taken = contraction + stack
        output = tuple(axis for axis in range(rank) if axis not in taken)
    if (
        not valid
        or not _are_ints(output)
        or sorted(contraction + output + stack) != list(range(rank))
    ):
        raise ValueError(
            f"The axes registered for `{attribute}` of "
            f"{type(layer).__name__} must be tuples of ints that name each of "
            f"its {rank} axes once. Received: "
            f"contraction_axes={contraction}, output_axes={output}, "
            f"stack_axes={stack} for layer {layer.name!r}"
        )
    return {
        "contraction_axes": contraction,
        "output_axes": output,
        "stack_axes": stack,
    }


def _are_ints(value):
    return isinstance(value, (tuple, list)) and all(
        isinstance(axis, int) and not isinstance(axis, bool) for axis in value
    )


def _other_matrices(layer, known):
    """The trainable weights of rank 2 or more of `layer` itself, but biases.

    Where the layer is frozen, what could be trained cannot be told, and all
    of them count.
    """
    inner = {
        id(variable)
        for child in layer._flatten_layers(include_self=False, recursive=False)
        for variable in child.weights
    }
    inner.update(
        id(parameter)
        for item in reparameterizations(layer)
        for parameter in item.parameters
    )
    return [
        variable
        for variable in layer.weights
        if id(variable) not in inner
        and id(variable) not in known
        and len(variable.shape) >= 2
        and (variable.trainable or not layer.trainable)
        and not variable.name.endswith("bias")
        and not variable.name.startswith("lora_")
    ]


def _unknown_reason(layer, variable, rules):
    if "embedding" in variable.name or "embedding" in layer.name:
        return _EMBEDDING
    name = type(layer).__name__
    if rules:
        return (
            f"of {name}, find_targets knows {', '.join(rules)} only; "
            "register_target makes this one known"
        )
    return f"find_targets does not know {name}; register_target makes it known"


def _tests(name, patterns, layers):
    """List of pairs (pattern, callable from Target to bool), or None."""
    if patterns is None:
        return None
    if not isinstance(patterns, (list, tuple, set, frozenset)):
        patterns = [patterns]
    return [(pattern, _test(name, pattern, layers)) for pattern in patterns]


def _test(name, pattern, layers) -> Callable[[Target], bool]:
    if isinstance(pattern, (str, re.Pattern)):
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"`{name}` must be a valid regular expression ({error}). "
                f"Received: {name}={pattern!r}"
            ) from error
        return lambda target: regex.search(target.path) is not None
    is_type = isinstance(pattern, type)
    if isinstance(pattern, keras.layers.Layer) or (
        is_type and issubclass(pattern, keras.layers.Layer)
    ):
        outer = [
            layer
            for layer in layers
            if (isinstance(layer, pattern) if is_type else layer is pattern)
        ]
        inside = {id(layer) for each in outer for layer in _layers_of(each)}
        return lambda target: id(target.layer) in inside
    if callable(pattern) and not is_type:
        return lambda target: bool(pattern(target))
    raise ValueError(
        f"`{name}` must be a regular expression for the path, a layer, a "
        "layer type, a callable from Target to bool, or a list of these. "
        f"Received: {name}={pattern!r}"
    )


def _nothing_matches(pattern, targets, skipped):
    message = (
        "Each element of `include` must match a target. Received: "
        f"include={pattern!r}, which matches none of {len(targets)}"
    )
    if targets:
        message += ", among them " + ", ".join(
            repr(target.path) for target in targets[:5]
        )
    if isinstance(pattern, (str, re.Pattern)):
        for skip in skipped:
            if re.search(pattern, skip.path):
                return f"{message}. Left out: {skip.path} ({skip.reason})"
    return f"{message}. `find_targets(model)` lists them all."


def execution_order(model, watched):
    """{id of layer: place} of the `watched` layers that run, as they run.

    The declared order is another: a block often creates its output
    projection before its query. So the model is run once on symbols.
    """
    for size in (4, 64, 256):
        order: dict[int, int] = {}
        try:
            inputs = _symbolic_inputs(model, size)
            if inputs is None:
                break
            args, kwargs = inputs
            with _untouched(_layers_of(model)):
                for layer in watched:
                    vars(layer)["call"] = _noting_call(layer, order)
                _Run(model).compute_output_spec(*args, **kwargs)
        # What a model's own code raises on symbols or on this size is not
        # known. Without an order, the declared one remains.
        except Exception:
            continue
        return order
    return {}


class _Run(keras.Operation):
    """A model as an operation whose `call` runs it, without a trace in it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def call(self, *args, **kwargs):
        return self.model(*args, **kwargs)


def _noting_call(layer, order):
    call = layer.call

    def noting_call(*args, **kwargs):
        order.setdefault(id(layer), len(order))
        return call(*args, **kwargs)

    return noting_call


@contextlib.contextmanager
def _untouched(layers):
    """Restores the attributes of `layers`, and keeps warnings to itself.

    Past Keras' attribute tracking, which is locked on built layers. Keras
    notes in layers that they were called, and models' own code may keep
    symbols.
    """
    saved = [(vars(layer), dict(vars(layer))) for layer in layers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for attributes, before in saved:
            for name in attributes.keys() - before.keys():
                del attributes[name]
            for name, value in before.items():
                if attributes.get(name, attributes) is not value:
                    attributes[name] = value


def _symbolic_inputs(model, size):
    """Pair (args, kwargs) to call `model` with, or None if not known.

    Open dimensions become `size`, an open batch 1. Keras itself would put in
    large numbers, and two of them; on torch, where a model that cannot run
    on the meta device runs eagerly, that takes minutes for an LLM.
    """

    def symbol(shape, dtype):
        filled = [size if dim is None else dim for dim in shape]
        if shape and shape[0] is None:
            filled[0] = 1
        return keras.KerasTensor(filled, dtype=dtype)

    def of_tensor(x):
        return symbol(x.shape, x.dtype)

    def of_shape(shape):
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


def _columns(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows
    ]
