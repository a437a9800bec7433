"""Places drawn at random, the same ones from a seed wherever it is done."""

from typing import Any

import numpy as np


def random_places(seed: int, size: int, count: int, stream: int = 0) -> Any:
    """Draw places without replacement, each set of them as likely.

    They depend on the arguments alone: the 64-bit words are those of the bit
    generator PCG64, which NumPy does not change from version to version. Time
    and memory are of the order of `count`, or of `size - count` if that is
    less.

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
    if count > size - count:
        left = random_places(seed, size, size - count, stream)
        is_drawn = np.ones(size, bool)
        is_drawn[left] = False
        return np.flatnonzero(is_drawn).astype("uint32")
    words = np.random.PCG64([seed, stream])
    found = np.empty(0, "uint32")
    # Drawn with replacement until as many are distinct: by symmetry that is
    # each set with the same probability.
    while found.size < count:
        missing = count - found.size
        halves = words.random_raw(-(-missing // 2)).astype("<u8").view("<u4")
        drawn = halves[:missing].astype("uint64")
        drawn *= np.uint64(size)
        drawn >>= np.uint64(32)
        found = _union(found, drawn.astype("uint32"))
    return found


def _union(found: Any, drawn: Any) -> Any:
    """Return rising places with those of `drawn` that are not there yet."""
    drawn.sort()
    is_new = np.ones(drawn.size, bool)
    np.not_equal(drawn[1:], drawn[:-1], out=is_new[1:])
    drawn = drawn[is_new]
    if not found.size:
        return drawn
    before = np.searchsorted(found, drawn)
    is_new = found[np.minimum(before, found.size - 1)] != drawn
    return np.insert(found, before[is_new], drawn[is_new])


def seed_of(seed: int, number: int) -> int:
    """Return a seed for one of several things that are drawn with a seed.

    Args:
        seed: Int, from 0.
        number: Int, from 0, of the thing.

    Returns:
        Int in [0, 2**31).
    """
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0] >> 1)
