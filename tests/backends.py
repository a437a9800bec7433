"""Which cases of a test run on which backend; the rule is in conftest.py."""

import os
import subprocess
import sys

import keras
import pytest


def run_python(*arguments, backend=None, cwd=None, **environment):
    """Run Python in a process of its own; return what it prints."""
    own = {"KERAS_BACKEND": backend or keras.backend.backend()}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **own, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


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
