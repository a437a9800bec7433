"""SemiStructuredSparse: N:M sparsity as a weight constraint."""

import warnings
from collections.abc import Iterable
from typing import Any

import keras
from keras import ops

from keras_weightmods.calibration.walk import check_finite
from keras_weightmods.core import keras_compat
from keras_weightmods.core.restored import RestoredOnError
from keras_weightmods.core.targets import Target, resolve_targets
from keras_weightmods.core.wrapping_optimizer import inner_optimizer
from keras_weightmods.ops import nm
from keras_weightmods.sparsity import sparsify
from keras_weightmods.sparsity.report import ChangeReport
from keras_weightmods.utils import checks
from keras_weightmods.utils.progress import Progress


@keras.saving.register_keras_serializable(package="keras_weightmods")
class SemiStructuredSparse(keras.constraints.Constraint):
    """Keeps the n largest magnitudes of every m weights, zeroes the others.

    After every optimizer step the kernel is projected onto the nearest N:M
    kernel. This is projected gradient descent, w <- P(w - update), where P
    keeps the top n of each group (equation 6 of CAST, arXiv 2509.25996). Groups
    run along the contraction axes, as hardware for 2:4 sparsity requires.

    Pass an instance as the `kernel_constraint` of a layer. Some layers take
    none (KerasHub), and some kernels are not rank 2: call
    `SemiStructuredSparse.attach(model)` for these. It finds the kernels and
    their contraction axes, and is not written into the configuration of the
    layers.

    **LoRA.** Keras refuses `enable_lora` on a layer that has a
    `kernel_constraint`. Use `attach` instead, or call `detach` first. Keras
    freezes the base kernel when LoRA is enabled, so it stays exactly N:M while
    the LoRA weights train. (Saving merges them into the kernel, which makes it
    dense.)

    **Averages.** At the end of `fit` Keras writes the averages of
    `use_ema=True` into the model and applies no constraint to them. The kernels
    are then dense. Add the callback `SwapSparseEMAWeights`, which projects
    them, or train with `AdamS` and `prune` at the end. `attach` warns where it
    finds such an optimizer, and `assert_sparse` checks the result.

    Args:
        pattern: String `"n:m"` or pair of ints: n weights KEPT of every m.
            Defaults to `"2:4"`.
        axis: Int or tuple of ints, the contraction axes of the kernel. `None`
            means axis 0 of a rank-2 kernel `(inputs, units)`; a kernel of
            another rank is an error. Defaults to `None`.
        frozen: If `True`, the kept weights never change place: this retrains
            under a fixed mask. The mask must be known before the first step, so
            only `attach(model, frozen=True)` makes a frozen constraint that can
            be applied. The mask costs one bit a weight, and is not saved.
            Attach again after loading: the zeros give the mask back. Defaults
            to `False`.

    Raises:
        ValueError: If `pattern` or `axis` is malformed. When applied: if the
            contraction size of a kernel is not a multiple of m.

    Example:

    ```python
    import keras
    import numpy as np
    from keras_weightmods import SemiStructuredSparse
    from keras_weightmods.ops import nm_violations

    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(
                4, kernel_constraint=SemiStructuredSparse("2:4")
            ),
        ]
    )
    model.compile(optimizer="sgd", loss="mse")
    model.fit(np.ones((4, 8)), np.ones((4, 4)), verbose=0)
    assert int(nm_violations(model.layers[0].kernel, "2:4", axis=0)) == 0
    ```
    """

    # Other code that acts on weights reads this, without knowing the class.
    keeps_pattern = True

    def __init__(
        self,
        pattern: nm.Pattern = "2:4",
        axis: int | Iterable[int] | None = None,
        frozen: bool = False,
    ) -> None:
        self.pattern = "{}:{}".format(*nm.parse_pattern(pattern))
        self.axis: Any = axis
        if axis is not None:
            self.axis = (
                tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
            )
            different = {i for i in self.axis if type(i) is int}
            if not different or len(different) != len(self.axis):
                raise checks.error(
                    "axis", "None, an int or different ints", axis
                )
        self.frozen = checks.check_bool("frozen", frozen)
        # One bit a weight, and the shape of the kernel.
        self._mask: tuple[Any, tuple[int, ...]] | None = None

    def __call__(self, w: Any) -> Any:
        w = checks.check_tensor("w", w)
        shape = tuple(w.shape)
        if not self.frozen:
            return nm.nm_project(w, self.pattern, self.axes_of(shape))
        bits, masked = self._mask or (None, None)
        if shape != masked:
            # Keras calls a constraint only after the update, when the zeros
            # that show the mask are overwritten.
            raise ValueError(
                "A frozen `SemiStructuredSparse` needs the mask of its kernel "
                "before the first step. Call `SemiStructuredSparse.attach("
                f"model, {self.pattern!r}, frozen=True)` once the weights are "
                f"built or loaded. Received: w.shape={shape} and a mask of "
                f"shape {masked}"
            )
        return ops.where(nm.unpack_bits(bits, shape), w, ops.zeros_like(w))

    def get_config(self) -> dict[str, Any]:
        return {
            "pattern": self.pattern,
            "axis": self.axis,
            "frozen": self.frozen,
        }

    @classmethod
    def attach(
        cls,
        model: keras.Model,
        pattern: nm.Pattern = "2:4",
        *,
        targets: Any = None,
        frozen: bool = False,
        verbose: int = 1,
    ) -> ChangeReport:
        """Constrain the kernels of a built model, and project them at once.

        Every target gets a constraint with its own contraction axes, and is
        exactly N:M from now on, before any training. It replaces an earlier
        `SemiStructuredSparse`. It does not block `enable_lora`, and the saved
        model loads without this package.

        The constraint exists only on the variable; no file of Keras or of this
        package holds it. Attach again after loading, or the next `fit` loses
        the pattern silently. (`save_model` warns; `model.save` of Keras does
        not.) If `model` is part of a larger model that was trained before,
        compile the larger one again. This traces its train step anew.

        Args:
            model: A built Keras model or layer.
            pattern: String `"n:m"` or pair of ints: n weights KEPT of every
                m. Defaults to `"2:4"`.
            targets: The kernels, as `find_targets(model)` returns them or in
                a form that its `include` takes; `None` for all. Defaults to
                `None`.
            frozen: If `True`, the mask of this moment stays: exactly n weights
                of every group train. All others remain exactly zero under any
                optimizer. On JAX, the mask is a constant of the compiled train
                step, one bit a weight. Defaults to `False`.
            verbose: 0 or 1. 0 shows no progress bar; 1 shows one once it has
                taken two seconds. Defaults to `1`.

        Returns:
            A `ChangeReport`. It names the kernels that were skipped, because
            their contraction size is not a multiple of m or because they have a
            constraint of another class.

        Raises:
            ValueError: If the pattern is malformed, the targets do not
                belong to the model, or none can be constrained. The model is
                then unchanged.

        Warns:
            UserWarning: If the model is compiled with `use_ema=True`.

        Example:

        ```python
        import keras
        from keras_weightmods import SemiStructuredSparse

        model = keras.Sequential(
            [keras.Input((8,)), keras.layers.Dense(4, name="dense")],
            name="net",
        )
        report = SemiStructuredSparse.attach(model, "2:4")
        assert report.kernels[0].path == "net/dense/kernel"
        model.layers[0].enable_lora(2)
        ```
        """
        checks.check_verbose(verbose)
        found = sparsify.fitting_targets(
            "SemiStructuredSparse.attach",
            resolve_targets(model, targets),
            pattern,
            _other_constraint,
        )
        variables = [target.variable for target in found]
        check_finite(variables)
        with (
            Progress(len(found), "kernel", verbose) as progress,
            RestoredOnError(model, values=variables),
        ):
            for target in found:
                axes, variable = target.contraction_axes, target.variable
                constraint = cls(pattern, axes, frozen)
                variable.assign(nm.nm_project(variable, pattern, axes))
                if frozen:
                    # The projected kernel alone determines the mask, so
                    # that attaching after a reload finds it.
                    mask = nm.nm_mask(variable, pattern, axes)
                    constraint._mask = nm.pack_bits(mask), target.shape
                variable.constraint = constraint
                progress.add()
            _forget_train_step(model)
        inner = inner_optimizer(getattr(model, "optimizer", None))
        optimizers = getattr(inner, "optimizers", [inner])
        if any(getattr(each, "use_ema", False) for each in optimizers):
            warnings.warn(
                "The optimizer has `use_ema=True`: `fit` ends with averaged "
                "kernels, which no constraint makes sparse again. Pass "
                "`callbacks=[keras_weightmods.SwapSparseEMAWeights()]` to "
                "`fit`.",
                stacklevel=2,
            )
        title = f"Constrained to {constraint.pattern} (not saved in files)"
        return ChangeReport.of(title, model.weights, variables, found.skipped)

    @classmethod
    def detach(cls, model: keras.Model) -> ChangeReport:
        """Remove every `SemiStructuredSparse` from a model.

        The weights stay as they are, N:M or not. Constraints given to layers
        as `kernel_constraint` go too, so that `enable_lora` is possible.

        Args:
            model: A Keras model or layer.

        Returns:
            A `ChangeReport` of the variables that were constrained.

        Raises:
            ValueError: If `model` is no Keras model or layer.

        Example:

        ```python
        import keras
        from keras_weightmods import SemiStructuredSparse

        layer = keras.layers.Dense(4, kernel_constraint=SemiStructuredSparse())
        model = keras.Sequential([keras.Input((8,)), layer])
        SemiStructuredSparse.detach(model)
        layer.enable_lora(2)
        ```
        """
        checks.check_model(model)
        constrained = [v for v in model.weights if _is_ours(v)]
        with RestoredOnError(model):
            for variable in constrained:
                variable.constraint = None
            for layer in keras_compat.layers_of(model):
                # Attention layers keep theirs under a private name, recurrent
                # ones under several.
                for name, value in list(keras_compat.attributes(layer).items()):
                    if isinstance(value, SemiStructuredSparse):
                        setattr(layer, name, None)
            _forget_train_step(model)
        return ChangeReport.of("Freed of a pattern", model.weights, constrained)

    def axes_of(self, shape: Any) -> Any:
        """Return the contraction axes of a kernel of this shape."""
        if self.axis is not None:
            return self.axis
        if len(shape) == 2:
            return (0,)
        raise ValueError(
            "`SemiStructuredSparse` knows the axis of a rank-2 kernel only. "
            "Pass `axis=`, such as `axis=(0, 1, 2)` for a Conv2D, or let "
            "`SemiStructuredSparse.attach(model)` find it. "
            f"Received: axis=None for a kernel of shape {shape}"
        )


def _other_constraint(target: Target) -> str | None:
    constraint = target.variable.constraint
    if constraint is None or _is_ours(target.variable):
        return None
    return f"it has the constraint {type(constraint).__name__} already"


def _is_ours(variable: Any) -> bool:
    constraint = getattr(variable, "constraint", None)
    return isinstance(constraint, SemiStructuredSparse)


def _forget_train_step(model: keras.Model) -> None:
    # A train step traced earlier by JAX or TensorFlow holds the old
    # constraints.
    if getattr(model, "train_function", None) is not None:
        model.train_function = None
