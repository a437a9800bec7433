"""The container: exact arrays, whole files, and no mutated file gets in."""

import hashlib
import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_weightmods.saving import container
from keras_weightmods.saving.container import Entry, Reader, Writer
from tests.models import assert_same_bits

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


def write(path, values):
    container.write_arrays(path, FORMAT, VERSION, values)


def read(path):
    with Reader(path, FORMAT, versions=(VERSION,)) as reader:
        return {name: reader.read(name) for name in reader.entries}


def assert_equal(received, expected):
    assert set(received) == set(expected)
    assert_same_bits([received[name] for name in expected], expected.values())


def test_round_trip_is_exact(tmp_path):
    write(tmp_path / "file", arrays())
    assert_equal(read(tmp_path / "file"), arrays())
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("dtype", container.DTYPES)
def test_every_dtype(tmp_path, dtype):
    rng = np.random.default_rng(1)
    kind = container.numpy_dtype(dtype)
    value = rng.integers(0, 2, size=(3, 2)).astype(kind)
    write(tmp_path / "file", {"x": value})
    assert_equal(read(tmp_path / "file"), {"x": value})


@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(container.DTYPES)),
            st.lists(st.integers(0, 4), max_size=4),
        ),
        max_size=6,
    )
)
@settings(max_examples=40, deadline=None)
def test_any_shapes(tmp_path_factory, specs):
    path = tmp_path_factory.mktemp("any") / "file"
    values = {
        f"{i}": np.ones(shape, container.numpy_dtype(dtype))
        for i, (dtype, shape) in enumerate(specs)
    }
    write(path, values)
    assert_equal(read(path), values)


def test_safetensors_reads_it(tmp_path):
    write(tmp_path / "file", arrays())
    with safetensors.safe_open(tmp_path / "file", "np") as file:
        assert set(file.keys()) == set(arrays())
        for name, value in arrays().items():
            if value.dtype != ml_dtypes.bfloat16:
                np.testing.assert_array_equal(file.get_tensor(name), value)


def test_the_widest_come_first_so_that_each_is_aligned(tmp_path):
    write(tmp_path / "file", arrays())
    data = (tmp_path / "file").read_bytes()
    header, start = parse(data)
    assert start % 8 == 0
    for name, tells in header.items():
        if name != "__metadata__":
            itemsize = arrays()[name].dtype.itemsize
            assert tells["data_offsets"][0] % itemsize == 0


def test_writer_leaves_nothing_on_an_error(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    entries = {"x": Entry((2,), "float32"), "y": Entry((), "int8")}
    with pytest.raises(ValueError, match=r"Missing: \['y'\]"):
        with Writer(path, FORMAT, 1, entries) as writer:
            writer.write("x", np.ones(2, "float32"))
    with pytest.raises(KeyboardInterrupt):
        with Writer(path, FORMAT, 1, entries):
            raise KeyboardInterrupt
    for wrong in (np.ones(2), np.ones(3, "float32"), np.ones((2, 1), "f4")):
        with pytest.raises(ValueError, match=r"Entry `x` must be an array"):
            with Writer(path, FORMAT, 1, entries) as writer:
                writer.write("x", wrong)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        Writer(path, FORMAT, 1, entries, overwrite=False)
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_text() == "before"


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"": Entry((), "int8")}, "printable"),
        ({"a\nb": Entry((), "int8")}, "printable"),
        ({"x" * 1025: Entry((), "int8")}, "printable"),
        ({"x": Entry((), "complex64")}, "dtypes"),
        ({f"{i:01000}": Entry((), "int8") for i in range(10_000)}, "10000 ent"),
    ],
    ids=["empty", "newline", "long", "dtype", "many"],
)
def test_writer_refuses(tmp_path, entries, match):
    with pytest.raises(ValueError, match=match):
        Writer(tmp_path / "file", FORMAT, 1, entries)


def test_writer_refuses_what_is_no_place_for_a_file(tmp_path):
    for wrong in (tmp_path, tmp_path / "none" / "file"):
        with pytest.raises(ValueError, match="`filepath` must be a file"):
            write(wrong, arrays())
    container.write_arrays(tmp_path / "new", FORMAT, 1, {}, overwrite=False)
    assert os.listdir(tmp_path) == ["new"]


def test_the_file_has_the_rights_of_any_new_file(tmp_path):
    write(tmp_path / "file", arrays())
    (tmp_path / "other").write_text("")
    modes = {os.stat(tmp_path / name).st_mode for name in ("file", "other")}
    assert len(modes) == 1


def test_a_link_stays_one(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write(tmp_path / "link", arrays())
    assert (tmp_path / "link").is_symlink()
    assert_equal(read(tmp_path / "file"), arrays())


def test_read_returns_memory_of_its_own(tmp_path):
    write(tmp_path / "file", arrays())
    with Reader(tmp_path / "file", FORMAT, (VERSION,)) as reader:
        first, second = reader.read("a/matrix"), reader.read("a/matrix")
    first[:] = 0
    np.testing.assert_array_equal(second, arrays()["a/matrix"])


# Mutated files. `pack` makes a file of a header and data whose checksums are
# right, so that only what a test changed is wrong.


def parse(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), 8 + length


def pack(header, data, text=None, fix=True):
    header = json.loads(json.dumps(header))
    metadata = header.get("__metadata__")
    if fix and isinstance(metadata, dict) and "header_sha256" in metadata:
        metadata["header_sha256"] = "0" * 64
    text = json.dumps(header).encode() if text is None else text
    prefix = len(text).to_bytes(8, "little")
    if fix:
        digest = hashlib.sha256(prefix + text).hexdigest()
        key = b'_sha256": "'
        text = text.replace(key + b"0" * 64, key + digest.encode())
    return prefix + text + data


@pytest.fixture
def data(tmp_path):
    """The bytes of a file of `arrays()`."""
    path = tmp_path / "original"
    write(path, arrays())
    data = path.read_bytes()
    path.unlink()
    return data


def assert_refused(path, data, match="."):
    path.write_bytes(data)
    with pytest.raises(ValueError, match=match) as error:
        Reader(path, FORMAT, versions=(VERSION,))
    message = str(error.value)
    assert f"Received: filepath={str(path)!r}" in message
    assert len(message) < 1000
    assert os.listdir(path.parent) == [path.name]


def test_pack_of_an_unchanged_header_is_the_file(tmp_path, data):
    header, start = parse(data)
    path = tmp_path / "file"
    path.write_bytes(pack(header, data[start:]))
    assert_equal(read(path), arrays())


def test_truncated_files(tmp_path, data):
    _, start = parse(data)
    cuts = {*range(9), start - 1, start, start + 1, len(data) - 1}
    cuts.update(range(9, len(data), 37))
    for cut in sorted(cuts):
        assert_refused(tmp_path / "file", data[:cut])


def test_longer_files(tmp_path, data):
    assert_refused(tmp_path / "file", data + b"\0", "not fully covered")
    assert_refused(tmp_path / "file", b"\0" + data)


def test_flipped_bits(tmp_path, data):
    _, start = parse(data)
    for place in [*range(9), *range(9, start, 11), *range(start, len(data))]:
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        assert_refused(tmp_path / "file", bytes(changed))


def test_a_flipped_bit_of_an_array_names_the_entry(tmp_path, data):
    header, start = parse(data)
    for name in arrays():
        begin, end = header[name]["data_offsets"]
        if begin == end:
            continue
        changed = bytearray(data)
        changed[start + begin] ^= 1
        assert_refused(
            tmp_path / "file", bytes(changed), f"checksum of `{name}`"
        )


def test_swapped_entries(tmp_path):
    values = {
        "one": np.ones(4, "float32"),
        "two": np.arange(4, dtype="float32"),
    }
    write(tmp_path / "original", values)
    data = (tmp_path / "original").read_bytes()
    (tmp_path / "original").unlink()
    header, start = parse(data)
    names = data.replace(b'"one": {', b'"???": {').replace(
        b'"two": {', b'"one": {'
    )
    names = names.replace(b'"???": {', b'"two": {')
    assert_refused(tmp_path / "file", names, "checksum of the header")
    moved = data[:start] + data[start + 16 :] + data[start : start + 16]
    assert_refused(tmp_path / "file", moved, "checksum of `one`")
    # With a header that is right in itself.
    header["one"], header["two"] = header["two"], header["one"]
    assert_refused(
        tmp_path / "file", pack(header, data[start:]), "checksum of `one`"
    )


def set_entry(name, **values):
    return lambda header: header[name].update(values)


def set_metadata(**values):
    return lambda header: header["__metadata__"].update(values)


def rename(new):
    def change(header):
        header[new] = header.pop("e/empty")
        checksums = json.loads(header["__metadata__"]["sha256"])
        checksums[new] = checksums.pop("e/empty")
        header["__metadata__"]["sha256"] = json.dumps(checksums)

    return change


def set_checksum(value):
    def change(header):
        checksums = json.loads(header["__metadata__"]["sha256"])
        checksums["a/matrix"] = value
        header["__metadata__"]["sha256"] = json.dumps(checksums)

    return change


def set_matrix(**values):
    return set_entry("a/matrix", **values)


def set_empty(**values):
    return set_entry("e/empty", **values)


def drop(*keys):
    def change(header):
        for key in keys[:-1]:
            header = header[key]
        del header[keys[-1]]

    return change


# {what the error says: {name: change of the header}}
HOSTILE = {
    "state format": {
        "no metadata": drop("__metadata__"),
        "metadata null": lambda h: h.update(__metadata__=None),
        "no format": drop("__metadata__", "format"),
        "other format": set_metadata(format="other"),
    },
    "states version": {
        "no version": drop("__metadata__", "version"),
        "version 4": set_metadata(version="4"),
        "version float": set_metadata(version="3.0"),
        "version -3": set_metadata(version="-3"),
    },
    "must have the metadata": {
        "no checksums": drop("__metadata__", "sha256"),
        "no header checksum": drop("__metadata__", "header_sha256"),
        "more metadata": set_metadata(code="print()"),
    },
    "one checksum for each entry": {
        "checksums no JSON": set_metadata(sha256="{"),
        "checksums deep": set_metadata(sha256="[" * 100_000),
        "checksums list": set_metadata(sha256="[]"),
        "checksums empty": set_metadata(sha256="{}"),
    },
    "checksum of `a/matrix` does not match": {
        "checksum int": set_checksum(0),
        "checksum list": set_checksum([]),
        "checksum short": set_checksum("00"),
        "checksum upper": set_checksum("A" * 64),
        "checksum other": set_checksum("1" * 64),
    },
    # As the safetensors library finds.
    "header is not valid": {
        "metadata list": lambda h: h.update(__metadata__=[]),
        "format int": set_metadata(format=1),
        "version int": set_metadata(version=3),
        "version list": set_metadata(version=["3"]),
        "metadata int": set_metadata(sha256=1),
        "entry empty": lambda h: h.update({"a/matrix": []}),
        "entry null": lambda h: h.update({"a/matrix": None}),
        "entry text": lambda h: h.update({"a/matrix": "F32"}),
        "entry missing": drop("a/matrix"),
        "no dtype": drop("a/matrix", "dtype"),
        "no shape": drop("a/matrix", "shape"),
        "no offsets": drop("a/matrix", "data_offsets"),
        "dtype unknown": set_matrix(dtype="F31"),
        "dtype object": set_matrix(dtype="O"),
        "dtype numpy": set_matrix(dtype="float32"),
        "dtype long": set_matrix(dtype="F" * 10**6),
        "dtype list": set_matrix(dtype=["F32"]),
        "dtype null": set_matrix(dtype=None),
        "dtype wider": set_matrix(dtype="F64"),
        "shape other": set_matrix(shape=[4, 4]),
        "shape reversed": set_empty(shape=[3, 1]),
        "shape negative": set_matrix(shape=[-3, -4]),
        "shape float": set_matrix(shape=[3.0, 4.0]),
        "shape text": set_matrix(shape="34"),
        "shape texts": set_matrix(shape=["3", "4"]),
        "shape bools": set_matrix(shape=[True, 12]),
        "shape nested": set_matrix(shape=[[3, 4]]),
        "shape null": set_matrix(shape=None),
        "shape dict": set_matrix(shape={"3": 4}),
        "shape huge": set_matrix(shape=[2**62, 2**62]),
        "shape wraps": set_matrix(shape=[2**62 + 3, 4]),
        "shape digits": set_empty(shape=[0, 10**4000]),
        "offsets reversed": set_matrix(data_offsets=[56, 8]),
        "offsets negative": set_matrix(data_offsets=[-40, 8]),
        "offsets float": set_matrix(data_offsets=[8.0, 56.0]),
        "offsets bools": set_empty(data_offsets=[False, False]),
        "offsets three": set_matrix(data_offsets=[8, 56, 1]),
        "offsets one": set_matrix(data_offsets=[8]),
        "offsets null": set_matrix(data_offsets=None),
        "offsets outside": set_matrix(data_offsets=[10**6, 10**6 + 48]),
        "offsets absurd": set_matrix(data_offsets=[2**70, 2**70 + 48]),
        "offsets overlap": set_matrix(data_offsets=[4, 52]),
        "offsets overlap all": set_matrix(data_offsets=[0, 48]),
        "offsets inside": set_empty(data_offsets=[20, 20]),
        "name surrogate": rename("\ud800"),
    },
    # What the library lets pass.
    "Entry `a/matrix` must have the fields": {
        "entry list": lambda h: h.update(
            {"a/matrix": ["F32", [3, 4], [8, 56]]}
        ),
        "entry more keys": set_matrix(code=1),
    },
    "Entry `a/matrix` has the unknown dtype": {
        "dtype of half a byte": set_matrix(dtype="F4", shape=[96]),
        "dtype complex": set_matrix(dtype="C64", shape=[6]),
        "dtype dict": set_matrix(dtype={"F32": None}),
    },
    "`a/matrix` has a shape that is too large": {
        "shape rank": set_matrix(shape=[1] * 33 + [12]),
        "shape long": set_matrix(shape=[1] * 10**5 + [12]),
    },
    "`e/empty` has a shape that is too large": {
        "shape huge empty": set_empty(shape=[0, 2**62])
    },
    "1024 printable characters": {
        "name empty": rename(""),
        "name control": rename("a\x00b"),
        "name newline": rename("a\nb"),
        "name bidi": rename("a\u202eb"),
        "name long": rename("x" * 10**6),
    },
}


@pytest.mark.parametrize(
    ("match", "name"),
    [(match, name) for match, changes in HOSTILE.items() for name in changes],
)
def test_hostile_headers(tmp_path, data, match, name):
    header, start = parse(data)
    HOSTILE[match][name](header)
    assert_refused(tmp_path / "file", pack(header, data[start:]), match)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b" ",
        b"{",
        b"[]",
        b"null",
        b"NaN",
        b"1e999",
        b'"\xff"',
        b"\xef\xbb\xbf{}",
        b"{}{}",
        b"{} x",
        b"[" * 10**6,
        b'{"a":' * 10**6,
        b"1" * 10**5,
        b'{"a": 1, "a": 1}',
        b'{"__metadata__": {}, "__metadata__": {}}',
        b"\x80\x04K\x01.",  # a pickle
        b"PK\x03\x04",  # a zip
    ],
    ids=lambda text: str(text[:20]),
)
def test_headers_that_are_no_json_object(tmp_path, text):
    path = tmp_path / "file"
    assert_refused(path, pack({}, b"", text, fix=False), "header is not valid")


@pytest.mark.parametrize(
    "text", [b'{"a": %s, "a": %s}', b'{"__metadata__": {"b": "", "b": ""}}']
)
def test_keys_that_appear_twice(tmp_path, text):
    entry = b'{"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}'
    text = text.replace(b"%s", entry)
    assert_refused(tmp_path / "file", pack({}, b"", text, fix=False), "twice")


def test_lengths_of_the_header(tmp_path, data):
    path = tmp_path / "file"
    for length in (2**64 - 1, 2**63, 2**40, len(data), len(data) - 7):
        changed = length.to_bytes(8, "little") + data[8:]
        assert_refused(path, changed, "must take at most")


def test_a_header_that_is_too_long_is_not_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "safe_open", None)
    path = tmp_path / "file"
    with open(path, "wb") as file:
        file.write((2**24 + 8).to_bytes(8, "little"))
        file.truncate(2**24 + 100)
    with pytest.raises(ValueError, match="must take at most"):
        Reader(path, FORMAT, (VERSION,))


def test_a_wrong_checksum(tmp_path, data):
    header, start = parse(data)
    for checksum in ("0" * 64, "1" * 64, "", "x", "0", "\\" * 64):
        header["__metadata__"]["header_sha256"] = checksum
        changed = pack(header, data[start:], fix=False)
        assert_refused(tmp_path / "file", changed, "checksum of the header")


def test_booleans_are_0_and_1(tmp_path):
    data = bytes([0, 1, 2])
    header = {
        "__metadata__": {
            "format": FORMAT,
            "version": str(VERSION),
            "sha256": json.dumps({"b": hashlib.sha256(data).hexdigest()}),
            "header_sha256": "",
        },
        "b": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]},
    }
    assert_refused(tmp_path / "file", pack(header, data), "other than 0 and 1")


def test_a_file_that_shrinks_while_it_is_open(tmp_path):
    path = tmp_path / "file"
    write(path, arrays())
    with Reader(path, FORMAT, (VERSION,)) as reader:
        os.truncate(path, 100)
        with pytest.raises(ValueError, match="`f/bytes` ends early"):
            reader.read("f/bytes")


def test_what_is_no_json(tmp_path):
    path = tmp_path / "file"
    values = {
        "bytes": np.frombuffer(b"{", "uint8"),
        "deep": np.frombuffer(b"[" * 10**5, "uint8"),
        "floats": np.ones(1, "float32"),
        "json": np.frombuffer(b'{"a": [1]}', "uint8"),
    }
    write(path, values)
    with Reader(path, FORMAT, (VERSION,)) as reader:
        assert reader.read_json("json") == {"a": [1]}
        for name in ("bytes", "deep", "floats"):
            with pytest.raises(ValueError, match=f"Entry `{name}` must be"):
                reader.read_json(name)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Reader(tmp_path / "none", FORMAT, (VERSION,))
    with pytest.raises(OSError):
        Reader(tmp_path, FORMAT, (VERSION,))
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match="not that of a regular file"):
            Reader(tmp_path / "pipe", FORMAT, (VERSION,))
