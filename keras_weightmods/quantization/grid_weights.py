"""Weights that are trained through their rounding."""

from collections.abc import Callable
from typing import Any

from keras import ops

from keras_weightmods import backend
from keras_weightmods.core.reparameterization import Reparameterization
from keras_weightmods.core.targets import Target
from keras_weightmods.ops.rounding import Grid
from keras_weightmods.utils.matrix import from_stack, to_stack


class GridWeights(Reparameterization):
    """A kernel that is rounded for the computation, and trained unrounded.

    In the forward pass each weight is the nearest multiple of its scale, and
    each scale has few bits. In the backward pass gradients go straight through
    the roundings, and clipping stops them. The gradient of the scales is that
    of LSQ (arXiv 1902.08153). Zeros stay zero.

    Args:
        target: The `Target`.
        unrounded: Callable from the variable to its value before rounding, or
            None. The variable holds what this is rounded to, which may be
            another multiple than the nearest.
        scales: Tensor of shape `(S, G, R)`, those of the rounded weights.
        grid: `Grid`.
    """

    def __init__(
        self, target: Target, unrounded: Any, scales: Any, grid: Grid
    ) -> None:
        super().__init__(target)
        self.unrounded, self.scales, self.grid = unrounded, scales, grid

    def start(self, weight: Any) -> Any:
        # The closest to the weights, of all that round to the values.
        reach = 0.45 * ops.abs(self.scales)[:, :, None]
        weights = self.unrounded(self.target.variable)
        weights = self._grouped(self._as_stack(weights, "float32"))
        values = self._grouped(self._as_stack(weight, "float32"))
        change = ops.clip(weights - values, -reach, reach)
        stored = ops.where(weights == 0, 0.0, values + change)
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
        # In the type of the kernel, which the backward pass holds.
        groups = self._grouped(self._as_stack(stored))
        limits = self.grid.low, self.grid.high
        return self._as_kernel(
            multiples(groups, self._trained_scales(), limits)
        )

    def folded(self) -> Any:
        scales = self._folded_scales()
        groups = self._as_stack(self.target.variable.value, "float32")
        groups = self._grouped(groups)
        integers = ops.round(groups / scales)
        integers = ops.clip(integers, self.grid.low, self.grid.high)
        return ops.cast(self._as_kernel(integers * scales), self.dtype)

    def _folded_scales(self) -> Any:
        """Set `scales` to what the training gave; return them with an axis."""
        # Exactly on the grid, which the sum in training may miss.
        (factor,) = self.parameters
        scales = self.grid.rounded_scales(self.scales * factor.value)
        self.scales = ops.stop_gradient(scales)
        return self.scales[:, :, None]

    def _trained_scales(self) -> Any:
        """Return the scales of groups, of shape `(S, G, 1, R)`."""
        (factor,) = self.parameters
        scales = self.scales * ops.convert_to_tensor(factor)
        # Straight through.
        rounded = self.grid.rounded_scales(scales)
        return (scales + ops.stop_gradient(rounded - scales))[:, :, None]

    def _grouped(self, stack: Any) -> Any:
        """Return a stack as `(S, G, group, R)`, the last group filled up."""
        stacks, groups, _ = self.scales.shape
        size = self.target.contraction_size
        group_size = min(self.grid.group_size, size)
        if filling := groups * group_size - size:
            stack = ops.pad(stack, [(0, 0), (0, filling), (0, 0)])
        return ops.reshape(stack, (stacks, groups, group_size, -1))

    def _as_stack(self, kernel: Any, dtype: str | None = None) -> Any:
        axes = self.target.contraction_axes, self.target.stack_axes
        stack = to_stack(kernel, *axes, self.scales.shape[0])
        return ops.cast(stack, dtype) if dtype else stack

    def _as_kernel(self, groups: Any) -> Any:
        """Return the kernel of what `_grouped` returns."""
        axes = self.target.contraction_axes, self.target.stack_axes
        stacks, _, units = self.scales.shape
        stack = ops.reshape(groups, (stacks, -1, units))
        stack = stack[:, : self.target.contraction_size]
        return from_stack(stack, self.target.shape, *axes)


class GridScales(GridWeights):
    """Rounded weights with trainable scales only.

    The variable holds the integers meanwhile.

    Args:
        target, scales, grid: As of `GridWeights`.
    """

    def __init__(self, target: Target, scales: Any, grid: Grid) -> None:
        super().__init__(target, None, scales, grid)

    @property
    def _exact_in(self) -> str:
        """The type that weights, integers and scales are all exact in."""
        return self.dtype if self.dtype == "bfloat16" else "float32"

    def start(self, weight: Any) -> Any:
        groups = self._grouped(self._as_stack(weight, self._exact_in))
        # JAX divides by multiplying with the inverse, which misses the
        # integers.
        scales = ops.cast(self.scales[:, :, None], self._exact_in)
        integers = self._as_kernel(ops.round(groups / scales))
        return ops.cast(integers, self.dtype)

    def effective(self, stored: Any) -> Any:
        # Integers and scales are exact in bfloat16. Their product there is the
        # one of float32, rounded once, in half of the memory.
        dtype = self.target.layer.compute_dtype
        dtype = dtype if dtype == "bfloat16" else "float32"
        integers = self._as_stack(ops.stop_gradient(stored), dtype)
        scales = ops.cast(self._trained_scales(), dtype)
        return self._as_kernel(self._grouped(integers) * scales)

    def folded(self) -> Any:
        stack = self._as_stack(self.target.variable.value, self._exact_in)
        scales = ops.cast(self._folded_scales(), self._exact_in)
        kernel = self._as_kernel(self._grouped(stack) * scales)
        return ops.cast(kernel, self.dtype)


def multiples(groups: Any, scales: Any, limits: Any) -> Any:
    """Round weights to multiples of their scales, with gradients of both.

    Args:
        groups: Float tensor `(S, G, group, R)`.
        scales: float32 tensor `(S, G, 1, R)`.
        limits: Pair of ints, the smallest and the largest multiple.

    Returns:
        float32 tensor `(S, G, group, R)`.
    """
    in_place = backend.current().in_place()
    values = in_place and in_place.multiples(groups, scales, limits)
    if values is not None:
        return values

    @ops.custom_gradient
    def through_rounding(groups: Any, scales: Any) -> Any:
        ratio = groups / scales
        clipped = ops.clip(ratio, *limits)
        integers = ops.round(clipped)
        inside = ops.equal(clipped, ratio)
        # The derivative by the scale.
        by_scale = ops.where(inside, integers - ratio, integers)

        def pullback(*args: Any, upstream: Any = None) -> Any:
            # torch passes the inputs too.
            slope = args[0] if upstream is None else upstream
            by_scales = ops.sum(slope * by_scale, axis=2, keepdims=True)
            return ops.where(inside, slope, 0.0), by_scales

        return integers * scales, pullback

    return through_rounding(ops.cast(groups, "float32"), scales)
