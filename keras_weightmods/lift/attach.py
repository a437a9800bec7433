"""The weights that `PrincipalMaskCallback` trains, and their optimizer."""

import math
from typing import Any

import keras
from keras import ops

from keras_weightmods.core import keras_compat
from keras_weightmods.core.reparameterization import slots
from keras_weightmods.core.targets import Target, resolve_targets
from keras_weightmods.core.weight_keys import weight_keys
from keras_weightmods.lift.masked_optimizer import MaskedOptimizer
from keras_weightmods.lift.masked_state import MaskedState, MaskSpec
from keras_weightmods.lift.report import MaskedKernel, PrincipalMaskReport
from keras_weightmods.ops.nm import nm_violations
from keras_weightmods.ops.principal_mask import Selection
from keras_weightmods.utils import checks
from keras_weightmods.utils.matrix import stack_shape
from keras_weightmods.utils.report import Skipped, skipped_text


class Plan:
    """The weights of a model to train; nothing is changed yet.

    Args:
        model: A built Keras model.
        targets: As in `PrincipalMaskCallback`.
        whole: List of the variables that are trained whole.
        keep_pattern: As in `PrincipalMaskCallback`.
        selection: The `Selection` of entries.

    Attributes:
        targets: List of the `Target`s to mask, in the order of `variables`.
        tiny: List of the paths of kernels without an entry to train.
        variables: List of the variables that are trained, in part or whole.
        sparse: List of the paths of those of `targets` that are 2:4.
        specs: List of `MaskSpec`, one for each of `variables`.
        known: List of all variables that the model would train.
        report: The `PrincipalMaskReport`.
    """

    def __init__(
        self,
        model: Any,
        targets: Any,
        whole: list[Any],
        keep_pattern: bool,
        selection: Selection,
    ) -> None:
        found = resolve_targets(model, targets)
        ids, paths = {id(v) for v in whole}, {v.path for v in whole}
        skipped = [skip for skip in found.skipped if skip.path not in paths]
        self.known = model.trainable_variables
        trainable = set(map(id, self.known))
        sizes: dict[int, int] = {}
        self.tiny: list[str] = []
        self.targets: list[Target] = []
        problems = []
        rewritten = {
            id(layer.kernel)
            for layer in keras_compat.layers_of(model)
            if isinstance(layer, keras.layers.SpectralNormalization)
        }
        # In a model with constraints, kernels without one may be dense.
        is_sparse = keep_pattern and not any(map(_has_pattern, found))
        for target in found:
            variable, axes = target.variable, target.contraction_axes
            problem = None
            if id(variable) in ids:
                if keep_pattern and _has_zeros(variable):
                    problem = "would lose its zeros; leave it out of also_train"
            elif id(variable) not in trainable:
                skipped.append(Skipped(target.path, "frozen"))
            elif "float" not in variable.dtype:
                reason = f"not a float variable ({variable.dtype})"
                skipped.append(Skipped(target.path, reason))
            else:
                stacks, *matrix = stack_shape(
                    target.shape, axes, target.stack_axes
                )
                try:
                    sizes[id(variable)] = stacks * selection.size(*matrix)
                except ValueError as error:
                    skipped.append(Skipped(target.path, str(error)))
                    self.tiny.append(target.path)
                else:
                    self.targets.append(target)
                    problem = _problem(target, keep_pattern, is_sparse)
                    if id(variable) in rewritten:
                        problem = (
                            "is written whole in each step, mask or not, by "
                            "its `SpectralNormalization`"
                        )
            if problem is not None:
                problems.append(f"{target.path!r} {problem}")
        checks.raise_all(
            "`PrincipalMaskCallback` cannot train these kernels. Leave them "
            "out of `targets`, or mend what is named. Received:",
            problems,
        )
        if not sizes:
            raise ValueError(
                "`PrincipalMaskCallback` found no kernel to train. Received: "
                f"model={model.name!r}, skipped: {skipped_text(skipped)}"
            )
        self.specs = [
            MaskSpec(v.path, tuple(v.shape), sizes.get(id(v)), place)
            for place, v in enumerate(self.known)
            if id(v) in sizes or id(v) in ids
        ]
        self.variables = [self.known[spec.place] for spec in self.specs]
        order = {id(v): place for place, v in enumerate(self.variables)}
        self.sparse = [t.path for t in self.targets if _is_24(t)]
        self.targets.sort(key=lambda target: order[id(target.variable)])
        keys = weight_keys(model)

        def row(variable: Any) -> MaskedKernel:
            shape = tuple(variable.shape)
            size = sizes.get(id(variable), math.prod(shape))
            return MaskedKernel(keys[id(variable)], shape, size)

        self.report = PrincipalMaskReport(
            tuple(row(target.variable) for target in self.targets),
            tuple(skipped),
            tuple(map(row, whole)),
        )

    def check_optimizer(self, optimizer: Any) -> None:
        """Raise ValueError if it cannot train these variables."""
        if not optimizer.built:
            return
        if not isinstance(optimizer, MaskedState):
            keras_compat.check_known(optimizer, self.variables)
            return
        trained = keras_compat.optimizer_variables(optimizer)
        received = {id(v): s.size for v, s in zip(trained, optimizer.specs)}
        expected = {id(v): s.size for v, s in zip(self.variables, self.specs)}
        if expected != received:
            raise ValueError(
                "The model's optimizer has masks of other kernels or sizes. "
                "Compile the model with a new optimizer. Received: masks of "
                f"{len(received)} variables, for a `PrincipalMaskCallback` "
                f"that trains {len(expected)}"
            )

    def install(self, model: Any, optimizer: Any) -> Any:
        """Make an optimizer with masks the model's; return it."""
        if not isinstance(optimizer, MaskedState):
            optimizer = MaskedOptimizer(optimizer)
        optimizer.build_masked(self.variables, self.specs, self.known)
        outer, new = model.optimizer, optimizer
        if isinstance(outer, keras.optimizers.LossScaleOptimizer):
            # The old wrapper was built for all variables.
            settings = {**outer.get_config(), "inner_optimizer": optimizer}
            new = keras.optimizers.LossScaleOptimizer(**settings)
            new.build(self.variables)
            if outer.built:
                new.dynamic_scale.assign(outer.dynamic_scale)
                new.step_counter.assign(outer.step_counter)
        keras_compat.set_optimizer(model, new)
        return optimizer


def _problem(target: Target, keep_pattern: bool, is_sparse: bool) -> str | None:
    """Return why a kernel cannot have a mask; None if it can."""
    variable = target.variable
    constraint = variable.constraint
    if target.attribute in slots(target.layer):
        return "is reparameterized; call `kwm.fold(model)`"
    if constraint is None:
        if is_sparse and not _has_zeros(variable):
            return "has no zero; `keep_pattern=True` is for a sparse model"
        return None
    name = type(constraint).__name__
    if not _has_pattern(target):
        return f"has the constraint {name}, which acts outside of the mask too"
    if not keep_pattern:
        return f"has the constraint {name}; pass `keep_pattern=True`"
    if ops.any(constraint(variable) != variable.value):
        return (
            "is not in its pattern; call `SemiStructuredSparse.attach(model)`"
        )
    return None


def _is_24(target: Target) -> bool:
    """Return whether a kernel is 2:4 and at least half zero, but not all."""
    weight, axes = target.variable.value, target.contraction_axes
    zeros = ops.mean(ops.cast(weight == 0, "float32"))
    return (
        0.5 <= float(zeros) < 1
        and target.reason_not_nm(4) is None
        and not int(nm_violations(weight, "2:4", axes))
    )


def _has_pattern(target: Target) -> bool:
    return getattr(target.variable.constraint, "keeps_pattern", False)


def _has_zeros(variable: keras.Variable) -> bool:
    return bool(ops.any(variable.value == 0))
