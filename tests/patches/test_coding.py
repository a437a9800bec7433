import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_weightmods.patches import coding
from keras_weightmods.utils.dtypes import numpy_dtype

pytestmark = pytest.mark.one_backend


@settings(max_examples=60, deadline=None)
@given(
    places=st.sets(st.integers(0, 5_000), min_size=1, max_size=20)
    | st.sets(st.integers(0, 60), min_size=1, max_size=61)
)
def test_places_come_back(places):
    places = sorted(places)
    size = places[-1] + 1
    packed = coding.pack_gaps(np.array(places))
    found = coding.unpack_gaps(packed, len(places), size)
    assert found.tolist() == places
    with pytest.raises(ValueError, match=r"beyond|does not hold"):
        coding.unpack_gaps(packed, len(places), size - 1)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_places_come_back_by_rows_and_by_columns(data):
    shape = data.draw(st.lists(st.integers(1, 12), max_size=4))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=1)), dtype=bool)
    mask = np.resize(mask, shape)
    places = np.flatnonzero(mask)
    rows, packed = coding.pack_places(places, tuple(shape))
    found = coding.unpack_gaps(packed, places.size, mask.size)
    columns = mask.reshape(rows, mask.size // rows).T
    assert found.tolist() == np.flatnonzero(columns).tolist()
    found = coding.to_rows(found, rows, mask.size)
    assert found.tolist() == places.tolist()
    assert found.dtype == places.dtype


def test_what_is_dense_in_columns_is_coded_by_columns():
    random = np.random.default_rng(0)
    channels = random.random(96) < 0.1
    rising = channels[:, None, None, None]
    for dense, rows in ((channels, 576), (rising, 1)):
        shape = (3, 3, 64, 96) if rows > 1 else (96, 3, 3, 64)
        mask = random.random(shape) < np.where(dense, 0.5, 0.01)
        places = np.flatnonzero(mask)
        found = coding.pack_places(places, mask.shape)
        assert found[0] == rows
        assert found[-1].size <= coding.pack_gaps(places).size


@pytest.mark.parametrize("size", [2**32 - 2**16, 2**32 + 2**16])
def test_places_beyond_4_bytes(size):
    for rows in (2**16, size):
        columns = size // rows
        places = np.array([0, 1, rows - 1, size - 1])
        at = [divmod(int(place), rows) for place in places]
        expected = sorted(row * columns + column for column, row in at)
        assert coding.to_rows(places, rows, size).tolist() == expected


def test_the_code_of_gaps():
    """Bytes of 255 stand for as many more."""
    packed = coding.pack_gaps(np.array([3, 4, 600]))
    assert coding.decompress(packed, 9).tolist() == [3, 0, 255, 255, 85]


@settings(max_examples=200, deadline=None)
@given(
    packed=st.binary(max_size=12),
    count=st.integers(0, 20),
)
def test_bytes_at_random_are_places_or_an_error(packed, count):
    packed = np.frombuffer(packed, "uint8")
    try:
        places = coding.unpack_gaps(packed, count, 50)
    except ValueError:
        return
    assert places.size == count
    assert np.all(np.diff(places) > 0)
    assert not count or 0 <= places[0] <= places[-1] < 50


def test_a_code_does_not_unpack_to_more_than_it_must():
    packed = coding.compress(np.zeros(10**6, "uint8"))
    assert coding.decompress(packed, 10**6).size == 10**6
    for most in (0, 10, 10**6 - 1):
        with pytest.raises(ValueError, match="does not hold"):
            coding.decompress(packed, most)


@pytest.mark.parametrize("number", [0, 255])
def test_a_small_code_does_not_take_much_memory(number):
    """By the search of DEFLATE, 20 kB become 20 MB."""
    coder = zlib.compressobj(wbits=-15)
    data = coder.compress(bytes([number]) * 20_000_000) + coder.flush()
    tracemalloc.start()
    with pytest.raises(ValueError, match="does not hold"):
        coding.unpack_gaps(np.frombuffer(data, "uint8"), 1, 2**40)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30 * len(data) < 1_000_000


def test_places_come_back_over_several_pieces(monkeypatch):
    monkeypatch.setattr(coding, "_PART", 7)
    places = np.flatnonzero(np.random.default_rng(0).random(5_000) < 0.003)
    packed = coding.pack_gaps(places)
    found = coding.unpack_gaps(packed, places.size, 5_000)
    assert found.tolist() == places.tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_floats_come_back(dtype):
    dtype = numpy_dtype(dtype)
    unsigned = f"u{dtype.itemsize}"
    random = np.random.default_rng(0)
    bits = random.integers(0, np.iinfo(unsigned).max, 999, unsigned, True)
    found = coding.join_floats(*coding.split_floats(bits.view(dtype)), dtype)
    assert (found.view(unsigned) == bits).all()
    # The exponents of normal numbers are alike.
    first, _ = coding.split_floats(random.normal(size=9999).astype(dtype))
    assert coding.compress(first).size < 0.8 * first.size
