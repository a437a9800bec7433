"""Checks of arguments, with one notion of an int and one wording.

Each takes the name of the argument, for the message, and its value, and returns
the value. NumPy's ints and floats count as ints and floats. Bools count as
neither.
"""

import inspect
import math
import numbers
import operator
import os
import reprlib
from collections.abc import Iterable
from typing import Any

# Characters of a value, and of a list of problems, in an error.
_MOST_SHOWN, _MOST_LISTED = 500, 1100
_REPR = reprlib.Repr()
_REPR.maxlevel = 3
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = 8
_REPR.maxfrozenset = 8
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = _MOST_SHOWN


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
    is_int = isinstance(value, numbers.Integral) and is_number(value)
    bounds = {">=": least, "<=": most}
    return _number(name, value, int, "an int", is_int, bounds, optional)


def check_float(
    name, value, least=None, most=None, above=None, below=None, optional=False
):
    """Return a finite number in the interval, as a float.

    Args:
        name: String, the argument.
        value: What was received.
        least, most: Floats, bounds that are allowed; `None` for none.
        above, below: Floats, bounds that are not allowed; `None` for none.
        optional: Bool, whether `None` is allowed too. Defaults to `False`.

    Raises:
        ValueError: If `value` is something else.
    """
    bounds = {">=": least, ">": above, "<=": most, "<": below}
    kind = "a finite float"
    return _number(name, value, float, kind, is_finite(value), bounds, optional)


def check_bool(name: str, value: Any) -> bool:
    """Return a bool; raise ValueError for anything else."""
    if not isinstance(value, bool):
        raise error(name, "a bool", value)
    return value


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> Any:
    """Return one of `choices`; raise ValueError for anything else."""
    # Avoid `in`: an array compares elementwise.
    if not any(type(value) is type(each) and value == each for each in choices):
        raise error(name, f"one of {', '.join(map(repr, choices))}", value)
    return value


def check_choices(name: str, value: Any, choices: Any) -> tuple[Any, ...]:
    """Return a tuple of some of `choices`: of one, of several, or of none."""
    chosen = () if value is None else value
    chosen = tuple(chosen) if isinstance(chosen, tuple | list) else (chosen,)
    return tuple(check_choice(name, each, choices) for each in chosen)


def check_list(name: str, value: Any, count: int, what: str) -> Any:
    """Return a list or vector of `count` entries, or raise ValueError."""
    is_list = isinstance(value, (list, tuple))
    shape = (len(value),) if is_list else getattr(value, "shape", ())
    if tuple(shape) != (count,):
        raise error(name, f"a list of {count} {what}", value)
    return value


def check_string(name: str, value: Any, optional: bool = False) -> Any:
    """Return a string that is not empty; raise ValueError otherwise."""
    if optional and value is None:
        return None
    if not isinstance(value, str) or not value:
        expected = "a non-empty string"
        raise error(name, expected + " or None" * optional, value)
    return value


def check_verbose(value: Any) -> Any:
    """Return 0 or 1, or a bool; raise ValueError for anything else."""
    return check_choice("verbose", value, (0, 1, False, True))


def check_path(name: str, value: Any) -> str:
    """Return a path as a string; raise ValueError for anything else."""
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str) or not path or "\0" in path:
        raise error(name, "a string or a path, and not empty", value)
    return path


def check_array(name: str, value: Any, dtype: Any = None) -> Any:
    """Return a NumPy array of real numbers or bools; else raise ValueError."""
    import numpy as np
    from keras import ops

    try:
        # Tensors of a backend may be on a device, or need a gradient.
        is_tensor = ops.is_tensor(value) or hasattr(value, "assign")
        array = np.asarray(ops.convert_to_numpy(value) if is_tensor else value)
        if array.dtype.kind in "biuf" or "float" in array.dtype.name:
            return array.astype(dtype or array.dtype, copy=False)
    # Values that are no arrays fail in many ways.
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        pass
    raise error(name, "an array of numbers", value)


def check_tensor(name: str, value: Any) -> Any:
    """Return a tensor of real numbers or bools; else raise ValueError."""
    import keras
    from keras import ops

    if not (ops.is_tensor(value) or isinstance(value, keras.Variable)):
        value = check_array(name, value)
    tensor = ops.convert_to_tensor(value)
    if "complex" in keras.backend.standardize_dtype(tensor.dtype):
        raise error(name, "a tensor of real numbers", value)
    return tensor


def check_shape(name: str, value: Any) -> tuple[int, ...]:
    """Return a tuple of ints, none of them negative; else raise ValueError."""
    # The shape of a TensorFlow tensor is no tuple.
    found = value.as_list() if hasattr(value, "as_list") else value
    if not isinstance(found, (tuple, list)):
        raise error(name, "a tuple of ints", value)
    return tuple(check_int(name, size, 0) for size in found)


def check_schedule(name: str, value: Any) -> None:
    """Raise ValueError for a callable learning rate that needs arguments."""
    import keras

    schedules = keras.optimizers.schedules.LearningRateSchedule
    if not callable(value) or isinstance(value, schedules):
        return
    try:
        inspect.signature(value).bind()
        is_valid = not isinstance(value, keras.layers.Layer)
    except (TypeError, ValueError):
        is_valid = False
    if not is_valid:
        expected = "a float, a schedule, or a callable without arguments"
        raise error(name, expected, value)


def check_model(model: Any) -> None:
    """Raise ValueError if `model` is no Keras model or layer."""
    import keras

    if not isinstance(model, keras.layers.Layer):
        raise error("model", "a Keras model or layer", model)


def is_number(value: Any) -> bool:
    """Return whether a value is an int or a float, of Python or NumPy."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Return whether a value is a number that a float can hold."""
    try:
        return is_number(value) and math.isfinite(value)
    except OverflowError:
        return False


def error(name: str, expected: str, value: Any) -> ValueError:
    """Return a `ValueError` to raise: what was expected and received."""
    return ValueError(
        f"`{name}` must be {cut(expected, 750)}. Received: "
        f"{name}={shown(value)}"
    )


def not_installed(what: str, packages: str, error: Any = None) -> ImportError:
    """Return an `ImportError` to raise: what needs packages, named as for pip.

    An extra of this package is not named: pip finds it after a release alone.

    Args:
        what: String, what cannot be done.
        packages: String, their names with spaces between them.
        error: The `ImportError` that was caught, if any. A package may be
            there and broken.
    """
    names = packages.replace(" ", " and ")
    return ImportError(
        f"{what} needs {names}. Install with: pip install {packages}"
        + (f" ({error})" if error else "")
    )


def shown(value: Any) -> str:
    """Return the `repr` of a user's value, cut if it is long.

    Python's own is as long as the value, or longer if parts of it recur, and
    fails for an int of 5,000 digits.
    """
    try:
        return cut(_REPR.repr(value), _MOST_SHOWN)
    # A user's class may raise anything.
    except Exception:
        return object.__repr__(value)


def cut(text: Any, most: int = _MOST_SHOWN) -> str:
    """Return a text of limited length, with `...` in place of its middle."""
    text = str(text)
    return text if len(text) <= most else f"{text[: most - 60]}...{text[-57:]}"


def printable(text: str) -> str:
    """Return a text with escapes for control characters."""
    # Line breaks in a list of problems stay.
    return "".join(
        c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text
    )


def raise_all(summary: str, problems: Iterable[str]) -> None:
    """Raise a ValueError that lists the first of `problems`, if there are any.

    The error also says how many there are.
    """
    if problems := list(problems):
        plural = "s" if len(problems) > 1 else ""
        raise ValueError(
            f"{cut(summary, 800)} {len(problems)} problem{plural}:"
            f"{listed(problems)}"
        )


def listed(problems: list[str]) -> str:
    """Return the first of `problems`, a line each, and the number of others."""
    lines: list[str] = []
    for problem in problems:
        line = f"\n  {cut(problem)}"
        if sum(map(len, lines)) + len(line) > _MOST_LISTED:
            lines.append(f"\n  and {len(problems) - len(lines)} more")
            break
        lines.append(line)
    return "".join(lines)


_COMPARISONS = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}


def _number(name, value, cast, kind, is_kind, bounds, optional):
    """Return a number of `kind` within bounds; raise ValueError otherwise."""
    if optional and value is None:
        return None
    given = {sign: x for sign, x in bounds.items() if x is not None}
    if is_kind and all(
        _COMPARISONS[sign](value, given[sign]) for sign in given
    ):
        return cast(value)
    limits = " and ".join(f"{sign} {x}" for sign, x in given.items())
    expected = f"{kind} {limits}".rstrip() + " or None" * optional
    raise error(name, expected, value)
