"""Weight Compander (arXiv 2306.16993) as a reparameterization of kernels."""

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.core import seam
from keras_weightmods.core.reparameterization import Reparameterization
from keras_weightmods.ops.compand import (
    check_function,
    compand,
    compand_derivative,
    compand_inverse,
    compand_limit,
)
from keras_weightmods.utils import checks

# The share of the range in which weights may start. Beyond it, the slope of the
# arc tangent is below 1/4000 of that at zero, and a weight is stuck.
_USABLE = 0.99

# Learnable a and b are `_LEAST + (raw + sqrt(raw**2 + 1)) / 2`. This is
# positive for any `raw` that an optimizer or an average of weights makes, and
# close to a large `raw`. Near zero its slope falls as the square. With
# softplus, whose slope falls exponentially, one large step can leave a at zero
# for good.
_LEAST = 1e-3


@dataclasses.dataclass(frozen=True, eq=False)
class CompandedKernel:
    """One kernel with its compander.

    Attributes:
        path: String, the path of the kernel.
        shape: Tuple of ints.
        function: String, as in `compand`.
        learnable: Bool, whether `a` and `b` are trained.
        outside: Int, the weights that did not fit into the range at the start.
        raised: Bool, whether `a` was raised to make them fit; if not, they
            were clipped.
    """

    path: str
    shape: tuple[int, ...]
    function: str
    learnable: bool
    outside: int
    raised: bool
    _item: "Compander" = dataclasses.field(repr=False)

    @property
    def a(self) -> float:
        """Float, the present value of `a`."""
        return self._item.pair[0]

    @property
    def b(self) -> float:
        """Float, the present value of `b`."""
        return self._item.pair[1]

    @property
    def detail(self) -> str:
        """String, for a report."""
        line = f"a = {self.a:.4g}, b = {self.b:.4g}"
        if self.outside:
            done = "a raised for" if self.raised else "clipped"
            line += f", {done} {self.outside} weight(s)"
        return line


def attach_compander(
    model: keras.layers.Layer,
    *,
    targets: Any = None,
    a: float = 0.5,
    b: float | None = None,
    learnable: bool = False,
    function: str = "arctan",
    out_of_range: str = "raise_a",
    verbose: int = 1,
) -> seam.ReparameterizationReport:
    """Train the kernels of a model through a compander, w = a f(v / b).

    With Weight Compander (arXiv 2306.16993) the layers store v and compute with
    w, which keeps weights from growing large. Each kernel becomes the v that
    gives it, so the model's outputs do not change. Train it, then call
    `fold(model)`. The layer's `kernel` is w: its call, regularizer and
    constraint see w, and LoRA adds to it.

    With `learnable` every kernel has a pair (a, b) of its own, which stays
    positive under any optimizer. In `benchmarks/compander_quality.py` it does
    worse than fixed pairs more often than better, so it is not the default. The
    paper's grid for fixed pairs is 0.5 to 1 for both. With b = a the slope at
    zero is 1, so the learning rate keeps its usual meaning.

    Weight decay should act on w for fixed pairs, on v alone for learnable ones,
    and never on a and b. `CompanderOptimizer` takes care of this. A bare Keras
    optimizer decays v, and also the raw pairs unless told
    `optimizer.exclude_from_weight_decay(var_names=["kernel_compander"])`. For
    fixed pairs use `kernel_regularizer=keras.regularizers.L2(...)` with it.

    `save_weights` stores v and the pairs in its checkpoints, which load only
    into a model companded in the same way. Call `fold` before `save`,
    `keras.models.clone_model` and `quantize`.

    Args:
        model: A built Keras model; give the outermost one that you train.
        targets: `Targets`, a list of `Target`, or what `find_targets` takes
            as `include`. Defaults to all that
            `find_targets(model, depthwise=True)` finds.
        a: Float above 0.001, the height of the function, or its start.
        b: Float above 0.001, the width of the function, or its start. Defaults
            to `a`, and to twice that if learnable, as in the paper.
        learnable: Bool, whether a and b are trained. Defaults to `False`.
        function: `"arctan"`, `"arsinh"` or `"erf"`, as in `ops.compand`.
        out_of_range: What to do with a kernel that has weights beyond 0.99 of
            the range, which is a pi / 2 for `"arctan"`: `"raise_a"` for this
            kernel, or `"clip"` the weights, which changes the model. The report
            counts these weights. Defaults to `"raise_a"`.
        verbose: 0 or 1. 0 shows no progress bar; 1 shows one once it has
            taken two seconds. Defaults to `1`.

    Returns:
        A `ReparameterizationReport` of `CompandedKernel`s, whose `a` and `b`
        follow the training.

    Raises:
        ValueError: If an argument is wrong, no target can be companded, one is
            reparameterized already, or the model's optimizer has been built.
            The model is unchanged then.

    Example:

    ```python
    import keras
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(4)])
    report = kwm.attach_compander(model, a=0.5)
    assert report.kernels[0].b == 0.5
    model.compile("sgd", loss="mse")
    model.fit(keras.ops.ones((8, 16)), keras.ops.ones((8, 4)), verbose=0)
    kwm.fold(model)
    ```
    """

    def make_item(target: Any) -> Compander:
        return Compander(target, a, b, learnable, function, out_of_range)

    make_item(None)
    return seam.attach_to_targets(
        model, targets, make_item, "companded", verbose
    )


class Compander(Reparameterization):
    """w = a f(v / b) of one kernel.

    Args:
        target: The `Target`, or None until `bind`.
        a, b, learnable, function, out_of_range: As in `attach_compander`.
        outside, raised: As in `CompandedKernel`.
    """

    name = "compander"

    def __init__(
        self,
        target: Any = None,
        a: float = 0.5,
        b: float | None = None,
        learnable: bool = False,
        function: str = "arctan",
        out_of_range: str = "clip",
        outside: int = 0,
        raised: bool = False,
    ):
        super().__init__(target)
        check_function(function)
        self.a = checks.check_float("a", a, above=_LEAST)
        self.learnable = checks.check_bool("learnable", learnable)
        if b is None:
            b = 2 * self.a if learnable else self.a
        self.b = checks.check_float("b", b, above=_LEAST)
        choices = ("clip", "raise_a")
        checks.check_choice("out_of_range", out_of_range, choices)
        self.function = function
        self.out_of_range = out_of_range
        self.outside = checks.check_int("outside", outside, 0)
        self.raised = checks.check_bool("raised", raised)

    def get_config(self) -> dict[str, Any]:
        found = {"outside": self.outside, "raised": self.raised}
        return self.settings() | found

    def settings(self) -> dict[str, Any]:
        """Return the arguments, as a copy of the layer would take them."""
        names = "a", "b", "learnable", "function", "out_of_range"
        return {name: getattr(self, name) for name in names}

    def start(self, weight: Any) -> Any:
        if self.is_empty:
            return weight
        weight = ops.stop_gradient(ops.convert_to_tensor(weight))
        dtype = keras.backend.standardize_dtype(weight.dtype)
        limit = self._limit(self.a, dtype)
        magnitudes = ops.abs(ops.cast(weight, "float32"))
        self.outside = int(ops.sum(ops.cast(magnitudes > limit, "int32")))
        if self.outside and self.out_of_range == "raise_a":
            self.a = float(ops.max(magnitudes)) / self._limit(1.0, dtype)
            self.raised = True
        return self._inverse(weight)

    def create_parameters(self, add_weight: Any) -> None:
        if not self.learnable:
            return

        def initializer(shape: Any, dtype: Any) -> Any:
            # Not earlier: a fit that builds the layer raises `a` in between.
            raw = np.sinh(np.log(2 * (np.array([self.a, self.b]) - _LEAST)))
            return ops.convert_to_tensor(raw, dtype)

        add_weight(
            name=self._key(),
            shape=(2,),
            initializer=initializer,
            # In half precision the steps near 1 are too coarse to train.
            dtype=keras.backend.result_type(self.dtype, "float32"),
        )

    def effective(self, stored: Any) -> Any:
        a, b = self._pair()
        return compand(stored, a, b, self.function)

    def derivative(self, stored: Any) -> Any:
        """Return the derivative of `effective`."""
        a, b = self._pair()
        return compand_derivative(stored, a, b, self.function)

    def constraint(self, constraint: Any) -> Any:
        # An N:M pattern ranks magnitudes, whose order does not change. `detach`
        # looks for it in the variable.
        if getattr(constraint, "keeps_pattern", False):
            return constraint

        def on_effective(stored: Any) -> Any:
            stored = ops.convert_to_tensor(stored)
            weight = self.effective(stored)
            new = constraint(weight)
            # Unchanged weights must not drift by rounding.
            return ops.where(new == weight, stored, self._inverse(new))

        return on_effective

    def saved_arrays(self) -> dict[str, Any]:
        if self.learnable:
            return super().saved_arrays()
        return {self._key(): ((2,), "float64")}

    def saved(self) -> dict[str, Any]:
        if self.learnable:
            return super().saved()
        return {self._key(): np.array([self.a, self.b])}

    def load(self, saved: Any) -> None:
        if self.learnable:
            super().load(saved)
            return
        pair = tuple(float(value) for value in saved[self._key()])
        if not np.allclose(pair, (self.a, self.b), rtol=1e-6):
            raise ValueError(
                "A checkpoint with fixed pairs loads into a model with the "
                f"same pairs. Received: a checkpoint with (a, b) = {pair} for "
                f"{self.target.path!r}, which has {(self.a, self.b)}. Build "
                "the model with the checkpoint's pair."
            )

    def summary(self) -> CompandedKernel:
        return CompandedKernel(
            self.target.path,
            tuple(self.target.shape),
            self.function,
            self.learnable,
            self.outside,
            self.raised,
            self,
        )

    @property
    def pair(self) -> tuple[float, float]:
        """The present a and b, as floats."""
        a, b = (float(ops.convert_to_numpy(each)) for each in self._pair())
        return a, b

    def _pair(self) -> Any:
        if not self.parameters:
            return self.a, self.b
        return ops.unstack(_positive(self.parameters[0]))

    def _limit(self, a: Any, dtype: str) -> Any:
        return _USABLE * compand_limit(a, self.b, self.function, dtype)

    def _inverse(self, weight: Any) -> Any:
        """Return the stored values for `weight`, clipped into the range."""
        dtype = keras.backend.standardize_dtype(weight.dtype)
        wide = keras.backend.result_type(dtype, "float32")
        a, b = self._pair()
        limit = a * self._limit(1.0, dtype)
        weight = ops.clip(ops.cast(weight, wide), -limit, limit)
        return ops.cast(compand_inverse(weight, a, b, self.function), dtype)

    def _key(self) -> str:
        # Names everything that is not in the values, so that the checkpoint of
        # another compander does not fit.
        fixed = "" if self.learnable else "_fixed"
        return f"{self.target.attribute}_compander_{self.function}{fixed}"


def _positive(raw: Any) -> Any:
    # The sum in the comment above, in a form that does not cancel.
    return _LEAST + ops.exp(ops.arcsinh(raw)) / 2
