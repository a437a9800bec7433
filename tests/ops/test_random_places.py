import itertools
import zlib

import numpy as np
import pytest

from keras_weightmods.ops.random_places import random_places, seed_of

pytestmark = pytest.mark.one_backend


class PCG64:
    """PCG XSL RR 128/64 of O'Neill (2014), in whole numbers of Python."""

    def __init__(self, seed):
        state = np.random.PCG64(seed).state["state"]
        self.state, self.increment = state["state"], state["inc"]

    def word(self):
        multiplier = 0x2360ED051FC65DA44385DF649FCCF645
        self.state = (self.state * multiplier + self.increment) % 2**128
        folded = (self.state >> 64 ^ self.state) % 2**64
        turn = self.state >> 122
        return (folded >> turn | folded << (64 - turn)) % 2**64


def reference(seed, size, count, stream=0):
    """As documented, one place at a time."""
    if 2 * count > size:
        left = reference(seed, size, size - count, stream)
        return [place for place in range(size) if place not in left]
    words, found = PCG64([seed, stream]), set()
    while len(found) < count:
        missing = count - len(found)
        halves = []
        while len(halves) < missing:
            word = words.word()
            halves += [word % 2**32, word >> 32]
        found |= {half * size >> 32 for half in halves[:missing]}
    return sorted(found)


@pytest.mark.parametrize(
    ("size", "count"),
    [(1, 0), (1, 1), (2, 1), (20, 3), (100, 49), (101, 51), (999, 50), (7, 7)],
)
def test_as_the_reference(size, count):
    for seed, stream in itertools.product((0, 5, 2**31 - 1), (0, 3)):
        places = random_places(seed, size, count, stream)
        assert places.dtype == "uint32"
        assert places.tolist() == reference(seed, size, count, stream)


def test_the_same_on_each_machine():
    """Files hold seeds in place of places, so this must never change."""
    places = random_places(seed_of(7, 3), 884_736, 44_237)
    assert zlib.crc32(places.astype("<u4")) == 2_831_469_568


def test_large_arrays():
    places = random_places(1, 2**31 - 1, 1000)
    assert np.all(np.diff(places.astype("int64")) > 0)
    assert places[0] < 2**23 and places[-1] > 2**31 - 2**23


@pytest.mark.parametrize(("size", "count"), [(5, 2), (5, 3)])
def test_all_sets_are_as_likely(size, count):
    """By the statistic of Pearson, whose 99.99 % is at 33.7."""
    draws = 5_000
    sets = {s: 0 for s in itertools.combinations(range(size), count)}
    for seed in range(draws):
        sets[tuple(random_places(seed, size, count).tolist())] += 1
    expected = draws / len(sets)
    statistic = sum((n - expected) ** 2 / expected for n in sets.values())
    assert statistic < 33.7


def test_seeds_of_several():
    seeds = [seed_of(3, number) for number in range(1000)]
    assert len({*seeds}) == 1000
    assert 0 <= min(seeds) and max(seeds) < 2**31
