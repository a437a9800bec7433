"""Arrays in parts that stand for one array."""

import dataclasses
from typing import Any

from keras import ops


@dataclasses.dataclass(frozen=True)
class Stack:
    """Tensors or stacks of one shape, stacked along a new axis.

    JAX and TensorFlow take it as a nest of tensors.

    Args:
        axis: Int.
        parts: List of tensors and stacks.
    """

    axis: int
    parts: list[Any]

    @property
    def shape(self):
        shape = self.parts[0].shape
        return (*shape[: self.axis], len(self.parts), *shape[self.axis :])

    def __tf_flatten__(self):
        return (self.axis,), (self.parts,)

    @classmethod
    def __tf_unflatten__(cls, metadata, components):
        return cls(*metadata, *components)


def whole(x: Any) -> Any:
    """Return the tensor that a stack stands for; return tensors as they are."""
    if isinstance(x, Stack):
        return ops.stack(list(map(whole, x.parts)), x.axis)
    return x


def split_like(tensor: Any, stack: Any) -> Any:
    """Return a tensor as a stack of the form of another one."""
    if not isinstance(stack, Stack):
        return tensor
    parts = [ops.take(tensor, i, stack.axis) for i in range(len(stack.parts))]
    return Stack(stack.axis, list(map(split_like, parts, stack.parts)))
