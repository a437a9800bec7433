"""Learnable weight scales, constant inside every N:M group (CAST)."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_weightmods.core import seam
from keras_weightmods.core.reparameterization import Reparameterization
from keras_weightmods.core.targets import Target
from keras_weightmods.ops.nm import Pattern, parse_pattern
from keras_weightmods.utils import checks
from keras_weightmods.utils.matrix import (
    contraction_size,
    from_matrix,
    to_matrix,
)


@dataclasses.dataclass(frozen=True, eq=False)
class ScaledKernel:
    """One kernel with its scales; `path` and `shape` are the kernel's."""

    path: str
    shape: tuple[int, ...]
    groups: int
    scale: keras.Variable

    @property
    def detail(self) -> str:
        """String, for a report."""
        return f"scales for {self.groups} groups"


def attach_scaling(
    model: keras.Model,
    *,
    targets: Any = None,
    groups: int = 2,
    pattern: Pattern = "2:4",
    verbose: int = 1,
) -> seam.ReparameterizationReport:
    """Give each output unit of each target `groups` learnable scales.

    The effective weight is `scale * kernel` (equations 11 and 12 of CAST, arXiv
    2509.25996). There is one scale for each output unit and each of `groups`
    contiguous blocks of the flattened contraction axes, and it starts at one.
    With a scale, a unit regains the magnitude that sparse training takes from
    it. A scale is constant inside each N:M group, so the mask stays.

    Each target layer stays the same object with the same name and paths. It
    gains one weight, `kernel_scale` (`pointwise_kernel_scale` and so on for
    other attributes), in float32 at least. Its shape is `(groups, ...)`,
    followed by the kernel's axes that are not contracted. The layer's `kernel`
    becomes the effective weight: its call and `kernel_regularizer` use it, and
    LoRA adds to it. `kernel_constraint` still acts on the stored kernel. The
    product is taken in float32 also under mixed precision. A frozen kernel gets
    frozen scales, and `enable_lora` freezes the scales with the kernel.

    The paper trains scales without weight decay:
    `optimizer.exclude_from_weight_decay(var_names=["kernel_scale"])`.

    `keras_weightmods.save_model` saves the model with its scales.
    `save_weights` stores them too, and its checkpoints load only into a model
    scaled in the same way. Call `fold` before `save`,
    `keras.models.clone_model` and `quantize`.

    Args:
        model: A built Keras model; give the outermost one that you train.
        targets: The kernels to scale: `Targets`, or what `include=` of
            `find_targets` takes. Defaults to all of them.
        groups: Int, the blocks of the contraction axes for an output unit. Some
            kernels do not divide into so many blocks of whole N:M groups. They
            get the largest number that fits, and the report says so. Defaults
            to `2`.
        pattern: The N:M pattern, `"n:m"` or `(n, m)`. Only m matters.
        verbose: 0 or 1. 0 shows no progress bar; 1 shows one once it has
            taken two seconds. Defaults to `1`.

    Returns:
        A `ReparameterizationReport`, whose `kernels` are `ScaledKernel`s.

    Raises:
        ValueError: If `groups` or `pattern` is wrong, no target can be
            scaled, one is scaled already, or the model's optimizer has been
            built. The model is unchanged then.

    Example:

    ```python
    import keras
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(4)])
    report = kwm.attach_scaling(model, groups=2)
    assert report.kernels[0].scale.shape == (2, 4)
    kwm.fold(model)
    assert len(model.weights) == 2
    ```
    """
    checks.check_int("groups", groups, 1)
    _, m = parse_pattern(pattern)

    def make_item(target: Target) -> Scaling | str:
        most = min(groups, target.contraction_size)
        for count in range(most, 0, -1):
            if target.reason_not_nm(count * m) is None:
                return Scaling(target, count)
        return str(target.reason_not_nm(m))

    return seam.attach_to_targets(
        model, targets, make_item, "scaled", verbose, depthwise=False
    )


def compute_scaled(kernel: Any, scale: Any, axes: tuple[int, ...]) -> Any:
    """Multiply a kernel by its scales: A * W of CAST (arXiv 2509.25996).

    Args:
        kernel: Tensor or variable.
        scale: Tensor or variable of shape `(groups, ...)`, followed by the
            kernel's axes that are not contracted.
        axes: Tuple of ints, the contraction axes. Flattened in this order,
            they divide into `groups` contiguous blocks.

    Returns:
        Tensor of the kernel's shape, in the wider of the two dtypes.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.sparsity.scaling import compute_scaled

    scaled = compute_scaled(np.ones((4, 1)), np.array([[2.0], [3.0]]), (0,))
    assert np.array(scaled)[:, 0].tolist() == [2.0, 2.0, 3.0, 3.0]
    ```
    """
    kernel, scale = map(ops.convert_to_tensor, (kernel, scale))
    shape, groups, first = tuple(kernel.shape), scale.shape[0], axes[0]
    size = contraction_size(shape, axes) // groups
    if axes == tuple(range(first, first + len(axes))):
        # For adjacent axes only the small scale is transposed, not the kernel.
        before = math.prod(shape[:first])
        scale = ops.reshape(scale, (groups, before, -1))
        scale = ops.transpose(scale, (1, 0, 2))[:, :, None, :]
        blocks = ops.reshape(kernel, (before, groups, size, -1))
        return ops.reshape(ops.multiply(blocks, scale), shape)
    blocks = ops.reshape(to_matrix(kernel, axes), (groups, size, -1))
    scale = ops.reshape(scale, (groups, 1, -1))
    return from_matrix(ops.multiply(blocks, scale), shape, axes)


class Scaling(Reparameterization):
    """The scales of one target; see `attach_scaling`."""

    name = "scaling"

    def __init__(self, target: Target, groups: int) -> None:
        super().__init__(target)
        self.groups = groups

    def get_config(self) -> dict[str, Any]:
        return {"groups": self.groups}

    @classmethod
    def from_config(cls, target: Target, config: dict[str, Any]) -> "Scaling":
        groups: Any = config.get("groups")
        size = target.contraction_size
        valid = type(groups) is int and groups > 0 and size % groups == 0
        if not valid or len(config) != 1:
            expected = f"`groups` alone, a divisor of {size} for {target.path}"
            raise checks.error("config", expected, config)
        return cls(target, groups)

    def create_parameters(self, add_weight: Callable[..., Any]) -> None:
        shape, axes = self.target.shape, self.target.contraction_axes
        others = tuple(d for i, d in enumerate(shape) if i not in axes)
        add_weight(
            name=f"{self.target.attribute}_scale",
            shape=(self.groups, *others),
            initializer="ones",
            # In half precision the steps near 1 are too coarse to train.
            dtype=keras.backend.result_type(self.dtype, "float32"),
        )

    def effective(self, stored: Any) -> Any:
        (scale,) = self.parameters
        return compute_scaled(stored, scale, self.target.contraction_axes)

    def is_identity(self) -> bool:
        (scale,) = self.parameters
        return bool(ops.all(ops.equal(scale, 1)))

    def summary(self) -> ScaledKernel:
        target, (scale,) = self.target, self.parameters
        return ScaledKernel(target.path, target.shape, self.groups, scale)
