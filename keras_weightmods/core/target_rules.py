"""What is known of layer classes: which axes of a kernel are contracted."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from keras import layers

from keras_weightmods.core import keras_compat
from keras_weightmods.core.expert_banks import bank_of
from keras_weightmods.utils.checks import error

_Axes = Sequence[int] | Callable[[Any], Sequence[int]]


def register_target(
    layer_class: type[layers.Layer],
    attribute: str = "kernel",
    *,
    contraction_axes: _Axes,
    output_axes: _Axes | None = None,
    stack_axes: _Axes = (),
) -> None:
    """Make a kernel of a layer class known to `find_targets`.

    Serves the subclasses too; of several registrations of one attribute, that
    of the most derived class counts. Overrides what the library knows itself.
    Call it once for each attribute that holds a kernel.

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
    is_class = isinstance(layer_class, type)
    if not is_class or not issubclass(layer_class, layers.Layer):
        expected = "a subclass of `keras.layers.Layer`"
        raise error("layer_class", expected, layer_class)
    if not isinstance(attribute, str) or not attribute.isidentifier():
        expected = "the name of an attribute of the layer"
        raise error("attribute", expected, attribute)
    axes: dict[str, Any] = {
        "contraction_axes": contraction_axes,
        "output_axes": output_axes,
        "stack_axes": stack_axes,
    }
    fixed: list[int] = []
    for name, value in axes.items():
        is_function = not isinstance(value, (type, layers.Layer))
        if (is_function and callable(value)) or (
            name == "output_axes" and value is None
        ):
            continue
        if not _are_ints(value) or (name == "contraction_axes" and not value):
            expected = (
                "a tuple of ints (at least one in `contraction_axes`), or a "
                "callable from the layer to one"
            )
            raise error(name, expected, value)
        fixed.extend(value)
    if len(set(fixed)) != len(fixed):
        raise ValueError(
            "An axis must be named once. Received: "
            + ", ".join(f"{name}={value!r}" for name, value in axes.items())
        )
    _RULES[layer_class, attribute] = Rule(**axes)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a layer class uses one attribute.

    Attributes:
        contraction_axes, output_axes, stack_axes: Tuples of ints, or callables
            from the layer to one; see `register_target`.
        reason: String, why it is no target; None if it is one.
        depthwise: Bool, whether it is one where depthwise kernels are.
        optional: Bool, whether some layers of the class do without it.
    """

    contraction_axes: Any = ()
    output_axes: Any = None
    stack_axes: Any = ()
    reason: str | None = None
    depthwise: bool = False
    optional: bool = False


def _einsum_axes(role: tuple[bool, bool]) -> _Axes:
    """Return a callable from an EinsumDense to the axes that play `role` in it.

    A letter of the kernel is contracted where it stands in the input and not
    in the output, is a stack of kernels where it stands in both, and is of
    the output units otherwise.
    """

    def axes(layer: Any) -> tuple[int, ...]:
        operands, output = layer.equation.replace(" ", "").split("->")
        inputs, kernel = operands.split(",")
        return tuple(
            axis
            for axis, letter in enumerate(kernel)
            if (letter in inputs, letter in output) == role
        )

    return axes


_DEPTHWISE = Rule(
    contraction_axes=lambda layer: tuple(range(layer.rank)),
    reason="a depthwise kernel contracts no channels",
    depthwise=True,
)
# (spatial..., in, out), whatever the data format.
_CONV = Rule(contraction_axes=lambda layer: tuple(range(layer.rank + 1)))
# (spatial..., out, in). Of a pixel of the output each sums over other taps, so
# that the product is of a pixel of the input: its channels are contracted.
_CONV_TRANSPOSE = Rule(contraction_axes=(-1,))
# (in, gates * units) and (units, gates * units).
_MATRIX = Rule(contraction_axes=(0,))
# (experts, in, out)
_EXPERTS = Rule(contraction_axes=(1,), stack_axes=(0,))
EMBEDDING = "an embedding, whose rows are looked up and not contracted"

# {(layer class, attribute): rule}; `register_target` adds to it.
_RULES: dict[tuple[type, str], Rule] = {
    (layers.Dense, "kernel"): Rule(contraction_axes=(0,)),
    (layers.EinsumDense, "kernel"): Rule(
        contraction_axes=_einsum_axes((True, False)),
        stack_axes=_einsum_axes((True, True)),
    ),
    (layers.Conv1D, "kernel"): _CONV,
    (layers.Conv2D, "kernel"): _CONV,
    (layers.Conv3D, "kernel"): _CONV,
    **{
        (cls, "kernel"): _CONV_TRANSPOSE
        for cls in (
            layers.Conv1DTranspose,
            layers.Conv2DTranspose,
            layers.Conv3DTranspose,
        )
    },
    **{
        (cls, name): _MATRIX
        for cls in (layers.SimpleRNNCell, layers.LSTMCell, layers.GRUCell)
        for name in ("kernel", "recurrent_kernel")
    },
    (keras_compat.ConvLSTMCell, "kernel"): _CONV,
    (keras_compat.ConvLSTMCell, "recurrent_kernel"): _CONV,
    (layers.SeparableConv1D, "depthwise_kernel"): _DEPTHWISE,
    (layers.SeparableConv1D, "pointwise_kernel"): _CONV,
    (layers.SeparableConv2D, "depthwise_kernel"): _DEPTHWISE,
    (layers.SeparableConv2D, "pointwise_kernel"): _CONV,
    (layers.DepthwiseConv1D, "kernel"): _DEPTHWISE,
    (layers.DepthwiseConv2D, "kernel"): _DEPTHWISE,
    # The heads tied to an embedding are in this class as well; the axes are
    # those of the head.
    (layers.Embedding, "embeddings"): Rule((1,), reason=EMBEDDING),
    (layers.Embedding, "reverse_embeddings"): Rule(
        (0,), reason="the reverse of an embedding"
    ),
}


_SCALE = Rule(reason="multiplied entry by entry, and not contracted")
_LOW_RANK = Rule(contraction_axes=(0,), optional=True)
# By names of classes of KerasHub, which is no dependency.
_HUB_RULES: dict[str, dict[str, Rule]] = {
    # (channels, taps)
    "Qwen3_5GatedDeltaNet": {
        "conv1d_weight": dataclasses.replace(_DEPTHWISE, contraction_axes=(1,))
    },
    # The first layer has no v1 and v2.
    "RWKV7TimeMix": {
        **{f"{name}{i}": _LOW_RANK for name in "wavg" for i in (1, 2)},
        "r_k": _SCALE,
    },
}


def rules_of(layer: Any) -> dict[str, Rule]:
    """Return {attribute: rule} of what is known of a layer."""
    rules: dict[str, Rule] = {}
    for cls in reversed(type(layer).__mro__):
        if (bank := bank_of(cls)) is not None:
            rules.update(dict.fromkeys(bank.stacks, _EXPERTS))
        if cls.__module__.startswith("keras_hub."):
            rules.update(_HUB_RULES.get(cls.__name__, {}))
        for (owner, attribute), rule in _RULES.items():
            if owner is cls:
                rules[attribute] = rule
    return rules


def axes_of(
    layer: Any, attribute: str, rule: Rule, rank: int
) -> dict[str, tuple[int, ...]]:
    """Return the three kinds of axes as a dict, rising and not negative.

    Raises:
        ValueError: If they do not fit a weight of `rank` axes.
    """
    axes: dict[str, Any] = {}
    for name in ("contraction_axes", "stack_axes", "output_axes"):
        value = getattr(rule, name)
        value = value(layer) if callable(value) else value
        if value is None and all(map(_are_ints, axes.values())):
            taken = sum(axes.values(), ())
            value = tuple(axis for axis in range(rank) if axis not in taken)
        if _are_ints(value):
            value = (a + rank if -rank <= a < 0 else a for a in value)
            value = tuple(sorted(value))
        axes[name] = value
    if not all(map(_are_ints, axes.values())) or sorted(
        sum(axes.values(), ())
    ) != list(range(rank)):
        received = ", ".join(f"{name}={axes[name]}" for name in axes)
        raise ValueError(
            f"The axes registered for `{attribute}` of "
            f"{type(layer).__name__} must be tuples of ints that name each of "
            f"its {rank} axes once. Received: {received} for layer "
            f"{layer.name!r}"
        )
    return axes


def _are_ints(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(
        isinstance(axis, int) and not isinstance(axis, bool) for axis in value
    )
