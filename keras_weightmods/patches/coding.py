"""Places and values in fewer bytes, by an entropy coder.

A byte plane is coded with the Huffman codes of DEFLATE and without its search
for what is repeated: that is fast, and what repeats here are single bytes.

- Rising places become the gaps between them, a byte each; a byte of 255 stands
  for as many more without a place. Of places at random with a density of 5 % a
  gap takes 5.8 bits, where 5.73 is the least possible, and less where their
  density changes along the array. Of wide gaps the low bytes, which nothing
  predicts, are kept as they are. The array is gone through row by row or column
  by column, as takes less: principal masks are denser in some columns of a
  kernel than in others.
- Of values the exponents are coded, of which most are alike, and the signs and
  mantissas kept as they are.
"""

import math
import zlib

import numpy as np

_LONG = 255
# Mean gaps from which on one more low byte is as good as random.
_WIDE = 512


def pack_places(places, shape):
    """Code rising places in a flattened array, in the order that takes less.

    Args:
        places: int array of shape `(n,)`, rising, from 0, below the size.
        shape: Tuple of ints, of the array.

    Returns:
        Quadruple of `rows`, and what `pack_gaps` returns. The array of shape
        `(rows, size // rows)` is gone through column by column; with one row
        that is the order of the places.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.patches.coding import pack_places, unpack_gaps
    from keras_weightmods.patches.coding import to_rows

    mask = np.zeros((64, 8), bool)
    mask[:, 1] = np.random.random(64) < 0.9
    places = np.flatnonzero(mask)
    rows, low, count, packed = pack_places(places, mask.shape)
    found = unpack_gaps(packed, places.size, low, count, mask.size)
    assert to_rows(found, rows, mask.size).tolist() == places.tolist()
    ```
    """
    best = 1, *pack_gaps(places)
    size = math.prod(shape)
    for axis in range(1, len(shape) if places.size else 0):
        rows = math.prod(shape[:axis])
        if rows in (1, size):
            continue
        # That is to exchange rows and columns, both ways.
        found = rows, *pack_gaps(to_rows(places, size // rows, size))
        best = min(best, found, key=lambda each: each[-1].size)
    return best


def to_rows(places, rows, size):
    """Return places of columns one after another as those of rows, rising.

    Args:
        places: int array of shape `(n,)`, below `size`.
        rows: Int, of the array, a divisor of `size`.
        size: Int, of the array.

    Returns:
        int64 array of shape `(n,)`.
    """
    if rows > 1:
        # In half the time of 8 bytes.
        exact = np.uint32 if size < 2**32 else np.uint64
        places = places.astype(exact, copy=False)
        column = places // exact(rows)
        places = places - column * exact(rows)
        places *= exact(size // rows)
        places += column
        places.sort()
    return places.astype("int64", copy=False)


def pack_gaps(places):
    """Code rising places.

    Args:
        places: int array of shape `(n,)`, rising, from 0, below 2**31.

    Returns:
        Triple of the number of low bytes, the number of bytes that are coded,
        and a uint8 array: first the low bytes, then the codes.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.patches.coding import pack_gaps, unpack_gaps

    places = np.array([0, 3, 4, 900])
    low, count, packed = pack_gaps(places)
    assert unpack_gaps(packed, 4, low, count, 901).tolist() == [0, 3, 4, 900]
    ```
    """
    gaps = np.diff(np.asarray(places, "int64"), prepend=-1) - 1
    low = 0
    while gaps.size and gaps.mean() >= _WIDE << 8 * low:
        low += 1
    planes = [(gaps >> 8 * i & 0xFF).astype("uint8") for i in range(low)]
    high = gaps >> 8 * low
    longs = high // _LONG
    ends = np.cumsum(longs + 1) - 1
    coded = np.full(int(ends[-1]) + 1 if ends.size else 0, _LONG, "uint8")
    coded[ends] = high - _LONG * longs
    return low, coded.size, np.concatenate([*planes, compress(coded)])


def unpack_gaps(packed, count, low, coded, size):
    """Undo `pack_gaps`; checks what it is given, as from a file.

    Args:
        packed: uint8 array.
        count: Int, the number of places.
        low: Int, the number of low bytes.
        coded: Int, the number of bytes that are coded.
        size: Int, of the array: all places are below.

    Returns:
        int64 array of shape `(count,)`, rising; uint32 where no sum of what is
        coded overflows it.

    Raises:
        ValueError: If `packed` does not hold such places.
    """
    # The most that places below `size` can need.
    most = count + (size >> 8 * low) // _LONG
    if not (0 <= low <= 3 and 0 <= count <= size and 0 <= coded <= most):
        raise ValueError(f"must hold at most {size} places")
    if packed.size < low * count:
        raise ValueError(f"does not hold {count} places")
    planes = packed[: low * count].reshape(low, count)
    numbers = decompress(packed[low * count :], coded)
    is_place = numbers != _LONG
    if np.count_nonzero(is_place) != count or not (coded == 0 or is_place[-1]):
        raise ValueError(f"does not hold {count} places")
    # No sum of bytes and ones overflows; it takes half the time of int64.
    is_short = low == 0 and 256 * coded <= 2**32
    dtype = "uint32" if is_short else "int64"
    places = np.cumsum(numbers, dtype=dtype)
    if coded > count:
        places = places[is_place]
    if low:
        places <<= 8 * low
        rest = np.zeros(count, "int64")
        for number, plane in enumerate(planes):
            rest += plane.astype("int64") << 8 * number
        places += np.cumsum(rest)
    places += np.arange(count, dtype=dtype)
    if count and places[-1] >= size:
        raise ValueError(f"holds places beyond {size}")
    return places


def split_floats(values):
    """Return the exponents and the rest of floats, as bytes.

    Args:
        values: Array of shape `(n,)` of bfloat16, float16 or float32.

    Returns:
        Pair of uint8 arrays of shapes `(n,)` and `(n * (itemsize - 1),)`.
    """
    width = values.dtype.itemsize
    bits = values.view(f"u{width}")
    # The sign goes to the end, so that the exponent begins the first byte.
    bits = bits << 1 | bits >> (8 * width - 1)
    rows = bits.astype(f">u{width}").view("uint8").reshape(-1, width)
    return np.ascontiguousarray(rows[:, 0]), rows[:, 1:].reshape(-1)


def join_floats(first, rest, dtype):
    """Undo `split_floats`.

    Args:
        first, rest: The uint8 arrays.
        dtype: NumPy dtype of the values.
    """
    width = dtype.itemsize
    bits = first.astype(f"u{width}")
    for plane in rest.reshape(first.size, width - 1).T:
        bits <<= 8
        bits |= plane
    return (bits >> 1 | bits << (8 * width - 1)).view(dtype)


def compress(numbers):
    """Return the codes of a uint8 array, as one."""
    coder = zlib.compressobj(
        level=9, wbits=-15, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY
    )
    data = coder.compress(np.ascontiguousarray(numbers).data)
    return np.frombuffer(data + coder.flush(), "uint8")


def decompress(packed, size):
    """Undo `compress`.

    Args:
        packed: uint8 array.
        size: Int, the number of bytes that it must hold.

    Raises:
        ValueError: If it does not hold that many, or is no code.
    """
    decoder = zlib.decompressobj(wbits=-15)
    try:
        # One more, to see that there are no more.
        found = decoder.decompress(packed.data, size + 1)
    except zlib.error as error:
        raise ValueError(f"is no code ({error})") from error
    if len(found) != size or not decoder.eof or decoder.unused_data:
        raise ValueError(f"does not hold {size} bytes")
    return np.frombuffer(found, "uint8")
