"""Weight normalization (arXiv 1602.07868) as a reparameterization."""

import dataclasses
import math
from typing import Any

import keras
from keras import ops

from keras_weightmods.core import seam
from keras_weightmods.core.reparameterization import Reparameterization

# A vector of zeros has no direction; its square norm counts as this.
_LEAST_SQUARE = 1e-12


@dataclasses.dataclass(frozen=True, eq=False)
class NormalizedKernel:
    """One kernel with its norms `g`; `path` and `shape` are the kernel's."""

    path: str
    shape: tuple[int, ...]
    g: keras.Variable

    @property
    def detail(self) -> str:
        """String, for a report."""
        return f"{math.prod(self.g.shape)} norms"


def attach_weight_norm(
    model: keras.layers.Layer, *, targets: Any = None, verbose: int = 1
) -> seam.ReparameterizationReport:
    """Give each output unit of each target its own norm, w = g v / |v|.

    Weight Normalization (arXiv 1602.07868, equation 2) trains the length and
    the direction of an output unit's weights apart. The norm is taken over the
    contraction axes, and g starts as this norm, so the model's outputs do not
    change. Train it, then call `fold(model)`.

    The layer's `kernel` is w: its call and regularizer see w, and LoRA adds to
    it. `kernel_constraint` still acts on the stored v. Weight decay on v leaves
    w alone, and changes how fast its direction is learned. Weight decay on g
    acts on w.

    `save_weights` stores v and g in its checkpoints, which load only into a
    model normalized in the same way. Call `fold` before `save`,
    `keras.models.clone_model` and `quantize`.

    Args:
        model: A built Keras model; give the outermost one that you train.
        targets: `Targets`, a list of `Target`, or what `find_targets` takes
            as `include`. Defaults to all that
            `find_targets(model, depthwise=True)` finds.
        verbose: 0 or 1. 0 shows no progress bar; 1 shows one once it has
            taken two seconds. Defaults to `1`.

    Returns:
        A `ReparameterizationReport` of `NormalizedKernel`s.

    Raises:
        ValueError: If no target can be normalized, one is reparameterized
            already, or the model's optimizer has been built. The model is
            unchanged then.

    Example:

    ```python
    import keras
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(4)])
    report = kwm.attach_weight_norm(model)
    assert report.kernels[0].g.shape == (1, 4)
    kwm.fold(model)
    ```
    """
    return seam.attach_to_targets(
        model, targets, WeightNorm, "normalized", verbose
    )


class WeightNorm(Reparameterization):
    """w = g v / |v|, with the norm over the contraction axes of `target`."""

    name = "weight_norm"

    def create_parameters(self, add_weight: Any) -> None:
        contracted = self.target.contraction_axes
        add_weight(
            name=f"{self.target.attribute}_g",
            shape=tuple(
                1 if axis in contracted else size
                for axis, size in enumerate(self.target.shape)
            ),
            initializer="ones" if self.is_empty else self._norms,
            # In half precision the steps near 1 are too coarse to train.
            dtype=keras.backend.result_type(self.dtype, "float32"),
        )

    def effective(self, stored: Any) -> Any:
        (g,) = self.parameters
        return stored * (g * ops.rsqrt(self._square_norm(stored)))

    def summary(self) -> NormalizedKernel:
        return NormalizedKernel(
            self.target.path, tuple(self.target.shape), self.parameters[0]
        )

    def _norms(self, shape: Any, dtype: Any) -> Any:
        square = ops.stop_gradient(self._square_norm(self.target.variable))
        return ops.cast(ops.sqrt(square), dtype)

    def _square_norm(self, stored: Any) -> Any:
        wide = keras.backend.result_type(self.dtype, "float32")
        square = ops.sum(
            ops.square(ops.cast(stored, wide)),
            axis=self.target.contraction_axes,
            keepdims=True,
        )
        return ops.maximum(square, _LEAST_SQUARE)
