"""What is known of layer classes: which axes of a kernel are contracted."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_weightmods.utils.checks import error

_Axes = Sequence[int] | Callable[[Any], Sequence[int]]


def register_target(
    layer_class: type[keras.layers.Layer],
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
    if not (
        isinstance(layer_class, type)
        and issubclass(layer_class, keras.layers.Layer)
    ):
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
        if callable(value) or (name == "output_axes" and value is None):
            continue
        if not _are_ints(value):
            expected = "a tuple of ints, or a callable from the layer to one"
            raise error(name, expected, value)
        fixed.extend(value)
    if not callable(contraction_axes) and not contraction_axes:
        expected = "at least one axis, which the layer sums over"
        raise error("contraction_axes", expected, contraction_axes)
    if len(set(fixed)) != len(fixed):
        raise ValueError(
            "An axis must be named once. Received: "
            + ", ".join(f"{name}={value!r}" for name, value in axes.items())
        )
    _RULES.setdefault(layer_class, {})[attribute] = Rule(**axes)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a layer class uses one attribute.

    Attributes:
        contraction_axes, output_axes, stack_axes: Tuples of ints, or callables
            from the layer to one; see `register_target`.
        reason: String, why it is no target; None if it is one.
        depthwise: Bool, whether it is one where depthwise kernels are.
    """

    contraction_axes: Any = ()
    output_axes: Any = None
    stack_axes: Any = ()
    reason: str | None = None
    depthwise: bool = False


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
_POINTWISE = Rule(contraction_axes=lambda layer: tuple(range(layer.rank + 1)))
EMBEDDING = "an embedding, whose rows are looked up and not contracted"

# {layer class: {attribute: rule}}; `register_target` adds to it.
_RULES: dict[type, dict[str, Rule]] = {
    keras.layers.Dense: {"kernel": Rule(contraction_axes=(0,))},
    keras.layers.EinsumDense: {
        "kernel": Rule(
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
        # The axes are those of the head that is tied to it.
        "embeddings": Rule(contraction_axes=(1,), reason=EMBEDDING),
        "reverse_embeddings": Rule(reason="the reverse of an embedding"),
    },
}


def rules_of(layer: Any) -> dict[str, Rule]:
    """Return {attribute: rule} of what is known of a layer."""
    rules: dict[str, Rule] = {}
    for cls in reversed(type(layer).__mro__):
        rules.update(_RULES.get(cls, {}))
    return rules


def axes_of(
    layer: Any, attribute: str, rule: Rule, rank: int
) -> dict[str, tuple[int, ...]]:
    """Return the three kinds of axes as a dict, rising and not negative.

    Raises:
        ValueError: If they do not fit a weight of `rank` axes.
    """

    def resolved(axes: Any) -> Any:
        axes = axes(layer) if callable(axes) else axes
        if not _are_ints(axes):
            return axes
        return tuple(sorted(a + rank if -rank <= a < 0 else a for a in axes))

    contraction = resolved(rule.contraction_axes)
    stack = resolved(rule.stack_axes)
    output = resolved(rule.output_axes)
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


def _are_ints(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(
        isinstance(axis, int) and not isinstance(axis, bool) for axis in value
    )
