"""The budget of the decode kernel: see budget.py. `pytest -s` prints it."""

import collections
import ctypes
import dataclasses

import numpy as np
import pytest

from keras_weightmods.native import gpu, type_code
from keras_weightmods.native.packed import pack_kernel
from tests.gpu import budget
from tests.gpu.conftest import warp_bytes
from tests.gpu.test_build import nvrtc as nvrtc
from tests.gpu.test_products import account_of, decode, make

ROWS = (1, 2, 4, 8)
VALUE_DTYPES = ("bfloat16", "int8", "int4")

# For a tile of 64 x 64: instructions, with room for another version of NVRTC
# (106, 208 and 218 by 13.5), wavefronts of shared memory, bytes.
MOST = {
    "bfloat16": (125, 92, 4608),
    "int8": (235, 76, 2560),
    "int4": (245, 73, 1664),
}


def compile_decode(library, value_dtype):
    """The machine code for an H100 and 8 rows of bfloat16."""
    size, code = ctypes.c_int64(1 << 20), ctypes.create_string_buffer(1 << 20)
    failure = library.kwm_gpu_compile_decode(
        9,
        0,
        gpu.X_TYPES["bfloat16"],
        type_code(value_dtype),
        8,
        ctypes.byref(size),
        code,
    )
    assert failure is None
    assert 0 < size.value <= len(code)
    return code.raw[: size.value]


def aligned(array):
    """As memory of a GPU is, whose sectors the emulation counts."""
    room = np.empty(array.nbytes + 256, np.uint8)
    start = -room.ctypes.data % 256
    moved = room[start : start + array.nbytes].view(array.dtype)
    moved = moved.reshape(array.shape)
    moved[...] = array
    return moved


def traffic(faked, value_dtype, rows):
    """The wavefronts and the bytes of a tile, of W and of x."""
    library, fake = faked
    x, kernel = make(rows, 512, 64, "bfloat16")
    packed = pack_kernel(kernel, value_dtype)
    arrays = {
        name: aligned(getattr(packed, name))
        for name in ("values", "meta", "scale")
        if getattr(packed, name) is not None
    }
    fake.fake_reset()
    failure, _ = decode(
        library, aligned(x), dataclasses.replace(packed, **arrays)
    )
    assert failure is None
    account = account_of(fake)
    assert account.tiles == 512 // 64
    return (
        account.wavefronts / account.tiles,
        32 * account.weight_sectors / account.tiles,
        32 * account.x_sectors / account.tiles,
    )


def test_budget_of_an_h100(nvrtc, faked, tmp_path):
    if budget.disassembler() is None:
        pytest.skip("needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    lines = [budget.HEADER]
    for value_dtype in VALUE_DTYPES:
        code = compile_decode(nvrtc, value_dtype)
        registers, frame = budget.registers_and_frame(code)
        assembly = budget.disassemble(code, tmp_path)
        assert frame == 0
        # Nothing is spilled, and W is not loaded past the ring.
        assert not {"LDL", "STL"} & set(assembly.replace(".", " ").split())
        loop = collections.Counter(budget.main_loop(assembly))
        for rows in ROWS:
            count = budget.Count(
                loop,
                registers,
                *traffic(faked, value_dtype, rows),
                warp_bytes(1, type_code(value_dtype), 8),
            )
            lines.append(budget.row_of_table(value_dtype, rows, count))
            instructions, wavefronts, weight_bytes = MOST[value_dtype]
            assert count.total <= instructions
            assert count.registers <= 128
            assert count.wavefronts == wavefronts
            assert count.weight_bytes == weight_bytes
            assert count.of("HMMA") == 8
            assert count.of("LDSM") == 2
            for card in (budget.H100, budget.SLOW_H100):
                assert count.share(card) >= 0.85, count.limits(card)
    print("\n" + "\n".join(lines))


GOOD = budget.Count(
    collections.Counter(IMAD=200, HMMA=8),
    registers=100,
    wavefronts=92,
    weight_bytes=4608,
    x_bytes=1024,
    warp_bytes=20480,
)


@pytest.mark.parametrize(
    ("limit", "change"),
    [
        ("issue", {"instructions": collections.Counter(IMAD=1600, HMMA=8)}),
        ("shared", {"wavefronts": 400}),
        ("tensor", {"instructions": collections.Counter(HMMA=200)}),
        ("caches", {"x_bytes": 6000}),
        ("flight", {"warp_bytes": 50000, "weight_bytes": 1000}),
        (
            "chain",
            {
                "registers": 255,
                "warp_bytes": 50000,
                "instructions": collections.Counter(IMAD=400, HMMA=8),
            },
        ),
    ],
)
def test_each_limit_can_be_missed(limit, change):
    assert GOOD.share(budget.H100) == budget.H100.memory
    count = dataclasses.replace(GOOD, **change)
    assert count.limits(budget.H100)[limit] < 0.85
    assert count.share(budget.H100) < 0.85


def test_main_loop_of_an_assembly():
    assembly = """
.L_x_1:
        /*0000*/  LDG.E.U16 R1, [R2] ;
        /*0010*/  HMMA.SP.16832 R1 ;
        /*0020*/  LDGSTS.E [R1] ;
        /*0030*/  @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0040*/  @!P1 LDGSTS.E [R1] ;
        /*0050*/  HMMA.SP.16832 R1 ;
        /*0060*/  @P0 BRA `(.L_x_2) ;
        /*0070*/  BRA `(.L_x_1) ;
"""
    assert budget.main_loop(assembly) == ["LDGSTS.E", "HMMA.SP.16832", "BRA"]
