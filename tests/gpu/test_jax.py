"""The GPU products under JAX, as far as a machine without a GPU goes.

Programs are lowered for CUDA, and run on a CPU with the handlers over a fake
cuSPARSELt.
"""

import functools
import sys
import warnings

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.native.gpu import trial
from keras_weightmods.native.packed import pack_kernel, unpack_kernel
from tests.gpu.kernels import error, prepared, sparse_kernel
from tests.models import make_sparse, mlp, normal

if keras.backend.backend() != "jax":
    pytest.skip("JAX alone", allow_module_level=True)

import jax
import jax.numpy as jnp
from jax import export

from keras_weightmods.backend.jax import sparse_matmul_gpu as products

K, N = 64, 32
pytestmark = pytest.mark.usefixtures("library")


def make(value_dtype="float32", activations="float32"):
    kernel = sparse_kernel(K, N) * np.linspace(0.1, 3, N)
    return pack_kernel(kernel.astype("float32"), value_dtype, activations)


def lowered(function, *arguments):
    """The program of a function for CUDA, as text."""
    allowed = [
        export.DisabledSafetyCheck.custom_call(target)
        for target in products.TARGETS
    ]
    exported = export.export(
        jax.jit(function), platforms=["cuda"], disabled_checks=allowed
    )
    return exported(*arguments).mlir_module()


def test_cusparselt_lowers_for_cuda():
    x_dtype = "bfloat16"
    # Any companion does.
    companions = {"cusparselt": jnp.zeros((1000,), "uint8")}
    packed = products.PreparedPacked(
        **vars(make("bfloat16")), companions=companions, x_dtype=x_dtype
    )
    product = functools.partial(
        products.matmul, packed=packed, method="cusparselt"
    )
    # 5 rows become 16.
    for function, shape in ((product, (5, K)), (jax.vmap(product), (4, 5, K))):
        text = lowered(function, jnp.ones(shape, x_dtype))
        assert text.count("custom_call @kwm_gpu_cusparselt") == 1
        assert f"-> tensor<16x{N}xbf16>" in text


def test_float32_is_multiplied_in_float32():
    """By default a GPU rounds the factors to TF32."""
    packed = make()
    dense = prepared(products, packed, "float32", ["dense"])
    blocks = make("int8", "int8")
    x = jnp.ones((2, K))
    for weights in (dense, blocks):
        product = functools.partial(products.matmul, packed=weights)
        _, pull = jax.vjp(product, x)
        for function, given in ((product, x), (pull, jnp.ones((2, N)))):
            text = lowered(function, given)
            count = text.count("stablehlo.dot_general")
            assert count == text.count("[HIGHEST, HIGHEST]") > 0
    # No product of 16-bit types is in float32.
    product = functools.partial(products.matmul, packed=packed)
    text = lowered(product, x.astype("bfloat16"))
    assert "stablehlo.dot_general" in text
    assert "HIGHEST" not in text


@pytest.mark.parametrize("is_prepared", [False, True])
def test_dense_product_and_its_gradient(is_prepared):
    packed = make("int8")
    kernel = unpack_kernel(packed).astype("float64")
    x = normal(2, 3, K, seed=1)
    if is_prepared:
        packed = prepared(products, packed, "float32", ["dense"])
    y, pull = jax.vjp(lambda x: products.matmul(x, packed), jnp.asarray(x))
    assert error(y, x @ kernel) <= 1e-6
    dy = normal(2, 3, N, seed=2)
    assert error(pull(jnp.asarray(dy))[0], dy @ kernel.T) <= 1e-6


def test_without_a_gpu_it_says_so():
    if products.has_gpu():
        pytest.skip("there is a GPU")
    assert "finds no NVIDIA GPU" in products.reason_unavailable()


def test_custom_calls_take_what_they_are_given():
    """On a CPU the stream alone is missing of all that a call binds."""
    handler = products.native.xla_handler("kwm_gpu_cusparselt")
    capsule = jax.ffi.pycapsule(handler)
    jax.ffi.register_ffi_target("on_a_cpu", capsule, platform="cpu")
    result = jax.ShapeDtypeStruct((16, N), "bfloat16")
    call = jax.ffi.ffi_call("on_a_cpu", result)
    stream_is_missing = r"bad operands at: 0\)\nDiagnostics:\n.*stream"
    with pytest.raises(jax.errors.JaxRuntimeError, match=stream_is_missing):
        call(jnp.ones((16, K), "bfloat16"), jnp.zeros((10,), "uint8"))


@pytest.fixture
def card(monkeypatch, fake_gpu):
    """A GPU that is none: custom calls run over the fake cuSPARSELt."""
    cpu = jax.local_devices(backend="cpu")
    for owner, name, value in (
        (jax.ffi, "ffi_call", fake_gpu.ffi_call),
        (products.native, "library", lambda: fake_gpu.library),
        (products, "has_gpu", lambda: True),
        (products, "_devices", lambda: cpu),
        (products, "reason_unavailable", lambda: ""),
        # Either product at some number of rows.
        (trial, "ROWS", (16, 32)),
        (trial, "seconds", seconds),
        # The product of the layers: a CPU stands for the GPU.
        (
            sys.modules["keras_weightmods.ops.sparse_matmul"],
            "_implementations",
            {"jax": lambda x, packed: products.matmul(x, packed)},
        ),
    ):
        monkeypatch.setattr(owner, name, value)
    products.plan.cache_clear()
    yield fake_gpu
    fake_gpu.cuda.fake_break(0)
    products.plan.cache_clear()


def seconds(multiply, weights, x, wait):
    is_dense = weights[0].ndim == 2
    return 1.5 if is_dense else {16: 2.0, 32: 1.0}[len(x)]


def test_packed_model_goes_by_the_trial(card, tmp_path):
    model = make_sparse(mlp(K, N, dtype="mixed_bfloat16"))
    kernel, bias = map(np.asarray, model.get_weights())
    packed = pack_kernel(kernel, "int8")
    x = normal(40, K, seed=1)
    expected = np.asarray(jnp.asarray(x, "bfloat16"), "float64")
    expected = expected @ unpack_kernel(packed) + bias
    kwm.pack(model, dtype="int8", activations="float32")
    names = {variable.name for variable in model.layers[0].variables}
    companions = {"kernel_companion_dense", "kernel_companion_cusparselt"}
    assert companions <= names
    for rows in (3, 40):
        found = model.predict(x[:rows], verbose=0)
        assert error(found, expected[:rows]) <= 6e-3
    plan = kwm.ops.sparse_matmul.__globals__["gpu_plan"]
    plan = plan((K, N), "bfloat16")
    assert (plan.method(3), plan.method(40)) == ("dense", "cusparselt")

    # Companions are not saved, and a compiled function takes the new ones.
    path = str(tmp_path / "packed.weights.h5")
    model.save_weights(path)
    item = model.layers[0]._reparameterizations["kernel"]
    assert set(item.saved()) == {"kernel_values", "kernel_meta", "kernel_scale"}
    for name in companions:
        variable = next(v for v in model.layers[0].variables if v.name == name)
        variable.assign(variable * 0)
    model.load_weights(path)
    assert error(model.predict(x, verbose=0), expected) <= 6e-3


@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_a_layer_is_dense_where_the_library_fails(card, activations):
    model = make_sparse(mlp(K, N, dtype="mixed_bfloat16"))
    x = normal(32, K, seed=1)
    expected = np.asarray(model(x), "float64")
    card.cuda.fake_break(1)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        kwm.pack(model, dtype="int8", activations=activations)
    # It is not even tried for integers.
    message = "cuSPARSELt was tried on this GPU"
    tried = [message in str(warning.message) for warning in warned]
    assert any(tried) is (activations == "float32")
    assert error(model(x), expected) <= 2e-2


def test_gradient_by_cusparselt_is_that_of_the_kernel(card):
    packed = prepared(products, make("int8"), "bfloat16", ["cusparselt"])
    x, dy = normal(32, K, seed=1), normal(32, N, seed=2)
    _, pull = jax.vjp(
        lambda x: products.matmul(x, packed, "cusparselt"),
        jnp.asarray(x, "bfloat16"),
    )
    (dx,) = pull(jnp.asarray(dy, "bfloat16"))
    assert error(dx, dy @ unpack_kernel(packed).T.astype("float64")) <= 1e-2


def test_several_processes_do_not_try(card, monkeypatch):
    """Their trials may differ, and so would their programs."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.warns(UserWarning, match="multiplied by dense kernels"):
        plan = products.plan((K, N), "bfloat16")
    assert plan.why(99) == "dense: several processes share the program"
