"""A few wrong calls of each public name; all are in `make faults`."""

import contextlib
import pathlib

import pytest

from tests.faults import raised, wrong_calls

pytestmark = [
    pytest.mark.one_backend,
    pytest.mark.skipif(
        not wrong_calls.IS_LINUX, reason="bounds the memory as Linux does"
    ),
]


@pytest.mark.filterwarnings("ignore")
def test_every_public_name_is_called(tmp_path, monkeypatch):
    pytest.importorskip("keras_hub")
    monkeypatch.chdir(tmp_path)
    for name in wrong_calls.subjects():
        call = wrong_calls.call_of(name)
        # Of what is optional, as lm-eval.
        with contextlib.suppress(ImportError):
            result = call.function(**call.arguments)
            if call.then is not None:
                call.then(result)


def test_wrong_calls_are_refused_in_words():
    pytest.importorskip("keras_hub")
    cases = wrong_calls.some_cases(200)
    assert {name for name, *_ in cases} == set(wrong_calls.subjects())
    assert wrong_calls.run_all(cases) == {}


# What a run of all of them has found; they are not among those of the test
# above.
FOUND = [
    ("CAST.evaluate", "y", "{}"),
    *(
        (name, "verbose", bad)
        for name in ("export", "load_model", "pack", "save_model", "unpack")
        for bad in ("array of strings", "array of no columns", "a variable")
    ),
    ("CAST.fit", "y", "None"),
    ("CAST.fit", "batch_size", "2**70"),
    ("ops.compand", "a", "2**70"),
    ("ops.nm_project", "x", "array of no columns"),
    ("Perplexity.__call__", "texts", "scalar array"),
    ("perplexity", "batch_size", "2**31"),
    ("Perplexity", "batch_size", "2**70"),
    ("quantize", "damping", "2**70"),
    ("quantize", "group_size", "2**31"),
    ("register_layer_kind", "kernels", "a class"),
    ("self_generated", "seed", "2**31"),
    ("self_generated", "temperature", "2**70"),
    ("WeightSignature.sum", "weights", "scalar array"),
    ("Targets.select", "reason", "a layer"),
]


def test_wrong_calls_that_were_not_refused_once():
    pytest.importorskip("keras_hub")
    assert wrong_calls.run_all(FOUND) == {}


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
