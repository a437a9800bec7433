"""What share of a GPU's bandwidth the decode kernel can reach, by a count.

Not a measurement: the kernel has not yet run on a GPU. Counted are, for a tile
of 64 by 64, the instructions of the loop in the kernel's assembly, the
wavefronts of shared memory and the bytes of global memory of its run on a CPU,
and, of the whole kernel, its registers. Of what a GPU does in a second, each
resource allows some share of the bandwidth of the memory; the least of them is
the expectation:

- memory: no card gives what its data sheet says. A copy on an H100 SXM got
  2,903 of 3,350 GB/s (github.com/aigatech/vpbenchmarking).
- issue: a processor (SM) begins 4 instructions of warps a cycle (CUDA C++
  Programming Guide, compute capability 9.0).
- shared: its shared memory moves one wavefront, 128 bytes, a cycle.
- tensor: each of its 4 parts takes 8 cycles for a sparse m16n8k32, twice what
  the data sheet's rate of dense products makes of a dense m16n8k16.
- caches: x comes from the second-level cache, through which W goes too.
- flight: latency times bandwidth must be under way. A warp that waits has asked
  for the tiles behind the one that it waits for: `STAGES - 2`.
- chain: as if no instruction of a warp could begin before the one before has
  ended, so that only other warps hide that.

The share is that of a long stream: a call has `FIXED` beside it.
"""

import collections
import dataclasses
import importlib.util
import pathlib
import re
import struct
import subprocess

STAGES = 4
BLOCK_WARPS = 4
MOST_WARPS = 16  # of a processor, by decode.cc

# Cycles from an instruction to the next that needs its result: arithmetic
# (arXiv:1804.06826), a load from shared memory and a matrix instruction
# (arXiv:2402.13499), rounded up.
ARITHMETIC, SHARED_LOAD, MATRIX = 5, 33, 35

# Seconds of a call beside its stream, assumed: the first tile's way from
# memory, the sums of warps and blocks, the end.
FIXED = 1.8e-6


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU, by its data sheet where nothing else is said.

    Args:
        processors: Int, the SMs.
        clock: Float, cycles a second.
        bandwidth: Float, bytes a second.
        memory: Float, the share of it that a copy gets.
        cache_bandwidth: Float, bytes a second of the second-level cache.
        latency: Float, seconds from a load to its data.
        shared_bytes: Int, shared memory of a processor.
        registers: Int, of 32 bits, of a processor.
    """

    name: str
    processors: int
    clock: float
    bandwidth: float
    memory: float
    cache_bandwidth: float
    latency: float
    shared_bytes: int = 233472
    registers: int = 65536


# 989.4 TFLOPS of bfloat16 are 132 SMs * 4 * 512 multiply-adds * 1.83 GHz. Of
# the second-level cache 10 to 12 TB/s are published (fp4-site.pages.dev/
# silicon/gpu-memory-hierarchy, mikamirai.com/blog/gpu-memory-bandwidth): half
# of that is counted on. Latency is 400 ns there, and twice that here, for a
# busy memory.
H100 = Card("H100 SXM", 132, 1.83e9, 3.35e12, 2903 / 3350, 5.5e12, 800e-9)
# As low as chipsandcheese.com saw the clock of an H100 PCIe fall, at its limit
# of power. The cache's clock is another one.
SLOW_H100 = dataclasses.replace(H100, name="slowed H100", clock=1.395e9)


@dataclasses.dataclass(frozen=True)
class Count:
    """What a tile costs.

    Args:
        instructions: Counter of the loop's instructions, by opcode.
        registers: Int, of a lane.
        wavefronts: Float, of shared memory.
        weight_bytes: Float, of the packed arrays.
        x_bytes: Float, of x.
        warp_bytes: Int, shared memory of a warp.
    """

    instructions: collections.Counter
    registers: int
    wavefronts: float
    weight_bytes: float
    x_bytes: float
    warp_bytes: int

    @property
    def total(self):
        return sum(self.instructions.values())

    def of(self, name):
        """How many instructions are of a kind, whatever their variant."""
        return sum(
            count
            for opcode, count in self.instructions.items()
            if opcode.split(".")[0] == name
        )

    def warps(self, card):
        """How many warps a processor holds."""
        registers = -(-self.registers // 8) * 8 * 32
        blocks = min(
            card.shared_bytes // (BLOCK_WARPS * self.warp_bytes + 1024),
            card.registers // (registers * BLOCK_WARPS),
            MOST_WARPS // BLOCK_WARPS,
        )
        return blocks * BLOCK_WARPS

    def limits(self, card):
        """The share of the bandwidth that each resource allows."""
        of_processor = card.bandwidth / card.processors
        # In which the memory brings a tile.
        cycles = self.weight_bytes / of_processor * card.clock
        warps = self.warps(card)
        flight = warps * (STAGES - 2) * self.weight_bytes
        chain = self.total * ARITHMETIC + 2 * (SHARED_LOAD + MATRIX)
        through_cache = (self.weight_bytes + self.x_bytes) / self.weight_bytes
        return {
            "memory": card.memory,
            "issue": 4 * cycles / self.total,
            "shared": cycles / self.wavefronts,
            "tensor": 4 * cycles / (8 * self.of("HMMA")),
            "caches": card.cache_bandwidth / (card.bandwidth * through_cache),
            "flight": flight / (of_processor * card.latency),
            "chain": warps * cycles / chain,
        }

    def share(self, card):
        """The expected share of the bandwidth."""
        return min(self.limits(card).values())

    def share_of_call(self, card, k, n):
        """That of a whole product, with what is fixed."""
        stream = self.weight_bytes * k * n / 64**2 / card.bandwidth
        return stream / (stream / self.share(card) + FIXED)


def main_loop(assembly):
    """Return the opcodes of the loop over tiles.

    The shortest loop around the matrix instructions that loads from global
    memory by asynchronous copies alone.
    """
    opcodes, labels, jumps = [], {}, []
    for line in assembly.splitlines():
        if found := re.match(r"(\.L_x_\d+):", line):
            labels[found[1]] = len(opcodes)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            text = re.sub(r"^@!?U?P\w+ ", "", found[1])
            opcodes.append(text.split()[0])
            if target := re.search(r"BRA.*`\((\.L_x_\d+)\)", text):
                jumps.append((len(opcodes) - 1, target[1]))
    bodies = [
        opcodes[labels[target] : place + 1]
        for place, target in jumps
        if labels.get(target, place + 1) <= place
    ]
    kinds = [{opcode.split(".")[0] for opcode in body} for body in bodies]
    return min(
        (
            body
            for body, found in zip(bodies, kinds)
            if {"HMMA", "LDGSTS"} <= found and "LDG" not in found
        ),
        key=len,
    )


def disassembler():
    """Return the path of nvdisasm, of nvidia-cuda-nvdisasm, or None."""
    spec = importlib.util.find_spec("nvidia")
    for place in (spec and spec.submodule_search_locations) or ():
        for path in pathlib.Path(place).glob("*/bin/nvdisasm"):
            return path
    return None


def disassemble(code, folder):
    """Return the assembly of machine code."""
    path = folder / "decode.cubin"
    path.write_bytes(code)
    command = [disassembler(), "-c", path]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout


# Of the attributes in the section .nv.info of a kernel's file.
_REGISTERS, _FRAME = 0x2F, 0x11


def registers_and_frame(code):
    """Return the registers of a lane and its bytes of local memory."""
    (start,) = struct.unpack_from("<Q", code, 40)
    size, count, names_at = struct.unpack_from("<HHH", code, 58)
    sections = [
        struct.unpack_from("<IIQQQQIIQQ", code, start + i * size)
        for i in range(count)
    ]
    names = sections[names_at][4]
    found = {}
    for section in sections:
        name = code[names + section[0] :].split(b"\0", 1)[0]
        if name == b".nv.info":
            data = code[section[4] : section[4] + section[5]]
            for i in range(0, len(data), 12):
                _, kind, _, _, value = struct.unpack_from("<BBHII", data, i)
                found[kind] = value
    return found[_REGISTERS], found[_FRAME]


def row_of_table(name, rows, count):
    """A line of the table that the test prints."""
    limits = count.limits(H100)
    return (
        f"{name:>9} {rows:>4} {count.total:>6} {count.registers:>5}"
        f" {count.wavefronts:>6.0f} {count.weight_bytes:>6.0f}"
        f" {count.x_bytes:>5.0f}"
        f" {count.warps(H100) * (STAGES - 2) * count.weight_bytes / 1024:>7.0f}"
        + "".join(f" {limit:>6.2f}" for limit in limits.values())
        + f" {count.share(H100):>6.2f} {count.share(SLOW_H100):>6.2f}"
        + "".join(
            f" {count.share_of_call(H100, size, size):>6.2f}"
            for size in (4096, 8192)
        )
    )


HEADER = """\
Counted, not run on a GPU. A tile of 64 x 64 on an H100 SXM; limits as shares of
its bandwidth; the share, of a slowed card too, and of whole calls, with 1.8 us
that are assumed.
   values rows instr.  regs  waves  W [B] x [B] fl.[KB] memory  issue shared \
tensor caches flight  chain  share slowed  4096²  8192²"""
