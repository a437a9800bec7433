"""Places drawn at random, the same ones from a seed wherever it is done."""

import math
from typing import Any

import numpy as np


def random_places(seed: int, size: int, count: int, stream: int = 0) -> Any:
    """Draw places without replacement, each set of them as likely.

    They depend on the arguments alone: all is whole numbers, and the 64-bit
    words are those of the bit generator PCG64, which NumPy does not change from
    version to version. Time and memory are of the order of `count`, or of
    `size - count` if that is less.

    Args:
        seed: Int, from 0.
        size: Int below 2**32, the number of places.
        count: Int, how many to draw, at most `size`.
        stream: Int, from 0, to draw others with the same seed. Defaults to 0.

    Returns:
        uint32 NumPy array of shape `(count,)`, rising.

    Example:

    ```python
    from keras_weightmods.ops.random_places import random_places

    assert random_places(seed=1, size=20, count=3).tolist() == [9, 10, 15]
    ```
    """
    return _draw(np.random.PCG64([seed, stream]), size, count)


def _draw(words: Any, size: int, count: int) -> Any:
    if not count:
        return np.empty(0, "uint32")
    if count > size - count:
        return _without(np.arange(size), _draw(words, size, size - count))
    # Drawn with replacement, and so many that enough are distinct: all sets of
    # as many are as likely, and so are those of what is left when some of them,
    # any with the same probability, are taken out.
    many = count
    if count**2 >= size:
        # n x (2 - x) / (2 - 2 x) is more than n log(1 / (1 - x)).
        many = -(-count * (2 * size - count) // (2 * (size - count)))
        many += 3 * math.isqrt(count**2 // size)
    found = np.empty(0, "uint32")
    while found.size < count:
        found = _draw_distinct(words, size, many)
    return _without(found, _draw(words, found.size, found.size - count))


def _draw_distinct(words: Any, size: int, many: int) -> Any:
    """Draw so many independently; return those that are distinct, rising."""
    halves = words.random_raw(-(-many // 2)).astype("<u8").view("<u4")
    drawn = halves[:many].astype("uint64")
    drawn *= np.uint64(size)
    drawn >>= np.uint64(32)
    drawn = drawn.astype("uint32")
    drawn.sort()
    is_first = np.ones(drawn.size, bool)
    np.not_equal(drawn[1:], drawn[:-1], out=is_first[1:])
    return drawn[is_first]


def _without(places: Any, left_out: Any) -> Any:
    if not left_out.size:
        return places.astype("uint32", copy=False)
    is_left = np.ones(places.size, bool)
    is_left[left_out] = False
    return places[is_left].astype("uint32", copy=False)


def seed_of(seed: int, number: int) -> int:
    """Return a seed for one of several things that are drawn with a seed.

    Args:
        seed: Int, from 0.
        number: Int, from 0, of the thing.

    Returns:
        Int in [0, 2**31).
    """
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0] >> 1)
