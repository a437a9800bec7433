"""Deltas: the code of the places, and what a file brings to a model."""

import json
import os

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

import keras_weightmods as kwm
from keras_weightmods.patches.delta import FORMAT
from keras_weightmods.patches.places import pack_places, unpack_places
from keras_weightmods.saving.container import Entry, Reader, Writer

SIZES = (96, 64)


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


def make(seed=0, dtype="float32"):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((SIZES[0],)),
            keras.layers.Dense(SIZES[1], dtype=dtype),
            keras.layers.BatchNormalization(dtype=dtype),
            keras.layers.Dense(SIZES[1], dtype=dtype),
        ]
    )


def values(model):
    return [ops.convert_to_numpy(v.value).copy() for v in model.weights]


def same(a, b):
    return all(
        x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in zip(a, b)
    )


def changed(base, seed, density=0.05):
    """The weights of another model, changed in the two kernels."""
    random = np.random.default_rng(seed)
    new = [array.copy() for array in base]
    for i in (0, 6):
        at = random.random(new[i].shape) < density
        noise = 0.01 * random.normal(size=new[i].shape)
        new[i] = np.where(at, new[i] + noise, new[i]).astype(new[i].dtype)
    return new


@pytest.fixture
def base():
    return values(make())


def delta_file(base, folder, seed=1, **kwargs):
    tuned = make()
    tuned.set_weights(changed(base, seed))
    path = folder / f"task_{seed}.safetensors"
    return tuned, path, kwm.save_delta(tuned, base, path, **kwargs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_brings_the_change(base, tmp_path, dtype):
    tuned, path, report = delta_file(base, tmp_path, dtype=dtype)
    model = make()
    applied = kwm.apply_delta(model, path)
    assert applied.entries == report.entries
    assert applied.weights == report.weights
    assert applied.active == {"task_1": 1.0}
    relative = {"bfloat16": 2**-8, "float16": 2**-9, "float32": 0}[dtype]
    for clean, new, brought in zip(base, values(tuned), values(model)):
        assert np.array_equal(brought != clean, new != clean)
        error = np.abs(brought - new)
        assert np.all(error <= relative * np.abs(new - clean) + 1e-7)
    kwm.remove_delta(model)
    assert same(values(model), base)


def test_file_is_small(tmp_path):
    """At most 1.45 of as many numbers of a LoRA in bfloat16."""
    random = np.random.default_rng(0)
    model = keras.Sequential([keras.Input((800,)), keras.layers.Dense(1200)])
    old = values(model)
    at = random.random(old[0].shape) < 0.05
    model.set_weights([np.where(at, old[0] + 0.1, old[0]), old[1]])
    report = kwm.save_delta(model, old, tmp_path / "delta.safetensors")
    assert report.entries == at.sum()
    assert report.index_bits <= 6.5
    assert report.nbytes == os.path.getsize(tmp_path / "delta.safetensors")
    assert report.nbytes <= 1.45 * 2 * report.entries


def test_several_in_any_order(base, tmp_path):
    paths = [delta_file(base, tmp_path, seed)[1] for seed in (1, 2, 3)]
    a, b = make(), make()
    for path in paths:
        kwm.apply_delta(a, path, scale=0.5)
    for path in reversed(paths):
        kwm.apply_delta(b, path, scale=0.5)
    assert same(values(a), values(b))
    float64 = [array.astype("float64") for array in base]
    for seed in (1, 2, 3):
        for total, new, old in zip(float64, changed(base, seed), base):
            total += 0.5 * (new.astype("float64") - old)
    for total, brought in zip(float64, values(a)):
        np.testing.assert_allclose(brought, total, rtol=0, atol=3e-4)
    kwm.remove_delta(a, "task_2")
    kwm.remove_delta(b, "task_1")
    kwm.apply_delta(b, paths[0], scale=0.5)
    kwm.remove_delta(b, "task_2")
    assert same(values(a), values(b))
    kwm.remove_delta(a, "task_1")
    report = kwm.remove_delta(a, "task_3")
    assert report.active == {}
    assert same(values(a), base)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes(tmp_path, dtype):
    if dtype == "float64" and keras.backend.backend() == "jax":
        pytest.skip("JAX has no float64 unless it is told to")
    model = make(dtype=dtype)
    old = values(model)
    model.set_weights(changed(old, 1))
    new = values(model)
    kwm.save_delta(model, old, tmp_path / "d.safetensors", dtype="float32")
    model.set_weights(old)
    kwm.apply_delta(model, tmp_path / "d.safetensors")
    for a, b in zip(values(model), new):
        np.testing.assert_allclose(
            a.astype("float64"), b.astype("float64"), rtol=1e-6, atol=1e-7
        )
    kwm.remove_delta(model)
    assert same(values(model), old)


def test_another_base(base, tmp_path):
    _, path, _ = delta_file(base, tmp_path)
    other = make(seed=5)
    before = values(other)
    with pytest.raises(ValueError, match="must be the one that the delta"):
        kwm.apply_delta(other, path)
    assert same(values(other), before)
    kwm.apply_delta(other, path, force=True)
    assert not same(values(other), before)
    kwm.remove_delta(other)
    assert same(values(other), before)


def test_weights_changed_since(base, tmp_path):
    _, path, _ = delta_file(base, tmp_path)
    _, second, _ = delta_file(base, tmp_path, 2)
    model = make()
    kwm.apply_delta(model, path)
    kernel = model.layers[0].kernel
    kernel.assign(kernel * 1.5)
    before = values(model)
    for call in (
        lambda: kwm.remove_delta(model),
        lambda: kwm.apply_delta(model, second),
    ):
        with pytest.raises(ValueError, match="changed since") as error:
            call()
        assert "0:" in str(error.value)
        assert same(values(model), before)
    kwm.remove_delta(model, force=True)
    at = changed(base, 1)[0] != base[0]
    assert np.array_equal(values(model)[0][at], base[0][at])
    assert np.array_equal(values(model)[0][~at], before[0][~at])


def test_errors(base, tmp_path):
    tuned, path, _ = delta_file(base, tmp_path)
    target = tmp_path / "other.safetensors"

    def check(match, call, *args, **kwargs):
        with pytest.raises(ValueError, match=match):
            call(*args, **kwargs)
        assert not target.exists()

    check("must differ from `base`", kwm.save_delta, tuned, tuned, target)
    check("`dtype` must be", kwm.save_delta, tuned, base, target, dtype="int8")
    check("the same weights", kwm.save_delta, tuned, base[:-1], target)
    broken = [np.full_like(base[0], np.nan), *base[1:]]
    check("not finite", kwm.save_delta, tuned, broken, target)
    model = make()
    check("`scale` must be", kwm.apply_delta, model, path, scale="1")
    check("`scale` must be finite", kwm.apply_delta, model, path, scale=np.inf)
    check("must be that of a delta", kwm.remove_delta, model)
    small = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    check("does not fit", kwm.apply_delta, small, path)
    kwm.apply_delta(model, path)
    check("that no delta on the model", kwm.apply_delta, model, path)
    kwm.apply_delta(model, path, name="again")
    check("must be that of a delta", kwm.remove_delta, model)
    half = make(dtype="float16")
    old = values(half)
    kwm.save_delta(_added(half, 100.0), old, path)
    half.set_weights(old)
    check("is not finite", kwm.apply_delta, half, path, scale=1e6)
    assert same(values(half), old)


def _added(model, number):
    kernel = model.layers[0].kernel
    kernel.assign(kernel + number)
    return model


def test_corrupt_files_change_nothing(base, tmp_path):
    _, path, _ = delta_file(base, tmp_path)
    model = make()
    data = path.read_bytes()
    random = np.random.default_rng(0)
    for place in random.integers(len(data), size=40):
        broken = bytearray(data)
        broken[place] ^= 1 << int(random.integers(8))
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="truncated, altered"):
            kwm.apply_delta(model, path)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="truncated, altered"):
        kwm.apply_delta(model, path)
    assert same(values(model), base)


@pytest.mark.parametrize(
    "attack",
    [
        lambda about: about.update(weights=None),
        lambda about: about.update(count="many"),
        lambda about: about.pop("fingerprint"),
        lambda about: about["weights"].reverse(),
        lambda about: about["weights"][0].append(1),
        lambda about: about["weights"][0].__setitem__(0, 99),
        lambda about: about["weights"][0].__setitem__(2, [-1, 4]),
        lambda about: about["weights"][0].__setitem__(2, [2, 2]),
        lambda about: about["weights"][0].__setitem__(3, 10**9),
        lambda about: about["weights"][0].__setitem__(4, 77),
        lambda about: about["weights"][0].__setitem__(5, 3),
        lambda about: about["weights"].pop(),
    ],
)
def test_files_with_right_hashes_and_wrong_contents(base, tmp_path, attack):
    _, path, _ = delta_file(base, tmp_path)
    with Reader(path, FORMAT, (1,)) as reader:
        about = reader.read_json("description")
        arrays = {k: reader.read(k) for k in ("places", "values")}
    attack(about)
    text = np.frombuffer(json.dumps(about).encode(), "uint8")
    entries = {
        "description": Entry(text.shape, "uint8"),
        "places": Entry(arrays["places"].shape, "uint8"),
        "values": Entry(arrays["values"].shape, "bfloat16"),
    }
    with Writer(path, FORMAT, 1, entries) as writer:
        for name, array in {"description": text, **arrays}.items():
            writer.write(name, array)
    model = make()
    with pytest.raises(ValueError, match="truncated, altered"):
        kwm.apply_delta(model, path)
    assert same(values(model), base)
