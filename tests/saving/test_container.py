"""The container: exact arrays, whole files, and no mutated file gets in."""

import functools
import hashlib
import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_weightmods.saving import bounded_json, container, file_kinds
from keras_weightmods.saving.container import Entry, Reader
from keras_weightmods.saving.container import write as write_all
from keras_weightmods.utils.dtypes import numpy_dtype
from tests.models import assert_same_bits

pytestmark = pytest.mark.one_backend

FORMAT, VERSION = "test.numbers", 3


def arrays():
    rng = np.random.default_rng(0)
    return {
        "a/matrix": rng.normal(size=(3, 4)).astype("float32"),
        "b/half": rng.normal(size=(5,)).astype(ml_dtypes.bfloat16),
        "c/flags": np.array([True, False, True]),
        "d/scalar": np.array(7, "int64"),
        "e/empty": np.zeros((0, 3), "float32"),
        "f/bytes": np.frombuffer(b"some text", "uint8"),
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


def write(path, values):
    container.write_arrays(path, FORMAT, VERSION, values)


def reader_of(path):
    return Reader(path, FORMAT, versions=(VERSION,))


def read(path):
    with reader_of(path) as reader:
        return {name: reader.read(name) for name in reader.entries}


def assert_equal(received, expected):
    assert set(received) == set(expected)
    assert_same_bits([received[name] for name in expected], expected.values())


@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(container.DTYPES)),
            st.lists(st.integers(0, 4), max_size=4),
        ),
        max_size=6,
    )
)
@settings(max_examples=60, deadline=None)
def test_any_shapes(tmp_path_factory, specs):
    path = tmp_path_factory.mktemp("any") / "file"
    values = {
        f"{i}": np.ones(shape, numpy_dtype(dtype))
        for i, (dtype, shape) in enumerate(specs)
    }
    write(path, values)
    assert_equal(read(path), values)


def test_safetensors_reads_it_and_the_widest_come_first_so_are_aligned(path):
    write(path, arrays())
    assert_equal(read(path), arrays())
    with safetensors.safe_open(path, "np") as file:
        assert set(file.keys()) == set(arrays())
        for name, value in arrays().items():
            if value.dtype != ml_dtypes.bfloat16:
                np.testing.assert_array_equal(file.get_tensor(name), value)
    header, start = parse(path.read_bytes())
    assert start % 8 == 0
    for name, value in arrays().items():
        assert header[name]["data_offsets"][0] % value.dtype.itemsize == 0


def test_nothing_is_left_on_an_error(tmp_path, path):
    path.write_text("before")
    entries = {"x": Entry((2,), "float32"), "y": Entry((), "int8")}
    halves = np.ones((2, 1), "float32")
    for match, array, overwrite in (
        (r"Missing: \['y'\]", halves[:, 0], True),
        (r"Missing: \['y'\]", iter(halves), True),
        ("Entry `x` must be an array", np.ones(2), True),
        ("Entry `x` must be an array", np.ones(3, "float32"), True),
        ("Entry `x` must be an array", halves, True),
        ("whole, 8 bytes. Received: 4", iter(halves[:1]), True),
        ("whole, 8 bytes. Received: 12", iter(np.ones((3, 1), "f4")), True),
        ("overwrite=True", halves[:, 0], False),
    ):
        with pytest.raises((ValueError, FileExistsError), match=match):
            write_all(path, FORMAT, 1, entries, [("x", array)], overwrite)
    with pytest.raises(ValueError, match="no entry for an array 'z'"):
        write_all(path, FORMAT, 1, entries, [("z", halves)])
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_text() == "before"


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"": Entry((), "int8")}, "printable"),
        ({"a\nb": Entry((), "int8")}, "printable"),
        ({"x": Entry((), "complex64")}, "dtypes"),
        ({f"{i:01000}": Entry((), "int8") for i in range(10_000)}, "10000 ent"),
    ],
    ids=["empty", "newline", "dtype", "many"],
)
def test_entries_that_a_file_cannot_hold(path, entries, match):
    with pytest.raises(ValueError, match=match):
        write_all(path, FORMAT, 1, entries, [])


# Mutated files. `pack` makes a file of a header and data whose checksums are
# right, so that only what a test changed is wrong.


def parse(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), 8 + length


def with_length(text):
    return len(text).to_bytes(8, "little") + text


def pack(header, data):
    """Return a file of a header, with its right checksum, and data."""
    metadata = header.get("__metadata__")
    is_signed = isinstance(metadata, dict) and "header_sha256" in metadata
    if is_signed:
        metadata["header_sha256"] = "0" * 64
    text = with_length(json.dumps(header).encode())
    if is_signed:
        digest = hashlib.sha256(text).hexdigest()
        key = b'_sha256": "'
        text = text.replace(key + b"0" * 64, key + digest.encode())
    return text + data


def bytes_of(path, values):
    """Return the bytes of a file of these arrays, which is gone then."""
    write(path, values)
    data = path.read_bytes()
    path.unlink()
    return data


@pytest.fixture
def data(path):
    return bytes_of(path, arrays())


def assert_refused(path, data, match="."):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=match) as error:
        reader_of(path)
    message = str(error.value)
    assert f"Received: filepath={str(path)!r}" in message
    assert len(message) < 1000
    assert os.listdir(path.parent) == [path.name]


def test_files_that_are_shorter_or_longer(path, data):
    _, start = parse(data)
    cuts = {*range(9), start - 1, start, start + 1, len(data) - 1}
    cuts.update(range(9, len(data), 97))
    for cut in sorted(cuts):
        assert_refused(path, data[:cut])
    # Before 0.6 safetensors has words of its own.
    words = "not fully covered|MetadataIncompleteBuffer"
    assert_refused(path, data + b"\0", words)
    assert_refused(path, b"\0" + data)


def test_flipped_bits(path, data):
    header, start = parse(data)
    places = dict.fromkeys([*range(9), *range(9, start, 23)], ".")
    places |= dict.fromkeys(range(start, len(data), 3), "checksum|0 and 1")
    for name in arrays():
        begin, end = header[name]["data_offsets"]
        if begin < end:
            places[start + begin] = f"(checksum of|Entry) `{name}`"
    for place, match in places.items():
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        assert_refused(path, bytes(changed), match)


def test_swapped_entries(path):
    one, two = np.ones(4, "float32"), np.arange(4, dtype="float32")
    data = bytes_of(path, {"one": one, "two": two})
    header, start = parse(data)
    moved = data[:start] + data[start + 16 :] + data[start : start + 16]
    assert_refused(path, moved, "checksum of `one`")
    header["one"], header["two"] = header["two"], header["one"]
    swapped = with_length(json.dumps(header).encode()) + data[start:]
    assert_refused(path, swapped, "checksum of the header")
    # With a header that is right in itself.
    assert_refused(path, pack(header, data[start:]), "checksum of `one`")


def set_entry(name, **values):
    return lambda header: header[name].update(values)


set_metadata = functools.partial(set_entry, "__metadata__")
set_matrix = functools.partial(set_entry, "a/matrix")
set_empty = functools.partial(set_entry, "e/empty")


def set_each(field, *values):
    """Return a change of the matrix for each of these values of a field."""
    return [set_matrix(**{field: value}) for value in values]


def put_matrix(value):
    return lambda header: header.update({"a/matrix": value})


def edit_checksums(change):
    def edited(header):
        checksums = json.loads(header["__metadata__"]["sha256"])
        change(checksums)
        header["__metadata__"]["sha256"] = json.dumps(checksums)

    return edited


def set_checksum(value):
    return edit_checksums(lambda sums: sums.update({"a/matrix": value}))


def rename(new):
    def change(header):
        header[new] = header.pop("e/empty")
        edit_checksums(lambda s: s.update({new: s.pop("e/empty")}))(header)

    return change


def drop(*keys):
    def change(header):
        for key in keys[:-1]:
            header = header[key]
        del header[keys[-1]]

    return change


OTHER = "safetensors file of another program"
INVALID = "header is not valid"
DTYPE = "Entry `a/matrix` must have one of the dtypes"
EMPTY = "Entry `e/empty` must have one of the dtypes"
NAME = "1024 printable characters"
# What the error says, and changes of the header.
HOSTILE = {
    OTHER: [
        drop("__metadata__"),
        lambda header: header.update(__metadata__=None),
        drop("__metadata__", "sha256"),
        drop("__metadata__", "header_sha256"),
    ],
    "state format": [
        drop("__metadata__", "format"),
        set_metadata(format="other"),
        drop("__metadata__", "version"),
        *(set_metadata(version=x) for x in ("4", "3.0", "-3")),
    ],
    "one checksum for each entry": [
        set_metadata(sha256=text) for text in ("{", "[" * 100_000, "[]", "{}")
    ],
    "checksum of `a/matrix` does not match": [
        set_checksum(value) for value in (0, [], "00", "A" * 64, "1" * 64)
    ],
    # The safetensors library finds these.
    INVALID: [
        lambda header: header.update(__metadata__=[]),
        set_metadata(format=1),
        set_metadata(version=["3"]),
        *(put_matrix(value) for value in ([], None, "F32")),
        drop("a/matrix"),
        drop("a/matrix", "dtype"),
        drop("a/matrix", "data_offsets"),
        *set_each("dtype", "F31", "float32", "F64", ["F32"], "F" * 10**6),
        # Other than the offsets, no sizes, no list, no list of sizes, huge.
        *set_each("shape", [4, 4], [-3, -4], [3.0, 4.0], [True, 12], "34"),
        *set_each("shape", {"3": 4}, ["3", "4"], [[3, 4]], [2**62 + 3, 4]),
        set_empty(shape=[3, 1]),
        set_empty(shape=[0, 10**4000]),
        # Wrong order, type or number, places outside the file, overlaps.
        *set_each("data_offsets", [56, 8], [-40, 8], [8.0, 56.0], [8], None),
        *set_each("data_offsets", [10**6, 10**6 + 48], [2**70, 2**70 + 48]),
        *set_each("data_offsets", [4, 52], [0, 48]),
        set_empty(data_offsets=[20, 20]),
        rename("\ud800"),
    ],
    # What the library lets pass, or some of its versions.
    DTYPE: [
        put_matrix(["F32", [3, 4], [8, 56]]),
        set_matrix(dtype="F4", shape=[96]),
        set_matrix(dtype="C64", shape=[6]),
        set_matrix(dtype={"F32": None}),
        set_matrix(shape=[1] * 33 + [12]),
        set_matrix(shape=[1] * 10**5 + [12]),
    ],
    EMPTY: [set_empty(shape=[0, 2**62])],
    NAME: [rename(x) for x in ("", "a\x00b", "a\nb", "a\u202eb", "x" * 10**6)],
}


@pytest.mark.parametrize("match", HOSTILE)
def test_hostile_headers(path, data, match):
    for change in HOSTILE[match]:
        header, start = parse(data)
        change(header)
        # What safetensors says of a dtype, where it does not know it either.
        known = "|InvalidHeaderDeserialization" if match == DTYPE else ""
        assert_refused(path, pack(header, data[start:]), match + known)


EMPTY_ENTRY = b'"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}'


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"{", b"[]", b"null", b"NaN", b'"\xff"', b"{}{}", b"{} x"),
        *(b"\xef\xbb\xbf{}", b"1" * 10**5, b"[" * 10**6, b'{"a":' * 10**6),
        b'{"a": 1, "a": 1}',
        b"{%s, %s}" % (EMPTY_ENTRY, EMPTY_ENTRY),
        b'{"__metadata__": {"b": "", "b": ""}}',
        b"\x80\x04K\x01.",  # a pickle
        b"PK\x03\x04",  # a zip
    ],
    ids=lambda text: str(text[:20]),
)
def test_headers_that_are_no_json_object(path, text):
    assert_refused(path, with_length(text), "header is not valid")


def test_lengths_of_the_header(path, data, monkeypatch):
    for length in (2**64 - 1, 2**63, 2**40, len(data), len(data) - 7):
        changed = length.to_bytes(8, "little") + data[8:]
        assert_refused(path, changed, "must take at most")
    # One that is too long is not parsed.
    monkeypatch.setattr(safetensors, "safe_open", None)
    with open(path, "wb") as file:
        file.write((2**24 + 8).to_bytes(8, "little"))
        file.truncate(2**24 + 100)
    with pytest.raises(ValueError, match="must take at most"):
        reader_of(path)


def test_many_values_of_json_are_not_read(path):
    text = b"[" + b"[]," * 4 * 10**6 + b"[]]"
    floats = np.ones(1, "float32")
    write(path, {"x": np.frombuffer(text, "uint8"), "floats": floats})
    with reader_of(path) as reader:
        with pytest.raises(ValueError, match="Entry `floats` must be"):
            reader.read_json("floats")
        with pytest.raises(ValueError, match="JSON that takes"):
            reader.read_json("x")
    # Nor in a header, before safetensors sees it.
    text = b'{"__metadata__": {"format": "x"}, "a": ' + text + b"}"
    path.write_bytes(with_length(text))
    assert file_kinds.metadata_of(path) == {}
    with pytest.raises(ValueError, match="JSON that takes"):
        reader_of(path)
    with pytest.raises(ValueError, match="JSON that takes"):
        bounded_json.json_array([[]] * 2 * 10**6)
    assert bounded_json.json_array(["token"] * 10**6).size > 10**6


def test_a_wrong_checksum(path, data):
    header, start = parse(data)
    for checksum in ("0" * 64, "1" * 64, "", "x", "0", "\\" * 64):
        header["__metadata__"]["header_sha256"] = checksum
        changed = with_length(json.dumps(header).encode()) + data[start:]
        assert_refused(path, changed, "checksum of the header")


def test_booleans_are_0_and_1(path):
    data = bytes([0, 1, 2])
    data = bytes_of(path, {"b": np.frombuffer(data, "uint8")})
    header, start = parse(data)
    header["b"]["dtype"] = "BOOL"
    assert_refused(path, pack(header, data[start:]), "other than 0 and 1")


def test_a_file_that_shrinks_while_it_is_open(path):
    write(path, arrays())
    with reader_of(path) as reader:
        os.truncate(path, 100)
        with pytest.raises(ValueError, match="`f/bytes` ends early"):
            reader.read("f/bytes")
