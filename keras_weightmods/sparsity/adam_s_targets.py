"""Which variables of an optimizer `AdamS` sparsifies, saved ones included."""

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Sequence
from typing import Any

import keras

from keras_weightmods.core.targets import Target, Targets, find_targets
from keras_weightmods.core.weight_keys import matching_places
from keras_weightmods.ops.matrix import contraction_size
from keras_weightmods.utils import checks


@dataclasses.dataclass(frozen=True, eq=False)
class Spec:
    """What the optimizer knows of one sparsified variable.

    Attributes:
        path: String, the path of the variable.
        shape: Tuple of ints.
        axes: Tuple of ints, the contraction axes.
        variable: `keras.Variable`.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    variable: Any

    @classmethod
    def of(cls, variable: Any, axes: Sequence[int]) -> "Spec":
        """Return the spec of a variable that is contracted along `axes`."""
        return cls(variable.path, tuple(variable.shape), tuple(axes), variable)

    def to_config(self, index: int | None) -> dict[str, Any]:
        """Return what restores it; `index` is its place, None if unknown."""
        return {
            "index": index,
            "path": self.path,
            "shape": list(self.shape),
            "contraction_axes": list(self.axes),
        }


def check_targets(targets: Any) -> Any:
    """Return the argument `targets` of `AdamS` if it is one."""
    if isinstance(targets, str):
        with contextlib.suppress(re.error):
            return re.compile(targets).pattern
    if targets is None or isinstance(targets, (keras.layers.Layer, Targets)):
        return targets
    if targets and isinstance(targets, (list, tuple)):
        for kind in (Target, dict):
            if all(isinstance(target, kind) for target in targets):
                return tuple(targets)
    raise checks.error(
        "targets",
        "a model, what `find_targets` returns, a regex or None. The other "
        "forms of `include` need the model: pass "
        "`targets=find_targets(model, include=...)`",
        targets,
    )


def find_specs(targets: Any, variables: list[Any], m: int) -> list[Spec | None]:
    """Return a `Spec` or None for each of `variables`, in their order.

    Args:
        targets: As `check_targets` returns it.
        variables: List of `keras.Variable`, those the optimizer is built on.
        m: Int, the size of a group.

    Raises:
        ValueError: If the targets cannot be told or there are none.
    """
    if targets is None or isinstance(targets, str):
        specs = _inferred(targets or "", variables)
    elif isinstance(targets, tuple) and isinstance(targets[0], dict):
        specs = _restored(targets, variables)
    else:
        specs = _of_targets(targets, variables)
    unusable = [
        spec
        for spec in specs
        if spec and contraction_size(spec.shape, spec.axes) % m
    ]
    if unusable:
        warnings.warn(
            f"AdamS leaves {len(unusable)} kernels dense, because the size of "
            f"their contraction axes is no multiple of m={m}: "
            f"{[(spec.path, spec.shape) for spec in unusable[:5]]}",
            stacklevel=3,
        )
    usable = [None if spec in unusable else spec for spec in specs]
    if not any(usable):
        raise ValueError(
            f"`AdamS` found no kernel to sparsify among the {len(variables)} "
            "variables it was built on. Pass `targets=model` or "
            "`targets=find_targets(model)`, or use Adam. "
            f"Received: targets={targets!r}"
        )
    return usable


def targets_config(targets: Any) -> Any:
    """Return `targets`, as `check_targets` returns it, ready to be saved."""
    if isinstance(targets, keras.layers.Layer):
        targets = find_targets(targets)
    if targets is None or isinstance(targets, str):
        return targets
    return [
        target
        if isinstance(target, dict)
        else Spec.of(target.variable, target.contraction_axes).to_config(None)
        for target in targets
    ]


def _inferred(pattern: Any, variables: Any) -> Any:
    specs: list[Spec | None] = []
    for variable in variables:
        rank = len(variable.shape)
        is_kernel = (
            variable.name == "kernel"
            and rank >= 2
            and re.search(pattern, variable.path)
        )
        if is_kernel and rank > 2:
            raise ValueError(
                "`AdamS` without a model takes kernels of rank 2. Pass "
                "`targets=model` or `targets=find_targets(model, include=..., "
                f"exclude=...)`. Received: {variable.path!r} of shape "
                f"{tuple(variable.shape)}"
            )
        specs.append(Spec.of(variable, (0,)) if is_kernel else None)
    return specs


def _of_targets(targets: Any, variables: Any) -> Any:
    if isinstance(targets, keras.layers.Layer):
        targets = find_targets(targets)
    by_id = {id(target.variable): target for target in targets}
    found = [by_id.pop(id(variable), None) for variable in variables]
    if by_id:
        missing = [target.path for target in by_id.values()]
        warnings.warn(
            f"AdamS leaves {len(missing)} targets as they are, because they "
            "are not among the variables it was built on (frozen, or of "
            f"another model): {missing[:5]}",
            stacklevel=4,
        )
    return [t and Spec.of(t.variable, t.contraction_axes) for t in found]


def _restored(configs: Any, variables: Any) -> Any:
    specs: list[Spec | None] = [None] * len(variables)
    found = [
        (_places(config, variables), tuple(config["contraction_axes"]))
        for config in configs
    ]
    for config, (places, axes) in zip(configs, found):
        # Variables that cannot be told apart must all be targets.
        if not places or found.count((places, axes)) != len(places):
            index = config["index"]
            where = "" if index is None else f", at position {index}"
            raise ValueError(
                f"The restored target {config['path']!r} of shape "
                f"{tuple(config['shape'])} must name exactly one of the "
                f"variables that `AdamS` is built on{where}. Received: "
                f"{len(places)} such variables. Build it on the model it was "
                "saved with, or pass new `targets`."
            )
        for place in places:
            specs[place] = Spec.of(variables[place], axes)
    return specs


def _places(config: Any, variables: Any) -> Any:
    """Where among `variables` the restored target may be."""
    index, shape = config["index"], tuple(config["shape"])
    if index is None:
        return matching_places(config["path"], shape, variables)
    # A path can change when a model is rebuilt, by the name of what it was
    # built in; its place and shape among the variables do not.
    fits = index < len(variables) and tuple(variables[index].shape) == shape
    return [index] if fits else []
