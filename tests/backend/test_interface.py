"""What each backend of Keras does for the library."""

import gc
import inspect
import weakref

import keras
import numpy as np
import pytest
from keras import ops

from keras_weightmods import backend
from keras_weightmods.backend.interface import Backend

SPECIAL = np.float32([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -3.0])


def test_a_backend_keeps_to_the_interface():
    current = backend.current()
    for name, method in vars(type(current)).items():
        if inspect.isfunction(method):
            own, inherited = (
                list(inspect.signature(m).parameters)
                for m in (method, getattr(Backend, name))
            )
            assert own == inherited, name
    for module, names in {
        current.layouts(): "split_of split_vector SplitPacked taken put",
        current.in_place(): "adam_s adamw distillation_gradient",
        current.gpu_products(): "plan has_gpu",
        current.products(): "sparse_matmul reason_unavailable",
        current.generation(): "CompiledGenerate LENGTH_STEP",
    }.items():
        if module is not None:
            assert all(hasattr(module, name) for name in names.split())


@pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="others recompute nothing"
)
def test_what_is_recomputed_is_freed_at_once():
    """Without a search for garbage."""
    layer, inside = keras.layers.Dense(4, activation="tanh"), []

    def function(x):
        y = layer(x)
        inside.append(weakref.ref(y))
        return layer(y)

    x = ops.ones((2, 4))
    layer.build(x.shape)
    gc.collect()
    gc.disable()
    try:
        ops.sum(backend.current().recomputed(function)(x)).backward()
        assert [each() for each in inside] == [None, None]
    finally:
        gc.enable()


def test_waiting_changes_no_bit():
    x = np.concatenate([SPECIAL, np.uint32([0x7FC00123]).view("float32")])
    after = backend.current().after
    tensors = [ops.convert_to_tensor(x), ops.convert_to_tensor(x[None])]
    for first in SPECIAL:
        wait = [ops.convert_to_tensor(np.float32([first]))]
        for found in after(tensors, wait):
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


def test_a_tensor_of_memory_that_is_not_aligned():
    array = np.arange(-5.0, 4096.0, dtype="float32")[1:]
    tensor = backend.current().tensor_of(array)
    # TensorFlow would abort here.
    np.testing.assert_array_equal(ops.abs(tensor), np.abs(array))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_tensors_and_arrays_have_the_same_bits(dtype):
    bits = np.arange(256, dtype="uint8").reshape(8, 32)
    current = backend.current()
    tensor = current.tensor_of(bits.view(dtype))
    for found in (current.array_of(tensor), current.view_of(tensor)):
        assert np.array_equal(found.view("uint8"), bits)
