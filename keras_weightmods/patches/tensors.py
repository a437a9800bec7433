"""Sums of changes on NumPy arrays, a piece at a time."""

import math

import numpy as np

from keras_weightmods.patches.entry import Quantized, Replacing, Sparse

# Elements of a piece. Its temporaries stay in the cache, and threads rarely
# wait for each other between NumPy's calls.
_PIECE = 1 << 18
_ALIGNMENT = 64


def rebuilt_pieces(clean, terms, out=None):
    """Yield slices and `clean + sum(scale * (tensor - replaced * clean))`.

    If the replaced shares, `scale * replaced`, sum to more than 1, the scales
    are divided by their sum, and nothing is left of `clean`.

    Values are computed in float64 if `clean` has that dtype, else in float32,
    and rounded once. The computation does not depend on the machine's state, so
    equal arguments give equal bits.

    Args:
        clean: Array of a floating dtype.
        terms: List of triples of a float `scale`; an array, `Quantized` or
            `Sparse` of the shape of `clean`; and a float `replaced`, 0 beside
            `Sparse`.
        out: Array to write to, of the dtype and shape of `clean`, contiguous.
            Defaults to `None`, for memory that is used again for the next
            piece.
    """
    clean = clean.reshape(-1)
    target = None if out is None else out.reshape(-1)
    dtype = np.dtype("float64" if clean.dtype == "float64" else "float32")
    size = min(_PIECE, clean.size)
    total, product = np.empty(size, dtype), np.empty(size, dtype)
    rounded = total if dtype == clean.dtype else np.empty(size, clean.dtype)
    tensors = [
        x.dequantized() if isinstance(x, Quantized) else x for _, x, _ in terms
    ]
    exact = [
        x
        for (scale, *_), x in zip(terms, tensors)
        if scale == 1 and isinstance(x, Replacing)
    ]
    if not all(isinstance(x, Sparse) for x in tensors):
        exact = []
    # The caller checks the result for overflows.
    with np.errstate(over="ignore", invalid="ignore"):
        share = math.fsum(scale * replaced for scale, _, replaced in terms)
        scales = [
            dtype.type(scale / max(1.0, share) if replaced else scale)
            for scale, _, replaced in terms
        ]
        left_out = dtype.type(min(1.0, share))
    for start in range(0, clean.size, _PIECE):
        piece = slice(start, min(start + _PIECE, clean.size))
        with np.errstate(over="ignore", invalid="ignore"):
            base = clean[piece].astype(dtype, copy=False)
            sums, scratch = total[: base.size], product[: base.size]
            delta = _scaled(tensors[0], scales[0], piece, base, sums)
            for tensor, scale in zip(tensors[1:], scales[1:]):
                scaled = _scaled(tensor, scale, piece, base, scratch)
                delta = np.add(delta, scaled, out=sums)
            if left_out:
                np.multiply(base, left_out, out=scratch)
                delta = np.subtract(delta, scratch, out=sums)
            values = rounded[: base.size] if target is None else target[piece]
            # Adds in the wider dtype, and then rounds.
            np.add(base, delta, out=values, casting="same_kind")
        for tensor in exact:
            places, new = tensor.within(piece)
            others = [x.within(piece)[0] for x in tensors if x is not tensor]
            alone = ~np.isin(places, np.concatenate([places[:0], *others]))
            values[places[alone]] = new[alone]
        yield piece, values


def _scaled(tensor, scale, piece, base, out):
    """Return what a term adds to `base`, in `out` if there is work to do."""
    if isinstance(tensor, Sparse):
        places, values = tensor.within(piece)
        values = values.astype(out.dtype)
        if isinstance(tensor, Replacing):
            values -= base[places]
        # The neutral element of addition; 0.0 + -0.0 is 0.0.
        out.fill(-0.0)
        out[places] = values * scale
        return out
    values = tensor.reshape(-1)[piece]
    if scale == 1:
        return values.astype(out.dtype, copy=False)
    return np.multiply(values, scale, out=out)


def empty_aligned(shape, dtype):
    """Return an empty array in memory that JAX takes over without a copy."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, "uint8")
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def is_finite(x):
    """Return whether all entries of a floating array are finite."""
    size = x.dtype.itemsize
    infinity = np.array([np.inf, -np.inf], x.dtype)
    # Read as integers, the bits are ordered: numbers, infinity, NaN. Signed
    # integers end with the positive ones, unsigned integers with the negative
    # ones.
    return all(
        x.view(kind).max(initial=0) < infinity.view(kind)[sign]
        for sign, kind in enumerate((f"i{size}", f"u{size}"))
    )


def is_rebuilt(array, clean, terms):
    """Return whether `array` equals `rebuilt_pieces`, bit for bit."""
    unsigned = f"u{array.dtype.itemsize}"
    bits = array.reshape(-1).view(unsigned)
    return all(
        np.array_equal(bits[piece], values.view(unsigned))
        for piece, values in rebuilt_pieces(clean, terms)
    )
