"""The seam between a stored weight and the weight a layer computes with.

A reparameterized layer keeps its object, name, paths and stored variables; its
class becomes a generated subclass whose weight attribute (`kernel`) returns
the effective weight. Weight scaling uses it; any other w = f(v, parameters)
fits by one more subclass of `Reparameterization`.
"""

import functools
from typing import Any

from keras import ops

# Not in the public API. An effective weight is computed in the variables' own
# precision, outside of the autocast scope of a mixed-precision layer: a scale
# near 1 has steps of 2**-7 in bfloat16, too coarse to be trained.
from keras.src.backend import AutocastScope, get_autocast_scope

# The place in `vars(layer)` of {attribute: Reparameterization}.
_SLOT = "_reparameterizations"


class Reparameterization:
    """How the effective weight of one target follows from stored variables.

    Subclasses set `finish`, the call that ends the reparameterization, named
    in error messages, and implement `create_parameters` and `effective`.

    Args:
        target: The `Target` to reparameterize.
    """

    finish = "the fold function of the reparameterization"

    def __init__(self, target):
        self.target = target
        # Not read later: inside of an autocast scope it is another one.
        self.dtype = target.variable.dtype
        self.parameters = ()

    def create_parameters(self, add_weight):
        """Creates the parameters through the layer's `add_weight`.

        They become `self.parameters`, in this order. Their names must be
        unique in the layer, as they are keys in checkpoints.
        """
        raise NotImplementedError

    def effective(self, stored):
        """The effective weight for the value `stored` of the variable."""
        raise NotImplementedError


def obstacle(target):
    """Says why a target cannot be reparameterized; None if it can."""
    layer = target.layer
    if layer.quantization_mode is not None:
        return f"quantized ({layer.quantization_mode})"
    if "float" not in target.variable.dtype:
        return f"not a float variable ({target.variable.dtype})"
    saver = type(layer).save_own_variables
    if not is_reparameterized(layer) and not saver.__module__.startswith(
        ("keras.", "keras_hub.")
    ):
        return (
            f"{type(layer).__name__} overrides save_own_variables, so its "
            "extra state would be lost in checkpoints"
        )
    return None


def check_attachable(model, items):
    """Raises ValueError if `items` cannot be attached to `model` now."""
    taken = [
        item.target.path
        for item in items
        if item.target.attribute in _slots(item.target.layer)
    ]
    if taken:
        first = _slots_of(model)[0]
        raise ValueError(
            "A weight can be reparameterized only once. Received: a model "
            f"with {len(taken)} of the targets reparameterized already, the "
            f"first being {taken[0]!r}. Call `{first.finish}` first, or leave "
            "these targets out."
        )
    if _has_built_optimizer(model):
        raise ValueError(
            "The model's optimizer has already been built for the present "
            "weights and would not update new ones. Compile the model with a "
            "new optimizer (`model.compile(...)`), then try again. Received: "
            f"model={model.name!r}, optimizer={model.optimizer.name!r} at "
            f"step {int(model.optimizer.iterations)}"
        )


def attach(model, items):
    """Installs the reparameterizations; all of them or, on an error, none."""
    check_attachable(model, items)
    try:
        for item in items:
            _create_parameters(item)
    except Exception:
        for item in items:
            _drop_parameters(item)
        raise
    for item in items:
        _install(item)
    _forget_compiled_functions(model)


def fold(model, kind):
    """Bakes all reparameterizations of class `kind` into the stored weights.

    The layers are again what they were before. A built optimizer holds state
    of parameters that are gone, so the model is left uncompiled then.

    Returns:
        The list of the items folded.
    """
    items = [item for item in _slots_of(model) if isinstance(item, kind)]
    for item in items:
        variable = item.target.variable
        variable.assign(ops.cast(item.effective(variable), item.dtype))
        _uninstall(item)
        _drop_parameters(item)
    if items:
        _forget_compiled_functions(model)
        if _has_built_optimizer(model):
            model.optimizer = None
            model.compiled = False
    return items


def is_reparameterized(layer, attribute=None):
    """Whether `layer`, or one attribute of it, is reparameterized."""
    slots = _slots(layer)
    return bool(slots) if attribute is None else attribute in slots


def reparameterizations(model, kind=Reparameterization):
    """All the `Reparameterization`s of class `kind` in `model`."""
    return [item for item in _slots_of(model) if isinstance(item, kind)]


class _ReparameterizedLayer:
    """What the generated classes put in front of the layer's own class."""

    name: str

    def save_own_variables(self, store):
        # Keras' layers save `kernel`, which is the effective weight here, and
        # merge LoRA into it. Other keys than theirs make sure that a plain
        # layer fails on this checkpoint and never loads half of it.
        for key, variable in _checkpoint_items(self).items():
            store[key] = variable

    def load_own_variables(self, store):
        items = _checkpoint_items(self)
        expected = {k: tuple(v.shape) for k, v in items.items()}
        received = {k: tuple(store[k].shape) for k in list(store.keys())}
        if received != expected:
            raise ValueError(
                f"Layer '{self.name}' is reparameterized and expected a "
                "checkpoint of a model reparameterized in the same way, with "
                f"the weights {expected}. Received: {received}. Load a "
                "checkpoint of the plain model before attaching, or after "
                f"`{_finish(self)}`."
            )
        for key, variable in items.items():
            variable.assign(store[key])

    # Reached by `model.save` and not by `model.save_weights`.
    def save_assets(self, inner_path):
        raise ValueError(self._not_serializable())

    def get_config(self):
        raise ValueError(self._not_serializable())

    # `quantize` itself is wrapped on the instance; this hook of the wrapper is
    # looked up on the class. Model.quantize turns it into a warning.
    def _check_quantize_args(self, mode, compute_dtype):
        raise NotImplementedError(
            f"Layer '{self.name}' is reparameterized and cannot be quantized: "
            f"its stored weight is not the effective one. Call "
            f"`{_finish(self)}` first. Received: mode={mode!r}"
        )

    def _not_serializable(self):
        return (
            f"Layer '{self.name}' is reparameterized, and a reparameterized "
            "model cannot be saved, cloned or copied as a whole. Call "
            f"`{_finish(self)}` first, or keep a checkpoint by "
            "`model.save_weights`, which holds all its variables."
        )


class _ReparameterizedLoraLayer(_ReparameterizedLayer):
    def enable_lora(self, *args, **kwargs):
        super().enable_lora(*args, **kwargs)
        # LoRA freezes what it adapts.
        for item in _slots(self).values():
            for parameter in item.parameters:
                parameter.trainable = False


@functools.cache
def _generated_class(cls: Any, attributes: tuple[str, ...]):
    has_lora = hasattr(cls, "enable_lora")
    front = _ReparameterizedLoraLayer if has_lora else _ReparameterizedLayer
    namespace: dict[str, Any] = {
        attribute: property(functools.partial(_effective_weight, attribute))
        for attribute in attributes
    }
    namespace["__module__"] = cls.__module__
    namespace["__qualname__"] = cls.__qualname__
    # The same name, because checkpoints derive paths from class names.
    return type(cls.__name__, (front, cls), namespace)


def _effective_weight(attribute, layer):
    item = _slots(layer)[attribute]
    variable = item.target.variable
    scope = get_autocast_scope()
    with AutocastScope(None):
        weight = ops.cast(item.effective(variable), item.dtype)
        if attribute == "kernel" and getattr(layer, "lora_enabled", False):
            delta = ops.matmul(layer.lora_kernel_a, layer.lora_kernel_b)
            rate = layer.lora_alpha / layer.lora_rank
            weight = ops.cast(
                ops.add(weight, ops.multiply(rate, delta)), layer.compute_dtype
            )
    return weight if scope is None else scope.maybe_cast(weight)


class _OnEffectiveWeight:
    """Applies a regularizer of the stored weight to the effective one."""

    def __init__(self, regularizer, item):
        self.regularizer = regularizer
        self.item = item

    def __call__(self, stored):
        return self.regularizer(self.item.effective(stored))


def _install(item):
    layer, variable = item.target.layer, item.target.variable
    slots = {**_slots(layer), item.target.attribute: item}
    _set_slots(layer, slots)
    if variable.regularizer is not None:
        variable.regularizer = _OnEffectiveWeight(variable.regularizer, item)


def _uninstall(item):
    layer, variable = item.target.layer, item.target.variable
    slots = dict(_slots(layer))
    del slots[item.target.attribute]
    _set_slots(layer, slots)
    if isinstance(variable.regularizer, _OnEffectiveWeight):
        variable.regularizer = variable.regularizer.regularizer


def _set_slots(layer, slots):
    base: Any = type(layer)
    if issubclass(base, _ReparameterizedLayer):
        base = base.__bases__[1]
    # Past Keras' attribute tracking, which has nothing to see here: the
    # parameters are tracked by `add_weight`.
    if slots:
        vars(layer)[_SLOT] = slots
        layer.__class__ = _generated_class(base, tuple(sorted(slots)))
    else:
        del vars(layer)[_SLOT]
        layer.__class__ = base


def _create_parameters(item):
    layer = item.target.layer
    # A built layer is locked; LoRA in Keras adds its weights in this way too.
    locked = layer._tracker.locked

    def add_weight(**arguments):
        parameter = layer.add_weight(**arguments)
        item.parameters += (parameter,)

    layer._tracker.unlock()
    try:
        item.create_parameters(add_weight)
    finally:
        if locked:
            layer._tracker.lock()
    if not item.target.variable.trainable:
        for parameter in item.parameters:
            parameter.trainable = False


def _drop_parameters(item):
    # `del layer.attribute`, the public way, collects garbage each time, which
    # takes minutes on an LLM.
    for parameter in item.parameters:
        item.target.layer._untrack_variable(parameter)


def _checkpoint_items(layer):
    parameters = [
        parameter
        for item in _slots(layer).values()
        for parameter in item.parameters
    ]
    known = {id(parameter) for parameter in parameters}
    own = layer._trainable_variables + layer._non_trainable_variables
    stored = [variable for variable in own if id(variable) not in known]
    items = {f"stored_{i}": variable for i, variable in enumerate(stored)}
    return {**items, **{parameter.name: parameter for parameter in parameters}}


def _slots(layer):
    return vars(layer).get(_SLOT, {})


def _slots_of(model):
    items = [
        item
        for layer in model._flatten_layers()
        for item in _slots(layer).values()
    ]
    return sorted(items, key=lambda item: item.target.depth)


def _finish(layer):
    return next(iter(_slots(layer).values())).finish


def _has_built_optimizer(model):
    optimizer = getattr(model, "optimizer", None)
    return optimizer is not None and getattr(optimizer, "built", False)


def _forget_compiled_functions(model):
    for layer in model._flatten_layers():
        for name in (
            "train_function",
            "test_function",
            "predict_function",
            "generate_function",
        ):
            if getattr(layer, name, None) is not None:
                setattr(layer, name, None)
        # torch only: a container lists the variables of its layers as torch
        # parameters when built, and zero_grad would miss a later one, so that
        # its gradients add up over the steps. Keras does the same after
        # `quantize`.
        if "_torch_params" in getattr(layer, "_modules", {}):
            layer._track_variables()
