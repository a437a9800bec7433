"""Weights of models, one for each of their arrays; which are merged."""

import re

import numpy as np

from keras_weightmods.utils import checks

# Of the papers, or near: of the methods that have a density.
DENSITIES = {
    "ties": 0.2,
    "dare": 0.1,
    "dare_ties": 0.1,
    "della": 0.3,
    "breadcrumbs": 0.15,
}
WITHOUT_BASE = ("linear", "slerp")
# What they add is divided by the weights, whose size so does not matter.
ELECTED = ("ties", "dare_ties", "della")
# Their weights are shares, of which the sum is not 0.
_MEANS = (*WITHOUT_BASE, "iso_c")
_NOT_NEGATIVE = ("slerp", *ELECTED)


def kept(found, include, exclude):
    """Return {name: why} of the weights that are not merged."""
    reasons = {w.name: w.kept for w in found if w.kept}
    chosen = _matching("include", include, found)
    left = _matching("exclude", exclude, found)
    for weight in found:
        is_left = exclude is not None and weight.name in left
        if is_left or (include is not None and weight.name not in chosen):
            reason = "excluded" if is_left else "not included"
            reasons.setdefault(weight.name, reason)
    if len(reasons) == len(found):
        raise ValueError(
            "At least one weight must be merged. Received: "
            f"include={include!r}, exclude={exclude!r}, which leave none of "
            f"{len(found)}"
        )
    return reasons


def _matching(name, patterns, found):
    """Return the names of the weights that one of some regexes matches."""
    if patterns is None:
        return set()
    if isinstance(patterns, (str, re.Pattern)):
        patterns = [patterns]
    if not isinstance(patterns, (list, tuple)):
        raise checks.error(name, "a regex or a list of regexes", patterns)
    return set().union(*(_matched(name, each, found) for each in patterns))


def _matched(name, pattern, found):
    """Return the names of the weights that a regex matches, one at least."""
    try:
        regex = re.compile(pattern)
    except (re.error, TypeError) as error:
        expected = f"a valid regular expression ({error})"
        raise checks.error(name, expected, pattern) from error
    matched = {w.name for w in found if regex.search(w.path)}
    if not matched:
        paths = ", ".join(repr(w.path) for w in found[:5])
        expected = f"regexes that match a path, as {paths}"
        raise checks.error(name, expected, pattern)
    return matched


def resolved(name, spec, found):
    """Return {name of a weight: number} by a number, gradient or dict."""
    if isinstance(spec, dict):
        rules = []
        for pattern, value in spec.items():
            if isinstance(value, dict):
                raise checks.error(name, "numbers or lists in a dict", spec)
            matched = _matched(name, pattern, found)
            rules.append((matched, resolved(name, value, found)))
        values = {}
        for weight in found:
            each = [v for matched, v in rules if weight.name in matched]
            if weight.kept is None and not each:
                expected = (
                    f"with a regex for each weight, and none is found in "
                    f"{weight.path!r}: add one for all others, '' "
                )
                raise checks.error(name, expected.strip(), spec)
            values[weight.name] = each[0][weight.name] if each else 1.0
        return values
    is_gradient = isinstance(spec, (list, tuple, np.ndarray)) and len(spec) > 1
    if not is_gradient:
        value = checks.check_float(name, spec)
        return {weight.name: value for weight in found}
    anchors = [checks.check_float(name, each) for each in spec]
    places = np.linspace(0, 1, len(anchors))
    return {w.name: float(np.interp(w.place(), places, anchors)) for w in found}


def shares(method, specs, found, kept):
    """Return {name of a weight: tuple of the weights of the models}."""
    columns = [
        resolved(f"weights[{number}]", spec, found)
        for number, spec in enumerate(specs)
    ]
    shares = {w.name: tuple(c[w.name] for c in columns) for w in found}
    for weight in found:
        each = shares[weight.name]
        if weight.is_statistic:
            is_mean = min(each) >= 0 and sum(each) > 0
            if method in WITHOUT_BASE and not is_mean:
                shares[weight.name] = (1.0,) * len(each)
            continue
        if weight.name in kept:
            continue
        if method in _NOT_NEGATIVE and min(each) < 0:
            expected = f"numbers >= 0 for method {method!r}"
        elif method in _MEANS and sum(each) <= 0:
            expected = f"of a sum > 0 for method {method!r}"
        else:
            continue
        raise checks.error("weights", f"{expected}, at {weight.path!r}", each)
    return shares


def check_densities(method, densities, options):
    for value in {*densities.values()} if method in DENSITIES else ():
        checks.check_float("density", value, above=0, most=1)
        if method == "della" and not (
            value > options.epsilon and value + options.epsilon <= 1
        ):
            expected = (
                f"in ({options.epsilon:g}, {1 - options.epsilon:g}] with "
                f"epsilon={options.epsilon:g}: probabilities are density - "
                "epsilon to density + epsilon"
            )
            raise checks.error("density", expected, value)
        if method == "breadcrumbs" and value + options.gamma > 1:
            expected = (
                f"at most {1 - options.gamma:g} with gamma={options.gamma:g}, "
                "the share of entries that are not kept"
            )
            raise checks.error("density", expected, value)
