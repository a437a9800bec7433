import ctypes
import pathlib
import shutil
import subprocess

import keras
import pytest

from keras_weightmods.native import gpu
from tests.gpu.cards import card as card

HERE = pathlib.Path(__file__).parent
GPU = pathlib.Path(gpu.__file__).parent

# (x, values, rows) of the decode kernel, as the library numbers the types.
VARIANTS = [
    (x, values, rows)
    for x in range(3)
    for values in range(4)
    for rows in ((1, 2, 4, 8) if x == 0 else (8, 16))
]

_VARIANT = """
#define KWM_X {x}
#define KWM_VALUES {values}
#define KWM_ROWS {rows}
#define KWM_WARP_BYTES {bytes}
#define kwm_decode kernel_{x}_{values}_{rows}
namespace variant_{x}_{values}_{rows} {{
#include "decode.cu"
void run_lane(const Arguments& a) {{
  kwm_decode(static_cast<const Activation*>(a.x), a.rows, a.k, a.n,
             static_cast<const byte*>(a.values),
             static_cast<const byte*>(a.meta),
             static_cast<const byte*>(a.scale), static_cast<Activation*>(a.y));
}}
void run(int split, int warps, size_t shared_bytes, const Arguments& a) {{
  emulated(run_lane, {x}, {values}, split, warps, shared_bytes, a);
}}
}}
#undef KWM_X
#undef KWM_VALUES
#undef KWM_ROWS
#undef KWM_WARP_BYTES
#undef kwm_decode
"""


def warp_bytes(x, values, rows):
    """The shared memory of a warp: four stages of a tile of 64 by 64."""
    kept = 64 * 64 // 2 * (4, 2, 1, 0.5)[values]
    scales = 128 if values == 3 else 0
    return 4 * int(kept + 64 * 64 // 8 + rows * 64 * (4, 2, 2)[x] + scales)


@pytest.fixture(scope="session")
def library():
    if gpu.library() is None:
        pytest.skip(gpu.reason_unavailable())
    return gpu.library()


@pytest.fixture(scope="session")
def fake_cuda(tmp_path_factory):
    """A library that stands for CUDA's on a CPU."""
    if keras.backend.backend() != "torch":
        pytest.skip("not about the backend: run once, on torch")
    return build_fake(tmp_path_factory, VARIANTS)


def build_fake(tmp_path_factory, variants):
    """Compile the fake with some variants of the decode kernel."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("fake_cuda")
    finds = "".join(
        f"  if (x == {x} && values == {values} && rows == {rows})\n"
        f"    return variant_{x}_{values}_{rows}::run;\n"
        for x, values, rows in variants
    )
    source = folder / "fake_cuda.cc"
    source.write_text(
        '#include "emulate.h"\n'
        + "".join(
            _VARIANT.format(x=x, values=v, rows=r, bytes=warp_bytes(x, v, r))
            for x, v, r in variants
        )
        + "Runner find_variant(int x, int values, int rows) {\n"
        + f"{finds}  return nullptr;\n}}\n"
        + f'#include "{HERE}/fake_cuda.cc"\n'
    )
    built = folder / "fake_cuda.so"
    flags = "-std=c++17 -O1 -shared -fPIC -pthread -Wno-unknown-pragmas"
    subprocess.run(
        [compiler, *flags.split(), f"-I{HERE}", f"-I{GPU}", source]
        + [HERE / "fake_rounding.cc", "-o", built],
        check=True,
    )
    return built


@pytest.fixture(scope="session")
def faked(library, fake_cuda, tmp_path_factory):
    """The GPU library over the fake, and the fake."""
    return open_over(fake_cuda, tmp_path_factory)


@pytest.fixture(scope="session")
def faked_anywhere(library, tmp_path_factory):
    """`faked` on each backend, with the decode kernel of bfloat16 and int8."""
    fake = build_fake(tmp_path_factory, [(1, 2, 8)])
    return open_over(fake, tmp_path_factory)


def open_over(fake, tmp_path_factory):
    """Open a copy of the GPU library over a fake, and the fake.

    A copy keeps its own state: it has opened other libraries.
    """
    copy = tmp_path_factory.mktemp("kwm_gpu") / "copy.so"
    shutil.copy(GPU.parent / "lib" / "kwm_gpu.so", copy)
    over_fake = gpu.open_library(copy)
    path = str(fake).encode()
    assert over_fake.kwm_gpu_load_driver(path) is None
    assert over_fake.kwm_gpu_load_decode(gpu.decode_source(), path) is None
    source = (GPU / "rounding.cu").read_bytes()
    assert over_fake.kwm_gpu_load_rounding(source, path) is None
    assert over_fake.kwm_gpu_load_cusparselt(path) is None
    return over_fake, ctypes.CDLL(str(fake))
