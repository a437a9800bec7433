import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_weightmods.patches.places import unpack_places

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
    places=st.sets(st.integers(0, 9_999), min_size=1, max_size=20)
    | st.sets(st.integers(0, 60), min_size=1, max_size=61),
    bits=st.integers(0, 9),
)
def test_places_of_the_code(places, bits):
    places = sorted(places)
    size = places[-1] + 1
    packed = np.array(reference_bits(places, bits), "uint8")
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
