import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_weightmods.patches.places import pack_places, unpack_places

pytestmark = pytest.mark.one_backend


def reference_bits(places, bits):
    """The code, a bit after the other."""
    low, unary, previous = "", "", -1
    for place in places:
        gap = int(place) - previous - 1
        low += "".join(str(gap >> b & 1) for b in range(bits))
        unary += "0" * (gap >> bits) + "1"
        previous = int(place)
    packed = []
    for text in (low, unary):
        text += "0" * (-len(text) % 8)
        packed += [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]
    return packed


@settings(max_examples=60, deadline=None)
@given(
    places=st.sets(st.integers(0, 2**31 - 2), min_size=1, max_size=20)
    | st.sets(st.integers(0, 60), min_size=1, max_size=61)
)
def test_places_come_back(places):
    places = sorted(places)
    size = places[-1] + 1
    bits, packed = pack_places(np.array(places))
    if size < 10_000:
        assert packed.tolist() == reference_bits(places, bits)
    assert unpack_places(packed, len(places), bits, size).tolist() == places
    with pytest.raises(ValueError, match=r"beyond|must hold"):
        unpack_places(packed, len(places), bits, size - 1)


@settings(max_examples=200, deadline=None)
@given(
    packed=st.binary(max_size=12),
    count=st.integers(-1, 20),
    bits=st.integers(-1, 40),
)
def test_bytes_at_random_are_places_or_an_error(packed, count, bits):
    packed = np.frombuffer(packed, "uint8")
    try:
        places = unpack_places(packed, count, bits, 50)
    except ValueError:
        return
    assert places.size == count
    assert np.all(np.diff(places) > 0)
    assert not count or 0 <= places[0] <= places[-1] < 50


@pytest.mark.parametrize(
    ("density", "most"), [(0.01, 8.2), (0.05, 6.0), (0.3, 3.2), (1.0, 1.0)]
)
def test_bits_of_a_place(density, most):
    places = np.flatnonzero(np.random.default_rng(0).random(200_000) < density)
    _, packed = pack_places(places)
    assert 8 * packed.size / places.size <= most
