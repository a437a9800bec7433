"""The seam between a stored weight and the weight a layer computes with.

A reparameterized layer keeps its object, name, paths and stored variables; its
class becomes a generated subclass whose weight attribute (`kernel`) returns
the effective weight. Weight scaling, weight normalization and the companders
use it, and packing, where the parameters take the place of the stored
variable; any other w = f(v, parameters) fits by one more subclass of
`Reparameterization`. Layer classes that are reparameterized from the start,
as `CompanderDense`, are made of the same parts.
"""

import contextlib
import functools
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.core import keras_private

# The place in `vars(layer)` of {attribute: Reparameterization}.
_SLOT = "_reparameterizations"
# {name: class}, for files.
_KINDS: dict[str, type["Reparameterization"]] = {}


class Reparameterization:
    """How the effective weight of one target follows from stored variables.

    Subclasses implement `create_parameters` and `effective`.

    Attributes:
        name: String, unique, under which `save_model` records it. Without
            one, a model with it cannot be saved by `save_model`.
        finish: String, the call that ends the reparameterization, named in
            error messages.
        keeps_stored: Bool. If False, the parameters stand for the stored
            variable, the first of them for its values: the variable leaves the
            layer and gives back its memory, until the fold. It must be an
            attribute of the layer, named with an underscore in front.
        pattern: String, the N:M pattern of the weights that the parameters
            can hold; None for any weights.
        mixin: A class to put in front of the layer's, with another `call`.
        is_empty: Bool, whether it was made from a file, see `from_config`.
        is_own: Bool, whether the layer's own class made it, and not `attach`.

    Args:
        target: The `Target` to reparameterize; None if `bind` is to give it,
            as for a layer that is not built yet.
    """

    name: str | None = None
    finish = "kwm.fold(model)"
    keeps_stored = True
    pattern: str | None = None
    mixin: type | None = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.name is not None and "name" in vars(cls):
            _KINDS[cls.name] = cls

    def __init__(self, target=None):
        self.parameters: tuple[Any, ...] = ()
        self.is_empty = self.is_own = False
        self.own_constraint = self.our_constraint = None
        if target is not None:
            self.bind(target)

    def bind(self, target):
        """Sets the target."""
        self.target = target
        # Not read later: inside of an autocast scope it is another one.
        self.dtype = target.variable.dtype

    def start(self, weight):
        """What to store so that the effective weight is `weight`.

        Called once, before `create_parameters`. Raises ValueError where
        nothing gives the weight; the model is unchanged then.
        """
        return weight

    def get_config(self):
        """What `from_config` needs beside the target, as JSON."""
        return {}

    @classmethod
    def from_config(cls, target, config):
        """Creates it for the same target of a new model.

        `config` comes from a file: raises ValueError if it is not one that
        `get_config` returns for this target. The item is marked `is_empty`:
        variables have no values yet, so that nothing reads one until those of
        the parameters are loaded.
        """
        item = cls(target, **config)
        item.is_empty = True
        return item

    @classmethod
    def find_targets(cls, model):
        """The `Targets` of `model` among which those of this kind are.

        Defaults to `keras_weightmods.find_targets`.
        """
        # targets.py imports this module.
        from keras_weightmods.core.targets import find_targets

        return find_targets(model)

    def create_parameters(self, add_weight):
        """Creates the parameters through the layer's `add_weight`.

        They become `self.parameters`, in this order. Their names must be
        unique in the layer, as they are keys in checkpoints.
        """
        raise NotImplementedError

    def effective(self, stored):
        """The effective weight for the value `stored` of the variable.

        `stored` is not to be read where `keeps_stored` is False.
        """
        raise NotImplementedError

    def constraint(self, constraint):
        """What to call in place of the variable's own `constraint`."""
        return constraint

    def summary(self):
        """What reports say of it."""
        raise NotImplementedError

    def folded(self):
        """The value that the fold leaves in the variable."""
        return ops.cast(self.effective(self.target.variable), self.dtype)

    def saved_arrays(self):
        """{key: (shape, dtype)} of what `saved` returns; reads no value."""
        return {
            parameter.name: (tuple(parameter.shape), parameter.dtype)
            for parameter in self.parameters
        }

    def saved(self):
        """What a checkpoint holds of it, {key: variable or array}."""
        return {parameter.name: parameter for parameter in self.parameters}

    def load(self, saved):
        """Takes what `saved` returned, as NumPy arrays."""
        for parameter in self.parameters:
            parameter.assign(saved[parameter.name])


def check_model(model):
    """Raises ValueError if `model` is no Keras model or layer."""
    if not isinstance(model, keras.layers.Layer):
        raise ValueError(
            f"`model` must be a Keras model or layer. Received: model={model!r}"
        )


def obstacle(target):
    """Says why a target cannot be reparameterized; None if it can."""
    layer = target.layer
    if layer.quantization_mode is not None:
        return f"quantized ({layer.quantization_mode})"
    if "float" not in target.variable.dtype:
        return f"not a float variable ({target.variable.dtype})"
    saver = type(layer).save_own_variables
    if not issubclass(
        type(layer), ReparameterizedLayer
    ) and not saver.__module__.startswith(("keras.", "keras_hub.")):
        return (
            f"{type(layer).__name__} overrides save_own_variables, so its "
            "extra state would be lost in checkpoints"
        )
    return None


def check_unattached(model, items):
    """Raises ValueError if a target of `items` is reparameterized already."""
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


def check_attachable(model, items):
    """Raises ValueError if `items` cannot be attached to `model` now."""
    check_unattached(model, items)
    if _has_built_optimizer(model):
        raise ValueError(
            "The model's optimizer has already been built for the present "
            "weights and would not update new ones. Compile the model with a "
            "new optimizer (`model.compile(...)`), then try again. Received: "
            f"model={model.name!r}, optimizer={model.optimizer.name!r} at "
            f"step {int(model.optimizer.iterations)}"
        )


def attach(model, items, drop_optimizer=False):
    """Installs the reparameterizations; all of them or, on an error, none.

    With `drop_optimizer` a built optimizer is no error: it holds state of
    weights that are no longer trained, so the model is left uncompiled.
    """
    if drop_optimizer:
        check_unattached(model, items)
    else:
        check_attachable(model, items)
    stored = [item.start(item.target.variable) for item in items]
    try:
        for item in items:
            _create_parameters(item)
    except Exception:
        for item in items:
            _drop_parameters(item)
        raise
    for item, value in zip(items, stored):
        if value is not item.target.variable:
            item.target.variable.assign(value)
        _install(item)
    _forget_compiled_functions(model)
    if drop_optimizer:
        _drop_built_optimizer(model)


def install(item):
    """Installs a reparameterization in a layer that is being built.

    The layer is a `ReparameterizedLayer`, and what it stores has been through
    `start` already.
    """
    item.is_own = True
    _create_parameters(item)
    _install(item)


def fold(model, kind=Reparameterization):
    """Bakes all reparameterizations of class `kind` into the stored weights.

    The layers are again what they were before. A built optimizer holds state
    of parameters that are gone, so the model is left uncompiled then.

    Returns:
        The list of the items folded.
    """
    items = reparameterizations(model, kind)
    for item in items:
        _check_foldable(item.target.layer)
    for item in items:
        variable = item.target.variable
        value = item.folded()
        _uninstall(item)
        _drop_parameters(item)
        if item.keeps_stored:
            variable.assign(value)
        else:
            _put_back(item, value)
    if items:
        _forget_compiled_functions(model)
        _drop_built_optimizer(model)
    return items


def remove_weights(layer, names):
    """Takes the weights that `layer` holds as attributes `names` out of it."""
    for name in names:
        keras_private.remove_variable(layer, getattr(layer, name), name)


def forget_variables(model):
    """Drops what was compiled for, and trained with, other variables."""
    _forget_compiled_functions(model)
    _drop_built_optimizer(model)


def is_reparameterized(layer, attribute=None):
    """Whether `layer`, or one attribute of it, is reparameterized."""
    slots = _slots(layer)
    return bool(slots) if attribute is None else attribute in slots


def reparameterizations(model, kind=Reparameterization):
    """All the `Reparameterization`s of class `kind` in `model`."""
    return [item for item in _slots_of(model) if isinstance(item, kind)]


def reparameterization(layer, attribute):
    """The `Reparameterization` of one attribute of `layer`."""
    return _slots(layer)[attribute]


def checkpoint_arrays(layer):
    """{key: (shape, dtype)} of what a checkpoint holds of such a layer."""
    arrays = {
        key: (tuple(variable.shape), variable.dtype)
        for key, variable in _stored_items(layer).items()
    }
    for item in _slots(layer).values():
        arrays.update(item.saved_arrays())
    return arrays


def kinds():
    """{name: class} of the kinds of `Reparameterization` that have a name."""
    return dict(_KINDS)


@contextlib.contextmanager
def plain_classes(model):
    """A scope in which the layers have their own classes, to be serialized."""
    generated = {
        layer: type(layer)
        for layer in keras_private.layers_of(model)
        if isinstance(layer, _AttachedLayer)
    }
    try:
        for layer, cls in generated.items():
            layer.__class__ = cls.__bases__[-1]
        yield
    finally:
        for layer, cls in generated.items():
            layer.__class__ = cls


class ReparameterizedLayer:
    """What reparameterized classes put in front of the plain one.

    The plain class is the last of the bases.
    """

    name: str

    def save_own_variables(self, store):
        # Keras' layers save `kernel`, which is the effective weight here, and
        # merge LoRA into it. Other keys than theirs make sure that a plain
        # layer fails on this checkpoint and never loads half of it.
        for key, variable in _stored_items(self).items():
            store[key] = variable
        for item in _slots(self).values():
            for key, value in item.saved().items():
                store[key] = value

    def load_own_variables(self, store):
        expected = {
            key: shape for key, (shape, _) in checkpoint_arrays(self).items()
        }
        received = {k: tuple(store[k].shape) for k in list(store.keys())}
        if received != expected:
            raise ValueError(
                f"Layer '{self.name}' is reparameterized and expected a "
                "checkpoint of a model reparameterized in the same way, with "
                f"the weights {expected}. Received: {received}. Load a "
                "checkpoint of the plain model before attaching, or after "
                f"`{_finish(self)}`."
            )
        for item in _slots(self).values():
            keys = item.saved_arrays()
            item.load({key: np.asarray(store[key]) for key in keys})
        for key, variable in _stored_items(self).items():
            variable.assign(store[key])

    # `quantize` itself is wrapped on the instance; this hook of the wrapper is
    # looked up on the class. Model.quantize turns it into a warning.
    def _check_quantize_args(self, mode, compute_dtype):
        raise NotImplementedError(
            f"Layer '{self.name}' is reparameterized and cannot be quantized: "
            f"its stored weight is not the effective one. Call "
            f"`{_finish(self)}` first. Received: mode={mode!r}"
        )


class ReparameterizedLoraLayer(ReparameterizedLayer):
    """The same for a plain class that has `enable_lora`."""

    def enable_lora(self, *args, **kwargs):
        super().enable_lora(*args, **kwargs)
        # LoRA freezes what it adapts.
        for item in _slots(self).values():
            for parameter in item.parameters:
                parameter.trainable = False


class _AttachedLayer:
    """What the generated classes put before all: they have no config."""

    name: str

    # Reached by `model.save` and not by `model.save_weights`.
    def save_assets(self, inner_path):
        raise ValueError(self._not_serializable())

    def get_config(self):
        raise ValueError(self._not_serializable())

    def _not_serializable(self):
        return (
            f"Layer '{self.name}' is reparameterized, and Keras cannot save, "
            "clone or copy a reparameterized model as a whole. Save it with "
            "`keras_weightmods.save_model(model, path)`, call "
            f"`{_finish(self)}` first, or keep a checkpoint by "
            "`model.save_weights`, which holds all its variables."
        )


@functools.cache
def _generated_class(cls: Any, attributes, released, mixins):
    has_lora = hasattr(cls, "enable_lora")
    front = ReparameterizedLoraLayer if has_lora else ReparameterizedLayer
    namespace: dict[str, Any] = {
        attribute: effective_weight(attribute) for attribute in attributes
    }
    for attribute in released:
        namespace[f"_{attribute}"] = property(
            functools.partial(_stored_variable, attribute)
        )
    namespace["__module__"] = cls.__module__
    namespace["__qualname__"] = cls.__qualname__
    # The same name, because checkpoints derive paths from class names.
    return type(cls.__name__, (*mixins, _AttachedLayer, front, cls), namespace)


def effective_weight(attribute):
    """A property that returns the effective weight of `attribute`.

    Until the reparameterization is installed it is the stored one. Setting it
    sets the stored one, for layers that keep it under the same name.
    """

    def set_stored(layer, value):
        keras_private.attributes(layer)[attribute] = value

    return property(functools.partial(_effective_weight, attribute), set_stored)


def _stored_variable(attribute, layer):
    return _slots(layer)[attribute].target.variable


def _effective_weight(attribute, layer):
    item = _slots(layer).get(attribute)
    if item is None:
        variable = keras_private.stored_variable(layer, attribute)
        if variable is None:
            raise AttributeError(
                f"Layer '{layer.name}' has a `{attribute}` once it is built."
            )
        return variable
    variable = item.target.variable
    # In the variables' own precision, outside of the autocast scope of a
    # mixed-precision layer: a scale near 1 has steps of 2**-7 in bfloat16, too
    # coarse to be trained.
    scope = keras_private.get_autocast_scope()
    with keras_private.AutocastScope(None):
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
    if variable.regularizer is not None:
        regularizer = _OnEffectiveWeight(variable.regularizer, item)
        carrier = variable if item.keeps_stored else item.parameters[0]
        carrier.regularizer = regularizer
    if variable.constraint is not None:
        item.own_constraint = variable.constraint
        item.our_constraint = item.constraint(variable.constraint)
        variable.constraint = item.our_constraint
    if not item.keeps_stored:
        _take_out(item)
    _set_slots(layer, {**_slots(layer), item.target.attribute: item})
    # Where optimizers find it, which know variables only.
    variable.reparameterization = item


def _uninstall(item):
    layer, variable = item.target.layer, item.target.variable
    slots = dict(_slots(layer))
    del slots[item.target.attribute]
    _set_slots(layer, slots)
    del variable.reparameterization
    if isinstance(variable.regularizer, _OnEffectiveWeight):
        variable.regularizer = variable.regularizer.regularizer
    # Another may have been set since.
    if variable.constraint is item.our_constraint:
        variable.constraint = item.own_constraint


def _set_slots(layer, slots):
    cls: Any = type(layer)
    is_own = issubclass(cls, ReparameterizedLayer)
    plain = cls.__bases__[-1] if is_own else cls
    # The parameters are tracked by `add_weight`.
    own = keras_private.attributes(layer)
    if not slots:
        del own[_SLOT]
        layer.__class__ = plain
        return
    own[_SLOT] = slots
    if not is_own or issubclass(cls, _AttachedLayer):
        items = [slots[attribute] for attribute in sorted(slots)]
        layer.__class__ = _generated_class(
            plain,
            tuple(sorted(slots)),
            tuple(i.target.attribute for i in items if not i.keeps_stored),
            tuple(i.mixin for i in items if i.mixin is not None),
        )


def _check_foldable(layer):
    cls = type(layer)
    if issubclass(cls.__bases__[-1], ReparameterizedLayer):
        raise ValueError(
            "A layer can be folded if its class is a plain one or one of the "
            "library's own, for then the plain class is known. Received: "
            f"layer {layer.name!r} of class {cls.__name__}, a subclass of "
            f"{cls.__bases__[-1].__name__}. Subclass the plain class and call "
            "`attach_compander` instead."
        )


def _take_out(item):
    """Takes the stored variable out of its layer and frees its memory.

    The same object comes back in the same place, so that whoever holds it, a
    `Target` for instance, finds it alive after the fold.
    """
    layer, variable = item.target.layer, item.target.variable
    item.place = keras_private.remove_variable(
        layer, variable, f"_{item.target.attribute}"
    )
    keras_private.release_value(
        variable,
        f"The variable {variable.path!r} has been replaced by packed ones and "
        f"has no value until `{item.finish}`.",
    )


def _put_back(item, value):
    layer, variable = item.target.layer, item.target.variable
    keras_private.restore_value(variable, value)
    keras_private.put_variable_back(
        layer, variable, f"_{item.target.attribute}", item.place
    )


def _create_parameters(item):
    layer = item.target.layer

    def add_weight(**arguments):
        parameter = layer.add_weight(**arguments)
        item.parameters += (parameter,)

    with keras_private.unlocked(layer):
        item.create_parameters(add_weight)
    if not item.target.variable.trainable:
        for parameter in item.parameters:
            parameter.trainable = False


def _drop_parameters(item):
    for parameter in item.parameters:
        keras_private.remove_variable(item.target.layer, parameter)


def _stored_items(layer):
    known: set[int] = set()
    for item in _slots(layer).values():
        known.update(id(parameter) for parameter in item.parameters)
    own = keras_private.own_variables(layer)
    stored = [variable for variable in own if id(variable) not in known]
    return {f"stored_{i}": variable for i, variable in enumerate(stored)}


def _slots(layer):
    return keras_private.attributes(layer).get(_SLOT, {})


def _slots_of(model):
    check_model(model)
    items = [
        item
        for layer in keras_private.layers_of(model)
        for item in _slots(layer).values()
    ]
    return sorted(items, key=lambda item: item.target.depth)


def _finish(layer):
    return next(iter(_slots(layer).values())).finish


def _has_built_optimizer(model):
    optimizer = getattr(model, "optimizer", None)
    return optimizer is not None and getattr(optimizer, "built", False)


def _drop_built_optimizer(model):
    if _has_built_optimizer(model):
        model.optimizer = None
        model.compiled = False


def _forget_compiled_functions(model):
    for layer in keras_private.layers_of(model):
        for name in (
            "train_function",
            "test_function",
            "predict_function",
            "generate_function",
        ):
            if getattr(layer, name, None) is not None:
                setattr(layer, name, None)
    keras_private.track_torch_parameters(model)
