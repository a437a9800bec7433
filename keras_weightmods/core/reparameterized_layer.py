"""The classes of reparameterized layers, and their effective weights.

A reparameterized layer keeps its object, name, paths and stored variables. Its
class becomes a generated subclass whose weight attribute (`kernel`) returns the
effective weight. Classes like `CompanderDense`, reparameterized from the start,
consist of the same parts.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from keras import ops

from keras_weightmods.core import keras_compat
from keras_weightmods.core.reparameterization import SLOT, slots

# Whether attached layers give the configs of their plain classes.
_AS_PLAIN = contextvars.ContextVar("as_plain", default=False)


class ReparameterizedLayer:
    """The base that reparameterized classes put before the plain one.

    The plain class is the last of the bases.
    """

    def save_own_variables(self, store):
        # Keras' layers save `kernel`, which is the effective weight here, and
        # merge LoRA into it. The keys here differ, so a plain layer fails on
        # this checkpoint and never loads half of it.
        for key, variable in _stored_items(self).items():
            store[key] = variable
        for item in slots(self).values():
            for key, value in item.saved().items():
                store[key] = value

    def load_own_variables(self: Any, store):
        arrays = checkpoint_arrays(self)
        expected = {key: shape for key, (shape, _) in arrays.items()}
        received = {k: tuple(store[k].shape) for k in list(store.keys())}
        if received != expected:
            raise ValueError(
                f"Layer '{self.name}' is reparameterized and expected a "
                "checkpoint of a model reparameterized in the same way, with "
                f"the weights {expected}. Received: {received}. Load a "
                "checkpoint of the plain model before attaching, or after "
                f"`{_finish(self)}`."
            )
        for item in slots(self).values():
            keys = item.saved_arrays()
            item.load({key: np.asarray(store[key]) for key in keys})
        for key, variable in _stored_items(self).items():
            variable.assign(store[key])

    # Keras wraps `quantize` on the instance, but looks this hook up on the
    # class. Model.quantize turns it into a warning.
    def _check_quantize_args(self: Any, mode, compute_dtype):
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
        for item in slots(self).values():
            for parameter in item.parameters:
                parameter.trainable = False


class AttachedLayer:
    """The first base of generated classes: they have no config.

    So `model.save` and `clone_model` raise. A container that does not ask the
    layer for its config, such as a KerasHub backbone, can still be cloned or
    written as a preset. The plain layers made from that refuse its arrays.
    """

    def get_config(self: Any):
        if _AS_PLAIN.get():
            return super().get_config()
        raise ValueError(
            f"Layer '{self.name}' is reparameterized, and Keras cannot save, "
            "clone or copy a reparameterized model as a whole. Save it with "
            "`keras_weightmods.save_model(model, path)`, call "
            f"`{_finish(self)}` first, or keep a checkpoint by "
            "`model.save_weights`, which holds all its variables."
        )

    # `model.save` calls it, and `model.save_weights` does not.
    def save_assets(self, inner_path):
        self.get_config()


@functools.cache
def _generated_class(cls: Any, attributes, released, mixins):
    has_lora = hasattr(cls, "enable_lora")
    front = ReparameterizedLoraLayer if has_lora else ReparameterizedLayer
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        **{name: effective_weight(name) for name in attributes},
        **{
            f"_{name}": property(
                lambda layer, name=name: slots(layer)[name].target.variable
            )
            for name in released
        },
    }
    # Keep the name, because checkpoints derive paths from class names.
    return type(cls.__name__, (*mixins, AttachedLayer, front, cls), namespace)


def effective_weight(attribute: str) -> property:
    """Return a property that computes the effective weight of `attribute`.

    Before the reparameterization is installed it returns the stored weight.
    Setting it sets the stored weight, for layers that keep it under this name.
    """

    def set_stored(layer, value):
        keras_compat.attributes(layer)[attribute] = value

    return property(functools.partial(_effective_weight, attribute), set_stored)


def _effective_weight(attribute, layer):
    item = slots(layer).get(attribute)
    if item is None:
        variable = keras_compat.stored_variable(layer, attribute)
        if variable is None:
            raise AttributeError(
                f"Layer '{layer.name}' has a `{attribute}` once it is built."
            )
        return variable
    variable = item.target.variable
    # Computed in the variables' own precision, outside the autocast scope of a
    # mixed-precision layer. A scale near 1 has steps of 2**-7 in bfloat16, too
    # coarse to train.
    scope = keras_compat.get_autocast_scope()
    with keras_compat.AutocastScope(None):
        if item.is_idle:
            weight = ops.convert_to_tensor(variable)
        else:
            weight = item.effective(variable)
            if scope is None or item.dtype != "float32":
                weight = ops.cast(weight, item.dtype)
        if attribute == "kernel" and getattr(layer, "lora_enabled", False):
            delta = ops.matmul(layer.lora_kernel_a, layer.lora_kernel_b)
            rate = layer.lora_alpha / layer.lora_rank
            weight = ops.cast(
                ops.add(weight, ops.multiply(rate, delta)), layer.compute_dtype
            )
    return weight if scope is None else scope.maybe_cast(weight)


def set_reparameterizations(layer: Any, items: dict[str, Any]) -> None:
    """Give a layer {attribute: Reparameterization}, and the class for it."""
    cls = type(layer)
    is_own = issubclass(cls, ReparameterizedLayer)
    plain = cls.__bases__[-1] if is_own else cls
    # Past attribute tracking.
    own = keras_compat.attributes(layer)
    own[SLOT] = items
    if not items:
        del own[SLOT]
        layer.__class__ = plain
    elif not is_own or issubclass(cls, AttachedLayer):
        ordered = [items[attribute] for attribute in sorted(items)]
        layer.__class__ = _generated_class(
            plain,
            tuple(sorted(items)),
            tuple(i.target.attribute for i in ordered if not i.keeps_stored),
            # Each once: a layer may hold several stacks of kernels.
            tuple(dict.fromkeys(i.mixin for i in ordered if i.mixin)),
        )


def checkpoint_arrays(layer: Any) -> dict[str, tuple[Any, str]]:
    """Return {key: (shape, dtype)} of what a checkpoint holds."""
    arrays = {
        key: (tuple(variable.shape), variable.dtype)
        for key, variable in _stored_items(layer).items()
    }
    for item in slots(layer).values():
        arrays.update(item.saved_arrays())
    return arrays


@contextlib.contextmanager
def plain_configs() -> Iterator[None]:
    """Let attached layers return their configs, in this thread only."""
    token = _AS_PLAIN.set(True)
    try:
        yield
    finally:
        _AS_PLAIN.reset(token)


def plain_view(layer: Any) -> Any:
    """Return a view of an attached layer as its plain class, others as is."""
    if isinstance(layer, AttachedLayer):
        return keras_compat.view(layer, type(layer).__bases__[-1])
    return layer


def _stored_items(layer):
    items = slots(layer).values()
    known = {id(x) for item in items for x in item.parameters}
    own = keras_compat.own_variables(layer)
    stored = [variable for variable in own if id(variable) not in known]
    return {f"stored_{i}": variable for i, variable in enumerate(stored)}


def _finish(layer):
    return next(iter(slots(layer).values())).finish
