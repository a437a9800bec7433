"""The GPU products on a GPU; skipped without one. `make gpu` runs them."""

import dataclasses
import os

import keras
import pytest
from keras import ops

import keras_weightmods as kwm
from keras_weightmods import backend
from keras_weightmods.ops import pack_kernel, packed_arrays, unpack_kernel
from tests.gpu.kernels import error, prepared, sparse_kernel
from tests.models import make_sparse, mlp, normal, numpy

BACKEND = keras.backend.backend()
products = backend.current().gpu_products()
if products is None or not products.has_gpu():
    pytest.skip(f"{BACKEND} uses no NVIDIA GPU", allow_module_level=True)

TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-5, "float16": 2e-3}
# float16 has ended the process on some cards: `make gpu` runs it last.
ASKED = os.environ.get("KERAS_WEIGHTMODS_GPU_TYPES", "bfloat16").split(",")
HALVES = [dtype for dtype in ("bfloat16", "float16") if dtype in ASKED]
VALUE_DTYPES = ("float32", "bfloat16", "int8", "int4")


def make(k, n, value_dtype):
    packed = pack_kernel(sparse_kernel(k, n), value_dtype)
    on_gpu = {
        name: ops.convert_to_tensor(getattr(packed, name))
        for name in packed_arrays(packed.shape, value_dtype)
    }
    return dataclasses.replace(packed, **on_gpu), unpack_kernel(packed)


def multiply(x, packed, method):
    if BACKEND == "torch":
        arrays = packed.values, packed.meta, packed.scale
        size = packed.shape[1]
        return products.sparse_matmul(x, *arrays, size, method=method)
    packed = prepared(products, packed, x.dtype.name, [method])
    return products.matmul(x, packed, method)


@pytest.mark.parametrize("rows", [1, 17, 64, 512])
@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
@pytest.mark.parametrize("x_dtype", HALVES)
def test_cusparselt(x_dtype, value_dtype, rows):
    for k, n in ((1024, 2048), (2048, 512)):
        packed, kernel = make(k, n, value_dtype)
        x = ops.cast(ops.convert_to_tensor(normal(rows, k, seed=1)), x_dtype)
        y = multiply(x, packed, "cusparselt")
        assert tuple(y.shape) == (rows, n)
        assert keras.backend.standardize_dtype(y.dtype) == x_dtype
        expected = numpy(x).astype("float64") @ kernel
        assert error(y, expected) <= TOLERANCE[x_dtype]


@pytest.mark.parametrize("x_dtype", HALVES)
def test_trial_of_this_card(x_dtype):
    plan = products.plan((512, 256), x_dtype)
    assert plan.tried, plan.reason
    print(*(plan.why(tried.rows) for tried in plan.tried), sep="\n")


@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
def test_public_product_and_its_gradient(value_dtype):
    packed, kernel = make(256, 96, value_dtype)
    x, dy = normal(2, 3, 256, seed=1), normal(2, 3, 96, seed=2)
    vjp, product = backend.current().vjp, kwm.ops.sparse_matmul
    y, pull = vjp(lambda x: product(x, packed), ops.convert_to_tensor(x))
    (dx,) = pull(ops.convert_to_tensor(dy))
    assert error(y, x @ kernel.astype("float64")) <= TOLERANCE["float32"]
    assert error(dx, dy @ kernel.T.astype("float64")) <= TOLERANCE["float32"]


@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_packed_model(activations, tmp_path):
    model = make_sparse(mlp(256, 128, 64, dtype="mixed_bfloat16"))
    x = normal(64, 256, seed=1)
    expected = model.predict(x, verbose=0).astype("float64")
    kwm.pack(model, dtype="int8", activations=activations)
    bound = 2e-2 if activations == "float32" else 5e-2
    assert error(model.predict(x, verbose=0), expected) <= bound
    kwm.save_model(model, tmp_path / "packed.kwm")
    loaded = kwm.load_model(tmp_path / "packed.kwm")
    assert error(loaded.predict(x, verbose=0), expected) <= bound
