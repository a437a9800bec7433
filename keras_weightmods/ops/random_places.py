"""Places drawn at random, the same ones from a seed wherever it is done."""

import math
from typing import Any

import numpy as np


def random_places(seed: int, size: int, count: int, stream: int = 0) -> Any:
    """Draw places without replacement, each set of them as likely.

    They depend on the arguments alone: all is whole numbers, and the 64-bit
    words are those of the bit generator PCG64, which NumPy does not change from
    version to version. Time and memory are of the order of `count`.

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
    # Drawn with replacement, and so many that mostly enough are distinct. All
    # sets of as many are as likely, and so are those of what is left when some
    # of them, any with the same probability, are taken out.
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
    """Return at most `many` places, each as likely as the others."""
    words = words.random_raw(-(-many // 2)).astype("<u8", copy=False)
    halves = words.view("<u4")[:many]
    # Without these each place has as many of the 2**32 halves (Lemire 2019);
    # the product is the low half of the one below.
    is_fair = halves * np.uint32(size) >= np.uint32(2**32 % size)
    drawn = halves.astype("uint64")
    drawn *= np.uint64(size)
    drawn >>= np.uint64(32)
    return drawn.astype("uint32")[is_fair]


def _distinct(places: Any) -> Any:
    """Return rising places, each once."""
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
    """Return a seed for one of several things that are drawn with a seed.

    Args:
        *numbers: Ints from 0: the seed, and what tells the thing from others.

    Returns:
        Int in [0, 2**31).
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0] >> 1)
