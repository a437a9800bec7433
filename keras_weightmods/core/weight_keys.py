"""Keys of weights in a model, and the matching weights in another."""

import operator
import re
from collections.abc import Sequence
from typing import Any


def weight_key(position: int, path: str) -> str:
    """Return `"{position}:{path}"`, unique in a model; paths alone are not.

    Args:
        position: Int, the place of the variable in `model.weights`.
        path: String, the path of the variable.
    """
    return f"{position}:{path}"


def weight_keys(model: Any) -> dict[int, str]:
    """Return {id of variable: key} of all weights of a model or layer."""
    return {
        id(variable): weight_key(position, variable.path)
        for position, variable in enumerate(model.weights)
    }


def same_path(a: str, b: str) -> bool:
    """Return whether two paths name the same weight of one architecture.

    Keras numbers layers across a process ("dense_7"), and some paths begin with
    the model's own name. Both are ignored.
    """
    numbers = re.compile(r"_\d+(?=/|$)")
    return _same_end(numbers.sub("", a), numbers.sub("", b))


def matching_places(
    path: str, shape: Sequence[int], variables: Sequence[Any]
) -> list[int]:
    """Return the places among `variables` that may match a weight elsewhere.

    Args:
        path: String, the path of the weight.
        shape: Sequence of ints, its shape.
        variables: Sequence of `keras.Variable`.

    Returns:
        Rising list of ints: the places of the variables of this shape whose
        paths are equal; if there are none, equal but for the name of the
        model in front; if there are none, the same by `same_path`.
    """
    fitting = [
        (place, variable.path)
        for place, variable in enumerate(variables)
        if tuple(variable.shape) == tuple(shape)
    ]
    for same in (operator.eq, _same_end, same_path):
        found = [place for place, other in fitting if same(path, other)]
        if found:
            break
    return found


def _same_end(a: str, b: str) -> bool:
    return a == b or a.endswith(f"/{b}") or b.endswith(f"/{a}")
