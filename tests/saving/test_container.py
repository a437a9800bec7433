"""The container: exact arrays, whole files, and no mutated file gets in."""

import hashlib
import json
import os
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_weightmods.saving import container
from keras_weightmods.saving.container import Entry, Reader, Writer

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


def write(path, values, version=VERSION):
    entries = {k: Entry(v.shape, v.dtype.name) for k, v in values.items()}
    with Writer(path, FORMAT, version, entries) as writer:
        for name, value in values.items():
            writer.write(name, value)


def read(path):
    with Reader(path, FORMAT, versions=(VERSION,)) as reader:
        return {name: reader.read(name) for name in reader.entries}


def assert_equal(received, expected):
    assert set(received) == set(expected)
    for name, value in expected.items():
        assert received[name].dtype == value.dtype
        assert received[name].shape == value.shape
        assert received[name].tobytes() == value.tobytes()


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
    safetensors = pytest.importorskip("safetensors")
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
        with pytest.raises(ValueError, match=r"Entry 'x' must be an array"):
            with Writer(path, FORMAT, 1, entries) as writer:
                writer.write("x", wrong)
    for name in ("", "a\nb", "x" * 1025):
        with pytest.raises(ValueError, match="printable"):
            Writer(path, FORMAT, 1, {name: Entry((), "int8")})
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_text() == "before"


def test_writer_refuses_more_entries_than_a_header_holds(tmp_path):
    entries = {f"{i:01000}": Entry((), "int8") for i in range(10_000)}
    with pytest.raises(ValueError, match="10000 entries"):
        Writer(tmp_path / "file", FORMAT, 1, entries)


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


# Mutated files. `pack` makes a file of a header and data with hashes that are
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
        text = text.replace(b'_sha256": "' + b"0" * 64, digest_bytes(digest))
    return prefix + text + data


def digest_bytes(digest):
    return b'_sha256": "' + digest.encode()


def original(tmp_path):
    path = tmp_path / "original"
    write(path, arrays())
    data = path.read_bytes()
    path.unlink()
    return data


def assert_refused(path, data, match="."):
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"Entry '|The header|The last entry"
    ) as e:
        Reader(path, FORMAT, versions=(VERSION,))
    assert re.search(match, str(e.value)), str(e.value)
    assert repr(str(path)) in str(e.value)
    assert len(str(e.value)) < 2000
    assert os.listdir(path.parent) == [path.name]


def test_pack_of_an_unchanged_header_is_the_file(tmp_path):
    data = original(tmp_path)
    header, start = parse(data)
    path = tmp_path / "file"
    path.write_bytes(pack(header, data[start:]))
    assert_equal(read(path), arrays())


def test_truncated_files(tmp_path):
    data = original(tmp_path)
    _, start = parse(data)
    cuts = {*range(9), start - 1, start, start + 1, len(data) - 1}
    cuts.update(range(9, len(data), 37))
    for cut in sorted(cuts):
        assert_refused(tmp_path / "file", data[:cut])


def test_longer_files(tmp_path):
    data = original(tmp_path)
    assert_refused(tmp_path / "file", data + b"\0", "1 bytes follow")
    assert_refused(tmp_path / "file", b"\0" + data)


def test_flipped_bits(tmp_path):
    data = original(tmp_path)
    _, start = parse(data)
    for place in [*range(9), *range(9, start, 11), *range(start, len(data))]:
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        assert_refused(tmp_path / "file", bytes(changed))


def test_a_flipped_bit_of_an_array_names_the_entry(tmp_path):
    data = original(tmp_path)
    header, start = parse(data)
    for name in arrays():
        begin, end = header[name]["data_offsets"]
        if begin == end:
            continue
        changed = bytearray(data)
        changed[start + begin] ^= 1
        assert_refused(
            tmp_path / "file", bytes(changed), f"Entry '{name}' .*SHA-256"
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
    assert_refused(tmp_path / "file", names, "header .*SHA-256")
    moved = data[:start] + data[start + 16 :] + data[start : start + 16]
    assert_refused(tmp_path / "file", moved, "Entry 'one' .*SHA-256")
    # With a header that is right in itself.
    header["one"], header["two"] = header["two"], header["one"]
    assert_refused(
        tmp_path / "file", pack(header, data[start:]), "'one' .*SHA-256"
    )


def set_entry(name, **values):
    return lambda header: header[name].update(values)


def set_metadata(**values):
    return lambda header: header["__metadata__"].update(values)


def rename(new):
    def change(header):
        header[new] = header.pop("e/empty")
        hashes = json.loads(header["__metadata__"]["sha256"])
        hashes[new] = hashes.pop("e/empty")
        header["__metadata__"]["sha256"] = json.dumps(hashes)

    return change


def set_hash(value):
    def change(header):
        hashes = json.loads(header["__metadata__"]["sha256"])
        hashes["a/matrix"] = value
        header["__metadata__"]["sha256"] = json.dumps(hashes)

    return change


MATRIX, EMPTY = "Entry 'a/matrix'", "Entry 'e/empty'"
HOSTILE = {
    "no metadata": (lambda h: h.pop("__metadata__"), "format"),
    "metadata list": (lambda h: h.update(__metadata__=[]), "format"),
    "metadata null": (lambda h: h.update(__metadata__=None), "format"),
    "no format": (lambda h: h["__metadata__"].pop("format"), "format"),
    "other format": (set_metadata(format="other"), "format"),
    "format int": (set_metadata(format=1), "format"),
    "no version": (lambda h: h["__metadata__"].pop("version"), "version"),
    "version 4": (set_metadata(version="4"), "later release"),
    "version int": (set_metadata(version=3), "version"),
    "version float": (set_metadata(version="3.0"), "version"),
    "version -3": (set_metadata(version="-3"), "version"),
    "version list": (set_metadata(version=["3"]), "version"),
    "no hashes": (lambda h: h["__metadata__"].pop("sha256"), "metadata"),
    "no checksum": (
        lambda h: h["__metadata__"].pop("header_sha256"),
        "metadata",
    ),
    "more metadata": (set_metadata(code="print()"), "metadata"),
    "metadata int": (set_metadata(sha256=1), "metadata"),
    "hashes no JSON": (set_metadata(sha256="{"), "SHA-256 as JSON"),
    "hashes list": (set_metadata(sha256="[]"), "one SHA-256"),
    "hashes deep": (set_metadata(sha256="[" * 100_000), "nested"),
    "hashes empty": (set_metadata(sha256="{}"), "one SHA-256"),
    "hash short": (set_hash("00"), "one SHA-256"),
    "hash upper": (set_hash("A" * 64), "one SHA-256"),
    "hash int": (set_hash(0), "one SHA-256"),
    "hash other": (set_hash("1" * 64), MATRIX),
    "entry list": (lambda h: h.update({"a/matrix": []}), MATRIX),
    "entry null": (lambda h: h.update({"a/matrix": None}), MATRIX),
    "entry text": (lambda h: h.update({"a/matrix": "F32"}), MATRIX),
    "entry missing": (lambda h: h.pop("a/matrix"), "Entry '"),
    "entry more keys": (set_entry("a/matrix", code=1), MATRIX),
    "no dtype": (lambda h: h["a/matrix"].pop("dtype"), MATRIX),
    "no shape": (lambda h: h["a/matrix"].pop("shape"), MATRIX),
    "no offsets": (lambda h: h["a/matrix"].pop("data_offsets"), MATRIX),
    "dtype unknown": (set_entry("a/matrix", dtype="F31"), MATRIX),
    "dtype object": (set_entry("a/matrix", dtype="O"), MATRIX),
    "dtype numpy": (set_entry("a/matrix", dtype="float32"), MATRIX),
    "dtype long": (set_entry("a/matrix", dtype="F" * 10**6), MATRIX),
    "dtype list": (set_entry("a/matrix", dtype=["F32"]), MATRIX),
    "dtype null": (set_entry("a/matrix", dtype=None), MATRIX),
    "dtype wider": (set_entry("a/matrix", dtype="F64"), MATRIX),
    "shape other": (set_entry("a/matrix", shape=[4, 4]), MATRIX),
    "shape reversed": (set_entry("e/empty", shape=[3, 1]), EMPTY),
    "shape negative": (set_entry("a/matrix", shape=[-3, -4]), MATRIX),
    "shape float": (set_entry("a/matrix", shape=[3.0, 4.0]), MATRIX),
    "shape text": (set_entry("a/matrix", shape="34"), MATRIX),
    "shape texts": (set_entry("a/matrix", shape=["3", "4"]), MATRIX),
    "shape bools": (set_entry("a/matrix", shape=[True, 12]), MATRIX),
    "shape nested": (set_entry("a/matrix", shape=[[3, 4]]), MATRIX),
    "shape null": (set_entry("a/matrix", shape=None), MATRIX),
    "shape dict": (set_entry("a/matrix", shape={"3": 4}), MATRIX),
    "shape huge": (set_entry("a/matrix", shape=[2**62, 2**62]), MATRIX),
    "shape wraps": (set_entry("a/matrix", shape=[2**62 + 3, 4]), MATRIX),
    "shape huge empty": (set_entry("e/empty", shape=[0, 2**62]), EMPTY),
    "shape digits": (set_entry("e/empty", shape=[0, 10**4000]), EMPTY),
    "shape rank": (set_entry("a/matrix", shape=[1] * 33 + [12]), MATRIX),
    "shape long": (set_entry("a/matrix", shape=[1] * 10**5), MATRIX),
    "offsets reversed": (set_entry("a/matrix", data_offsets=[56, 8]), MATRIX),
    "offsets negative": (set_entry("a/matrix", data_offsets=[-40, 8]), MATRIX),
    "offsets float": (set_entry("a/matrix", data_offsets=[8.0, 56.0]), MATRIX),
    "offsets bools": (
        set_entry("e/empty", data_offsets=[False, False]),
        EMPTY,
    ),
    "offsets three": (set_entry("a/matrix", data_offsets=[8, 56, 1]), MATRIX),
    "offsets one": (set_entry("a/matrix", data_offsets=[8]), MATRIX),
    "offsets null": (set_entry("a/matrix", data_offsets=None), MATRIX),
    "offsets outside": (
        set_entry("a/matrix", data_offsets=[10**6, 10**6 + 48]),
        "too short",
    ),
    "offsets absurd": (
        set_entry("a/matrix", data_offsets=[2**70, 2**70 + 48]),
        MATRIX,
    ),
    "offsets overlap": (
        set_entry("a/matrix", data_offsets=[4, 52]),
        "must begin at byte",
    ),
    "offsets overlap all": (
        set_entry("a/matrix", data_offsets=[0, 48]),
        "must begin at byte",
    ),
    "offsets inside": (
        set_entry("e/empty", data_offsets=[20, 20]),
        "must begin at byte",
    ),
    "name empty": (rename(""), "printable"),
    "name control": (rename("a\x00b"), "printable"),
    "name newline": (rename("a\nb"), "printable"),
    "name surrogate": (rename("\ud800"), "printable"),
    "name bidi": (rename("a\u202eb"), "printable"),
    "name long": (rename("x" * 10**6), "printable"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(tmp_path, name):
    change, match = HOSTILE[name]
    data = original(tmp_path)
    header, start = parse(data)
    change(header)
    assert_refused(tmp_path / "file", pack(header, data[start:]), match)


def test_headers_that_are_no_json_object(tmp_path):
    path = tmp_path / "file"
    texts = {
        b"": "JSON",
        b" ": "JSON",
        b"{": "JSON",
        b"[]": "object",
        b"null": "object",
        b"NaN": "object",
        b"1e999": "object",
        b'"\xff"': "JSON",
        b"\xef\xbb\xbf{}": "JSON",
        b"{}{}": "JSON",
        b"{} x": "JSON",
        b"[" * 10**6: "nested",
        b'{"a":' * 10**6: "nested",
        b"1" * 10**5: "JSON",
        b'{"a": 1, "a": 1}': "twice",
        b'{"__metadata__": {}, "__metadata__": {}}': "twice",
        b"\x80\x04K\x01.": "JSON",  # a pickle
        b"PK\x03\x04": "JSON",  # a zip
    }
    for text, match in texts.items():
        assert_refused(path, pack({}, b"", text, fix=False), match)


def test_lengths_of_the_header(tmp_path):
    path = tmp_path / "file"
    data = original(tmp_path)
    for length in (2**64 - 1, 2**63, 2**40, len(data), len(data) - 7):
        changed = length.to_bytes(8, "little") + data[8:]
        assert_refused(path, changed, "header must take at most")
    # A file long enough for a header that is too long.
    with open(path, "wb") as file:
        file.write((2**24 + 8).to_bytes(8, "little"))
        file.truncate(2**24 + 100)
    with pytest.raises(ValueError, match="header must take at most"):
        Reader(path, FORMAT, (VERSION,))


def test_a_wrong_checksum(tmp_path):
    data = original(tmp_path)
    header, start = parse(data)
    for checksum in ("0" * 64, "1" * 64, "", "x", "0", "\\" * 64):
        header["__metadata__"]["header_sha256"] = checksum
        changed = pack(header, data[start:], fix=False)
        assert_refused(tmp_path / "file", changed, "header does not have")


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
    assert_refused(tmp_path / "file", pack(header, data), "than 0 and 1")


def test_a_file_that_shrinks_while_it_is_open(tmp_path):
    path = tmp_path / "file"
    write(path, arrays())
    with Reader(path, FORMAT, (VERSION,)) as reader:
        os.truncate(path, 100)
        with pytest.raises(ValueError, match="'f/bytes' ends early"):
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
            with pytest.raises(ValueError, match=f"Entry '{name}' must be"):
                reader.read_json(name)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Reader(tmp_path / "none", FORMAT, (VERSION,))
    with pytest.raises(OSError):
        Reader(tmp_path, FORMAT, (VERSION,))
