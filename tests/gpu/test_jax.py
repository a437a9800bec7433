"""The GPU products under JAX, as far as a machine without a GPU goes.

Programs are lowered for CUDA, and run with the products that a CPU can do.
"""

import functools

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.native.packed import Packed, pack_kernel, unpack_kernel
from tests.gpu.kernels import sparse_kernel
from tests.models import make_sparse, mlp, normal

if keras.backend.backend() != "jax":
    pytest.skip("JAX alone", allow_module_level=True)

import jax
import jax.numpy as jnp
from jax import export

from keras_weightmods.backend.jax import sparse_matmul_gpu
from keras_weightmods.native.gpu.dispatch import Measured, Plan

K, N = 64, 32
pytestmark = pytest.mark.usefixtures("library")


def make(value_dtype="float32"):
    return pack_kernel(sparse_kernel(K, N), value_dtype)


def lowered(function, *arguments):
    """The program of a function for CUDA, as text."""
    targets = sparse_matmul_gpu._TARGETS
    allowed = [export.DisabledSafetyCheck.custom_call(t) for t in targets]
    exported = export.export(
        jax.jit(function), platforms=["cuda"], disabled_checks=allowed
    )
    return exported(*arguments).mlir_module()


def arrays_of(packed):
    return packed.values, packed.meta, packed.scale


def decode(x, values, meta, scale, packed):
    arrays = Packed(values, meta, scale, packed.shape, packed.dtype)
    return sparse_matmul_gpu.matmul(x, arrays, method="decode")


def cusparselt(x, compressed, packed, algorithm=-1):
    own = *arrays_of(packed), packed.shape, packed.dtype
    prepared = sparse_matmul_gpu.PreparedPacked(
        *own,
        companion=compressed,
        companion_kind="cusparselt",
        x_dtype=x.dtype.name,
    )
    return sparse_matmul_gpu.matmul(x, prepared, "cusparselt", algorithm)


@pytest.mark.parametrize("value_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16", "float16"])
def test_decode_lowers_for_cuda(x_dtype, value_dtype):
    packed = make(value_dtype)
    product = functools.partial(decode, packed=packed)
    x = jnp.ones((2, 3, K), x_dtype)
    text = lowered(product, x, *arrays_of(packed))
    element = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[x_dtype]
    assert "custom_call @kwm_gpu_decode" in text
    assert f"-> tensor<6x{N}x{element}>" in text


@pytest.mark.parametrize("x_dtype", ["bfloat16", "float16", "int8"])
def test_cusparselt_lowers_for_cuda(x_dtype):
    packed = make("int8" if x_dtype == "int8" else "bfloat16")
    product = functools.partial(cusparselt, packed=packed, algorithm=3)
    x, compressed = jnp.ones((5, K), x_dtype), jnp.zeros((1000,), "uint8")
    text = lowered(product, x, compressed)
    assert "custom_call @kwm_gpu_cusparselt" in text
    assert "algorithm = 3 : i64" in text
    # 5 rows become 16.
    element = {"bfloat16": "bf16", "float16": "f16", "int8": "i32"}[x_dtype]
    assert f"-> tensor<16x{N}x{element}>" in text


def test_mapped_activations_are_rows():
    packed = make()
    mapped = jax.vmap(lambda x: decode(x, *arrays_of(packed), packed))
    text = lowered(mapped, jnp.ones((4, 2, K)))
    assert f"-> tensor<8x{N}xf32>" in text


def test_gradients_lower_for_cuda():
    packed = make()

    def loss(x, values):
        return decode(x, values, packed.meta, None, packed).sum()

    arguments = jnp.ones((2, K)), jnp.asarray(packed.values)
    text = lowered(jax.grad(loss, argnums=(0, 1)), *arguments)
    assert text.count("custom_call") == 0
    text = lowered(jax.value_and_grad(loss), *arguments)
    assert text.count("custom_call @kwm_gpu_decode") == 1


@pytest.mark.parametrize("value_dtype", ["float32", "int8"])
@pytest.mark.parametrize("prepared", [False, True])
def test_dense_without_a_table(value_dtype, prepared):
    packed = make(value_dtype)
    kernel = unpack_kernel(packed).astype("float64")
    x = normal(2, 3, K, seed=1)
    weights = packed
    if prepared:
        weights = sparse_matmul_gpu.prepare(packed, "float32")
        assert weights.companion_kind == "dense"
    y = sparse_matmul_gpu.matmul(jnp.asarray(x), weights)
    np.testing.assert_allclose(y, x @ kernel, rtol=1e-4, atol=1e-5)
    gradient = jax.grad(
        lambda x: (sparse_matmul_gpu.matmul(x, weights) ** 2).sum()
    )(jnp.asarray(x))
    expected = 2 * (x @ kernel) @ kernel.T
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-3)


def test_int8_activations():
    packed = make("int8")
    prepared = sparse_matmul_gpu.prepare(packed, "int8")
    x = np.random.default_rng(1).integers(-100, 100, (3, K)).astype("int8")
    y = sparse_matmul_gpu.matmul(jnp.asarray(x), prepared)
    assert y.dtype == jnp.float32
    expected = x @ unpack_kernel(packed).astype("float64")
    np.testing.assert_allclose(y, expected, atol=1e-3)


def test_mapped_weights():
    packed = make()
    values = np.stack([packed.values, 2 * packed.values])
    x = normal(2, 3, K, seed=1)

    def product(x, values):
        arrays = Packed(values, packed.meta, None, packed.shape, "float32")
        return sparse_matmul_gpu.matmul(x, arrays)

    y = jax.vmap(product)(jnp.asarray(x), jnp.asarray(values))
    kernel = unpack_kernel(packed)
    expected = np.stack([x[0] @ kernel, 2 * x[1] @ kernel])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_without_a_gpu_it_says_so():
    if sparse_matmul_gpu.device_name() is not None:
        pytest.skip("there is a GPU")
    reason = sparse_matmul_gpu.reason_unavailable("decode")
    assert "finds no NVIDIA GPU" in reason
    with pytest.raises(RuntimeError, match="finds no NVIDIA GPU"):
        sparse_matmul_gpu.prepare(make(), "bfloat16", "cusparselt")


def test_custom_calls_take_what_they_are_given():
    """On a CPU the stream alone is missing of all that a call binds."""
    packed = make("int8")
    x = jnp.ones((16, K), "bfloat16")
    result = jax.ShapeDtypeStruct((16, N), x.dtype)
    stream_is_missing = r"bad operands at: 0\)\nDiagnostics:\n.*stream"
    for name, inputs, attributes in (
        ("decode", arrays_of(packed), {}),
        ("cusparselt", [jnp.zeros((10,), "uint8")], {"algorithm": -1}),
    ):
        handler = sparse_matmul_gpu.gpu.xla_handler(f"kwm_gpu_xla_{name}")
        capsule, target = jax.ffi.pycapsule(handler), f"on_a_cpu_{name}"
        jax.ffi.register_ffi_target(target, capsule, platform="cpu")
        call = jax.ffi.ffi_call(target, result)
        with pytest.raises(jax.errors.JaxRuntimeError, match=stream_is_missing):
            call(x, *inputs, **attributes)


@pytest.fixture
def pretend(monkeypatch):
    """A GPU by its name and its table; products remain those of a CPU."""

    def measured(times):
        plan = Plan((Measured(8, times),))
        monkeypatch.setattr(sparse_matmul_gpu, "device_name", lambda: "card")
        monkeypatch.setattr(sparse_matmul_gpu, "plan", lambda *_: plan)

    return measured


def model():
    return make_sparse(mlp(K, N))


def test_layer_with_a_companion(pretend, tmp_path):
    x = normal(5, K)
    expected = np.asarray(model()(x))
    pretend({"dense": 2.0, "decode": 1.0})
    packed, other = model(), model()
    other.layers[0].kernel.assign(2 * other.layers[0].kernel)
    for made in (packed, other):
        kwm.pack(made)
        names = [variable.name for variable in made.layers[0].variables]
        assert "kernel_companion" in names
    np.testing.assert_allclose(packed(x), expected, 1e-5)

    # A compiled function takes the companion anew.
    other.predict(x, verbose=0)
    path = str(tmp_path / "packed.weights.h5")
    packed.save_weights(path)
    other.load_weights(path)
    item = other.layers[0]._reparameterizations["kernel"]
    assert "kernel_companion" not in item.saved()
    kernel = unpack_kernel(item.packed)
    np.testing.assert_array_equal(item.packed.companion, kernel)
    np.testing.assert_allclose(other.predict(x, verbose=0), expected, 1e-5)
    kwm.unpack(other)
    np.testing.assert_allclose(other(x), expected, 1e-5)


def test_layer_where_nothing_is_faster_is_dense(pretend):
    pretend({"dense": 2.0, "decode": 3.0})
    packed = model()
    kwm.pack(packed)
    names = [variable.name for variable in packed.layers[0].variables]
    assert "kernel_unpacked" in names
