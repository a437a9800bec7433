"""The seam between a stored weight and the weight a layer computes with.

Weight scaling, weight normalization and the companders use it. So does packing,
whose parameters replace the stored variable. Any other w = f(v, parameters)
needs one more subclass of `Reparameterization`.
"""

import collections
import dataclasses
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from keras_weightmods.core import keras_compat
from keras_weightmods.core.reparameterization import (
    Reparameterization,
    reparameterizations,
    slots,
)
from keras_weightmods.core.reparameterized_layer import (
    ReparameterizedLayer,
    set_reparameterizations,
)
from keras_weightmods.core.restored import RestoredOnError
from keras_weightmods.core.targets import Target, resolve_targets
from keras_weightmods.utils import checks
from keras_weightmods.utils.progress import Progress
from keras_weightmods.utils.report import (
    Report,
    Skipped,
    Table,
    skipped_text,
)


@dataclasses.dataclass(frozen=True, eq=False)
class ReparameterizationReport(Report):
    """The kernels that a reparameterization or `fold` changed.

    Attributes:
        kernels: Tuple with one summary for each kernel changed, with a `path`,
            a `shape` and a string `detail`.
        skipped: Tuple of `Skipped`, path and reason.
    """

    kernels: tuple[Any, ...]
    skipped: tuple[Skipped, ...] = ()

    def tables(self) -> Iterable[Table]:
        title = f"{len(self.kernels)} kernels"
        yield Table(title, self.kernels, "kernel=path shape detail")


def attach_to_targets(
    model: Any,
    targets: Any,
    make_item: Callable[[Any], Any],
    participle: str,
    verbose: Any,
    depthwise: bool = True,
) -> ReparameterizationReport:
    """Reparameterize each of `targets` that can be.

    Args:
        model: A built Keras model.
        targets: As in `resolve_targets`.
        make_item: Callable from a `Target` to its `Reparameterization`, or to
            the reason, a string, why it has none.
        participle: String, what is done to a kernel, for the error message.
        verbose: 0 or 1, whether to show progress.
        depthwise: Bool, as in `resolve_targets`.

    Raises:
        ValueError: If no target can be reparameterized, or as
            `resolve_targets` and `attach`. The model is unchanged then.
    """
    began = time.perf_counter()
    checks.check_verbose(verbose)
    found = resolve_targets(model, targets, depthwise)
    items, skipped = [], list(found.skipped)
    shared = shared_variables(model)
    for target in found:
        made = shared.get(id(target.variable)) or reason_to_skip(target)
        made = made or make_item(target)
        if isinstance(made, str):
            skipped.append(Skipped(target.path, made))
        else:
            items.append(made)
    if not items:
        raise ValueError(
            f"The model has no kernel that can be {participle}. Received: "
            f"model={model.name!r}, skipped: {skipped_text(skipped)}"
        )
    with Progress(len(items), "kernel", verbose, began) as progress:
        attach(model, items, see=progress.add)
    return ReparameterizationReport(
        tuple(item.summary() for item in items), tuple(skipped)
    )


def reason_to_skip(target: Target) -> str | None:
    """Return why a target cannot be reparameterized; None if it can."""
    layer = target.layer
    if layer.quantization_mode is not None:
        return f"quantized ({layer.quantization_mode})"
    if "float" not in target.variable.dtype:
        return f"not a float variable ({target.variable.dtype})"
    saver = type(layer).save_own_variables.__module__
    if isinstance(layer, ReparameterizedLayer) or saver.startswith(
        ("keras.", "keras_hub.")
    ):
        return None
    return (
        f"{type(layer).__name__} overrides save_own_variables, so its extra "
        "state would be lost in checkpoints"
    )


def shared_variables(model: Any) -> dict[int, str]:
    """Return {id: reason} of the variables that several layers hold.

    Only one of these would compute with another weight than it stores.
    """
    counts = collections.Counter(
        key
        for layer in keras_compat.layers_of(model)
        for key in {id(v) for v in keras_compat.own_variables(layer)}
    )
    shared = [key for key, count in counts.items() if count > 1]
    return dict.fromkeys(shared, "shared by several layers")


def attach(
    model: Any,
    items: Sequence[Any],
    drop_optimizer: bool = False,
    see: Callable[[Any], Any] = lambda item: None,
) -> None:
    """Install all reparameterizations or, on an error, none.

    With `drop_optimizer` a built optimizer is no error. It holds state of
    weights that are no longer trained, so the model is left uncompiled. `see`
    is called with each item once it has its parameters.
    """
    targets = [item.target for item in items]
    taken = [t for t in targets if t.attribute in slots(t.layer)]
    if taken:
        finish = slots(taken[0].layer)[taken[0].attribute].finish
        raise ValueError(
            "A weight can be reparameterized only once. Received: a model "
            f"with {len(taken)} of the targets reparameterized already, the "
            f"first being {taken[0].path!r}. Call `{finish}` first, or leave "
            "these targets out."
        )
    shared = shared_variables(model)
    if both := [t.path for t in targets if id(t.variable) in shared]:
        raise ValueError(
            "A weight can be reparameterized in one layer alone. Received: "
            f"{len(both)} targets that several layers share, the first being "
            f"{both[0]!r}. Leave these out of `targets`."
        )
    if not drop_optimizer and has_built_optimizer(model):
        raise ValueError(
            "The model's optimizer has already been built for the present "
            "weights and would not update new ones. Compile the model with a "
            "new optimizer (`model.compile(...)`), then try again. Received: "
            f"model={model.name!r}, optimizer={model.optimizer.name!r} at "
            f"step {int(model.optimizer.iterations)}"
        )
    stored = [
        item.start(target.variable) for item, target in zip(items, targets)
    ]
    variables = [target.variable for target in targets]
    with RestoredOnError(
        model,
        *(target.layer for target in targets),
        values=[v for v, value in zip(variables, stored) if value is not v],
        released=[
            item.target.variable for item in items if not item.keeps_stored
        ],
    ):
        _attach_items(model, items, stored, see)


def attach_items(model: Any, items: Sequence[Any]) -> None:
    """Install some items; on an error the caller restores the model."""
    stored = (item.start(item.target.variable) for item in items)
    _attach_items(model, items, stored)


def _attach_items(model, items, stored, see=lambda item: None):
    for item, value in zip(items, stored):
        item.get_model = weakref.ref(model)
        variable = item.target.variable
        _create_parameters(item)
        see(item)
        if value is not variable:
            variable.assign(value)
        if not item.keeps_stored:
            _take_out(item)
        _put_in(item)
    forget_variables(model)


def install(item: Reparameterization) -> None:
    """Install a reparameterization in a layer that is being built.

    The layer is a `ReparameterizedLayer`, and its stored weight already comes
    from `start`.
    """
    item.is_own = True
    _create_parameters(item)
    _put_in(item)


def fold(
    model: Any,
    kind: Any = Reparameterization,
    see: Callable[[Any], Any] = lambda item: None,
) -> list[Any]:
    """Bake all reparameterizations of class `kind` into the stored weights.

    The layers get their former classes back. A built optimizer holds state of
    parameters that are gone, so the model is left uncompiled. `see` is called
    with each folded item.

    Returns:
        The list of the items folded.
    """
    items = reparameterizations(model, kind)
    variables = [item.target.variable for item in items]
    stored = [item.target.variable for item in items if item.keeps_stored]
    with RestoredOnError(model, *variables, values=stored):
        fold_items(model, items, see)
    return items


def fold_items(
    model: Any,
    items: Sequence[Any],
    see: Callable[[Any], Any] = lambda item: None,
) -> None:
    """Fold some items; on an error the caller restores the model."""
    for layer in (item.target.layer for item in items):
        plain = type(layer).__bases__[-1]
        if issubclass(plain, ReparameterizedLayer):
            raise ValueError(
                "A layer can be folded if its class is a plain one or one of "
                "the library's own. "
                f"Received: layer {layer.name!r} of class "
                f"{type(layer).__name__}, a subclass of {plain.__name__}. "
                "Subclass the plain class and call `attach_compander` instead."
            )
    for item in items:
        _give_back(item)
        see(item)
    if items:
        forget_variables(model)


def forget_variables(model: Any) -> None:
    """Drop compiled functions and optimizer state of other variables."""
    for layer in keras_compat.layers_of(model):
        for name in ("train", "test", "predict", "generate"):
            if getattr(layer, f"{name}_function", None) is not None:
                setattr(layer, f"{name}_function", None)
    keras_compat.track_torch_parameters(model)
    if has_built_optimizer(model):
        model.optimizer = None
        model.compiled = False


def _put_in(item):
    variable = item.target.variable
    for name in ("regularizer", "constraint"):
        own = getattr(variable, name)
        if own is not None:
            ours = getattr(item, name)(own)
            item.replaced[name] = own, ours
            is_gone = name == "regularizer" and not item.keeps_stored
            setattr(item.parameters[0] if is_gone else variable, name, ours)
    items = {**slots(item.target.layer), item.target.attribute: item}
    set_reparameterizations(item.target.layer, items)
    # Optimizers look here, because they know only variables.
    variable.reparameterization = item


def _give_back(item):
    """Make a weight plain again, with its effective value."""
    layer, variable = item.target.layer, item.target.variable
    value = item.folded()
    others = {a: x for a, x in slots(layer).items() if x is not item}
    set_reparameterizations(layer, others)
    del variable.reparameterization
    for name, (own, ours) in item.replaced.items():
        # Someone may have set another one since.
        if getattr(variable, name) is ours:
            setattr(variable, name, own)
    _drop_parameters(item)
    if item.keeps_stored:
        variable.assign(value)
    else:
        keras_compat.restore_value(variable, value)
        keras_compat.put_variable_back(layer, variable, item.place)


def _take_out(item):
    """Take the stored variable out of its layer and free its memory.

    The fold puts the same object back in the same place, so that holders of it,
    such as a `Target`, can still use it.
    """
    layer, variable = item.target.layer, item.target.variable
    name = keras_compat.stored_name(layer, item.target.attribute)
    item.place = keras_compat.remove_variable(layer, variable, name)
    keras_compat.release_value(
        variable,
        f"The variable {variable.path!r} has been replaced by packed ones and "
        f"has no value until `{item.finish}`.",
    )


def _create_parameters(item):
    layer = item.target.layer

    def add_weight(**arguments):
        parameter = layer.add_weight(**arguments)
        item.parameters += (parameter,)
        return parameter

    with keras_compat.unlocked(layer):
        item.create_parameters(add_weight)
    if not item.target.variable.trainable:
        for parameter in item.parameters:
            parameter.trainable = False


def _drop_parameters(item):
    for parameter in item.parameters:
        keras_compat.remove_variable(item.target.layer, parameter)


def has_built_optimizer(model: Any) -> bool:
    """Return whether a model's optimizer holds state of its weights."""
    optimizer = getattr(model, "optimizer", None)
    return bool(getattr(optimizer, "built", False))
