"""What each backend of Keras does for the library."""

import importlib
import inspect

import keras
import numpy as np
import pytest
from keras import ops

from keras_weightmods import backend
from keras_weightmods.backend.interface import Backend

BACKEND = keras.backend.backend()
SPECIAL = np.float32([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -3.0])


def signatures(owner):
    """The parameters of functions by name, without `self`."""
    found = {}
    for name, function in vars(owner).items():
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        if function.__module__ == getattr(owner, "__module__", owner.__name__):
            parameters = inspect.signature(function).parameters.values()
            found[name] = [
                (p.name, p.kind, p.default)
                for p in parameters
                if p.name != "self"
            ]
    return found


@pytest.mark.one_backend
@pytest.mark.parametrize("name", ["jax", "tensorflow", "torch"])
def test_a_backend_has_the_functions_of_the_interface(name):
    pytest.importorskip(name)
    module = f"keras_weightmods.backend.{name}.implementation"
    module = importlib.import_module(module)
    assert signatures(module) == signatures(Backend)


def test_modules_of_a_subject_have_what_the_interface_names():
    current = backend.current()
    assert current.generation().CompiledGenerate
    for module, names in {
        current.layouts(): "split_of split_vector SplitPacked taken put",
        current.in_place(): "adam_s sparse_adamw distillation_gradient",
    }.items():
        if module is not None:
            assert all(hasattr(module, name) for name in names.split())


@pytest.mark.parametrize("first", SPECIAL)
def test_waiting_changes_no_bit(first):
    x = np.concatenate([SPECIAL, np.uint32([0x7FC00123]).view("float32")])
    after = backend.current().after
    tensors = [ops.convert_to_tensor(x), ops.convert_to_tensor(x[None])]
    for found in after(tensors, [ops.convert_to_tensor(np.float32([first]))]):
        found = backend.current().array_of(found).reshape(-1)
        assert np.array_equal(found.view("uint32"), x.view("uint32"))
    assert after([], []) == []


def test_compiled_functions_compute_the_same():
    def function(x, power, pair):
        return x**power + pair["a"]

    x = ops.convert_to_tensor(np.float32([1, 2, 3]))
    arguments = x, 2, {"a": ops.ones(3)}
    for compiled in (
        backend.current().compiled(function, (1,)),
        backend.current().fused(function),
    ):
        got = ops.convert_to_numpy(compiled(*arguments))
        np.testing.assert_allclose(got, [2, 5, 10], rtol=1e-6)
