"""The weights that are merged, and the numbers for them."""

from typing import Any

import numpy as np

from keras_weightmods.core.filters import included
from keras_weightmods.merging.methods import METHODS
from keras_weightmods.merging.sources import Weight
from keras_weightmods.utils import checks


def kept(found: list[Weight], include: Any, exclude: Any) -> dict[str, str]:
    """Return {name: why} of the weights that are not merged."""
    reasons = {w.name: w.kept for w in found if w.kept}
    if exclude is not None:
        for weight in included("exclude", exclude, found, kind="weight"):
            reasons.setdefault(weight.name, "excluded")
    chosen = included("include", include, found, kind="weight")
    for weight in found:
        if weight not in chosen:
            reasons.setdefault(weight.name, "not included")
    if len(reasons) == len(found):
        raise ValueError(
            "At least one weight must be merged. Received: "
            f"include={checks.shown(include)}, "
            f"exclude={checks.shown(exclude)}, which leave none of {len(found)}"
        )
    return reasons


def resolved(name: str, spec: Any, found: list[Weight]) -> dict[str, float]:
    """Return {name of a weight: number} by a number, gradient or dict."""
    if isinstance(spec, dict):
        values: dict[str, float] = {}
        for pattern, value in spec.items():
            if isinstance(value, dict):
                raise checks.error(name, "numbers or lists in a dict", spec)
            numbers = resolved(name, value, found)
            for weight in included(name, [pattern], found, kind="weight"):
                values.setdefault(weight.name, numbers[weight.name])
        for weight in found:
            if weight.name not in values and weight.kept is None:
                expected = (
                    "with a regex for each weight, and none is found in "
                    f"{weight.path!r}: add one for all others, ''"
                )
                raise checks.error(name, expected, spec)
            values.setdefault(weight.name, 1.0)
        return values
    if isinstance(spec, np.ndarray):
        spec = spec.tolist()
    # NumPy's size would not do: lists of unequal lengths have none.
    if isinstance(spec, (list, tuple)) and len(spec) > 1:
        anchors = [checks.check_float(name, each) for each in spec]
        places = np.linspace(0, 1, len(anchors))
        return {
            w.name: float(np.interp(w.place(), places, anchors)) for w in found
        }
    return dict.fromkeys(
        (w.name for w in found), checks.check_float(name, spec)
    )


def numbers(
    method: str, weights: Any, options: Any, found: list[Weight], kept: Any
) -> dict[str, tuple[tuple[float, ...], dict[str, float]]]:
    """Return {name of a weight: weights of the models and options there}."""
    chosen, made = METHODS[method], {}
    columns = [
        resolved(f"weights[{number}]", spec, found)
        for number, spec in enumerate(weights)
    ]
    settings = {x: resolved(x, spec, found) for x, spec in options.items()}
    for weight in found:
        shares = tuple(column[weight.name] for column in columns)
        given = {name: each[weight.name] for name, each in settings.items()}
        is_positive, total = min(shares) >= 0, sum(shares)
        if weight.is_statistic and not chosen.needs_base:
            if not is_positive or total <= 0:
                shares = (1.0,) * len(shares)
        elif weight.name not in kept and not weight.is_statistic:
            expected = None
            if chosen.weights in ("votes", "shares") and not is_positive:
                expected = "numbers >= 0"
            elif chosen.weights in ("mean", "shares") and total <= 0:
                expected = "of a sum > 0"
            if expected is not None:
                expected += f" for method {method!r}, at {weight.path!r}"
                raise checks.error("weights", expected, shares)
        bounds = chosen.bounds(given)
        for name, value in given.items() if weight.name not in kept else ():
            checks.check_float(name, value, **bounds.get(name, {}))
        made[weight.name] = shares, given
    return made
