"""The decode kernel's source, compiled for a CPU against a slow reference."""

import ctypes
import pathlib
import shutil
import subprocess

import ml_dtypes
import numpy as np
import pytest

from keras_weightmods.ops import native
from keras_weightmods.ops.nm import nm_project
from keras_weightmods.ops.packed import pack_kernel, unpack_kernel

GPU = pathlib.Path(native.__file__).parent / "gpu"
X_TYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
VALUE_TYPES = {"float32": 0, "bfloat16": 1, "int8": 2}
# float32 x, then 16-bit x.
ROWS = {"float32": (1, 2, 8), "bfloat16": (8, 16), "float16": (8, 16)}

VARIANTS = [
    (x, values, rows)
    for x in X_TYPES
    for values in VALUE_TYPES
    for rows in ROWS[x]
]

VARIANT = """
#define KWM_X {x}
#define KWM_VALUES {values}
#define KWM_ROWS {rows}
#define kwm_decode kernel_{x}_{values}_{rows}
namespace variant_{x}_{values}_{rows} {{
#include "decode.cu"
}}
extern "C" int run_{x}_{values}_{rows}(
    int warps, const void* x, int rows, int k, int n, const void* values,
    const void* meta, const float* scale, void* y) {{
  return emulated(variant_{x}_{values}_{rows}::kwm_decode, {x}, warps, x, rows,
                  k, n, values, meta, scale, y);
}}
#undef KWM_X
#undef KWM_VALUES
#undef KWM_ROWS
#undef kwm_decode
"""


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("emulator")
    source = folder / "variants.cc"
    source.write_text(
        '#include "emulate.h"\n'
        + "".join(
            VARIANT.format(x=X_TYPES[x], values=VALUE_TYPES[values], rows=rows)
            for x, values, rows in VARIANTS
        )
    )
    here = pathlib.Path(__file__).parent
    library = folder / "variants.so"
    flags = "-std=c++17 -O1 -shared -fPIC -pthread -Wno-unknown-pragmas"
    subprocess.run(
        [compiler, *flags.split(), f"-I{here}", f"-I{GPU}", source]
        + ["-o", library],
        check=True,
    )
    return ctypes.CDLL(str(library))


def make(rows, k, n, x_type, value_type, seed=0):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(k, n)).astype("float32")
    # Groups with fewer than two nonzeros, too.
    kernel[rng.random((k, n)) < 0.2] = 0
    padded = np.zeros((-(-k // 4) * 4, n), "float32")
    padded[:k] = kernel
    kernel = np.array(nm_project(padded, 2, 4))[:k]
    x_type = np.dtype(getattr(ml_dtypes, x_type, None) or x_type)
    x = rng.normal(size=(rows, k)).astype(x_type)
    return x, pack_kernel(kernel, value_type)


def reference(x, packed):
    """In float64, with the weights in the type that x is multiplied in."""
    kernel = unpack_kernel(packed)
    scale = np.ones(packed.shape[1])
    if packed.dtype == "int8":
        scale = packed.scale.ravel()[: packed.shape[1]].astype("float64")
        kernel = np.rint(kernel / scale)
    kernel = kernel.astype(x.dtype).astype("float64")
    return x.astype("float64") @ kernel * scale


@pytest.mark.parametrize(("x_type", "value_type", "fits"), VARIANTS)
@pytest.mark.parametrize(
    ("missing", "k", "n", "warps"),
    [(0, 320, 32, 2), (1, 70, 21, 1)],
)
def test_equals_reference(
    emulator, x_type, value_type, fits, missing, k, n, warps
):
    rows = max(fits - missing, 1)
    x, packed = make(rows, k, n, x_type, value_type)
    # Whatever is not written stays NaN.
    y = np.full((rows, n), np.nan, x.dtype)
    run = getattr(
        emulator, f"run_{X_TYPES[x_type]}_{VALUE_TYPES[value_type]}_{fits}"
    )
    pointers = [
        None if a is None else ctypes.c_void_p(a.ctypes.data)
        for a in (packed.values, packed.meta, packed.scale, y)
    ]
    bad_meta = run(warps, ctypes.c_void_p(x.ctypes.data), rows, k, n, *pointers)
    assert not bad_meta
    expected = reference(x, packed)
    error = np.linalg.norm(y.astype("float64") - expected)
    tolerance = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4}[x_type]
    assert error <= tolerance * np.linalg.norm(expected)
