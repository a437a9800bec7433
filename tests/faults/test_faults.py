"""A part of what `make faults` and `make mutants` do."""

import json
import pathlib
import sys

import pytest

from tests.backends import run_python
from tests.faults import (
    formats,
    interrupts,
    kills,
    mutants,
    raised,
    wrong_calls,
)
from tests.faults.interrupt_cases import CASES, SOME, STEPS

pytestmark = [
    pytest.mark.one_backend,
    pytest.mark.skipif(sys.platform != "linux", reason="measures by /proc"),
]


@pytest.mark.parametrize(
    ("method", "policy"),
    [
        ("cast", "mixed_float16"),
        *(
            pytest.param(method, policy, marks=pytest.mark.heavy)
            for policy in kills.POLICIES
            for method in kills.METHODS
            if (method, policy) != ("cast", "mixed_float16")
        ),
    ],
)
def test_killed_trainings_end_as_if_nothing_had_happened(method, policy):
    # In a process that has computed nothing yet: it is forked.
    chosen = "--kills", 2, "--method", method, "--policy", policy
    result = json.loads(run_python("-m", "tests.faults.kills", *chosen))
    assert result["kills"] == 2
    assert result["equal"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in SOME else pytest.mark.heavy)
        for name in (*CASES, *STEPS)
    ],
)
def test_interrupted_calls_leave_the_old_state_or_the_new(name):
    wrong, found = interrupts.run(name, 4)
    assert wrong == []
    assert sum(found.values()) == 4


@pytest.mark.parametrize("kind", formats.FORMATS)
def test_mutants_are_refused_in_words(kind):
    accepted, failures = mutants.run(kind, 50)
    assert failures == {}
    # Not all of what is changed matters: `info` reads no data.
    assert accepted < 50


def test_wrong_calls_are_refused_in_words():
    pytest.importorskip("keras_hub")
    cases = wrong_calls.some_cases(1)
    assert [name for name, *_ in cases] == [*wrong_calls.subjects()]
    assert wrong_calls.run_all([*cases, *FOUND]) == {}


# What a run of all of them has found, and is mended.
FOUND = [
    ("CAST.evaluate", "y", "{}"),
    *(
        (name, "verbose", bad)
        for name in ("export", "load_model", "pack")
        for bad in ("np.array(['a', 'b'])", "np.zeros((8, 0), 'float32')")
    ),
    ("CAST.fit", "y", "None"),
    ("CAST.fit", "batch_size", "2**70"),
    ("ops.compand", "a", "2**70"),
    ("ops.nm_project", "x", "np.zeros((8, 0), 'float32')"),
    ("Perplexity.__call__", "texts", "np.array(3.0)"),
    ("perplexity", "batch_size", "2**31"),
    ("quantize", "damping", "2**70"),
    ("quantize", "group_size", "2**31"),
    ("register_layer_kind", "kernels", "int"),
    ("self_generated", "seed", "2**31"),
    ("sparsify", "data", "iter([1, 2])"),
    ("self_generated", "temperature", "2**70"),
    ("WeightSignature.sum", "weights", "np.array(3.0)"),
    ("Targets.select", "reason", "keras.layers.Dense(2)"),
]


def test_what_is_obscure():
    def why(function):
        try:
            function()
        except Exception as error:
            return raised.why_obscure(error, "x")

    assert why(lambda: {}["x"]).startswith("KeyError")
    assert why(lambda: "x" + 1).startswith("TypeError")
    assert why(lambda: int("x")).startswith("ValueError")
    assert why(lambda: wrong_calls.kwm.pack(3)) is None
    assert why(lambda: pathlib.Path("none").read_text()) is None
