"""Filters of targets and weights: what `include` and its like can be."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import keras

from keras_weightmods.core.keras_compat import layers_of, own_variables
from keras_weightmods.utils import checks

_Test = Callable[[Any], bool]


def included(
    name: str, patterns: Any, model: Any, targets: Any, skipped: Any
) -> Any:
    """Return those of `targets` that one of the patterns matches.

    Args:
        name: String, the argument that the patterns were given as.
        patterns: A regex searched for in the path; a layer or a layer type,
            which stand for all layers inside of them too; a callable from
            `Target` to bool; or a list of these. `None` for all targets.
        model: The model or layer that holds the targets.
        targets: Sequence of `Target`.
        skipped: Sequence of `Skipped`, for the error message. `None` where the
            targets are not those of `find_targets`.

    Raises:
        ValueError: If a pattern has another form, or matches no target.
    """
    if patterns is None:
        return targets
    tests = _tests(name, patterns, model)
    for pattern, test in tests:
        if not any(map(test, targets)):
            raise ValueError(_nothing_matches(name, pattern, targets, skipped))
    return [t for t in targets if any(test(t) for _, test in tests)]


def excluded(name: str, patterns: Any, model: Any, targets: Any) -> Any:
    """Return those of `targets` that none of the patterns matches."""
    if patterns is None:
        return targets
    tests = _tests(name, patterns, model)
    return [t for t in targets if not any(test(t) for _, test in tests)]


@dataclasses.dataclass(frozen=True, eq=False)
class _Held:
    """A weight, as the tests of targets see one."""

    layer: Any
    path: str


def matching_weights(
    name: str, patterns: Any, model: Any, trainable: bool = False
) -> list[keras.Variable]:
    """Return the weights of a model that one of the patterns matches.

    Args:
        name: String, the argument that the patterns were given as.
        patterns: A regex searched for in the path; a layer or a layer type,
            which stand for all weights inside of them; or a list of these.
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
        (id(variable), _Held(layer, variable.path))
        for layer in layers_of(model)
        for variable in own_variables(layer)
        if id(variable) in known
    ]
    if not isinstance(patterns, (list, tuple, set, frozenset)):
        patterns = [patterns]
    found: set[int] = set()
    for pattern in patterns:
        if not isinstance(pattern, (str, re.Pattern, type, keras.layers.Layer)):
            expected = (
                "a regular expression for the path, a layer, a layer type, or "
                "a list of these"
            )
            raise checks.error(name, expected, pattern)
        test = _test(name, pattern, model)
        matched = {key for key, each in held if test(each)}
        if not matched:
            kind = "trainable weights" if trainable else "weights"
            raise ValueError(
                f"Each element of `{name}` must match a weight of the model. "
                f"Received: {name}={pattern!r}, which matches none of "
                f"{len(known)} {kind} of {model.name!r}"
            )
        found |= matched
    return [v for v in model.weights if id(v) in found]


def _tests(name: str, patterns: Any, model: Any) -> list[tuple[Any, _Test]]:
    if not isinstance(patterns, (list, tuple, set, frozenset)):
        patterns = [patterns]
    return [(pattern, _test(name, pattern, model)) for pattern in patterns]


def _test(name: str, pattern: Any, model: Any) -> _Test:
    """Return a pattern as a callable from `Target` to bool."""
    if isinstance(pattern, (str, re.Pattern)):
        try:
            regex = re.compile(pattern)
        except re.error as error:
            expected = f"a valid regular expression ({error})"
            raise checks.error(name, expected, pattern) from error
        return lambda target: regex.search(target.path) is not None
    is_type = isinstance(pattern, type)
    if isinstance(pattern, keras.layers.Layer) or (
        is_type and issubclass(pattern, keras.layers.Layer)
    ):
        outer = [
            layer
            for layer in layers_of(model)
            if (isinstance(layer, pattern) if is_type else layer is pattern)
        ]
        inside = {id(layer) for each in outer for layer in layers_of(each)}
        return lambda target: id(target.layer) in inside
    if callable(pattern) and not is_type:
        return lambda target: bool(pattern(target))
    expected = (
        "a regular expression for the path, a layer, a layer type, a callable "
        "from Target to bool, or a list of these"
    )
    if name == "targets":
        expected += "; or what `find_targets` returns"
    raise checks.error(name, expected, pattern)


def _nothing_matches(
    name: str, pattern: Any, targets: Any, skipped: Any
) -> str:
    paths = ", ".join(repr(target.path) for target in targets[:5])
    message = (
        f"Each element of `{name}` must match a target. Received: "
        f"{name}={pattern!r}, which matches none of {len(targets)}"
    ) + (f", among them {paths}" if paths else "")
    if skipped is None:
        return message
    if isinstance(pattern, (str, re.Pattern)):
        for skip in skipped:
            if re.search(pattern, skip.path):
                return f"{message}. Left out: {skip.path} ({skip.reason})"
    return f"{message}. `find_targets(model)` lists them all."
