"""The GPU products under JAX, as far as a machine without a GPU goes.

Programs are lowered for CUDA, and run with the products that a CPU can do.
"""

import functools
import os
import re
import subprocess
import sys

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

from keras_weightmods.backend.jax import layouts, sparse_matmul_gpu
from keras_weightmods.backend.jax.sparse_matmul import split_matmul
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
    own = *arrays_of(packed), packed.shape, packed.dtype, packed.activations
    prepared = sparse_matmul_gpu.PreparedPacked(
        *own,
        companions={"cusparselt": compressed},
        x_dtype=x.dtype.name,
    )
    return sparse_matmul_gpu.matmul(x, prepared, "cusparselt", algorithm)


@pytest.mark.parametrize("value_dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16", "float16"])
def test_decode_lowers_for_cuda(x_dtype, value_dtype):
    packed = make(value_dtype)
    product = functools.partial(decode, packed=packed)
    x = jnp.ones((2, 3, K), x_dtype)
    text = lowered(product, x, *arrays_of(packed))
    element = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[x_dtype]
    assert "custom_call @kwm_gpu_decode" in text
    assert f"-> tensor<6x{N}x{element}>" in text


@pytest.mark.parametrize("x_dtype", ["bfloat16", "float16"])
def test_cusparselt_lowers_for_cuda(x_dtype):
    packed = make("bfloat16")
    product = functools.partial(cusparselt, packed=packed, algorithm=3)
    x, compressed = jnp.ones((5, K), x_dtype), jnp.zeros((1000,), "uint8")
    text = lowered(product, x, compressed)
    assert "custom_call @kwm_gpu_cusparselt" in text
    assert "algorithm = 3 : i64" in text
    # 5 rows become 16.
    element = {"bfloat16": "bf16", "float16": "f16"}[x_dtype]
    assert f"-> tensor<16x{N}x{element}>" in text


@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16", "float16"])
def test_int8_activations_lower_for_cuda(x_dtype):
    packed = pack_kernel(sparse_kernel(K, N), "int8", "int8")
    product = functools.partial(cusparselt, packed=packed, algorithm=3)
    x, compressed = jnp.ones((5, K), x_dtype), jnp.zeros((1000,), "uint8")
    text = lowered(product, x, compressed)
    assert text.count("custom_call @kwm_gpu_round_rows") == 1
    assert f"(tensor<16x{K}xi8>, tensor<5xf32>)" in text
    assert text.count("custom_call @kwm_gpu_cusparselt") == 1
    # The scales of the columns go in, and no integers come out.
    assert re.search(rf"tensor<{N}xf32>\) -> tensor<16x{N}xbf16>", text)
    assert f"x{N}xi32>" not in text
    # At any number of rows the activations are rounded.
    for method in ("decode", "dense"):
        product = functools.partial(
            sparse_matmul_gpu.matmul, packed=packed, method=method
        )
        assert "round_nearest_even" in lowered(product, x)


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
        assert list(weights.companions) == ["dense"]
    y = sparse_matmul_gpu.matmul(jnp.asarray(x), weights)
    np.testing.assert_allclose(y, x @ kernel, rtol=1e-4, atol=1e-5)
    gradient = jax.grad(
        lambda x: (sparse_matmul_gpu.matmul(x, weights) ** 2).sum()
    )(jnp.asarray(x))
    expected = 2 * (x @ kernel) @ kernel.T
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-3)


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


def test_float32_is_multiplied_in_float32():
    """By default a GPU rounds the factors to TF32."""
    packed = make()
    prepared = sparse_matmul_gpu.prepare(packed, "float32", ["dense"])
    x = jnp.ones((2, K))
    for weights in (packed, prepared):
        product = functools.partial(
            sparse_matmul_gpu.matmul, packed=weights, method="dense"
        )
        _, pull = jax.vjp(product, x)
        for function, given in ((product, x), (pull, jnp.ones((2, N)))):
            text = lowered(function, given)
            assert "stablehlo.dot_general" in text
            products = text.count("stablehlo.dot_general")
            assert products == text.count("[HIGHEST, HIGHEST]")
    # Of 16-bit types no product is in float32.
    text = lowered(product, x.astype("bfloat16"))
    assert "stablehlo.dot_general" in text
    assert "HIGHEST" not in text


@pytest.mark.parametrize("value_dtype", ["float32", "int8"])
def test_sharded_product_lowers_for_cuda(monkeypatch, value_dtype):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    plan = Plan((Measured(8, {"dense": 2.0, "decode": 1.0}),))
    monkeypatch.setattr(sparse_matmul_gpu, "plan", lambda *_: plan)
    monkeypatch.setattr(sparse_matmul_gpu, "reason_unavailable", lambda _: "")
    automatic = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("model",), axis_types=automatic)
    packed = make(value_dtype)
    split = layouts.SplitPacked(
        **vars(packed), split=layouts.Split(mesh, (), ("model",))
    )
    for product in (
        lambda x: split_matmul(x, split),
        # The public product chooses by platform too.
        lambda x: kwm.ops.sparse_matmul(x, packed),
    ):
        text = lowered(product, jnp.ones((2, K)))
        assert "custom_call @kwm_gpu_decode" in text
        assert "kwm_xla" not in text
    # What is split is dense there, without a call that a CPU alone has.
    text = lowered(lambda x: kwm.ops.sparse_matmul(x, split), jnp.ones((2, K)))
    assert "dot_general" in text
    assert "custom_call @kwm" not in text


def test_compression_lowers_for_cuda():
    result = jax.ShapeDtypeStruct((1000,), "uint8")
    call = jax.ffi.ffi_call("kwm_gpu_compress", result)
    text = lowered(lambda kernel: call(kernel.T), jnp.ones((K, N), "bfloat16"))
    assert "custom_call @kwm_gpu_compress" in text


SPLIT_ROWS = """
import jax, numpy as np
from keras_weightmods import native
from keras_weightmods.native.packed import pack_kernel, unpack_kernel
from keras_weightmods.backend.jax import sparse_matmul_gpu, xla_handlers
from tests.gpu.kernels import sparse_kernel

# The handler of the CPU stands for that of the GPU, with the same operands.
handler = jax.ffi.pycapsule(native.xla_handler("kwm_xla_matmul"))
assert len(jax.devices()) == 2
jax.ffi.register_ffi_target("kwm_gpu_decode", handler, platform="cpu")
packed = pack_kernel(sparse_kernel(64, 32))
x = np.random.default_rng(0).normal(size=(4, 2, 64)).astype("float32")
expected = x @ unpack_kernel(packed).astype("float64")
mesh = jax.make_mesh((2,), ("data",))
split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
for given in (jax.device_put(x, split), jax.device_put(x, jax.devices()[1])):
    run = jax.jit(lambda x: sparse_matmul_gpu.matmul(x, packed, "decode"))
    compiled = run.lower(given).compile()
    text = compiled.as_text()
    rows = 4 if len(given.sharding.device_set) == 2 else 8
    assert f"f32[{rows},32]" in text and "kwm_gpu_decode" in text, text
    assert "all-" not in text and "collective" not in text, text
    y = compiled(given)
    assert y.sharding.device_set == given.sharding.device_set
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)

# So are those of cuSPARSELt; with int8 each device rounds its own rows.
for name in ("kwm_gpu_round_rows", "kwm_gpu_cusparselt"):
    jax.ffi.register_ffi_target(name, handler, platform="cpu")
given = jax.device_put(x, split)
for kind, mine in (("float32", "f32[16,64]"), ("int8", "s8[16,64]")):
    dtypes = ("int8", "int8") if kind == "int8" else ()
    prepared = sparse_matmul_gpu.PreparedPacked(
        **vars(pack_kernel(sparse_kernel(64, 32), *dtypes)),
        companions={"cusparselt": np.zeros(100, "uint8")},
    )
    run = jax.jit(lambda x: sparse_matmul_gpu.matmul(x, prepared, "cusparselt"))
    text = run.lower(given).compile().as_text()
    assert mine in text and "kwm_gpu_cusparselt" in text, text
    assert "all-" not in text and "collective" not in text, text

# A companion is made where the packed arrays are.
arrays = {"values": jax.device_put(packed.values, jax.devices()[1])}
moved = type(packed)(**{**vars(packed), **arrays})
companion = sparse_matmul_gpu.companion("dense", moved, "float32")
assert companion.devices() == {jax.devices()[1]}
"""


def test_rows_split_over_two_devices_without_a_gather():
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    command = [sys.executable, "-c", SPLIT_ROWS]
    subprocess.run(command, check=True, env=environment)


def test_facts_of_the_device_are_those_of_jax(monkeypatch):
    """A real device has no other attributes than the CPU's here."""
    cpu = jax.local_devices(backend="cpu")

    def local_devices(backend):
        assert backend == "cuda"
        return cpu

    def devices(backend=None):
        raise AssertionError("the first may be another process's")

    monkeypatch.setattr(jax, "local_devices", local_devices)
    monkeypatch.setattr(jax, "devices", devices)
    assert sparse_matmul_gpu.device_name.__wrapped__() == cpu[0].device_kind
    monkeypatch.setattr(sparse_matmul_gpu, "_require", lambda method: None)
    monkeypatch.setattr(
        sparse_matmul_gpu.gpu,
        "compressed_size",
        lambda device, *_: 100 + device,
    )
    spec = sparse_matmul_gpu.companion_spec("cusparselt", (K, N), "bfloat16")
    assert spec == ((100 + cpu[0].local_hardware_id,), "uint8")


def test_method_that_is_asked_for_is_loaded_first(monkeypatch):
    monkeypatch.setattr(sparse_matmul_gpu, "device_name", lambda: "card")
    reason = "NVRTC was not found."
    monkeypatch.setattr(
        sparse_matmul_gpu, "reason_unavailable", lambda method: reason
    )
    with pytest.raises(RuntimeError, match=reason):
        sparse_matmul_gpu.matmul(jnp.ones((1, K)), make(), "decode")


def test_without_a_gpu_it_says_so():
    if sparse_matmul_gpu.device_name() is not None:
        pytest.skip("there is a GPU")
    reason = sparse_matmul_gpu.reason_unavailable("decode")
    assert "finds no NVIDIA GPU" in reason
    with pytest.raises(RuntimeError, match="finds no NVIDIA GPU"):
        sparse_matmul_gpu.prepare(make(), "bfloat16", ["cusparselt"])


def test_custom_calls_take_what_they_are_given():
    """On a CPU the stream alone is missing of all that a call binds."""
    packed = make("int8")
    x = jnp.ones((16, K), "bfloat16")
    result = jax.ShapeDtypeStruct((16, N), x.dtype)
    stream_is_missing = r"bad operands at: 0\)\nDiagnostics:\n.*stream"
    for name, inputs, attributes in (
        ("decode", arrays_of(packed), {}),
        (
            "cusparselt",
            [jnp.zeros((10,), "uint8"), jnp.zeros((0,))],
            {"algorithm": -1},
        ),
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
        assert "kernel_companion_dense" in names
    np.testing.assert_allclose(packed(x), expected, 1e-5)

    # A compiled function takes the companion anew.
    other.predict(x, verbose=0)
    path = str(tmp_path / "packed.weights.h5")
    packed.save_weights(path)
    other.load_weights(path)
    item = other.layers[0]._reparameterizations["kernel"]
    assert set(item.saved()) == {"kernel_values", "kernel_meta"}
    kernel = unpack_kernel(item.packed)
    np.testing.assert_array_equal(item.packed.companions["dense"], kernel)
    np.testing.assert_allclose(other.predict(x, verbose=0), expected, 1e-5)
    kwm.unpack(other)
    np.testing.assert_allclose(other(x), expected, 1e-5)


def test_layer_with_both_companions(pretend, monkeypatch):
    """Each is used at the numbers of rows where it wins."""
    gpu, used = sparse_matmul_gpu, []
    pretend({"dense": 2.0})
    plan = Plan(
        (
            Measured(8, {"dense": 1.0, "cusparselt": 2.0}),
            Measured(32, {"dense": 2.0, "cusparselt": 1.0}, 3),
        )
    )
    monkeypatch.setattr(gpu, "plan", lambda *_: plan)
    monkeypatch.setattr(gpu, "reason_unavailable", lambda _: "")
    # Its compressed kernel is the dense one, in bytes, and so is its product.
    monkeypatch.setattr(
        gpu,
        "companion_spec",
        lambda kind, shape, dtype, activations: (shape, dtype),
    )
    monkeypatch.setattr(
        gpu,
        "companion",
        lambda kind, packed, dtype: jnp.asarray(unpack_kernel(packed)),
    )

    def product(n, algorithm, x, kernel):
        used.append((len(x), algorithm))
        return x @ kernel

    monkeypatch.setattr(gpu, "_cusparselt", product)
    packed = model()
    plain = model()
    kwm.pack(packed)
    names = [variable.name for variable in packed.layers[0].variables]
    assert {"kernel_companion_dense", "kernel_companion_cusparselt"} <= set(
        names
    )
    for rows, expected in ((4, []), (20, [(20, 3)]), (40, [(40, -1)])):
        x = normal(rows, K)
        used.clear()
        y = gpu.matmul(
            jnp.asarray(x),
            packed.layers[0]._reparameterizations["kernel"].packed,
        )
        assert used == expected
        kernel = np.asarray(plain.layers[0].kernel)
        np.testing.assert_allclose(y, x @ kernel, rtol=1e-4, atol=1e-5)


def test_layer_where_nothing_is_faster_is_dense(pretend):
    pretend({"dense": 2.0, "decode": 3.0})
    packed = model()
    kwm.pack(packed)
    names = [variable.name for variable in packed.layers[0].variables]
    assert "kernel_unpacked" in names
