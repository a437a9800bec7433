"""Places in an array, packed to a few bits each.

Rising places are stored as the gaps between them, in Golomb-Rice code: of a gap
the `bits` lowest bits as they are, and the rest in unary. Of places at random
with a density of 5 % it takes 5.8 bits each, where 5.73 is the least possible.
"""

import numpy as np

_MAX_BITS = 31


def pack_places(places):
    """Pack rising places.

    Args:
        places: int array of shape `(n,)`, rising, from 0, below 2**31.

    Returns:
        Pair of an int, the number of low bits, and a uint8 array.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.patches.places import pack_places, unpack_places

    places = np.array([0, 3, 4, 90])
    bits, packed = pack_places(places)
    assert unpack_places(packed, 4, bits, 91).tolist() == places.tolist()
    ```
    """
    gaps = np.diff(np.asarray(places, "int64"), prepend=-1) - 1
    costs = [
        gaps.size * (bits + 1) + int(np.sum(gaps >> bits))
        for bits in range(_MAX_BITS + 1)
    ]
    bits = int(np.argmin(costs))
    shifts = np.arange(bits, dtype="uint32")
    low = (gaps.astype("uint32")[:, None] >> shifts) & 1
    # A one ends each gap, after as many zeros as its high bits say.
    ends = np.cumsum((gaps >> bits) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1 if ends.size else 0, "uint8")
    unary[ends] = 1
    parts = [low.astype("uint8").reshape(-1), unary]
    return bits, np.concatenate([np.packbits(part) for part in parts])


def unpack_places(packed, count, bits, size):
    """Undo `pack_places`; checks what it is given, as from a file.

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
