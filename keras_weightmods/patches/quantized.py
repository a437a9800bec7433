"""Arrays in integers of few bits."""

import dataclasses
import functools
import math

import numpy as np

# Where the largest level may lie, as shares of the largest weight.
_CLIPS = np.arange(32, 0, -1) / 32


@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """An array in integers of 8, 4 or 2 bits, symmetric around zero.

    A weight is `scale * (code - levels)`, with one scale for the array or one
    for each index of its last axis, and `levels = 2 ** (bits - 1) - 1`.

    Attributes:
        packed: uint8 array, one axis: 1, 2 or 4 codes a byte, the first in
            the lowest bits.
        scales: float32 array of shape `()` or `(shape[-1],)`.
        bits: 8, 4 or 2.
        shape: Tuple of ints.
    """

    packed: np.ndarray
    scales: np.ndarray
    bits: int
    shape: tuple[int, ...]

    @property
    def nbytes(self):
        """Int, the bytes of the codes and of the scales."""
        return self.packed.nbytes + self.scales.nbytes

    @functools.cached_property
    def codes(self):
        """uint8 array of `shape`."""
        per_byte = 8 // self.bits
        shifts = np.arange(per_byte, dtype="uint8") * np.uint8(self.bits)
        mask = np.uint8(2**self.bits - 1)
        codes = (self.packed[:, None] >> shifts) & mask
        return codes.reshape(-1)[: math.prod(self.shape)].reshape(self.shape)

    def dequantized(self):
        """Return the float32 array of `shape`."""
        return self.part(slice(None)).reshape(self.shape)

    def part(self, part):
        """Return the float32 array of a slice of the weights, flattened."""
        codes = self.codes.reshape(-1)
        start, stop, _ = part.indices(codes.size)
        scales = self.scales
        if scales.size > 1:
            # They come again with each index of the axes before the last.
            rows = -(-(stop - start) // scales.size)
            scales = np.tile(np.roll(scales, -start), rows)[: stop - start]
        levels = np.float32(2 ** (self.bits - 1) - 1)
        return (codes[start:stop] - levels) * scales


def code_bytes(size, bits):
    """Return the number of bytes that hold `size` codes of `bits` bits."""
    return -(-size * bits // 8)


def quantize(x, bits, per_channel):
    """Round an array to integers of `bits` bits.

    The largest level lies at the largest weight with 8 bits, and where the
    squared error is smallest, of 32 places, with 4 and 2: with few levels, one
    outlier would otherwise round the rest to zero.

    Args:
        x: float32 array.
        bits: 8, 4 or 2.
        per_channel: Bool, a scale for each index of the last axis. An array
            of fewer than two axes has one scale in any case.

    Returns:
        A `Quantized`.
    """
    levels = 2 ** (bits - 1) - 1
    per_channel = per_channel and x.ndim >= 2
    channels = x.shape[-1] if per_channel else 1
    columns = x.reshape(-1, channels).astype("float64")
    largest = np.max(np.abs(columns), axis=0, initial=0.0)
    best = np.full(channels, np.inf)
    scales = np.zeros(channels, "float32")
    for clip in _CLIPS if bits < 8 else _CLIPS[:1]:
        candidate = (clip * largest / levels).astype("float32")
        rounded = _round(columns, candidate, levels) * candidate
        error = np.sum(np.square(rounded - columns), axis=0)
        better = error < best
        scales[better] = candidate[better]
        best[better] = error[better]
    codes = (_round(columns, scales, levels) + levels).astype("uint8")
    per_byte = 8 // bits
    padded = np.zeros(code_bytes(x.size, bits) * per_byte, "uint8")
    padded[: x.size] = codes.reshape(-1)
    shifts = np.arange(per_byte, dtype="uint8") * np.uint8(bits)
    packed = np.bitwise_or.reduce(padded.reshape(-1, per_byte) << shifts, 1)
    shape = (-1,) if per_channel else ()
    return Quantized(packed, scales.reshape(shape), bits, x.shape)


def _round(columns, scales, levels):
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scaled = np.where(scales > 0, columns / scales, 0.0)
    return np.clip(np.rint(scaled), -levels, levels)
