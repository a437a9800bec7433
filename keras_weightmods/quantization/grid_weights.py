"""Weights that are trained through their rounding."""

from collections.abc import Callable
from typing import Any

from keras import ops

from keras_weightmods.core.reparameterization import Reparameterization
from keras_weightmods.core.targets import Target
from keras_weightmods.ops.rounding import Grid
from keras_weightmods.utils.matrix import from_stack, to_stack


class GridWeights(Reparameterization):
    """A kernel that is computed with as it is rounded, and trained as it is.

    Forward each weight is the nearest multiple of its scale, and each scale
    has few bits. Backward the roundings pass gradients on as if they were not
    there, and clipping stops them: straight through, with the gradient of the
    scales of LSQ (arXiv 1902.08153). Zeros stay zero.

    Args:
        target: The `Target`.
        weights: Tensor of shape `(S, K, R)`, the weights before rounding.
        values: Tensor of the same shape, what they are rounded to, which may
            be another multiple than the nearest.
        scales: Tensor of shape `(S, G, R)`, those of `values`.
        grid: `Grid`.
    """

    def __init__(
        self, target: Target, weights: Any, values: Any, scales: Any, grid: Grid
    ) -> None:
        super().__init__(target)
        self.weights, self.values = weights, values
        self.scales, self.grid = scales, grid

    def rounded(self) -> Any:
        """Return `values` as a kernel, in its own type."""
        return ops.cast(self._as_kernel(self.values), self.dtype)

    def start(self, weight: Any) -> Any:
        # Next to the weights, among all that are rounded to the values.
        reach = 0.45 * self._spread(self.scales)
        weights = ops.cast(self.weights, "float32")
        change = ops.clip(weights - self.values, -reach, reach)
        stored = ops.where(weights == 0, 0.0, self.values + change)
        return ops.cast(self._as_kernel(stored), self.dtype)

    def create_parameters(self, add_weight: Callable[..., Any]) -> None:
        # Near 1, so that one learning rate fits all of them.
        add_weight(
            name=f"{self.target.attribute}_scale_factor",
            shape=tuple(self.scales.shape),
            initializer="ones",
            dtype="float32",
        )

    def effective(self, stored: Any) -> Any:
        stack, scales = self._as_stack(stored), self._trained_scales()
        integers = ops.clip(stack / scales, self.grid.low, self.grid.high)
        integers = _straight_through(ops.round, integers)
        return self._as_kernel(integers * scales)

    def folded(self) -> Any:
        # Exactly on the grid, which a sum of what is trained may miss.
        (factor,) = self.parameters
        scales = self.grid.rounded_scales(self.scales * factor.value)
        self.scales = ops.stop_gradient(scales)
        stack = self._as_stack(self.target.variable.value)
        rounded = self.grid.nearest(stack, self._spread(self.scales))
        return ops.cast(self._as_kernel(rounded), self.dtype)

    def _trained_scales(self) -> Any:
        (factor,) = self.parameters
        scales = self.scales * ops.convert_to_tensor(factor)
        scales = _straight_through(self.grid.rounded_scales, scales)
        return self._spread(scales)

    def _spread(self, scales: Any) -> Any:
        size = self.target.contraction_size
        group_size = min(self.grid.group_size, size)
        return ops.repeat(scales, group_size, axis=1)[:, :size]

    def _as_stack(self, kernel: Any) -> Any:
        axes = self.target.contraction_axes, self.target.stack_axes
        stack = to_stack(kernel, *axes, self.scales.shape[0])
        return ops.cast(stack, "float32")

    def _as_kernel(self, stack: Any) -> Any:
        axes = self.target.contraction_axes, self.target.stack_axes
        return from_stack(stack, self.target.shape, *axes)


class GridScales(GridWeights):
    """Rounded weights of which the scales alone are trained.

    The variable holds the integers meanwhile.

    Args:
        target, scales, grid: As of `GridWeights`.
    """

    def __init__(self, target: Target, scales: Any, grid: Grid) -> None:
        super().__init__(target, None, None, scales, grid)

    def start(self, weight: Any) -> Any:
        stack = self._as_stack(weight) / self._spread(self.scales)
        return ops.cast(self._as_kernel(stack), self.dtype)

    def effective(self, stored: Any) -> Any:
        return self._as_kernel(self._as_stack(stored) * self._trained_scales())

    def folded(self) -> Any:
        return ops.cast(self.effective(self.target.variable), self.dtype)


def _straight_through(function: Callable[[Any], Any], x: Any) -> Any:
    return x + ops.stop_gradient(function(x) - x)
