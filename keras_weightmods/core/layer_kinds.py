"""The kinds of layers: their kernels' axes, and their products with these.

An entry of `_KINDS` is all that the methods know about a layer class. It says
which weights are kernels (`find_targets`). It also has a forward pass with
replaceable products (`layer_calls`). This records the inputs of kernels, for
Wanda, SparseGPT and GPTQ, and multiplies by packed kernels.
"""

import dataclasses
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

from keras import layers

from keras_weightmods.core import keras_compat, layer_calls
from keras_weightmods.utils.checks import error

_NOT_ALONE = "which does not multiply by it alone"
EMBEDDING = "an embedding, whose rows are looked up and not contracted"
# The KerasHub release whose layers `layer_calls` follows.
KERAS_HUB = "0.32"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How a layer class uses one of its weights.

    Attributes:
        contraction_axes, output_axes, stack_axes: Tuples of ints, or callables
            from the layer to one; see `register_layer_kind`.
        reason: String, why it is no target; None if it is one.
        unread: String, why its products are not known, whatever `call` is;
            None if they are.
        dense: String, or callable from the layer to one or None: why nothing
            else can stand for it in a product; None if it can.
        depthwise: Bool, whether it is one where depthwise kernels are.
        optional: Bool, whether some layers of the class do without it.
    """

    contraction_axes: Any = ()
    output_axes: Any = None
    stack_axes: Any = ()
    reason: str | None = None
    unread: str | None = None
    dense: Any = None
    depthwise: bool = False
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What is known about a layer class.

    Attributes:
        kernels: Dict of `Kernel` by the name of an attribute.
        call: Function from a layer, its `Products` and the arguments of a call
            to the outputs; None if nobody knows it.
        reason: Callable from a layer to why `call` is not for it, or to None.
        routed: Callable from the layer that holds a bank of experts, and the
            arguments of the bank's call, to a boolean tensor (tokens,
            experts): which tokens are routed to which expert.
    """

    kernels: Mapping[str, Kernel]
    call: Callable[..., Any] | None = None
    reason: Callable[[Any], str | None] = lambda layer: None
    routed: Callable[..., Any] | None = None


def register_layer_kind(
    layer_class: type[layers.Layer],
    kernels: Mapping[str, Mapping[str, Any]],
    call: Callable[..., Any] | None = None,
) -> None:
    """Make the kernels of a layer class known to all methods.

    This covers subclasses too. If several classes register one attribute, the
    most derived class counts. A registration overrides what the library knows
    itself.

    Args:
        layer_class: A subclass of `keras.layers.Layer`.
        kernels: Dict from attribute to the axes of its kernel. The attribute
            holds the `keras.Variable`. Or it is a property whose variable has
            the same name with an underscore in front, as in Keras' own layers.
            The axes are a dict of tuples of ints, or of callables from the
            built layer to one. Negative ones count from the end. The layer sums
            over `"contraction_axes"`. `"stack_axes"` index whole kernels, such
            as the experts of a mixture. `"output_axes"` are the output units,
            by default all remaining axes.
        call: Function `call(layer, multiply, *args, **kwargs)`: the layer's own
            `call`, with `multiply(attribute, rows)` for each product with a
            kernel. It takes rows of shape `(..., K)`, with K the contracted
            axes flattened in order, and returns `(..., N)`. For a stack of S
            kernels write `multiply(attribute, rows, stacked=True)`, from
            `(..., S, K)` to `(..., S, N)`. There S may be 1 in `rows`, if all
            kernels have the same. With it the pruning criteria, `kwm.quantize`
            and `kwm.pack` reach the layer. Without it, by default, `None`, only
            methods that need no inputs do, such as magnitude pruning, AdamS and
            LIFT.

    Raises:
        ValueError: If `layer_class` is not a layer class, or `kernels` is not a
            dict of such axes. Axes that do not fit a kernel raise in the calls
            that look for it.

    Example:

    ```python
    import keras
    import keras_weightmods as kwm

    class Experts(keras.layers.Layer):
        def build(self, input_shape):
            self.up = self.add_weight(shape=(2, input_shape[-1], 3), name="up")

        def call(self, x):
            return keras.ops.einsum("bi,eio->beo", x, self.up)

    def call(layer, multiply, x):
        return multiply("up", x[:, None], stacked=True)

    axes = {"contraction_axes": (1,), "stack_axes": (0,)}
    kwm.register_layer_kind(Experts, {"up": axes}, call)
    layer = Experts()
    layer.build((None, 8))
    (target,) = kwm.find_targets(layer)
    assert target.output_axes == (2,)
    ```
    """
    if not isinstance(layer_class, type) or not issubclass(
        layer_class, layers.Layer
    ):
        expected = "a subclass of `keras.layers.Layer`"
        raise error("layer_class", expected, layer_class)
    if call is not None and not callable(call):
        raise error("call", "a function or None", call)
    try:
        known = {name: Kernel(**axes) for name, axes in kernels.items()}
        is_known = known and all(
            each.contraction_axes for each in known.values()
        )
    except (AttributeError, TypeError):
        is_known = False
    if not is_known:
        expected = (
            "a dict from the attribute of each kernel to a dict of its "
            "`contraction_axes`, `output_axes` and `stack_axes`"
        )
        raise error("kernels", expected, kernels)
    _KINDS[layer_class] = LayerKind(known, call)


def kernels_of(layer: Any) -> dict[str, Kernel]:
    """Return the known kernels of a layer as {attribute: `Kernel`}."""
    kernels: dict[str, Kernel] = {}
    for cls in reversed(type(layer).__mro__):
        if (kind := _kind(cls)) is not None:
            kernels.update(kind.kernels)
    return kernels


def kind_with_call(layer: Any) -> LayerKind | None:
    """Return the kind with the same `call` as the layer; None if there is none.

    A class or layer with its own `call` may do anything with its kernels.
    """
    if "call" in keras_compat.attributes(layer):
        return None
    for cls in type(layer).__mro__:
        own = keras_compat.attributes(cls)
        if own.get(GENERATED) or cls.__module__.startswith("keras_weightmods."):
            continue
        if (kind := _kind(cls)) is not None and kind.call is not None:
            return kind
        if "call" in own or "convolution_op" in own:
            return None
    return None


def reason_unread(layer: Any, attribute: str) -> str | None:
    """Return why the products with a kernel are unknown; None if known."""
    kind, rule = kind_with_call(layer), kernels_of(layer).get(attribute)
    if rule is not None and rule.unread is not None:
        why = rule.unread
    elif rule is not None and kind is None:
        why = (
            "whose `call` is not known; `kwm.register_layer_kind` makes it "
            "known"
        )
    elif kind is None or attribute not in kind.kernels:
        why = _NOT_ALONE
    else:
        return kind.reason(layer)
    return f"of {type(layer).__name__}, {why}"


def reason_dense(layer: Any, attribute: str) -> str | None:
    """Return why a kernel cannot be replaced in products; None if it can."""
    reason = reason_unread(layer, attribute)
    if reason is None:
        reason = kernels_of(layer)[attribute].dense
        reason = reason(layer) if callable(reason) else reason
    return reason


# Classes generated by the library have this attribute.
GENERATED = "_is_generated"


def axes_of(
    layer: Any, attribute: str, rank: int
) -> dict[str, tuple[int, ...]]:
    """Return the three kinds of axes as a dict, sorted and not negative.

    Raises:
        ValueError: If they do not fit a weight of `rank` axes.
    """
    rule, places = kernels_of(layer)[attribute], range(rank)
    axes: dict[str, tuple[int, ...]] = {}
    try:
        for name in ("contraction_axes", "stack_axes", "output_axes"):
            value = getattr(rule, name)
            value = value(layer) if callable(value) else value
            if value is None:
                value = {*places}.difference(*axes.values())
            axes[name] = tuple(sorted(places[axis] for axis in value))
        is_each = sorted(sum(axes.values(), ())) == [*places]
    except (IndexError, TypeError):
        is_each = False
    if not is_each:
        raise ValueError(
            f"The axes registered for `{attribute}` of "
            f"{type(layer).__name__} must be tuples of ints that name each of "
            f"its {rank} axes once. Received: {rule} for layer {layer.name!r}"
        )
    return axes


def _groups(layer: Any) -> str | None:
    if layer.groups == 1:
        return None
    return (
        f"a convolution in {layer.groups} groups, each with a kernel of its own"
    )


_MATRIX = Kernel(contraction_axes=(0,))
_EINSUM = Kernel(
    lambda layer: layer_calls.einsum_axes(layer.equation, True, False),
    stack_axes=lambda layer: layer_calls.einsum_axes(
        layer.equation, True, True
    ),
)
# (spatial..., in, out), whatever the data format.
_CONV = Kernel(lambda layer: tuple(range(layer.rank + 1)))
_DEPTHWISE = Kernel(
    lambda layer: tuple(range(layer.rank)),
    reason="a depthwise kernel contracts no channels",
    unread=_NOT_ALONE,
    depthwise=True,
)
# (spatial..., out, in). Each output pixel sums over other taps, so the product
# is that of an input pixel, whose channels are contracted.
_TRANSPOSED = Kernel(
    (-1,), dense="of a transposed convolution, which adds up its products"
)


_OF_CELLS = "kernel", "recurrent_kernel"


def _in_loop(kernel: Kernel) -> Kernel:
    # On torch that loop does not call the cell.
    why = "whose layer reads it whole, in a loop over the steps of a sequence"
    return dataclasses.replace(kernel, unread=why)


# {layer class: kind}; `register_layer_kind` adds to it.
_KINDS: dict[type, LayerKind] = {
    layers.Dense: LayerKind({"kernel": _MATRIX}, layer_calls.dense),
    layers.EinsumDense: LayerKind(
        {"kernel": _EINSUM},
        layer_calls.einsum_dense,
        layer_calls.einsum_reason,
    ),
    **dict.fromkeys(
        (layers.Conv1D, layers.Conv2D, layers.Conv3D),
        LayerKind(
            {"kernel": dataclasses.replace(_CONV, dense=_groups)},
            layer_calls.convolution,
        ),
    ),
    **dict.fromkeys(
        (
            layers.Conv1DTranspose,
            layers.Conv2DTranspose,
            layers.Conv3DTranspose,
        ),
        LayerKind({"kernel": _TRANSPOSED}, layer_calls.transposed_convolution),
    ),
    **dict.fromkeys(
        (layers.SeparableConv1D, layers.SeparableConv2D),
        LayerKind(
            {"depthwise_kernel": _DEPTHWISE, "pointwise_kernel": _CONV},
            layer_calls.separable_convolution,
        ),
    ),
    **dict.fromkeys(
        (layers.DepthwiseConv1D, layers.DepthwiseConv2D),
        LayerKind({"kernel": _DEPTHWISE}),
    ),
    # (in, gates * units) and (units, gates * units).
    **dict.fromkeys(
        (layers.LSTMCell, layers.GRUCell, layers.SimpleRNNCell),
        LayerKind(dict.fromkeys(_OF_CELLS, _in_loop(_MATRIX))),
    ),
    keras_compat.ConvLSTMCell: LayerKind(
        dict.fromkeys(_OF_CELLS, _in_loop(_CONV))
    ),
    # Heads tied to an embedding are also in this class. The axes are those of
    # the head.
    layers.Embedding: LayerKind({"embeddings": Kernel((1,), reason=EMBEDDING)}),
    layers.ReversibleEmbedding: LayerKind(
        {
            "embeddings": Kernel((1,), reason=EMBEDDING),
            "reverse_embeddings": Kernel(
                (0,), reason="the reverse of an embedding"
            ),
        },
        layer_calls.reversible_embedding,
    ),
}


def _other_keras_hub(layer: Any) -> str | None:
    version = importlib.metadata.version("keras-hub")
    if version.startswith(f"{KERAS_HUB}."):
        return None
    return (
        f"of {type(layer).__name__} of KerasHub {version}; known is that of "
        f"{KERAS_HUB}"
    )


def _bank(call: Any, routed: Any, *names: str) -> LayerKind:
    """Return the kind of a bank of experts, by the names of its stacks."""
    # (experts, in, out)
    experts = Kernel(contraction_axes=(1,), stack_axes=(0,))
    kernels = dict.fromkeys(names, experts)
    return LayerKind(kernels, call, _other_keras_hub, routed)


_STACKS = "_expert_feedforward_gate_dense", "_expert_feedforward_output_dense"
_BY_GATE = layer_calls.routed_by("_sparse_feedforward_gate_dense")
_LOW_RANK = Kernel(contraction_axes=(0,), optional=True)
_SCALE = Kernel(reason="multiplied entry by entry, and not contracted")

# Keyed by class name, because KerasHub is no dependency.
_HUB_KINDS: dict[str, LayerKind] = {
    "MixtralMoeExperts": _bank(
        layer_calls.mixtral_experts,
        _BY_GATE,
        *_STACKS,
        "_expert_feedforward_intermediate_dense",
    ),
    "QwenMoeExperts": _bank(layer_calls.qwen_experts, _BY_GATE, *_STACKS),
    "Qwen3MoeExperts": _bank(layer_calls.qwen_experts, _BY_GATE, *_STACKS),
    "Qwen3_5MoeExperts": _bank(
        layer_calls.qwen3_5_experts,
        layer_calls.routed_by("_router_gate"),
        *_STACKS,
    ),
    "GptOssExperts": _bank(
        layer_calls.gpt_oss_experts,
        layer_calls.routed_by("router", "router_dense"),
        *("gate_up_proj", "down_proj"),
    ),
    "Gemma4MoEBlock": _bank(
        layer_calls.gemma4_experts,
        layer_calls.routed_by_weights,
        *("gate_proj", "up_proj", "down_proj"),
    ),
    # The first layer has no v1 and v2.
    "RWKV7TimeMix": LayerKind(
        {
            **{f"{name}{i}": _LOW_RANK for name in "wavg" for i in (1, 2)},
            "r_k": _SCALE,
        }
    ),
}


def _kind(cls: Any) -> LayerKind | None:
    """Return what is known about a class itself, not its bases."""
    if cls in _KINDS:
        return _KINDS[cls]
    is_hub = cls.__module__.startswith("keras_hub.")
    return _HUB_KINDS.get(cls.__name__) if is_hub else None
