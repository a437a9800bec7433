"""Random places, the same from a seed on every machine."""

import math
from typing import Any

import numpy as np


def random_places(seed: int, size: int, count: int, stream: int = 0) -> Any:
    """Draw places without replacement; each set of them is equally likely.

    They depend only on the arguments. All numbers are integers, and the 64-bit
    words come from PCG64, which NumPy keeps the same in all versions. Time and
    memory are proportional to `count`.

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
        return _without(size, _draw(words, size, size - count))
    # Draw with replacement, so many that usually enough are distinct. All sets
    # of one size are equally likely. They stay so when some places, each with
    # the same probability, are removed.
    many = count
    if count**2 >= size:
        # n x (2 - x) / (2 - 2 x) is more than n log(1 / (1 - x)).
        many = -(-count * (2 * size - count) // (2 * (size - count)))
        many += 3 * math.isqrt(count**2 // size)
    found = _distinct(_draw_independently(words, size, many))
    while found.size < count:
        drawn = _draw_independently(words, size, many)
        found = _distinct(np.concatenate([found, drawn]))
    surplus = _draw(words, found.size, found.size - count)
    return found[_without(found.size, surplus)] if surplus.size else found


def _draw_independently(words: Any, size: int, many: int) -> Any:
    """Return at most `many` places, each equally likely."""
    words = words.random_raw(-(-many // 2)).astype("<u8", copy=False)
    halves = words.view("<u4")[:many]
    # Without these, each place has equally many of the 2**32 halves (Lemire
    # 2019). The product is the low half of the one below.
    is_fair = halves * np.uint32(size) >= np.uint32(2**32 % size)
    drawn = halves.astype("uint64")
    drawn *= np.uint64(size)
    drawn >>= np.uint64(32)
    return drawn.astype("uint32")[is_fair]


def _distinct(places: Any) -> Any:
    """Return the places in rising order, each once."""
    places.sort()
    is_first = np.ones(places.size, bool)
    np.not_equal(places[1:], places[:-1], out=is_first[1:])
    return places[is_first]


def _without(size: int, left_out: Any) -> Any:
    """Return the places below `size` that are not left out."""
    is_left = np.ones(size, bool)
    is_left[left_out] = False
    return np.flatnonzero(is_left).astype("uint32")


def seed_of(*numbers: int) -> int:
    """Return the seed of one of several draws that share a seed.

    Args:
        *numbers: Ints from 0: the seed, and what tells the thing from others.

    Returns:
        Int in [0, 2**31).
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0] >> 1)
