"""Match names: the values of `include`, `exclude` and similar arguments."""

import re
import types
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_weightmods.core.keras_compat import layers_of, own_variables
from keras_weightmods.utils import checks


def matcher(
    name: str, pattern: Any, model: Any = None
) -> Callable[[Any], bool]:
    """Return a pattern as a callable from `Target`, or similar, to bool.

    Args:
        name: String, the argument that the pattern was given as.
        pattern: A regex searched for in the `path`. With a model also a layer
            or a layer type, for what is inside of these layers, or a callable.
        model: The model or layer that holds what is matched.

    Raises:
        ValueError: If the pattern is none of these.
    """
    if isinstance(pattern, (str, re.Pattern)):
        try:
            regex = re.compile(pattern)
        except re.error as error:
            expected = f"a valid regular expression ({error})"
            raise checks.error(name, expected, pattern) from error
        return lambda each: regex.search(each.path) is not None
    is_type = isinstance(pattern, type)
    if model is not None and (
        isinstance(pattern, keras.layers.Layer)
        or (is_type and issubclass(pattern, keras.layers.Layer))
    ):
        inside = {
            id(inner)
            for layer in layers_of(model)
            if (isinstance(layer, pattern) if is_type else layer is pattern)
            for inner in layers_of(layer)
        }
        return lambda each: id(each.layer) in inside
    if model is not None and callable(pattern) and not is_type:
        return lambda each: bool(pattern(each))
    expected = "a regular expression for the path, or a list of these"
    if model is not None:
        expected += ", of layers, layer types or callables from Target to bool"
    raise checks.error(name, expected, pattern)


def included(
    name: str,
    patterns: Any,
    found: Sequence[Any],
    model: Any = None,
    skipped: Any = None,
    kind: str = "target",
) -> list[Any]:
    """Return those of `found` that one of the patterns matches.

    Args:
        name: String, the argument that the patterns were given as.
        patterns: As in `matcher`, or a list of these. `None` for all.
        found: Sequence of `Target`s, or of what has a `path` like them.
        model: As in `matcher`.
        skipped: Sequence of `Skipped`, for the error message. `None` where
            `found` is not what `find_targets` returns.
        kind: String, what `found` are, for the error message.

    Raises:
        ValueError: If a pattern has another form, or matches nothing.
    """
    if patterns is None:
        return list(found)
    taken: set[int] = set()
    for pattern in _listed(patterns):
        test = matcher(name, pattern, model)
        matched = {i for i, each in enumerate(found) if test(each)}
        if not matched:
            paths = ", ".join(repr(each.path) for each in found[:5])
            message = (
                f"Each element of `{name}` must match a {kind}. Received: "
                f"{name}={checks.shown(pattern)}, which matches none of "
                f"{len(found)} {kind}s"
                + (f", among them {paths}" if paths else "")
            )
            if skipped is not None:
                message += ". `find_targets(model)` lists them all."
                if isinstance(pattern, (str, re.Pattern)):
                    left = [each for each in skipped if test(each)]
                    for each in left[:1]:
                        message += f" Left out: {each.path} ({each.reason})"
            raise ValueError(message)
        taken |= matched
    return [each for i, each in enumerate(found) if i in taken]


def excluded(
    name: str, patterns: Any, found: Sequence[Any], model: Any = None
) -> list[Any]:
    """Return those of `found` that none of the patterns matches."""
    if patterns is None:
        return list(found)
    tests = [matcher(name, each, model) for each in _listed(patterns)]
    return [each for each in found if not any(test(each) for test in tests)]


def matching_weights(
    name: str, patterns: Any, model: Any, trainable: bool = False
) -> list[keras.Variable]:
    """Return the weights of a model that one of the patterns matches.

    Args:
        name: String, the argument that the patterns were given as.
        patterns: As in `matcher`, or a list of these.
        model: The model or layer that holds the weights.
        trainable: Bool, whether those that are not trainable are left out.
            Defaults to `False`.

    Returns:
        List of `keras.Variable`s, in the order of `model.weights`.

    Raises:
        ValueError: If a pattern has another form, or matches no weight.
    """
    known = {id(v) for v in model.weights if v.trainable or not trainable}
    held = [
        types.SimpleNamespace(
            layer=layer, path=variable.path, variable=variable
        )
        for layer in layers_of(model)
        for variable in own_variables(layer)
        if id(variable) in known
    ]
    kind = "trainable weight" if trainable else "weight"
    taken = included(name, patterns, held, model, kind=kind)
    ids = {id(each.variable) for each in taken}
    return [v for v in model.weights if id(v) in ids]


def _listed(patterns: Any) -> list[Any]:
    is_list = isinstance(patterns, (list, tuple, set, frozenset))
    return list(patterns) if is_list else [patterns]
