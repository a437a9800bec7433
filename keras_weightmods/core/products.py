"""The products that the functions of `layer_calls` make."""

from typing import Any

from keras import ops

from keras_weightmods.core import keras_compat
from keras_weightmods.core.layer_kinds import axes_of
from keras_weightmods.core.reparameterization import slots
from keras_weightmods.utils.matrix import contraction_size, to_stack


class Products:
    """The products of a layer with its own kernels.

    The argument `multiply` of the functions of `layer_calls`.

    Args:
        layer: A layer with a `kind_with_call`.
        plain: The layer's own `call`.
    """

    def __init__(self, layer: Any, plain: Any = None) -> None:
        self.layer = layer
        self.plain = plain

    def __call__(self, attribute: str, rows: Any, stacked: bool = False) -> Any:
        """Return rows (..., K), or (..., S, K), times a kernel."""
        kernel = getattr(self.layer, attribute)
        count = self.stacks(attribute, rows) if stacked else 1
        contracted, stack_axes = self._axes(attribute)
        matrices = to_stack(kernel, contracted, stack_axes, count)
        matrices = ops.cast(matrices, rows.dtype)
        if not stacked:
            return ops.matmul(rows, matrices[0])
        rows = ops.moveaxis(rows, -2, 0)
        leading = rows.shape[1:-1]
        rows = ops.reshape(rows, (rows.shape[0], -1, rows.shape[-1]))
        y = ops.matmul(rows, matrices)
        y = ops.reshape(y, (y.shape[0], *leading, y.shape[-1]))
        return ops.moveaxis(y, 0, -2)

    def look_up(self, attribute: str, indices: Any) -> Any:
        """Return rows of a table, in the layer's type."""
        table = getattr(self.layer, attribute)
        rows = ops.take(table, ops.cast(indices, "int32"), axis=0)
        return ops.cast(rows, self.layer.compute_dtype)

    def stacks(self, attribute: str, rows: Any) -> int:
        """Return how many kernels rows (..., S, K) are multiplied by."""
        stack_axes = self._axes(attribute)[1]
        if rows.shape[-2] > 1 or not stack_axes:
            return int(rows.shape[-2])
        return contraction_size(self.shape(attribute), stack_axes)

    def _axes(self, attribute: str) -> Any:
        """Return the contraction and the stack axes of a kernel."""
        axes = axes_of(self.layer, attribute, len(self.shape(attribute)))
        return axes["contraction_axes"], axes["stack_axes"]

    def shape(self, attribute: str) -> tuple[int, ...]:
        """Return the shape of a kernel."""
        item = slots(self.layer).get(attribute)
        if item is not None:
            return tuple(item.target.shape)
        stored = keras_compat.stored_variable(self.layer, attribute)
        return tuple(stored.shape)
