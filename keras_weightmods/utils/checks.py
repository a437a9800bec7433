"""Checks of arguments, with one notion of what an int is and one wording.

Each takes the name of the argument, for the message, and its value, and
returns the value. NumPy's ints and floats count as ints and floats, bools as
neither.
"""

import math
import numbers
from typing import Any


def check_int(name, value, least=None, most=None, optional=False):
    """Returns an int in [least, most].

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
    valid = (
        isinstance(value, numbers.Integral)
        and not isinstance(value, bool)
        and (least is None or value >= least)
        and (most is None or value <= most)
    )
    if not valid:
        expected = "an int" + _bounds(least, None, most, None)
        raise error(name, expected + _or_none(optional), value)
    return int(value)


def check_float(
    name,
    value,
    least=None,
    most=None,
    above=None,
    below=None,
    optional=False,
):
    """Returns a finite float in the interval.

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
    valid = (
        is_number(value)
        and math.isfinite(value)
        and (least is None or value >= least)
        and (most is None or value <= most)
        and (above is None or value > above)
        and (below is None or value < below)
    )
    if not valid:
        expected = "a finite float" + _bounds(least, above, most, below)
        raise error(name, expected + _or_none(optional), value)
    return value


def check_bool(name, value):
    """Returns a bool; raises ValueError for anything else."""
    if not isinstance(value, bool):
        raise error(name, "a bool", value)
    return value


def check_choice(name, value, choices):
    """Returns one of `choices`; raises ValueError for anything else."""
    # Not by `in`: an array compares elementwise.
    if not any(type(value) is type(each) and value == each for each in choices):
        listed = ", ".join(map(repr, choices))
        raise error(name, f"one of {listed}", value)
    return value


def check_string(name, value, optional=False):
    """Returns a string that is not empty; raises ValueError otherwise."""
    if optional and value is None:
        return None
    if not isinstance(value, str) or not value:
        raise error(name, "a non-empty string" + _or_none(optional), value)
    return value


def check_model(model: Any) -> None:
    """Raise ValueError if `model` is no Keras model or layer."""
    import keras

    if not isinstance(model, keras.layers.Layer):
        raise error("model", "a Keras model or layer", model)


def is_number(value):
    """Whether a value is an int or a float, of Python or NumPy."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def error(name: str, expected: str, value: Any) -> ValueError:
    """A `ValueError` to raise: what was expected and what was received."""
    return ValueError(
        f"`{name}` must be {expected}. Received: {name}={value!r}"
    )


def raise_all(summary, problems):
    """Raises a ValueError that lists all of `problems`, if there are any."""
    if problems:
        raise ValueError(
            f"{summary} {len(problems)} problem"
            f"{'s' if len(problems) > 1 else ''}:\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )


def _bounds(least, above, most, below):
    parts = [
        f"{sign} {bound}"
        for sign, bound in (
            (">=", least),
            (">", above),
            ("<=", most),
            ("<", below),
        )
        if bound is not None
    ]
    return f" {' and '.join(parts)}" if parts else ""


def _or_none(optional):
    return " or None" if optional else ""
