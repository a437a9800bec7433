import fractions
import itertools
import math
import zlib

import numpy as np
import pytest

from keras_weightmods.ops.random_places import random_places, seed_of

pytestmark = pytest.mark.one_backend


def reference(words, size, count):
    """Follow the comments of the code, one place at a time."""
    if not count:
        return []
    if 2 * count > size:
        left = reference(words, size, size - count)
        return [place for place in range(size) if place not in left]
    many = count
    if count * count >= size:
        x = fractions.Fraction(count, size)
        many = math.ceil(size * x * (2 - x) / (2 - 2 * x))
        many += 3 * math.floor(math.sqrt(count * count // size))
    found = set()
    while len(found) < count:
        halves = []
        while len(halves) < many:
            word = int(words.random_raw())
            halves += [word % 2**32, word >> 32]
        for half in halves[:many]:
            place, rest = divmod(half * size, 2**32)
            if rest >= 2**32 % size:
                found.add(place)
    found = sorted(found)
    if len(found) == count:
        return found
    left = reference(words, len(found), len(found) - count)
    return [place for rank, place in enumerate(found) if rank not in left]


@pytest.mark.parametrize(
    ("size", "count"),
    [
        *((1, 0), (1, 1), (2, 1), (4, 2), (7, 7), (20, 3), (100, 10)),
        *((100, 49), (101, 51), (999, 50), (10_000, 500)),
    ],
)
def test_as_the_reference(size, count):
    for seed, stream in itertools.product((0, 5, 2**31 - 1), (0, 3)):
        places = random_places(seed, size, count, stream)
        assert places.dtype == "uint32"
        assert places.tolist() == reference(
            np.random.PCG64([seed, stream]), size, count
        )


def test_the_same_on_each_machine():
    """Files hold seeds in place of places, so this must never change."""
    places = random_places(seed_of(7, 0, 3), 884_736, 44_237)
    assert zlib.crc32(places.astype("<u4")) == 2_925_259_164


@pytest.mark.parametrize(
    ("size", "count", "most"),
    [(5, 1, 23.5), (5, 2, 33.7), (6, 3, 50.8)],
)
def test_all_sets_are_as_likely(size, count, most):
    """By the statistic of Pearson, and where 99.99 % of it are below."""
    draws = 3_000
    sets = dict.fromkeys(itertools.combinations(range(size), count), 0)
    for seed in range(draws):
        sets[tuple(random_places(seed, size, count).tolist())] += 1
    expected = draws / len(sets)
    statistic = sum((n - expected) ** 2 / expected for n in sets.values())
    assert statistic < most
