import hashlib
import json
import os
import pickle
import struct
import sys
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import load as safetensors_load

from keras_weightmods import WeightSignature
from keras_weightmods.patches import files
from tests.patches.models import make_model, make_signature


@pytest.fixture(scope="module")
def signature():
    """All kinds of tensors: float32, 4 bits per channel, statistics."""
    model = make_model()
    packed = make_signature(model, 1, depth=2, statistics="replace").quantize(
        4, per_channel=True
    )
    plain = make_signature(model, 1, depth=3, name="noise")
    # The third layer stays in float32.
    return plain.with_entries([*packed, *(e for e in plain if e.depth == 2)])


@pytest.fixture(scope="module")
def content(signature, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "good.safetensors"
    signature.save(path)
    return path.read_bytes()


def split(content):
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_round_trip(signature, tmp_path):
    for bits, each in (
        ("mixed", signature),
        *((b, signature.truncate(1).quantize(b)) for b in (8, 4, 2)),
    ):
        path = tmp_path / f"{bits}.safetensors"
        each.save(path)
        loaded = WeightSignature.load(str(path))
        assert loaded.digest == each.digest
        assert loaded.get_config() == each.get_config()
        assert loaded.nbytes == each.nbytes
        assert repr(loaded) == repr(each)
        for a, b in zip(loaded, each):
            np.testing.assert_array_equal(a.dequantized(), b.dequantized())
            assert not a.dequantized().flags.writeable or a.tensor.bits
        # Others read the tensors too; packed weights take their bits.
        tensors = safetensors_load(path.read_bytes())
        assert sum(t.nbytes for t in tensors.values()) == each.nbytes
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "2.safetensors",
        "4.safetensors",
        "8.safetensors",
        "mixed.safetensors",
    ]


def test_overwriting(signature, tmp_path):
    path = tmp_path / "a.safetensors"
    signature.save(path)
    with pytest.raises(FileExistsError, match="overwrite=False"):
        signature.truncate(1).save(path, overwrite=False)
    assert WeightSignature.load(path).digest == signature.digest
    signature.truncate(1).save(path)
    assert len(WeightSignature.load(path)) < len(signature)
    with pytest.raises(FileNotFoundError):
        signature.save(tmp_path / "nowhere" / "a.safetensors")
    with pytest.raises(FileNotFoundError):
        WeightSignature.load(tmp_path / "nowhere.safetensors")


def test_an_interrupted_save_leaves_the_old_file(
    signature, tmp_path, monkeypatch
):
    path = tmp_path / "a.safetensors"
    signature.save(path)

    def fail(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        signature.truncate(1).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert WeightSignature.load(path).digest == signature.digest


def with_config(content, change, digest=True):
    """The file with another config, and the digest that goes with it."""
    header, data = split(content)
    config = json.loads(header["__metadata__"]["signature"])
    names = [
        name
        for entry in config["entries"]
        for name in (str(entry["position"]), f"{entry['position']}.scales")
        if name in header
    ]
    change(config)
    header["__metadata__"]["signature"] = json.dumps(config)
    if digest:
        right = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name in names:
            right.update(data[slice(*header[name]["data_offsets"])])
        header["__metadata__"]["digest"] = right.hexdigest()
    return join(header, data)


def with_header(content, change):
    header, data = split(content)
    changed = change(header)
    return join(header if changed is None else changed, data)


def setter(*keys, value):
    def change(tree):
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = value

    return change


def remover(*keys):
    def change(tree):
        for key in keys[:-1]:
            tree = tree[key]
        del tree[keys[-1]]

    return change


def header_attacks():
    strange = [None, True, -1, 1.5, "0", [], {}, 2**63, 10**40, "F64"]
    for key in ("dtype", "shape", "data_offsets"):
        yield remover("0", key)
        for value in strange:
            yield setter("0", key, value=value)
    for shape in (
        [2**31, 2**31],
        [2**62],
        [-1, -18],
        [18.0],
        [True, 18],
        [0, 2**62],
        [18, "1"],
        [1] * 40,
        [[18]],
        [17],
        [19],
    ):
        yield setter("0", "shape", value=shape)
    for offsets in (
        [0, 0],
        [0, 2**62],
        [2**62, 2**62 + 9],
        [9, 0],
        [1, 10],
        [-9, 0],
        [0, 9, 9],
        [0],
        [0.0, 9.0],
        ["0", "9"],
        [[0], [9]],
    ):
        yield setter("0", "data_offsets", value=offsets)
    for dtype in ("F16", "BF16", "I8", "BOOL", "F32", "f32", "O", "pickle"):
        yield setter("0", "dtype", value=dtype)
    for name in ("0", "0.scales", "12", "__metadata__"):
        yield remover(name)
        for value in strange[:7]:
            yield setter(name, value=value)
    for extra in ("999", "0.other", "", "../0"):
        yield setter(
            extra, value={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
        )
    yield setter("0", "more", value=1)
    for key in ("format", "format_version", "signature", "digest"):
        yield remover("__metadata__", key)
        for value in ("", "2", "0" * 64, "[]", "{}", 1, None, {}):
            yield setter("__metadata__", key, value=value)


def config_attacks():
    strange = [None, True, -1, 1.5, "0", [], {}, 10**40, [[]], [{}]]
    for key in (
        "method",
        "name",
        "model_class",
        "fingerprints",
        "architecture",
        "entries",
    ):
        yield remover(key)
        for value in strange:
            if key in ("name", "model_class") and value in ("0", None):
                continue
            if key == "method" and value == "0":
                continue
            if key == "fingerprints" and value == {}:
                continue
            yield setter(key, value=value)
    yield setter("more", value=1)
    yield setter("fingerprints", "clean", value="abc")
    yield setter("fingerprints", "other", value="0" * 64)
    for key in ("position", "depth", "pull", "bits"):
        yield remover("entries", 0, key)
        for value in (None, True, -1, 10**9, 10**40, 1e300, "0", 30, 32.0):
            yield setter("entries", 0, key, value=value)
    yield setter("entries", 0, "more", value=1)
    yield setter("entries", 4, "bits", value=8)
    for place in range(3):
        for value in (None, 3, [2**40, 2**40, 3], [-1]):
            yield setter("architecture", 0, place, value=value)
    for value in ("float32x", "object", "string", "O", ""):
        yield setter("architecture", 0, 2, value=value)
    yield setter("architecture", 0, 1, value=[3, 3, 2, 1])
    yield setter("architecture", 0, 2, value="int8")


# Sound, but not what was saved.
ALTERATIONS = [
    setter("method", value="difference"),
    setter("name", value="blur"),
    setter("name", value=None),
    setter("model_class", value=None),
    setter("fingerprints", value={}),
    setter("entries", 0, "depth", value=1),
    setter("entries", 4, "pull", value=0.5),
    setter("architecture", 0, 0, value="other/kernel"),
    setter("architecture", 0, 2, value="float16"),
]


def raw_attacks(content):
    header, data = split(content)
    text = json.dumps(header)
    size = len(text.encode())
    for length in (0, 1, 7, 8, 9, 8 + size // 2, 8 + size, len(content) - 1):
        yield content[:length]
    for extra in (b"\0", b"more", content):
        yield content + extra
    for length in (
        0,
        1,
        size - 1,
        size + 1,
        len(content),
        2**31,
        2**63,
        2**64 - 1,
    ):
        yield struct.pack("<Q", length) + content[8:]
    for name in ("0", "0.scales", "__metadata__"):
        twice = json.dumps({name: header[name]})[1:-1]
        yield join(f"{{{twice}, {text[1:]}".encode(), data)
    yield join(b"[" * 100_000, data)
    yield join(b'{"a":' * 100_000, data)
    yield join(b"\xff\xfe" + text.encode(), data)
    yield join(b"null", data)
    yield join(b"[]", data)
    yield join(b"{}", b"")
    yield join(b"9" * 10_000, data)
    yield join(text.replace('"bits\\": 4', '"bits\\": NaN').encode(), data)
    yield join(text.replace('"pull\\": 1.0', '"pull\\": 1e999').encode(), data)
    yield join(text.replace(": [", ": [0, ", 1).encode(), data)
    yield pickle.dumps({"weights": [1, 2]})
    yield b"PK\x03\x04" + bytes(100)
    yield b"\x89HDF\r\n\x1a\n" + bytes(100)
    yield b"not a file of this kind at all"
    yield bytes(1000)
    # A bit turned over, everywhere.
    rng = np.random.default_rng(0)
    places = rng.integers(len(content), size=60)
    for place in (*places, *range(8), len(content) - 1, len(content) - 300):
        yield (
            content[:place]
            + bytes([content[place] ^ (1 << int(rng.integers(8)))])
            + content[place + 1 :]
        )
    # Tensors that are not finite, and codes that no quantizer writes.
    for name, value in (
        ("4", np.float32(np.nan).tobytes()),
        ("4", np.float32(np.inf).tobytes()),
        ("0.scales", np.float32(np.nan).tobytes()),
        ("0.scales", np.float32(-1).tobytes()),
        ("0", b"\xff"),
    ):
        begin = header[name]["data_offsets"][0]
        yield join(header, data[:begin] + value + data[begin + len(value) :])


def test_every_mutated_file_is_a_clean_error(content, tmp_path):
    corpus = [
        *(with_header(content, change) for change in header_attacks()),
        *(with_config(content, change) for change in config_attacks()),
        *(with_config(content, each, digest=False) for each in ALTERATIONS),
        *raw_attacks(content),
    ]
    corpus = [each for each in dict.fromkeys(corpus) if each != content]
    assert len(corpus) >= 350
    path = tmp_path / "attack.safetensors"
    for number, each in enumerate(corpus):
        path.write_bytes(each)
        try:
            WeightSignature.load(path)
        except ValueError as error:
            message = str(error)
            assert message.startswith("`path` must be a whole signature file")
            assert str(path) in message
            assert len(message) < 600
        else:
            raise AssertionError((number, each[:3000]))


def test_the_digest_covers_what_is_sound(content, tmp_path):
    path = tmp_path / "other.safetensors"
    for change in ALTERATIONS:
        path.write_bytes(with_config(content, change))
        assert len(WeightSignature.load(path)) == 14
        path.write_bytes(with_config(content, change, digest=False))
        with pytest.raises(ValueError, match="digest"):
            WeightSignature.load(path)


def test_sizes_are_checked_before_they_are_read(content, tmp_path):
    """A header that promises a terabyte takes no memory."""
    path = tmp_path / "huge.safetensors"
    huge = with_header(
        content,
        lambda header: {
            "__metadata__": header["__metadata__"],
            "0": {
                "dtype": "F32",
                "shape": [2**38],
                "data_offsets": [0, 2**40],
            },
        },
    )
    path.write_bytes(huge)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="bytes of tensors"):
            WeightSignature.load(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    # A sparse file with a header of 16 GiB, which is never read.
    with open(path, "wb") as file:
        file.write((2**34).to_bytes(8, "little"))
        file.truncate(2**34 + 8)
    with pytest.raises(ValueError, match="is over"):
        WeightSignature.load(path)


def test_what_is_no_file(tmp_path):
    with pytest.raises((ValueError, IsADirectoryError)):
        WeightSignature.load(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match="no regular file"):
            WeightSignature.load(tmp_path / "pipe")


def test_a_later_version_says_so(content, tmp_path):
    path = tmp_path / "later.safetensors"
    change = setter("__metadata__", "format_version", value="2")
    path.write_bytes(with_header(content, change))
    with pytest.raises(ValueError, match="format version is '2'"):
        WeightSignature.load(path)


def test_without_the_package(signature, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    path = tmp_path / "a.safetensors"
    for call in (lambda: signature.save(path), lambda: files._safetensors()):
        with pytest.raises(ImportError, match=r"pip install .*\[files\]"):
            call()
    assert not path.exists()
