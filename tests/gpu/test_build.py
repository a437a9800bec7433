"""What a machine without a GPU can say of the library and of its sources."""

import ctypes
import importlib.machinery
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess

import pytest

from keras_weightmods.native import gpu

pytestmark = pytest.mark.one_backend

GPU = pathlib.Path(gpu.__file__).parent

_HEADERS = """
#include <type_traits>
#include "{declared}"
{includes}

// The same parameters but for pointers' and enumerations' names.
template <typename R, typename... A, typename S, typename... B>
constexpr bool alike(R (*)(A...), S (*)(B...)) {{
  if constexpr (sizeof...(A) != sizeof...(B)) {{
    return false;
  }} else {{
    return sizeof(R) == sizeof(S) &&
           ((sizeof(A) == sizeof(B) &&
             std::is_pointer_v<A> == std::is_pointer_v<B>) && ...);
  }}
}}
{checks}
"""


def include_folders():
    spec = importlib.util.find_spec("nvidia")
    places = [*((spec and spec.submodule_search_locations) or ())]
    # Of `make gpu-libraries`; the headers of the first library are seen.
    folders = os.environ.get("CUSPARSELT_FOLDERS", "").split()
    places += [pathlib.Path(folder, "nvidia") for folder in folders]
    found = (pathlib.Path(place).glob("*/include") for place in places)
    return [folder for folders in found for folder in folders]


def check_headers(tmp_path, needed, declared, includes, checks):
    folders = include_folders()
    for header in needed:
        if not any((folder / header).exists() for folder in folders):
            pytest.skip(f"needs {header}, of a package of NVIDIA's on PyPI")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    source = tmp_path / "headers.cc"
    parts = {
        "includes": "\n".join(f"#include <{name}>" for name in includes),
        "checks": "\n".join(f"static_assert({check});" for check in checks),
    }
    source.write_text(_HEADERS.format(declared=declared, **parts))
    search = [f"-I{folder}" for folder in [GPU, *folders]]
    subprocess.run(
        [compiler, "-std=c++17", "-fsyntax-only", *search, source], check=True
    )


def test_cusparselt_is_declared_as_in_its_header(tmp_path):
    functions = (
        "GetErrorString MatmulAlgSelectionDestroy Init GetVersion "
        "DenseDescriptorInit MatDescriptorDestroy StructuredDescriptorInit "
        "MatmulDescriptorInit MatmulDescSetAttribute MatmulAlgSelectionInit "
        "MatmulAlgSetAttribute "
        "MatmulAlgGetAttribute MatmulPlanInit MatmulPlanDestroy "
        "MatmulGetWorkspace Matmul SpMMACompressedSize2 SpMMACompress2"
    )
    structures = (
        "Handle MatDescriptor MatmulDescriptor MatmulAlgSelection MatmulPlan"
    )
    constants = {
        "kNonTranspose": "CUSPARSE_OPERATION_NON_TRANSPOSE",
        "kOrderColumn": "CUSPARSE_ORDER_COL",
        "kOrderRow": "CUSPARSE_ORDER_ROW",
        "kSparsity50": "CUSPARSELT_SPARSITY_50_PERCENT",
        "kCompute32I": "CUSPARSE_COMPUTE_32I",
        "kCompute32F": "CUSPARSE_COMPUTE_32F",
        "kAlgorithmDefault": "CUSPARSELT_MATMUL_ALG_DEFAULT",
        "kConfigId": "CUSPARSELT_MATMUL_ALG_CONFIG_ID",
        "kConfigMaxId": "CUSPARSELT_MATMUL_ALG_CONFIG_MAX_ID",
        "kR16F": "CUDA_R_16F",
        "kR16BF": "CUDA_R_16BF",
        "kR8I": "CUDA_R_8I",
        "kAlphaVector": "CUSPARSELT_MATMUL_ALPHA_VECTOR_SCALING",
    }
    lt = "kwm::cusparselt"
    checks = ["CUSPARSE_STATUS_SUCCESS == 0"]
    for name in functions.split():
        ours = f"decltype({lt}::Functions::{name}){{}}"
        checks.append(f"alike(decltype(&cusparseLt{name}){{}}, {ours})")
    for name in structures.split():
        checks.append(f"sizeof(cusparseLt{name}_t) <= sizeof({lt}::Opaque)")
    for ours, theirs in constants.items():
        checks.append(f"int({theirs}) == {lt}::{ours}")
    check_headers(
        tmp_path,
        ["cusparseLt.h", "library_types.h", "crt/host_defines.h"],
        "cusparselt_api.h",
        ["cuda_runtime_api.h", "cusparseLt.h"],
        checks,
    )


def test_driver_is_declared_as_in_its_header(tmp_path):
    same = (
        "Init GetErrorString DeviceGet DeviceGetAttribute ModuleLoadData "
        "ModuleGetFunction FuncSetAttribute LaunchKernelEx"
    )
    functions = {name: f"cu{name}" for name in same.split()} | {
        "PrimaryContextRetain": "cuDevicePrimaryCtxRetain",
        "ContextPush": "cuCtxPushCurrent_v2",
        "ContextPop": "cuCtxPopCurrent_v2",
    }
    checks = [
        "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR == 75",
        "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR == 76",
        "CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT == 16",
        "CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN == 97",
        "CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR == 81",
        "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"
        " == kwm::kMaxDynamicShared",
        "CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION == kwm::kClusterDimension",
        "CUDA_SUCCESS == 0",
    ]
    fields = {
        "grid": "gridDimX",
        "block": "blockDimX",
        "shared_bytes": "sharedMemBytes",
        "stream": "hStream",
        "attributes": "attrs",
        "attribute_count": "numAttrs",
    }
    pairs = [("Launch", "CUlaunchConfig", fields)]
    fields = {"id": "id", "cluster": "value.clusterDim.x"}
    pairs.append(("LaunchAttribute", "CUlaunchAttribute", fields))
    for ours, theirs, fields in pairs:
        checks.append(f"sizeof(kwm::{ours}) == sizeof({theirs})")
        checks += [
            f"offsetof(kwm::{ours}, {mine}) == offsetof({theirs}, {field})"
            for mine, field in fields.items()
        ]
    for ours, theirs in functions.items():
        ours = f"decltype(kwm::Driver::{ours}){{}}"
        checks.append(f"alike(decltype(&{theirs}){{}}, {ours})")
    check_headers(tmp_path, ["cuda.h"], "driver.h", ["cuda.h"], checks)


@pytest.fixture
def nvrtc(library):
    """The GPU library, with NVRTC loaded."""
    source = gpu.decode_source()
    paths = [gpu._cuda_library("nvrtc", cuda) for cuda in (13, 12)]
    if all(library.kwm_gpu_load_decode(source, p.encode()) for p in paths):
        pytest.skip("needs NVRTC: pip install nvidia-cuda-nvrtc")
    return library


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16", "float16"])
def test_nvrtc_compiles_the_decode_kernel(nvrtc, x_dtype, capability):
    x_type = gpu.X_TYPES[x_dtype]
    # Two are enough for an A100, where clusters alone are left out.
    for value_type in range(4) if capability == (9, 0) else (1, 3):
        size = ctypes.c_int64()
        rows = nvrtc.kwm_gpu_decode_rows(x_type)
        failure = nvrtc.kwm_gpu_compile_decode(
            *capability, x_type, value_type, rows, ctypes.byref(size), None
        )
        assert failure is None
        assert size.value > 0


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_nvrtc_compiles_the_rounding_kernel(nvrtc, capability):
    source = (GPU / "rounding.cu").read_bytes()
    paths = [gpu._cuda_library("nvrtc", cuda) for cuda in (13, 12)]
    load = nvrtc.kwm_gpu_load_rounding
    assert not all(load(source, path.encode()) for path in paths)
    for x_dtype in ("float32", "bfloat16", "float16"):
        size = ctypes.c_int64()
        failure = nvrtc.kwm_gpu_compile_rounding(
            *capability, gpu.X_TYPES[x_dtype], ctypes.byref(size)
        )
        assert failure is None
        assert size.value > 0
    failure = nvrtc.kwm_gpu_compile_rounding(1, 2, 0, ctypes.byref(size))
    assert failure.startswith(b"NVRTC, rounding.cu: ")


def test_nvrtc_says_what_it_cannot_compile(nvrtc):
    size = ctypes.c_int64()
    failure = nvrtc.kwm_gpu_compile_decode(
        1, 2, 1, 1, 8, ctypes.byref(size), None
    )
    assert failure.startswith(b"NVRTC, decode.cu: ")
    assert b"sm_12" in failure


def test_without_cuda_every_call_says_why(library, tmp_path, monkeypatch):
    # A copy has opened nothing yet.
    shutil.copy(GPU.parent / "lib" / "kwm_gpu.so", tmp_path / "copy.so")
    fresh = gpu.open_library(tmp_path / "copy.so")
    monkeypatch.setattr(gpu, "library", lambda: fresh)
    monkeypatch.setattr(gpu, "_DRIVER", b"libabsent.so")
    size = ctypes.c_int64()
    failure = fresh.kwm_gpu_compile_decode(
        8, 0, 0, 0, 1, ctypes.byref(size), None
    )
    assert failure == b"NVRTC is not loaded"
    no_driver = "the CUDA driver is not loaded"
    assert fresh.kwm_gpu_prepare_decode(0, 1, 1, 1) == no_driver.encode()
    with pytest.raises(RuntimeError, match=no_driver):
        gpu.compressed_size(0, (64, 64), "bfloat16")
    with pytest.raises(RuntimeError, match=no_driver):
        gpu.cusparselt_algorithms(0, 16, (64, 64), "bfloat16")
    assert fresh.kwm_gpu_cusparselt_version(0) == -1
    for load in (gpu.load_decode, gpu.load_cusparselt):
        reason = load.__wrapped__(12)
        assert "libabsent.so: cannot open shared object file" in reason
        assert "pip install 'keras-weightmods[cuda12]'" in reason


# The wheels as they were opened: each file with the package that brings it.
WHEELS = {
    "nvidia-cusparselt-cu12 0.7.1": "cusparselt/lib/libcusparseLt.so.0",
    "nvidia-cusparselt-cu13 0.8.0": "cusparselt/lib/libcusparseLt.so.0",
    "nvidia-cusparselt-cu13 0.10.0": "cu13/lib/libcusparseLt.so.0",
    "nvidia-cuda-nvrtc-cu12 12.9.86": "cuda_nvrtc/lib/libnvrtc.so.12",
    "nvidia-cuda-nvrtc 13.5.37": "cu13/lib/libnvrtc.so.13",
}


@pytest.mark.parametrize("wheel", list(WHEELS))
def test_libraries_are_found_in_both_layouts(wheel, tmp_path, monkeypatch):
    file = tmp_path / "nvidia" / WHEELS[wheel]
    file.parent.mkdir(parents=True)
    file.touch()
    spec = importlib.machinery.ModuleSpec("nvidia", None, is_package=True)
    # Packages of NVIDIA may lie in several folders.
    folders = [os.fspath(tmp_path / "other"), os.fspath(tmp_path / "nvidia")]
    spec.submodule_search_locations = folders
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    name = "nvrtc" if "nvrtc" in wheel else "cusparseLt"
    cuda = 12 if "12" in wheel.split()[0] else 13
    assert gpu._cuda_library(name, cuda) == os.fspath(file)
    file.unlink()
    assert gpu._cuda_library(name, cuda) == file.name


def functions_of_cusparselt():
    """The functions that the library opens, and those that it can lack."""
    text = (GPU / "cusparselt.cc").read_text()
    needed = re.findall(r"^  KWM_FIND\((\w+)\);", text, re.M)
    optional = re.findall(r"^  KWM_FIND_OPTIONAL\((\w+)\);", text, re.M)
    declared = (GPU / "cusparselt_api.h").read_text()
    assert set(re.findall(r"\(\*(\w+)\)\(", declared)) == {*needed, *optional}
    return needed, optional


def open_cusparselt(folder, path):
    """Open it by a fresh copy of the GPU library: what failed, the copy."""
    folder.mkdir()
    shutil.copy(GPU.parent / "lib" / "kwm_gpu.so", folder / "copy.so")
    fresh = gpu.open_library(folder / "copy.so")
    return fresh.kwm_gpu_load_cusparselt(os.fsencode(path)), fresh


# What 0.8 and later export and 0.7.1 does not, as `make gpu-libraries` prints.
ABSENT_IN_0_7 = {"GetErrorString", "MatmulAlgSelectionDestroy"}


def stub_of_cusparselt(path, functions, failing=""):
    """Compile a library of these functions: 0 for success, 10 of one."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source = path.with_suffix(".c")
    source.write_text(
        "".join(
            f"int cusparseLt{name}() {{ return {10 * (name == failing)}; }}\n"
            for name in functions
        )
    )
    command = [compiler, "-shared", "-fPIC", source, "-o", path]
    subprocess.run(command, check=True)
    return path


def test_cusparselt_of_every_version_is_opened(library, tmp_path):
    needed, optional = functions_of_cusparselt()
    every = {*needed, *optional}
    for version, names, lacks in (
        ("0.10", every, None),
        ("0.7", every - ABSENT_IN_0_7, None),
        ("broken", every - {"Matmul"}, "cusparseLtMatmul"),
    ):
        stub = stub_of_cusparselt(tmp_path / f"{version}.so", names)
        failure, _ = open_cusparselt(tmp_path / f"by {version}", stub)
        expected = lacks and f"a CUDA library lacks {lacks}".encode()
        assert failure == expected


@pytest.mark.parametrize("fails", ["", "MatmulAlgGetAttribute"])
def test_cusparselt_without_what_0_7_lacks(library, fake_cuda, tmp_path, fails):
    """Its errors have a number alone, its selections are never destroyed."""
    needed, optional = functions_of_cusparselt()
    names = {*needed, *optional} - ABSENT_IN_0_7
    stub = stub_of_cusparselt(tmp_path / "0.7.so", names, fails)
    failure, fresh = open_cusparselt(tmp_path / "by", stub)
    assert failure is None
    assert fresh.kwm_gpu_load_driver(os.fsencode(fake_cuda)) is None
    count = ctypes.c_int64(-1)
    product = 16, 64, 32, gpu.X_TYPES["bfloat16"], ctypes.byref(count)
    failure = fresh.kwm_gpu_cusparselt_algorithms(0, *product)
    text = b"cuSPARSELt, number of algorithms: error (10)"
    assert failure == (text if fails else None)
    assert count.value == (-1 if fails else 0)


@pytest.mark.skipif(
    "CUSPARSELT_FOLDERS" not in os.environ,
    reason="`make gpu-libraries` runs it",
)
def test_real_cusparselt_is_opened(library, tmp_path):
    folders = os.environ["CUSPARSELT_FOLDERS"].split()
    paths = [
        path
        for folder in folders
        for path in pathlib.Path(folder).rglob("libcusparseLt.so.0")
    ]
    assert paths
    for i, path in enumerate(paths):
        assert open_cusparselt(tmp_path / str(i), path)[0] is None
        needed, optional = functions_of_cusparselt()
        real = ctypes.CDLL(os.fspath(path))
        for name in needed:
            assert hasattr(real, f"cusparseLt{name}")
        lacking = [n for n in optional if not hasattr(real, f"cusparseLt{n}")]
        print(f"{path}: opened, {len(needed)} functions, without {lacking}")


def test_library_of_another_release(library, monkeypatch):
    monkeypatch.setattr(gpu, "ABI_VERSION", 99)
    with pytest.raises(OSError, match="of another release"):
        gpu.open_library(GPU.parent / "lib" / "kwm_gpu.so")
