"""Layers, the models made of them, and how Keras saves their parts."""

import contextlib
import copy
import itertools
import json
import random
from collections.abc import Iterator
from typing import Any

import keras
from keras.src.backend.common import global_state

# The cell of ConvLSTM1D to ConvLSTM3D. Keras does not export it.
from keras.src.layers.rnn.conv_lstm import ConvLSTMCell as ConvLSTMCell

# How Keras finds and names the parts of a model for its own files.
from keras.src.saving import saving_lib, serialization_lib
from keras.src.saving.keras_saveable import KerasSaveable as KerasSaveable
from keras.src.utils.naming import to_snake_case as to_snake_case

SafeModeScope = serialization_lib.SafeModeScope
ObjectSharingScope = serialization_lib.ObjectSharingScope
# Yields the attributes of a part that Keras looks into when it saves.
walk_saveable = saving_lib._walk_saveable


def layers_of(layer: Any) -> list[Any]:
    """Return a layer and all layers in it; `Model.layers` are one level."""
    return layer._flatten_layers()


def parts_of(layer: Any) -> list[Any]:
    """Return the layers that a layer holds itself."""
    return layer._flatten_layers(include_self=False, recursive=False)


def count_as_called(copy: Any, model: Any) -> None:
    """Let Keras export a copy by the shapes that the model was called on.

    It refuses a subclassed model that has not been called. Needless if a model
    that `build_from_config` has built could be exported.
    """
    for name in ("_called", "_build_shapes_dict"):
        vars(copy)[name] = vars(model)[name]


def own_variables(layer: Any) -> list[keras.Variable]:
    """Return the variables of `layer`; `weights` adds those of its layers."""
    return layer._trainable_variables + layer._non_trainable_variables


def attributes(obj: Any) -> dict[str, Any]:
    """Return the attributes of an instance, to be read and written.

    This bypasses properties, which may compute an effective weight, and Keras'
    attribute tracking, which is locked on a built layer.
    """
    return vars(obj)


def stored_variable(layer: Any, attribute: str) -> Any:
    """Return the variable behind the property `attribute`, such as `kernel`.

    Keras' layers keep it under the same name with an underscore in front.
    """
    name = stored_name(layer, attribute)
    return None if name is None else vars(layer)[name]


def stored_name(layer: Any, attribute: str) -> Any:
    """Return the name under which `stored_variable` is kept, or None."""
    for name in (f"_{attribute}", attribute):
        if isinstance(vars(layer).get(name), keras.Variable):
            return name
    return None


def view(obj: Any, cls: Any = None, /, **attributes: Any) -> Any:
    """Return a view of `obj` with another class, if given, and attributes.

    `obj` does not change. The view shares everything else with it, variables
    too, and is only to be read.
    """
    other = object.__new__(cls or type(obj))
    vars(other).update(vars(obj), **attributes)
    return other


@contextlib.contextmanager
def without_traces() -> Iterator[None]:
    """Restore what making layers uses up: seeds, and numbers for names."""
    names = global_state.get_global_attribute("object_name_uids")
    names, state = copy.copy(names), random.getstate()
    try:
        yield
    finally:
        random.setstate(state)
        if names is not None:
            global_state.set_global_attribute("object_name_uids", names)


def track_torch_parameters(model: Any) -> None:
    """List the variables of a changed model as torch parameters again.

    A container lists those of its layers when it is built. `zero_grad` would
    miss a later one, whose gradients would add up over the steps, and a removed
    one would stay alive. Keras does the same after `quantize`, but not for the
    functional model inside a Sequential.
    """
    if keras.backend.backend() != "torch":
        return
    modules = (each.modules() for each in layers_of(model))
    for module in dict.fromkeys(itertools.chain(*modules)):
        if "_torch_params" in module._modules:
            module._track_variables()
    if "_torch_params" in model._modules:
        list_hidden_parameters(model)


def list_hidden_parameters(model: Any) -> None:
    """List the variables of a model that Keras hides from torch.

    Keras lists them by path. If two have one path, as in KerasHub's SmolLM3 and
    T5, it loses the first. No `zero_grad` reaches it then, and its gradients
    add up over all steps of a `fit`. Here it gets a key of its own.
    """
    if keras.backend.backend() != "torch":
        return
    listed = {id(parameter) for parameter in model.parameters()}
    for number, variable in enumerate(model.trainable_variables):
        parameter = variable._value  # None in a build without values
        if parameter is not None and id(parameter) not in listed:
            model.torch_params[f"{variable.path}:{number}"] = parameter


def list_torch_parameters(model: Any) -> None:
    """List the variables of a model built in `without_values`, on torch.

    A layer built in a stateless scope does not list them. A trace of the module
    would find none, and its `state_dict` would be empty.
    """
    if keras.backend.backend() == "torch":
        for layer in layers_of(model):
            layer._track_variables()


def is_training() -> bool:
    """Return whether a call with `training=True` is under way, as in `fit`.

    Hook: a public `Layer.call_context`.
    """
    context = global_state.get_global_attribute("current_call_ctx")
    return context is not None and context.get_value("training") is True


def takes_training(layer: Any) -> bool:
    """Return whether a layer's `call` has an argument `training`.

    If it has none, calling the layer drops the argument, and `stateless_call`
    fails.
    """
    return bool(layer._call_has_training_arg)


def split_text(
    tokenizer: Any, pattern: str, single_digits: bool, keep_tokens: bool
) -> None:
    """Let a byte-pair tokenizer of KerasHub split text by a regex.

    With `keep_tokens` a part that is a token stays whole. Llama 3 needs this,
    because no merges make some of its tokens.

    KerasHub 0.32 means to do so, but passes its pattern to `tokenizers` as a
    literal string. So no text is split, and tokens cross the ends of words.
    Needless if `BytePairTokenizer` took a pattern.
    """
    from tokenizers import Regex, pre_tokenizers

    tokenizer._tokenizer.model.ignore_merges = keep_tokens
    digits = [pre_tokenizers.Digits(individual_digits=True)]
    tokenizer._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(digits if single_digits else ()),
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(
                add_prefix_space=tokenizer.add_prefix_space, use_regex=False
            ),
        ]
    )


def text_split(part: Any) -> bytes | None:
    """Return the split that `split_text` gave a part; None if it has none."""
    inner: Any = getattr(part, "_tokenizer", None)
    if not hasattr(inner, "pre_tokenizer"):
        return None
    state: bytes = inner.pre_tokenizer.__getstate__()
    if b'"Regex"' not in state:
        return None
    found = json.loads(state), inner.model.ignore_merges
    return json.dumps(found).encode()


def restore_text_split(tokenizer: Any, state: bytes) -> None:
    """Let a tokenizer split text by the state that `text_split` returned."""
    from tokenizers import pre_tokenizers

    split, tokenizer._tokenizer.model.ignore_merges = json.loads(state)
    restored = pre_tokenizers.Whitespace()
    restored.__setstate__(json.dumps(split).encode())
    tokenizer._tokenizer.pre_tokenizer = restored
