"""The maths of signatures on single NumPy arrays."""

import concurrent.futures
import dataclasses
import functools
import math
import os

import numpy as np

# Elements: small enough for the temporaries of one piece to stay in cache, and
# large enough for threads not to wait for each other between NumPy's calls.
_PIECE = 1 << 18
# Elements: what a thread computes at a time.
_PART = 1 << 22
_ALIGNMENT = 64
# Where the largest level may lie, as shares of the largest weight.
_CLIPS = np.arange(32, 0, -1) / 32


def residual(change, reference):
    """`change` less its projection on `reference`, both flattened.

    RWS (arXiv 2302.12480): what a robust checkpoint learned beyond what clean
    training learned. Where `reference` is zero, that is all of `change`.

    Args:
        change, reference: Arrays of one shape.

    Returns:
        A float64 array of that shape.
    """
    change = np.asarray(change, "float64")
    reference = np.asarray(reference, "float64")
    # Against the overflow of squares, and their underflow.
    largest = np.max(np.abs(reference), initial=0.0)
    if largest == 0.0:
        return change
    unit = reference / largest
    share = np.vdot(change, unit) / np.vdot(unit, unit)
    return change - share * unit


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
        """float32 array of `shape`."""
        return self.dequantized_part(slice(None)).reshape(self.shape)

    def dequantized_part(self, part):
        """float32 array, one axis: a slice of all weights, flattened."""
        codes = self.codes.reshape(-1)
        start, stop, _ = part.indices(codes.size)
        scales = self.scales
        if scales.size > 1:
            # They come again with each index of the axes before the last.
            first = start % scales.size
            rows = -(-(first + stop - start) // scales.size)
            scales = np.broadcast_to(scales, (rows, scales.size)).reshape(-1)
            scales = scales[first : first + stop - start]
        levels = np.float32(2 ** (self.bits - 1) - 1)
        return (codes[start:stop] - levels) * scales


def packed_size(size, bits):
    """Int, the bytes that hold `size` codes of `bits` bits."""
    return -(-size * bits // 8)


def quantize(x, bits, per_channel):
    """Rounds an array to integers of `bits` bits.

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
    channels = x.shape[-1] if per_channel and x.ndim >= 2 else 1
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
    padded = np.zeros(packed_size(x.size, bits) * per_byte, "uint8")
    padded[: x.size] = codes.reshape(-1)
    shifts = np.arange(per_byte, dtype="uint8") * np.uint8(bits)
    packed = np.bitwise_or.reduce(
        padded.reshape(-1, per_byte) << shifts, axis=1
    )
    shape = () if channels == 1 and not (per_channel and x.ndim >= 2) else (-1,)
    return Quantized(packed, scales.reshape(shape), bits, x.shape)


def _round(columns, scales, levels):
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scaled = np.where(scales > 0, columns / scales, 0.0)
    return np.clip(np.rint(scaled), -levels, levels)


def rebuild(clean, terms, out=None):
    """`clean + sum(scale * (tensor - pull * clean))`, rounded once.

    Each piece is computed in the same way whatever the machine's state, so
    that equal arguments give equal bits.

    Args:
        clean: Array of a floating dtype.
        terms: List of triples of a float `scale`, an array or `Quantized` of
            the shape of `clean`, and a float `pull`.
        out: Array to write to, of the dtype and shape of `clean`, contiguous.
            Defaults to `None`, for a new one.

    Returns:
        `out`, computed in float64 if that is its dtype and in float32 if not.
    """
    new = np.empty(clean.shape, clean.dtype) if out is None else out
    for _ in rebuilt_pieces(clean, terms, out=new):
        pass
    return new


def is_rebuilt(array, clean, terms, part=slice(None)):
    """Whether `array` is `rebuild(clean, terms)`, bit for bit.

    Args:
        array, clean, terms: As in `rebuild`.
        part: Slice of the arrays flattened, where to look.
    """
    unsigned = f"u{array.dtype.itemsize}"
    bits = array.reshape(-1).view(unsigned)
    return all(
        np.array_equal(bits[piece], values.view(unsigned))
        for piece, values in rebuilt_pieces(clean, terms, part)
    )


def rebuilt_pieces(clean, terms, part=slice(None), out=None):
    """Yields slices and what `rebuild` has there.

    Args:
        clean, terms: As in `rebuild`.
        part: Slice of the arrays flattened, the part to go through.
        out: As in `rebuild`. Defaults to `None`, for memory that is used
            again for the next piece.
    """
    clean = clean.reshape(-1)
    target = None if out is None else out.reshape(-1)
    dtype = np.dtype("float64" if clean.dtype == "float64" else "float32")
    first, last, _ = part.indices(clean.size)
    size = min(_PIECE, last - first)
    total, product = np.empty(size, dtype), np.empty(size, dtype)
    rounded = total if dtype == clean.dtype else np.empty(size, clean.dtype)
    # What overflows the dtype is found by the caller, who checks the result.
    with np.errstate(over="ignore", invalid="ignore"):
        scales = [dtype.type(scale) for scale, _, _ in terms]
        pull = dtype.type(math.fsum(scale * pull for scale, _, pull in terms))
    for start in range(first, last, _PIECE):
        piece = slice(start, min(start + _PIECE, last))
        with np.errstate(over="ignore", invalid="ignore"):
            base = clean[piece].astype(dtype, copy=False)
            sums, scratch = total[: base.size], product[: base.size]
            delta = _scaled(terms[0][1], scales[0], piece, sums)
            for (_, tensor, _), scale in zip(terms[1:], scales[1:]):
                scaled = _scaled(tensor, scale, piece, scratch)
                delta = np.add(delta, scaled, out=sums)
            if pull:
                np.multiply(base, pull, out=scratch)
                delta = np.subtract(delta, scratch, out=sums)
            values = rounded[: base.size] if target is None else target[piece]
            if values.dtype == dtype:
                np.add(base, delta, out=values)
            else:
                np.add(base, delta, out=sums)
                np.copyto(values, sums, casting="same_kind")
        yield piece, values


def _scaled(tensor, scale, piece, out):
    """`scale * tensor` at `piece`, in `out` where there is work to do."""
    if isinstance(tensor, Quantized):
        values = tensor.dequantized_part(piece)
    else:
        values = tensor.reshape(-1)[piece]
    if scale == 1:
        return values.astype(out.dtype, copy=False)
    return np.multiply(values, scale, out=out)


def over_parts(function, arrays):
    """Calls a function for all parts of arrays, on all cores.

    NumPy lets other threads run while it computes.

    Args:
        function: Callable of a key of `arrays`, and a slice of that array
            flattened.
        arrays: Dict of arrays.

    Returns:
        Dict from the keys to lists of what `function` returned.
    """
    calls = [
        (key, slice(start, min(start + _PART, array.size)))
        for key, array in arrays.items()
        for start in range(0, array.size, _PART)
    ]
    found: dict = {key: [] for key in arrays}
    with concurrent.futures.ThreadPoolExecutor(_cores()) as pool:
        results = pool.map(lambda call: function(*call), calls)
        for (key, _), result in zip(calls, results):
            found[key].append(result)
    return found


def _cores():
    if hasattr(os, "sched_getaffinity"):  # not on macOS or Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def empty_aligned(shape, dtype):
    """An empty array in memory that JAX takes over without a copy."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, "uint8")
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def is_finite(x):
    """Whether all entries of a floating array are finite."""
    size = x.dtype.itemsize
    infinity = np.array([np.inf, -np.inf], x.dtype)
    # Bits as integers are in the order of numbers, infinity, NaN: signed ones
    # end with those of positive sign, unsigned ones with those of negative.
    return all(
        x.view(kind).max(initial=0) < infinity.view(kind)[sign]
        for sign, kind in enumerate((f"i{size}", f"u{size}"))
    )


def same_bits(a, b):
    """Whether two arrays of one dtype and shape are equal bit for bit."""
    unsigned = f"u{a.dtype.itemsize}"
    return np.array_equal(a.view(unsigned), b.view(unsigned))


def trimmed(arrays, density):
    """The `density` of the weights that are largest; zero for the rest.

    TIES (arXiv 2306.01708), step 1, over all arrays of one signature together.
    Weights that are as large as the smallest one kept are kept as well.

    Args:
        arrays: List of arrays.
        density: Float in (0, 1].

    Returns:
        List of arrays.
    """
    magnitudes = np.concatenate([np.abs(x).reshape(-1) for x in arrays])
    kept = max(1, math.ceil(density * magnitudes.size))
    place = magnitudes.size - kept
    threshold = np.partition(magnitudes, place)[place]
    return [np.where(np.abs(x) >= threshold, x, 0.0) for x in arrays]


def elected_mean(arrays):
    """The mean of those entries that have the sign of their sum.

    TIES (arXiv 2306.01708), steps 2 and 3: zeros have no vote and do not
    count in the mean; zero where the votes cancel out.

    Args:
        arrays: List of arrays of one shape.

    Returns:
        A float64 array.
    """
    stacked = np.stack([np.asarray(x, "float64") for x in arrays])
    elected = np.sign(np.sum(stacked, axis=0))
    agree = (np.sign(stacked) == elected) & (stacked != 0)
    total = np.sum(np.where(agree, stacked, 0.0), axis=0)
    return total / np.maximum(1, np.sum(agree, axis=0))


def dropped(x, drop_rate, generator):
    """Drops entries at random and rescales the rest by `1 / (1 - rate)`.

    DARE (arXiv 2311.03099), equation 1: the expectation stays.

    Args:
        x: Array.
        drop_rate: Float in [0, 1).
        generator: A `numpy.random.Generator`.

    Returns:
        A float64 array.
    """
    keep = generator.random(x.shape) >= drop_rate
    return np.where(keep, np.asarray(x, "float64"), 0.0) / (1.0 - drop_rate)
