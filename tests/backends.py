"""Which cases of a test run on which backend; the rule is in conftest.py."""

import pytest


def breadth(names, cases, *everywhere, **kwargs):
    """Parametrizes a test whose cases run on one backend, but for some.

    The cases at the places `everywhere`, the first by default, run on each.
    """
    everywhere = everywhere or (0,)
    is_one = isinstance(names, str) and "," not in names
    marked = [
        pytest.param(
            *([case] if is_one else case),
            marks=() if place in everywhere else pytest.mark.one_backend,
        )
        for place, case in enumerate(cases)
    ]
    return pytest.mark.parametrize(names, marked, **kwargs)
