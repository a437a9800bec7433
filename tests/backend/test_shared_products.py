"""Products of one input with several packed kernels, by one call of XLA."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_weightmods import native
from keras_weightmods.native.packed import pack_dense, pack_kernel
from keras_weightmods.ops import nm_project, sparse_matmul
from tests.models import normal
from tests.native.test_packed import kernel_of

BACKEND = keras.backend.backend()
if BACKEND == "torch":
    pytest.skip("needs XLA", allow_module_level=True)
if not native.is_available():
    pytest.skip("no compiled kernels", allow_module_level=True)


def compiled(function, x):
    """Return the results of a compiled function, and how many calls it has."""
    if BACKEND == "jax":
        import jax

        calls = str(jax.make_jaxpr(function)(x)).count("ffi_call[")
        return jax.jit(function)(x), calls
    import tensorflow as tf

    run = tf.function(function, autograph=False, jit_compile=True)
    graph = run.get_concrete_function(x).graph
    kinds = [operation.type for operation in graph.get_operations()]
    return run(x), kinds.count("XlaCallModule")


def rewritten(function):
    if BACKEND == "jax":
        from keras_weightmods.backend.jax import traced_call

        return lambda x: traced_call.call(function, x)
    from keras_weightmods.backend.tensorflow.traced_call import Traced

    return lambda x: Traced(function, [x], None)(x)


@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
def test_products_of_one_input_share_a_call(x_dtype):
    first, others = (
        [pack_kernel(kernel_of(64, n), dtype, "int8") for n in sizes]
        for dtype, sizes in (("int8", (64, 64, 64)), ("int4", (16, 40)))
    )
    # All types but those of 2:4 kernels share one.
    dense = [pack_dense(normal(64, 16), f"int{bits}") for bits in (8, 4)]
    half = nm_project(normal(64, 16), "16:32")
    dense.append(pack_kernel(half, "int4", "int8", pattern="16:32"))

    def attention(x):
        q, k, v = (sparse_matmul(x, packed) for packed in first)
        y = q * k * v
        alone = [sparse_matmul(x, packed) for packed in dense]
        alone.append(sparse_matmul(x + 1, first[0]))
        return [y, *alone, *(sparse_matmul(y, packed) for packed in others)]

    x = ops.cast(normal(2, 3, 64), x_dtype)
    expected, calls = compiled(attention, x)
    assert calls == 9
    received, calls = compiled(rewritten(attention), x)
    assert calls == 4
    for got, own in zip(received, expected, strict=True):
        np.testing.assert_array_equal(got, own)
