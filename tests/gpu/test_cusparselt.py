"""The XLA handlers over fakes of XLA and cuSPARSELt; real libraries opened."""

import ctypes
import importlib.machinery
import importlib.util
import os
import pathlib
import re
import subprocess

import ml_dtypes
import numpy as np
import pytest

from keras_weightmods import native
from keras_weightmods.native import gpu
from tests.gpu.kernels import error, sparse_kernel
from tests.gpu.xla import fresh_library
from tests.models import normal

pytestmark = pytest.mark.one_backend

GPU = pathlib.Path(gpu.__file__).parent
TOLERANCE = {"bfloat16": 4e-3, "float16": 5e-4}


def operands(dtype):
    x, kernel = normal(16, 64, seed=1), sparse_kernel(64, 32)
    dtype = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    return x.astype(dtype), kernel.astype(dtype)


def compress(fake_gpu, kernel):
    size = ctypes.c_int64()
    dtype = gpu._TYPES[kernel.dtype.name]
    failure = fake_gpu.library.kwm_gpu_compressed_size(
        0, *kernel.shape, dtype, ctypes.byref(size)
    )
    assert failure is None
    compressed = np.zeros(size.value, "uint8")
    transposed = np.ascontiguousarray(kernel.T)
    failure = fake_gpu.call("kwm_gpu_compress", [transposed], [compressed])
    assert failure is None
    return compressed


def multiply(fake_gpu, x, compressed, n):
    y = np.full((len(x), n), np.nan, x.dtype)
    return fake_gpu.call("kwm_gpu_cusparselt", [x, compressed], [y]), y


@pytest.mark.parametrize("device", [0, 1])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_product_equals_reference(fake_gpu, dtype, device):
    fake_gpu.xla.fake_xla_set_device(device)
    x, kernel = operands(dtype)
    expected = x.astype("float64") @ kernel.astype("float64")
    compressed = compress(fake_gpu, kernel)
    failure, y = multiply(fake_gpu, x, compressed, 32)
    fake_gpu.xla.fake_xla_set_device(0)
    assert failure is None
    assert error(y, expected) <= TOLERANCE[dtype]


def test_structures_are_destroyed(fake_gpu):
    x, kernel = operands("bfloat16")
    compressed = compress(fake_gpu, kernel)
    multiply(fake_gpu, x, compressed, 32)
    before = fake_gpu.cuda.fake_live()
    for _ in range(3):
        compress(fake_gpu, kernel)
        assert multiply(fake_gpu, x, compressed, 32)[0] is None
        # A plan that cannot be made.
        assert multiply(fake_gpu, x[:3].copy(), compressed, 32)[0]
    assert fake_gpu.cuda.fake_live() == before


def test_what_does_not_fit_is_refused(fake_gpu):
    x, kernel = operands("float16")
    compressed = compress(fake_gpu, kernel)
    failure, _ = multiply(fake_gpu, x, compressed[:10].copy(), 32)
    assert "of another shape or device" in failure
    failure, _ = multiply(fake_gpu, x[:3].copy(), compressed, 32)
    assert "cuSPARSELt, activations: an error of fake cuSPARSELt (3)" in failure
    failure, _ = multiply(fake_gpu, x.astype("float32"), compressed, 32)
    assert "cuSPARSELt multiplies bfloat16 and float16" in failure
    y = np.zeros((16, 32), "float32")
    failure = fake_gpu.call("kwm_gpu_cusparselt", [x, compressed], [y])
    assert "does not fit the activations" in failure
    short = np.zeros(10, "uint8")
    failure = fake_gpu.call("kwm_gpu_compress", [kernel.T.copy()], [short])
    assert "of another size" in failure
    fake_gpu.cuda.fake_break(2)
    failure, _ = multiply(fake_gpu, x, compressed, 32)
    fake_gpu.cuda.fake_break(0)
    assert "cuSPARSELt, product: an error" in failure


def test_without_cuda_every_call_says_why(library, tmp_path, monkeypatch):
    fresh = fresh_library(tmp_path)
    monkeypatch.setattr(native, "library", lambda: fresh)
    monkeypatch.setattr(gpu, "_DRIVER", "libabsent.so")
    with pytest.raises(RuntimeError, match="cuSPARSELt is not loaded"):
        gpu.compressed_size(0, (64, 64), "bfloat16")
    reason = gpu.load_cusparselt.__wrapped__()
    assert "libabsent.so: cannot open shared object file" in reason
    assert "pip install nvidia-cusparselt-cu1" in reason


@pytest.mark.parametrize(
    ("cuda", "folder"),
    [
        (12, "cusparselt"),  # nvidia-cusparselt-cu12 0.7.1
        (13, "cusparselt"),  # -cu13 0.8.0
        (13, "cu13"),  # -cu13 0.10.0
    ],
)
def test_libraries_are_found_in_all_wheels(cuda, folder, tmp_path, monkeypatch):
    file = tmp_path / "nvidia" / folder / "lib" / "libcusparseLt.so.0"
    file.parent.mkdir(parents=True)
    file.touch()
    spec = importlib.machinery.ModuleSpec("nvidia", None, is_package=True)
    # Packages of NVIDIA may lie in several folders.
    folders = [os.fspath(tmp_path / "other"), os.fspath(tmp_path / "nvidia")]
    spec.submodule_search_locations = folders
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert gpu.cusparselt_path(cuda) == os.fspath(file)
    file.unlink()
    assert gpu.cusparselt_path(cuda) == file.name


def functions_of_cusparselt():
    """The functions that the library opens, and those that it can lack."""
    text = (GPU / "cusparselt.cc").read_text()
    needed = re.findall(r"^  KWM_FIND\((\w+), false\);", text, re.M)
    optional = re.findall(r"^  KWM_FIND\((\w+), true\);", text, re.M)
    declared = (GPU / "cusparselt_api.h").read_text()
    declared = declared[declared.index("struct Functions") :]
    assert set(re.findall(r"\(\*(\w+)\)\(", declared)) == {*needed, *optional}
    return needed, optional


@pytest.mark.skipif(
    "CUSPARSELT_FOLDERS" not in os.environ,
    reason="`make gpu-libraries` runs it",
)
def test_real_cusparselt_is_opened():
    folders = os.environ["CUSPARSELT_FOLDERS"].split()
    paths = [
        path
        for folder in folders
        for path in pathlib.Path(folder).rglob("libcusparseLt.so.0")
    ]
    assert paths
    needed, optional = functions_of_cusparselt()
    for path in paths:
        real = ctypes.CDLL(os.fspath(path))
        for name in needed:
            assert hasattr(real, f"cusparseLt{name}")
        lacking = [n for n in optional if not hasattr(real, f"cusparseLt{n}")]
        print(f"{path}: opened, {len(needed)} functions, without {lacking}")


_HEADERS = """
#include <type_traits>
#include "cusparselt_api.h"
#include <cuda_runtime_api.h>
#include <cusparseLt.h>

// The same parameters but for pointers' and enumerations' names.
template <typename R, typename... A, typename S, typename... B>
constexpr bool alike(R (*)(A...), S (*)(B...)) {
  if constexpr (sizeof...(A) != sizeof...(B)) {
    return false;
  } else {
    return sizeof(R) == sizeof(S) &&
           ((sizeof(A) == sizeof(B) &&
             std::is_pointer_v<A> == std::is_pointer_v<B>) && ...);
  }
}
namespace lt = kwm::cusparselt;
"""
CONSTANTS = {
    "kNonTranspose": "CUSPARSE_OPERATION_NON_TRANSPOSE",
    "kOrderColumn": "CUSPARSE_ORDER_COL",
    "kOrderRow": "CUSPARSE_ORDER_ROW",
    "kSparsity50": "CUSPARSELT_SPARSITY_50_PERCENT",
    "kCompute32F": "CUSPARSE_COMPUTE_32F",
    "kAlgorithmDefault": "CUSPARSELT_MATMUL_ALG_DEFAULT",
    "kR16F": "CUDA_R_16F",
    "kR16BF": "CUDA_R_16BF",
}


def test_cusparselt_is_declared_as_in_its_header(tmp_path):
    spec = importlib.util.find_spec("nvidia")
    places = [*((spec and spec.submodule_search_locations) or ())]
    # Set by `make gpu-libraries`; the headers of the first library are used.
    folders = os.environ.get("CUSPARSELT_FOLDERS", "").split()
    places += [pathlib.Path(folder, "nvidia") for folder in folders]
    includes = [
        folder
        for place in places
        for folder in pathlib.Path(place).glob("*/include")
    ]
    for header in ("cusparseLt.h", "library_types.h", "crt/host_defines.h"):
        if not any((folder / header).exists() for folder in includes):
            pytest.skip(f"needs {header}, of a package of NVIDIA's on PyPI")
    needed, optional = functions_of_cusparselt()
    checks = ["CUSPARSE_STATUS_SUCCESS == 0"]
    for name in (*needed, *optional):
        ours = f"decltype(lt::Functions::{name}){{}}"
        checks.append(f"alike(decltype(&cusparseLt{name}){{}}, {ours})")
    for name in ("Handle", "MatDescriptor", "MatmulDescriptor", "MatmulPlan"):
        checks.append(f"sizeof(cusparseLt{name}_t) <= sizeof(lt::Opaque)")
    for ours, theirs in CONSTANTS.items():
        checks.append(f"int({theirs}) == lt::{ours}")
    source = tmp_path / "headers.cc"
    source.write_text(
        _HEADERS + "".join(f"static_assert({check});\n" for check in checks)
    )
    search = [f"-I{folder}" for folder in [GPU, *includes]]
    command = ["g++", "-std=c++17", "-fsyntax-only", *search, source]
    subprocess.run(command, check=True)
