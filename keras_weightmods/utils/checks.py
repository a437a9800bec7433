"""Checks of arguments, with one notion of what an int is and one wording.

Each takes the name of the argument, for the message, and its value, and
returns the value. NumPy's ints and floats count as ints and floats, bools as
neither.
"""

import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any


def check_int(name, value, least=None, most=None, optional=False):
    """Return an int in [least, most].

    Args:
        name: String, the argument.
        value: What was received.
        least, most: Ints, the bounds, both allowed; `None` for none.
        optional: Bool, whether `None` is allowed too. Defaults to `False`.

    Raises:
        ValueError: If `value` is something else.
    """
    if optional and value is None:
        return None
    is_int = isinstance(value, numbers.Integral) and is_number(value)
    bounds = {">=": least, "<=": most}
    if not is_int or not _inside(value, bounds):
        raise error(name, _expected("an int", bounds, optional), value)
    return int(value)


def check_float(
    name, value, least=None, most=None, above=None, below=None, optional=False
):
    """Return a finite float in the interval; an int stays one.

    Args:
        name: String, the argument.
        value: What was received.
        least, most: Floats, bounds that are allowed; `None` for none.
        above, below: Floats, bounds that are not allowed; `None` for none.
        optional: Bool, whether `None` is allowed too. Defaults to `False`.

    Raises:
        ValueError: If `value` is something else.
    """
    if optional and value is None:
        return None
    bounds = {">=": least, ">": above, "<=": most, "<": below}
    is_finite = is_number(value) and math.isfinite(value)
    if not is_finite or not _inside(value, bounds):
        raise error(name, _expected("a finite float", bounds, optional), value)
    return value


def check_bool(name: str, value: Any) -> bool:
    """Return a bool; raise ValueError for anything else."""
    if not isinstance(value, bool):
        raise error(name, "a bool", value)
    return value


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> Any:
    """Return one of `choices`; raise ValueError for anything else."""
    # Not by `in`: an array compares elementwise.
    if not any(type(value) is type(each) and value == each for each in choices):
        raise error(name, f"one of {', '.join(map(repr, choices))}", value)
    return value


def check_string(name: str, value: Any, optional: bool = False) -> Any:
    """Return a string that is not empty; raise ValueError otherwise."""
    if optional and value is None:
        return None
    if not isinstance(value, str) or not value:
        raise error(name, _expected("a non-empty string", {}, optional), value)
    return value


def check_model(model: Any) -> None:
    """Raise ValueError if `model` is no Keras model or layer."""
    import keras

    if not isinstance(model, keras.layers.Layer):
        raise error("model", "a Keras model or layer", model)


def is_number(value: Any) -> bool:
    """Return whether a value is an int or a float, of Python or NumPy."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def error(name: str, expected: str, value: Any) -> ValueError:
    """Return a `ValueError` to raise: what was expected and received."""
    return ValueError(
        f"`{name}` must be {expected}. Received: {name}={value!r}"
    )


def raise_all(summary: str, problems: Iterable[str]) -> None:
    """Raise a ValueError that lists all of `problems`, if there are any."""
    lines = [f"  {problem}" for problem in problems]
    if lines:
        plural = "s" if len(lines) > 1 else ""
        raise ValueError(
            "\n".join([f"{summary} {len(lines)} problem{plural}:", *lines])
        )


_COMPARISONS = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}


def _inside(value: Any, bounds: dict[str, Any]) -> bool:
    return all(
        bound is None or _COMPARISONS[sign](value, bound)
        for sign, bound in bounds.items()
    )


def _expected(kind: str, bounds: dict[str, Any], optional: bool) -> str:
    parts = [f"{sign} {x}" for sign, x in bounds.items() if x is not None]
    text = " ".join([kind, " and ".join(parts)]).rstrip()
    return f"{text} or None" if optional else text
