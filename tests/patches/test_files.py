"""Files of patches: what comes back, and what is refused."""

import functools
import operator
import os

import numpy as np
import pytest
from safetensors.numpy import load_file

from keras_weightmods import (
    Patch,
    PrincipalMaskCallback,
    SparseAdamW,
    WeightSignature,
)
from keras_weightmods.patches import files
from keras_weightmods.saving import bounded_json, container
from tests.models import make_signature, mlp, normal, weights_of

pytestmark = pytest.mark.one_backend


@pytest.fixture(scope="module")
def signature(model):
    """All kinds of tensors: float32, 4 bits, statistics."""
    packed = make_signature(model, statistics="replace").quantize(4)
    plain = make_signature(model, depth=3, name="noise")
    # The third layer stays in float32.
    return plain.with_entries([*packed, *(e for e in plain if e.depth == 2)])


@pytest.fixture(scope="module")
def delta():
    """Places stored and drawn, differences and new values."""
    model = mlp(8, 16, 4)
    base = weights_of(model)
    model.compile(SparseAdamW(0.1), "mse", jit_compile=False)
    masks = PrincipalMaskCallback(
        0.25, criterion="random", refresh_every=None, seed=0
    )
    x, y = normal(8, 8), normal(8, 4)
    model.fit(x, y, callbacks=[masks], verbose=0)
    biases = [layer.bias for layer in model.layers]
    for bias in biases:
        bias.assign(bias + 0.5)
    patch = Patch.from_models(
        model, base, whole=f"{model.layers[-1].name}/bias", name="task"
    )
    assert [entry.seed is None for entry in patch] == [False, True, False, True]
    return patch


@pytest.fixture
def path(signature, tmp_path):
    path = tmp_path / "good.safetensors"
    signature.save(path)
    return path


def test_round_trip(signature, delta, tmp_path):
    shallow = signature.truncate(1)
    path = tmp_path / "file.safetensors"
    for each in (
        signature,
        delta,
        *(shallow.quantize(bits) for bits in (8, 4, 2)),
    ):
        report = each.save(path)
        assert report.nbytes == path.stat().st_size
        loaded = Patch.load(str(path))
        assert type(loaded) is type(each)
        assert loaded.digest == each.digest
        assert loaded.report() == each.report()
        for field in ("architecture", "base", "method", "whole"):
            assert getattr(loaded, field) == getattr(each, field)
        for a, b in zip(loaded, each):
            assert (a.depth, a.seed) == (b.depth, b.seed)
            for x, y in zip(a.arrays, b.arrays):
                np.testing.assert_array_equal(x, y)
    assert os.listdir(tmp_path) == ["file.safetensors"]
    # Others read the tensors too; packed weights take their bits.
    arrays = load_file(path)
    del arrays[files.CONFIG]
    assert sum(array.nbytes for array in arrays.values()) == each.nbytes
    with pytest.raises(FileExistsError, match="overwrite=False"):
        delta.save(path, overwrite=False)
    delta.save(path)
    with pytest.raises(ValueError, match="the file of a signature"):
        WeightSignature.load(path)
    # The name of a file is that of a patch without one.
    Patch(delta.entries, delta.architecture).save(path)
    assert Patch.load(path).name == "file"


def inside(tree, keys):
    return functools.reduce(operator.getitem, keys, tree)


def setter(*keys, value):
    last = keys[-1]
    return lambda tree: operator.setitem(inside(tree, keys[:-1]), last, value)


def remover(*keys):
    return lambda tree: operator.delitem(inside(tree, keys[:-1]), keys[-1])


def config_attacks(of):
    """Changes of the JSON, of which tests/faults/mutants.py tries more."""
    sound = {
        "name": ("0", None),
        "base": (None,),
        "method": ("0",),
        "whole": ([],),
        "kind": ("0",),
    }
    for key in (*sound, "architecture", "entries"):
        yield remover(key)
        for value in (None, True, 1.5, "0", [], {}, [{}]):
            if value not in sound.get(key, ()):
                yield setter(key, value=value)
    yield setter("more", value=1)
    for value in ([7, 0], ["3"], [[3]]):
        yield setter("whole", value=value)
    for place in range(3):
        for value in (None, 3, [2**40, 2**40, 3], [-1], "float32x", "int8"):
            # A path may be any text.
            if place or not isinstance(value, str):
                yield setter("architecture", 0, place, value=value)
    yield setter("architecture", 0, 3, value=1)
    yield lambda config: config["entries"].reverse()
    yield lambda config: config["entries"].append(config["entries"][-1])
    yield lambda config: config["entries"].pop()
    is_delta = of == "delta"
    keys = files._SPARSE if is_delta else ("kind", "depth", "bits")
    for key in ("position", *keys):
        yield remover("entries", 0, key)
        for value in (True, -1, 10**40, 1e300, "0", 30, [[]]):
            # Places are drawn from row 0 of a delta, from whatever seed.
            if key != "seed" or type(value) is not int or value < 0:
                yield setter("entries", 0, key, value=value)
    shapes = ([3, 3, 2, 2], [0, 2**62], [18, "1"], [True, 18], [20])
    changes = (
        *((0, "more", 1), (0, "kind", "floats"), (1, "kind", "other")),
        *((4, "bits", 8), (4, "replaced", np.nan), (4, "replaced", np.inf)),
        *((4, "replaced", -1), (4, "replaced", 0)),
    )
    if is_delta:
        shapes = [2**20, 2**20], [2, 2], [0, 2**40]
        changes = (
            *((0, "more", 1), (0, "rows", 8), (1, "seed", 5), (1, "rows", 3)),
            *((1, "dtype", "float64"), (3, "dtype", "float16")),
        )
    for row, key, value in changes:
        yield setter("entries", row, key, value=value)
    for shape in shapes:
        yield setter("architecture", 0, 1, value=shape)


def array_attacks(of):
    is_planes = of == "planes"
    names = ("0", "0.scale", "4", "12", files.CONFIG)
    if is_planes:
        names = [f"1{ending}" for ending in files._PLANES]
    for name in names:
        yield remover(name)
        for shape, dtype in (
            *((0, "uint8"), ((2, 2), "float32")),
            *((9, "int8"), (9, "float64")),
        ):
            yield setter(name, value=np.zeros(shape, dtype))
    for extra in ("999", "0.other", "../0", *["0.places"] * is_planes):
        yield setter(extra, value=np.zeros(9 * is_planes, "uint8"))
    if is_planes:
        for name in names:
            for value in (0, 77, 255):
                yield setter(name, value=np.full(40, value, "uint8"))
        return
    # Not finite, and codes that no quantizer writes.
    for name, value in (
        *(("4", np.nan), ("4", np.inf)),
        *(("0.scale", np.nan), ("0.scale", -1), ("0", 255)),
    ):
        yield lambda arrays, n=name, value=value: arrays[n].fill(value)
    # JSON that is none, or deep, or with a name twice.
    for text in (b"", b"[" * 100_000, b"\xff\xfe", b"null", b'{"a":1,"a":1}'):
        yield setter(files.CONFIG, value=np.frombuffer(text, "uint8"))


def refuses(path, number=0):
    with pytest.raises(ValueError) as error:
        print("number", number)
        Patch.load(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 700
    return str(error.value)


@pytest.mark.parametrize("of", ["signature", "delta", "arrays", "planes"])
def test_right_checksums_and_wrong_contents(path, delta, of):
    is_config = of in ("signature", "delta")
    if of in ("delta", "planes"):
        delta.save(path)
    attacks = config_attacks(of) if is_config else array_attacks(of)
    for number, attack in enumerate(attacks):
        with container.Reader(path, files.FORMAT, (files.VERSION,)) as reader:
            arrays = {name: reader.read(name) for name in reader.entries}
            config = reader.read_json(files.CONFIG)
        attack(config if is_config else arrays)
        if is_config:
            arrays[files.CONFIG] = bounded_json.json_array(config)
        attacked = path.parent / "attacked.safetensors"
        container.write_arrays(attacked, files.FORMAT, files.VERSION, arrays)
        message = refuses(attacked, number)
        is_kind = "`filepath` must be the file of" in message
        assert is_kind or "truncated, altered or" in message


def test_other_files(path):
    """Besides what tests/saving/test_container.py shows of all files."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refuses(path)
    container.write_arrays(path, files.FORMAT, 9, {"a": np.zeros(1)})
    assert "version '9'" in refuses(path)
