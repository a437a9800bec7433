import functools
import operator
import os
import pickle

import numpy as np
import pytest
from safetensors.numpy import load_file

from keras_weightmods import WeightSignature
from keras_weightmods.patches import signature_file as files
from keras_weightmods.saving import bounded_json, container
from tests.models import make_signature


@pytest.fixture(scope="module")
def signature(model):
    """All kinds of tensors: float32, 4 bits per channel, statistics."""
    packed = make_signature(model, statistics="replace").quantize(4, True)
    plain = make_signature(model, depth=3, name="noise")
    # The third layer stays in float32.
    return plain.with_entries([*packed, *(e for e in plain if e.depth == 2)])


@pytest.fixture
def path(signature, tmp_path):
    path = tmp_path / "good.safetensors"
    signature.save(path)
    return path


def test_round_trip(signature, tmp_path):
    shallow = signature.truncate(1)
    for each in (signature, *(shallow.quantize(bits) for bits in (8, 4, 2))):
        path = tmp_path / "file.safetensors"
        each.save(path)
        loaded = WeightSignature.load(str(path))
        assert loaded.digest == each.digest
        assert loaded.report() == each.report()
        assert loaded.architecture == each.architecture
        assert loaded.fingerprints == each.fingerprints
        for a, b in zip(loaded, each):
            np.testing.assert_array_equal(a.dequantized(), b.dequantized())
        # Others read the tensors too; packed weights take their bits.
        arrays = load_file(path)
        del arrays["signature.json"]
        assert sum(array.nbytes for array in arrays.values()) == each.nbytes
    assert os.listdir(tmp_path) == ["file.safetensors"]


def test_overwriting(signature, path, monkeypatch):
    with pytest.raises(FileExistsError, match="overwrite=False"):
        signature.truncate(1).save(path, overwrite=False)
    with pytest.raises(ValueError, match="folder that exists"):
        signature.save(path.parent / "nowhere" / "a.safetensors")
    with pytest.raises(FileNotFoundError):
        WeightSignature.load(path.parent / "nowhere.safetensors")

    def fail(*args):
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="full"):
            signature.truncate(1).save(path)
    assert os.listdir(path.parent) == [path.name]
    assert WeightSignature.load(path).digest == signature.digest
    signature.truncate(1).save(path)
    assert len(WeightSignature.load(path)) < len(signature)


def inside(tree, keys):
    return functools.reduce(operator.getitem, keys, tree)


def setter(*keys, value):
    last = keys[-1]
    return lambda tree: operator.setitem(inside(tree, keys[:-1]), last, value)


def remover(*keys):
    return lambda tree: operator.delitem(inside(tree, keys[:-1]), keys[-1])


def config_attacks():
    wrong = [None, True, -1, 1.5, "0", [], {}, 10**40, [[]], [{}]]
    sound = {
        "name": ("0", None),
        "model_class": ("0", None),
        "method": ("0",),
        "fingerprints": ({},),
    }
    for key in (*sound, "architecture", "entries"):
        yield remover(key)
        for value in wrong:
            if value not in sound.get(key, ()):
                yield setter(key, value=value)
    yield setter("more", value=1)
    yield setter("fingerprints", "clean", value="abc")
    yield setter("fingerprints", "other", value="0" * 64)
    for key in ("position", "depth", "replaced", "bits"):
        yield remover("entries", 0, key)
        for value in (None, True, -1, 10**9, 10**40, 1e300, "0", 30, 32.0):
            yield setter("entries", 0, key, value=value)
    yield setter("entries", 0, "more", value=1)
    yield setter("entries", 4, "bits", value=8)
    for value in (np.nan, np.inf):
        yield setter("entries", 4, "replaced", value=value)
    for place in range(3):
        for value in (None, 3, [2**40, 2**40, 3], [-1]):
            yield setter("architecture", 0, place, value=value)
    for value in ("float32x", "object", "string", "O", "", "int8"):
        yield setter("architecture", 0, 2, value=value)
    for value in ([3, 3, 2, 1], [0, 2**62], [18, "1"], [True, 18], [17]):
        yield setter("architecture", 0, 1, value=value)
    yield lambda config: config["entries"].reverse()
    yield lambda config: config["entries"].append(config["entries"][-1])


def array_attacks():
    for name in ("0", "0.scales", "4", "12", files._CONFIG):
        yield remover(name)
        for array in (
            np.zeros(0, "uint8"),
            np.zeros((2, 2), "float32"),
            np.zeros(9, "int8"),
            np.zeros(9, "float64"),
        ):
            yield setter(name, value=array)
    for extra in ("999", "0.other", "../0"):
        yield setter(extra, value=np.zeros(0, "uint8"))
    # Not finite, and codes that no quantizer writes.
    wrong = {"4": (np.nan, np.inf), "0.scales": (np.nan, -1), "0": (255,)}
    for name, values in wrong.items():
        for value in values:
            yield lambda arrays, n=name, value=value: arrays[n].fill(value)
    # JSON that is none, or deep, or with a name twice.
    for text in (b"", b"[" * 100_000, b"\xff\xfe", b"null", b'{"a":1,"a":1}'):
        yield setter(files._CONFIG, value=np.frombuffer(text, "uint8"))


def refuses(path):
    with pytest.raises(ValueError) as error:
        WeightSignature.load(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 700
    return str(error.value)


@pytest.mark.parametrize("attacks", [config_attacks, array_attacks])
def test_right_checksums_and_wrong_contents(path, attacks):
    for attack in attacks():
        with container.Reader(path, files.FORMAT, (files.VERSION,)) as reader:
            arrays = {name: reader.read(name) for name in reader.entries}
            config = reader.read_json(files._CONFIG)
        if attacks is config_attacks:
            attack(config)
            arrays[files._CONFIG] = bounded_json.json_array(config)
        else:
            attack(arrays)
        attacked = path.parent / "attacked.safetensors"
        container.write_arrays(attacked, files.FORMAT, files.VERSION, arrays)
        assert "truncated, altered or" in refuses(attacked)


def test_other_files(path):
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in (*rng.integers(len(content), size=40), *range(8)):
        broken = bytearray(content)
        broken[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        refuses(path)
    for other in (
        *(content[:length] for length in (0, 7, 8, 300, len(content) - 1)),
        content + b"\0",
        pickle.dumps({"weights": [1, 2]}),
        b"PK\x03\x04" + bytes(100),
        bytes(1000),
    ):
        path.write_bytes(other)
        refuses(path)
    path.write_bytes(content)
    with container.Reader(path, files.FORMAT, (files.VERSION,)) as reader:
        arrays = {name: reader.read(name) for name in reader.entries}
    container.write_arrays(path, files.FORMAT, 3, arrays)
    assert "version '3'" in refuses(path)
    container.write_arrays(path, "another.format", files.VERSION, arrays)
    assert "does not state format" in refuses(path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(path.parent / "pipe")
        assert "regular file" in refuses(path.parent / "pipe")
