"""Places and values in fewer bytes, by an entropy coder.

A byte plane is coded with the Huffman codes of DEFLATE, but without its search
for repeated strings. This is fast, and only single bytes repeat here.

- Rising places become the gaps between them, a byte each. A byte of 255 adds
  255 entries without a place. At a density of 5 % a gap between random places
  takes 5.8 bits; the least possible is 5.73. It takes less if the density
  varies along the array. Rows or columns come first, whichever takes less:
  principal masks are denser in some columns than in others.
- The exponents of values are coded, because most are similar. Signs and
  mantissas are stored as they are.
"""

import math
import zlib

import numpy as np

_LONG = 255
# Bytes unpacked at a time, so that the results fit into the caches.
_PART = 1 << 15


def pack_places(places, shape):
    """Code rising places in a flattened array, in the order that takes less.

    Args:
        places: int array of shape `(n,)`, rising, from 0, below the size.
        shape: Tuple of ints, of the array.

    Returns:
        Pair of `rows`, and what `pack_gaps` returns. The array of shape
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
    rows, packed = pack_places(places, mask.shape)
    found = unpack_gaps(packed, places.size, mask.size)
    assert to_rows(found, rows, mask.size).tolist() == places.tolist()
    ```
    """
    best = 1, pack_gaps(places)
    size = math.prod(shape)
    for axis in range(1, len(shape) if places.size else 0):
        rows = math.prod(shape[:axis])
        if rows in (1, size):
            continue
        # This exchanges rows and columns, both ways.
        found = rows, pack_gaps(to_rows(places, size // rows, size))
        best = min(best, found, key=lambda each: each[-1].size)
    return best


def to_rows(places, rows, size):
    """Convert places in column order to rising places in row order.

    Args:
        places: int array of shape `(n,)`, below `size`.
        rows: Int, of the array, a divisor of `size`.
        size: Int, of the array.

    Returns:
        int64 array of shape `(n,)`.
    """
    if rows > 1:
        # Takes half the time of 8 bytes.
        exact = np.uint32 if size < 2**32 else np.uint64
        places = places.astype(exact, copy=False)
        column = places // exact(rows)
        places = (places - column * exact(rows)) * exact(size // rows)
        places += column
        places.sort()
    return places.astype("int64", copy=False)


def pack_gaps(places):
    """Code rising places.

    Args:
        places: int64 array of shape `(n,)`, rising, from 0.

    Returns:
        uint8 array.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.patches.coding import pack_gaps, unpack_gaps

    places = np.array([0, 3, 4, 900])
    packed = pack_gaps(places)
    assert unpack_gaps(packed, 4, 901).tolist() == [0, 3, 4, 900]
    ```
    """
    gaps = np.diff(places, prepend=-1) - 1
    longs = gaps // _LONG
    ends = np.cumsum(longs + 1) - 1
    coded = np.full(np.sum(longs + 1), _LONG, "uint8")
    coded[ends] = gaps - _LONG * longs
    return compress(coded)


def unpack_gaps(packed, count, size):
    """Undo `pack_gaps`, and check the input, which may come from a file.

    Args:
        packed: uint8 array.
        count: Int, the number of places.
        size: Int, of the array: all places are below.

    Returns:
        int64 array of shape `(count,)`, rising.

    Raises:
        ValueError: If `packed` does not hold such places.
    """
    wrong = ValueError(f"does not hold {count} places")
    places = np.empty(count, "int64")
    found = before = last = 0
    # The most bytes that places below `size` can need.
    for piece in _unpacked(packed, count + size // _LONG):
        # This does not overflow.
        sums = np.cumsum(piece, dtype="uint32")
        here = sums[piece != _LONG]
        if found + here.size > count:
            raise wrong
        there = places[found : found + here.size]
        there[:] = here
        there += np.arange(before + found, before + found + here.size)
        found += here.size
        before, last = before + int(sums[-1]), piece[-1]
    if found < count or last == _LONG:
        raise wrong
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


def decompress(packed, most):
    """Undo `compress`.

    Args:
        packed: uint8 array.
        most: Int, the most bytes that it may hold.

    Raises:
        ValueError: If it holds more, or is no code.
    """
    parts = list(_unpacked(packed, most))
    return np.concatenate(parts) if parts else np.empty(0, "uint8")


def _unpacked(packed, most):
    """Yield what `decompress` returns, in parts."""
    decoder = zlib.decompressobj(wbits=-15)
    place = count = 0
    is_sound = True
    try:
        while is_sound and not decoder.eof and place < packed.size:
            part = packed[place : place + _PART]
            place += part.size
            # Without the search no code is shorter than a bit. Data that unpack
            # to more were made to fill the memory. Some bits were held back.
            found = decoder.decompress(part.data, 8 * (part.size + 64))
            count += len(found)
            is_sound = count <= most and not decoder.unconsumed_tail
            if is_sound and found:
                yield np.frombuffer(found, "uint8")
    except zlib.error as error:
        raise ValueError(f"is no code ({error})") from error
    is_whole = decoder.eof and place == packed.size and not decoder.unused_data
    if not is_sound or not is_whole:
        raise ValueError(f"does not hold {most} bytes at most")
