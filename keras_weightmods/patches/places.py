"""Places in an array as delta files of version 1 have them.

Rising places are stored as the gaps between them, in Golomb-Rice code: of a gap
the `bits` lowest bits as they are, and the rest in unary. Later files
have them as in `coding.py`.
"""

import numpy as np

_MAX_BITS = 31


def unpack_places(packed, count, bits, size):
    """Return the places that are packed; checks them, as from a file.

    Args:
        packed: uint8 array.
        count: Int, the number of places.
        bits: Int, the number of low bits.
        size: Int, of the array: all places are below.

    Returns:
        int64 array of shape `(count,)`, rising.

    Raises:
        ValueError: If `packed` does not hold such places.
    """
    if not (0 <= bits <= _MAX_BITS and 0 <= count <= size):
        raise ValueError(f"must hold at most {size} places of {_MAX_BITS} bits")
    split = -(-count * bits // 8)
    low = np.unpackbits(packed[:split])
    unary = np.unpackbits(packed[split:])
    ends = np.flatnonzero(unary)
    used = int(ends[-1]) + 1 if ends.size else 0
    if (
        packed.size < split
        or ends.size != count
        or unary.size != -(-used // 8) * 8
        or np.any(low[count * bits :])
    ):
        raise ValueError(f"does not hold {count} places")
    digits = low[: count * bits].reshape(count, bits).astype("int64")
    gaps = np.diff(ends, prepend=-1) - 1
    # What is too large stays so, and the shift does not overflow.
    gaps = np.minimum(gaps, (size >> bits) + 1)
    gaps = (gaps << bits) + digits @ (1 << np.arange(bits, dtype="int64"))
    places = np.cumsum(gaps + 1) - 1
    if count and places[-1] >= size:
        raise ValueError(f"holds places beyond {size}")
    return places
