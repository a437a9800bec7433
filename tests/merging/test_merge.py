import json
import os
import pathlib
import re
import sys
import time

import keras
import numpy as np
import pytest
import safetensors.numpy

import keras_weightmods as kwm
from keras_weightmods.merging.methods import _BUILT_IN, METHODS
from keras_weightmods.saving import container
from tests.backends import breadth
from tests.merging import references
from tests.models import (
    assert_same,
    assert_same_bits,
    conv_net,
    einsum_net,
    make_signature,
    mlp,
    numpy,
    random_weights,
    sequential,
    weights_of,
)


def models(count=3, make=mlp):
    """Models whose changes of the last one have something in common."""
    found = [make() for _ in range(count)]
    random = np.random.default_rng(0)
    base = weights_of(found[-1])
    common = [random.normal(size=x.shape) for x in base]
    for model in found[:-1]:
        model.set_weights(
            [x + y + random.normal(size=x.shape) for x, y in zip(base, common)]
        )
    return found


def files(folder, *, count=3, make=mlp):
    found = models(count, make)
    paths = [str(folder / f"{i}.safetensors") for i in range(count)]
    for model, path in zip(found, paths):
        kwm.save_model(model, path)
    return paths, found


def arguments(method, models):
    *some, base = models
    base = base if METHODS[method].needs_base else None
    return {"models": some, "method": method, "base": base, "verbose": 0}


@breadth("method", METHODS, 0, 3)
def test_files_and_models_alike(method, tmp_path):
    paths, found = files(tmp_path, make=einsum_net)
    output = tmp_path / "merged.safetensors"
    report = kwm.merge(output=output, **arguments(method, paths))
    merged = einsum_net()
    again = kwm.merge(output=merged, **arguments(method, found))
    assert_same_bits(weights_of(kwm.load_model(output)), weights_of(merged))
    assert report.merged == again.merged
    assert [each.path for each in report.merged] == [
        "heads/kernel",
        "joined/kernel",
    ]
    assert report.output == str(output)
    for model, path in zip(found, paths):
        assert_same_bits(weights_of(model), weights_of(kwm.load_model(path)))
    # A model into itself, and one of each kind.
    mixed = arguments(method, [paths[0], *found[1:]])
    kwm.merge(output=found[-1], **mixed)
    assert_same_bits(weights_of(found[-1]), weights_of(merged))


def test_a_file_of_models_in_memory_and_of_keras(tmp_path):
    """The file has the config of a model that has none yet."""
    paths, (a, b, base) = files(tmp_path)
    keras_files = [tmp_path / "a.keras", tmp_path / "b.keras"]
    for model, path in zip((a, b), keras_files):
        model.save(path)
    expected = mlp()
    given = {"method": "ties", "verbose": 0}
    kwm.merge([a, b], expected, base=base, **given)
    before = sorted(os.listdir(tmp_path))
    for models, start in (
        ([a, b], base),
        (keras_files, base),
        (keras_files, paths[2]),
        ([paths[0], b], base),
    ):
        kwm.merge(models, tmp_path / "m.safetensors", base=start, **given)
        merged = kwm.load_model(tmp_path / "m.safetensors")
        assert_same_bits(weights_of(merged), weights_of(expected))
        os.remove(tmp_path / "m.safetensors")
        assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.one_backend
def test_a_method_from_outside(tmp_path):
    """With numbers of its own, by `merge` and by mergekit."""

    def clipped(task):
        most = task.options["most"] * task.options["density"]

        def merged(part):
            base, changes = task.changes(part)
            return base + np.clip(np.median(changes, axis=0), -most, most)

        return task.mapped(merged)

    paths, (a, b, base) = files(tmp_path)
    merged, again, method = mlp(), mlp(), "test_clipped"
    given = {"method": method, "base": base, "verbose": 0}
    kwm.register_merge_method(
        method,
        clipped,
        options={"most": 0.1, "density": 0.5},
        bounds=lambda numbers: {"most": {"above": 0}},
        weights="none",
        models=(2, 3),
        mergekit="clipped",
    )
    try:
        kwm.merge([a, b], merged, most=0.3, **given)
        for old, x, y, got in zip(*map(weights_of, (base, a, b, merged))):
            change = np.clip((x + y) / 2 - old, -0.15, 0.15)
            np.testing.assert_allclose(got, old + change, atol=1e-6)
        for match, wrong in (
            ("at least 2 models", {"models": [a]}),
            ("`most` must be", {"most": -1}),
            ("for test_clipped", {"method": "linear", "base": None, "most": 1}),
            ("`weights` must be None", {"weights": [1, 1]}),
        ):
            with pytest.raises(ValueError, match=match):
                kwm.merge(
                    **{"models": [a, b], "output": again, **given, **wrong}
                )
        config = {
            "merge_method": "clipped",
            "base_model": paths[2],
            "models": [{"model": path} for path in paths],
            "parameters": {"most": 0.3, "density": 0.5},
        }
        assert kwm.merge(config, again, verbose=0).method == method
        assert_same_bits(weights_of(again), weights_of(merged))
    finally:
        del METHODS[method]


MERGEKIT_CONFIG = """
merge_method: ties
base_model: 2.safetensors
models:
  - model: 2.safetensors
  - model: 0.safetensors
    parameters: {weight: 1, density: 0.4}
  - model: 1.safetensors
    parameters:
      density: 0.4
      weight:
        - filter: bias
          value: 0
        - value: [0.2, 0.8]
parameters: {normalize: true, lambda: 0.7}
dtype: float32
"""


@pytest.mark.one_backend
def test_configs_of_mergekit(tmp_path, monkeypatch):
    pytest.importorskip("ruamel.yaml")
    paths, (a, b, base) = files(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config.yml"
    config.write_text(MERGEKIT_CONFIG)
    merged, expected = mlp(), mlp()
    found = kwm.merge(str(config), merged, verbose=0)
    weights = [1, {"bias": 0, "": [0.2, 0.8]}]
    given = {"base": base, "density": 0.4, "scale": 0.7, "verbose": 0}
    report = kwm.merge([a, b], expected, "ties", weights, **given)
    assert found.merged == report.merged
    assert_same_bits(weights_of(merged), weights_of(expected))
    # SLERP goes from the base to the other.
    slerp = {
        "merge_method": "slerp",
        "base_model": paths[1],
        "models": [{"model": paths[0]}, {"model": paths[1]}],
        "parameters": {"t": [0.2, 0.6]},
    }
    kwm.merge(slerp, merged, verbose=0)
    weights = [[0.2, 0.6], [0.8, 0.4]]
    kwm.merge([a, b], expected, "slerp", weights, verbose=0)
    assert_same_bits(weights_of(merged), weights_of(expected))
    rows = slerp["models"]
    of_base = {"base_model": paths[2], "models": rows}
    gamma = [{**rows[0], "parameters": {"gamma": 1}}, rows[1]]
    for wrong, match in (
        ({**slerp, "merge_method": "karcher"}, "`merge_method` of"),
        ({**slerp, "slices": []}, "`config` must be"),
        ({**slerp, "parameters": [1]}, "`parameters` must be"),
        ({"merge_method": "linear", "models": [paths[0]]}, "`model: FILE`"),
        (
            {**of_base, "merge_method": "dare_ties"},
            "`normalize` must be true",
        ),
        (
            {**of_base, "merge_method": "task_arithmetic", "models": gamma},
            "`gamma` must be the same",
        ),
        (
            {**slerp, "models": [{**r, "parameters": {"t": 1}} for r in rows]},
            "`t` must be left out",
        ),
        *(
            (
                {**of_base, "merge_method": name, "models": [], **more},
                "`models` must be",
            )
            for name in ("slerp", "ties", "linear")
            for more in ({}, {"parameters": {"t": 1, "lambda": 1}})
        ),
        *(
            ({**slerp, "parameters": {"t": t}}, "must be")
            for t in (
                *("x", None, [0.1, "x"], [0.1, [0.2, 0.3]], [0.1, [[], 2]]),
                *([{"filter": "x"}], [{"value": 1}, 2], [{"value": {"x": 1}}]),
                *([{"filter": x, "value": 1}] for x in (3, ["x"], True)),
            )
        ),
        ("nothing.txt", "or mergekit's .yml"),
    ):
        with pytest.raises(ValueError, match=match):
            kwm.merge(wrong, merged, verbose=0)
    with pytest.raises(ValueError, match="`base` must be left out"):
        kwm.merge(slerp, merged, base=base)


@pytest.mark.one_backend
def test_configs_of_any_size_are_refused_by_their_file(tmp_path):
    pytest.importorskip("ruamel.yaml")
    laughs = "".join(
        f"- &{name} [{', '.join([f'*{last}'] * 9)}]\n"
        for last, name in zip("abcdefgh", "bcdefghi")
    )
    # Each level copies the one before nine times.
    merges = "".join(
        f"{name}: &{name} {{<<: [{', '.join([f'*{last}'] * 9)}]}}\n"
        for last, name in zip("abcdefgh", "bcdefghi")
    )
    rows = "merge_method: linear\nmodels: [{model: a, parameters: {weight: "
    for name, text in (
        ("a.yml", f"models:\n- &a [ha]\n{laughs}"),
        ("a.yml", f"merge_method:\n- &a [ha]\n{laughs}"),
        ("a.yml", f"a: &a {{x: 1}}\n{merges}"),
        ("a.yml", f"a: &a {{x: 1}}\n{merges.replace('<<', '!!merge x')}"),
        ("a.yml", "models: &a [*a]"),
        ("a.yml", "[" * 1000),
        ("a.yml", "- a\n" * 2**19),
        ("a.yml", f"{rows}{'[' * 150}1{']' * 150}}}}}]"),
        ("a.yml", "- " * 9),
        ("a.json", '{"models": ' + "[" * 100_000),
        ("a.json", f'{{"models": {"[" * 500}{"]" * 500}}}'),
        ("a.json", f'{{"models": {"9" * 5000}}}'),
    ):
        path = tmp_path / name
        path.write_text(text)
        start = time.process_time()
        with pytest.raises(ValueError, match=re.escape(f"{path}: ")) as error:
            kwm.merge(str(path), mlp(), verbose=0)
        assert time.process_time() - start < 1
        assert len(str(error.value)) < 2000


@pytest.mark.one_backend
def test_methods_and_their_numbers_are_documented():
    folder = pathlib.Path(__file__).absolute().parents[2] / "docs" / "guides"
    guide = (folder / "merge.md").read_text()
    for name in _BUILT_IN:
        assert f'`"{name}"`' in guide
        for said in (f'"{name}"', *METHODS[name].options):
            assert f"`{said}`" in kwm.merge.__doc__


@pytest.mark.one_backend
def test_gradients_filters_and_what_is_left_out():
    def deep():
        return mlp(4, 4, 4, 4, 4)

    a, b = models(2, deep)
    report = kwm.merge([a, b], deep(), weights=[[1, 0], 1], verbose=0)
    shares = {each.path: each.weights for each in report.merged}
    paths = [f"{layer.name}/kernel" for layer in a.layers]
    expected = [(1, 1), (2 / 3, 1), (1 / 3, 1), (0, 1)]
    np.testing.assert_allclose([shares[path] for path in paths], expected)
    assert shares[f"{a.layers[1].name}/bias"] == shares[paths[1]]
    first = a.layers[0].name
    spec = {"bias": 0.5, f"{first}/": [3, 1], "": 1}
    given = {"weights": [spec, 1], "verbose": 0}
    report = kwm.merge([a, b], deep(), **given)
    shares = {each.path: each.weights[0] for each in report.merged}
    assert [shares[path] for path in paths] == [3, 1, 1, 1]
    assert shares[f"{first}/bias"] == 0.5
    merged, chosen = deep(), {"include": "kernel", "exclude": [f"^{first}/"]}
    report = kwm.merge([a, b], merged, **given, **chosen)
    assert [each.path for each in report.merged] == paths[1:]
    reasons = [each.reason for each in report.skipped]
    assert reasons == ["excluded"] * 2 + ["not included"] * 3
    for i, (x, y) in enumerate(zip(weights_of(merged), weights_of(a))):
        assert np.array_equal(x, y) == (i not in (2, 4, 6))


STATISTICS = (4, 5, 10, 11)  # of `conv_net`
WITH_NEGATIVE = [(0.1, 0.2), (0, 0), (2, -0.5), (0.5, -0.3), (-1, 0.5)]


@breadth("weights", WITH_NEGATIVE)
def test_statistics_go_as_far_from_the_base_as_the_weights(weights):
    found = [conv_net(), conv_net(), conv_net()]
    for seed, each in enumerate(found):
        each.set_weights(random_weights(each, seed))
    *some, base = found
    merged = conv_net()
    for method in ("task_arithmetic", "ties", "dare", "linear"):
        if method == "linear" and sum(weights) <= 0:
            continue
        if method == "ties" and min(weights) < 0:
            continue
        given = {**arguments(method, found), "weights": weights}
        report = kwm.merge(output=merged, **given)
        is_mean = method == "linear" and min(weights) < 0
        assert is_mean or {x.weights for x in report.merged} == {weights}
        *arrays, old, got = map(weights_of, (*some, base, merged))
        for i in STATISTICS:
            x, y = (each[i] for each in arrays)
            expected = references.moved_statistics(
                old[i], [x, y], weights, is_whole=method == "ties"
            )
            if method == "linear":
                # Equal weights where one is negative.
                expected = np.average([x, y], 0, None if is_mean else weights)
            np.testing.assert_allclose(got[i], expected, rtol=1e-5, atol=1e-6)
            if not sum(weights):
                assert_same_bits([got[i]], [old[i]])


class Masked(keras.layers.Layer):
    def build(self, shape):
        self.mask = self.add_weight(shape=shape[1:], trainable=False)

    def call(self, x):
        return x + self.mask


@pytest.mark.one_backend
def test_what_is_not_trained_is_that_of_the_base(tmp_path):
    """Integers, statistics of `adapt`, masks with infinity, what is frozen."""

    def make():
        adapted = keras.layers.Normalization()
        adapted.adapt(np.random.default_rng(0).normal(size=(9, 4)))
        dense = [keras.layers.Dense(4) for _ in "ab"]
        model = sequential((4,), adapted, *dense, Masked())
        dense[0].kernel.trainable = False
        return model

    found = models(make=make)
    paths = [str(tmp_path / f"{i}.safetensors") for i in range(3)]
    for model, path in zip(found, paths):
        model.layers[-1].mask.assign([0, 0, 0, -np.inf])
        kwm.save_model(model, path)
    first = weights_of(found[0])
    custom = {"custom_objects": {"Masked": Masked}, "verbose": 0}
    report = kwm.merge(paths[:2], tmp_path / "m", **custom)
    reasons = sorted(each.reason for each in report.skipped)
    # A file does not say which weights are frozen.
    assert reasons == ["int32, no floats"] + 3 * ["not trained"]
    report = kwm.merge(found[:2], found[2], weights=[1, 2], verbose=0)
    assert len(report.skipped) == 5
    assert_same_bits([weights_of(found[2])[3]], [first[3]])
    for model in (kwm.load_model(tmp_path / "m", **custom), found[2]):
        got = weights_of(model)
        assert_same_bits(got[:3] + got[-1:], first[:3] + first[-1:])
        assert not np.array_equal(got[5], first[5])


@breadth("dtype", ["bfloat16", "float16"])
def test_other_dtypes(dtype, tmp_path):
    paths, found = files(tmp_path, make=lambda: mlp(4, 3, dtype=dtype))
    kwm.merge(paths[:2], tmp_path / "m.safetensors", verbose=0)
    got = weights_of(kwm.load_model(tmp_path / "m.safetensors"))
    wide = [[x.astype("float32") for x in weights_of(m)] for m in found[:2]]
    expected = [((x + y) / 2).astype(z.dtype) for x, y, z in zip(*wide, got)]
    assert_same(got, expected)
    large, output, base = found
    large.set_weights([x * 0 + 6e4 for x in weights_of(large)])
    if dtype == "float16":
        before = weights_of(output)
        given = {"base": base, "scale": 3.0, "verbose": 0}
        with pytest.raises(ValueError, match="must be finite in float16"):
            kwm.merge([large] * 2, output, "task_arithmetic", **given)
        assert_same_bits(weights_of(output), before)


@pytest.mark.one_backend
def test_a_seed_gives_one_result():
    a, b, base = models()
    got = []
    for seed in (1, 1, 2):
        merged = mlp()
        given = {"base": base, "density": 0.5, "seed": seed, "verbose": 0}
        kwm.merge([a, b], merged, "dare", **given)
        got.append(weights_of(merged))
    assert_same_bits(got[0], got[1])
    assert not np.array_equal(got[0][0], got[2][0])
    # Each model, and each weight, has entries of its own.
    kwm.merge([a, a], merged, "dare_ties", base=base, density=0.5, verbose=0)
    change = weights_of(merged)[0] - weights_of(base)[0]
    assert 0.6 < np.mean(change != 0) < 0.9


# More wrong values are in tests/faults/wrong_calls.py.
ERRORS = [
    ("`models` must be 2 models", {"method": "slerp", "count": 3}),
    ("`base` must be what", {"method": "ties", "base": None}),
    ("`base` must be None", {"method": "linear", "base": True}),
    ("`weights` must be a list of 2", {"weights": [1]}),
    (r"`weights\[0\]` must be a finite", {"weights": ["a", 1]}),
    (r"`weights\[1\]` must be with a regex", {"weights": [1, {"bias": 2}]}),
    (
        r"`weights\[0\]` must match a weight.*'baias'",
        {"weights": [{"baias": 0, "": 1}, 1]},
    ),
    (
        "`density` must match a weight.*'nothing'",
        {"method": "ties", "density": {"": 0.5, "nothing": 0.2}},
    ),
    ("`weights` must be of a sum > 0", {"weights": [1, -1]}),
    ("`weights` must be numbers >= 0", {"method": "ties", "weights": [1, -1]}),
    ("`weights` must be None", {"method": "model_stock", "weights": [1, 1]}),
    ("`density` must be left out .* for ties, dare", {"density": 0.2}),
    ("`density` must be a finite", {"method": "ties", "density": [0.5, 2]}),
    ("`gamma` must be", {"method": "breadcrumbs", "gamma": 1.0}),
    ("`density` must .* > 0.1 and", {"method": "della", "density": 0.05}),
    (
        "`density` must be a finite float > 0.0 and <= 0.4",
        {"method": "breadcrumbs", "density": 0.5, "gamma": 0.6},
    ),
    ("`include` must match a weight", {"include": "nothing"}),
    ("At least one weight must be merged", {"exclude": ""}),
]


@pytest.mark.one_backend
def test_wrong_arguments_are_found_before_a_weight_is_read(
    tmp_path, monkeypatch
):
    paths, _ = files(tmp_path, count=4)
    reader = container.Reader
    read_part, check_data = reader.read_part, reader.check_data

    def only_description(self, name, *args):
        assert name == "model.json"
        return read_part(self, name, *args)

    def check_description(self, names=None):
        assert names == ["model.json"]
        check_data(self, names)

    monkeypatch.setattr(reader, "read_part", only_description)
    monkeypatch.setattr(reader, "check_data", check_description)
    output = tmp_path / "merged.safetensors"
    for match, changes in ERRORS:
        given = {"models": paths[: changes.get("count", 2)], **changes}
        given.pop("count", None)
        needs_base = METHODS[changes.get("method", "linear")].needs_base
        if given.get("base", needs_base and "base" not in given):
            given["base"] = paths[-1]
        with pytest.raises(ValueError, match=match):
            kwm.merge(output=output, **given)
        assert not output.exists()


@pytest.mark.one_backend
def test_what_is_not_finite_is_refused(tmp_path):
    """One entry that a method leaves out; what is excluded; after a cast."""
    paths, (a, b, output) = files(tmp_path)
    path = tmp_path / "m"

    def check(match, models, output, *args, **kwargs):
        with pytest.raises(ValueError, match=match):
            kwm.merge(models, output, *args, verbose=0, **kwargs)
        if output == path:
            assert not path.exists()

    before = weights_of(output)
    weights = weights_of(b)
    weights[0][1, 2] = np.nan
    b.set_weights(weights)
    check("must be finite to be merged", [a, b], output, "ties", base=output)
    assert_same_bits(weights_of(output), before)
    b.set_weights([np.zeros_like(x) for x in weights])
    kept = {"exclude": "kernel", "weights": [1, 99]}
    a.set_weights([np.full_like(x, 1e6) for x in weights])
    match = r"must be finite in .*kernel"
    check(match, [a, b], mlp(dtype="float16"), **kept)
    kwm.merge([a, b], output, verbose=0, **kept)
    a.layers[0].kernel.assign(a.layers[0].kernel * np.nan)
    check(match, [a, b], output, **kept)
    kwm.save_model(a, paths[0])
    check("must be finite in float32", paths[:2], path, **kept)


@pytest.mark.one_backend
def test_models_that_do_not_fit(tmp_path):
    paths, (a, b, base) = files(tmp_path)
    before = weights_of(base)
    packed, patched = mlp(), mlp()
    kwm.attach_scaling(packed)
    make_signature(patched).apply(patched)
    # One bit of a file.
    data = bytearray((tmp_path / "1.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "1.safetensors").write_bytes(data)
    other = r"`models\[1\]`, weights/layers/dense_1/0"
    for match, models, output in (
        (other, [a, mlp(8, 16, 3)], base),
        (r"has in addition", [a, mlp(8, 16, 4, 4)], base),
        ("which ends in .safetensors", [a, b], tmp_path / "m.keras"),
        ("packed, reparameterized", [a, packed], base),
        ("No such file", [tmp_path / "none", b], base),
        ("must be without patches", [a, b], patched),
        ("checksum", paths[:2], tmp_path / "m"),
        ("overwrite=False", [paths[0]] * 2, paths[0]),
    ):
        with pytest.raises((ValueError, OSError), match=match):
            kwm.merge(models, output, overwrite=False, verbose=0)
        assert_same_bits(weights_of(base), before)
        assert not (tmp_path / "m").exists()
    # Another activation is fine, and so is a file that is read.
    kwm.merge([a, mlp(activation=None)], mlp(), verbose=0)
    kwm.merge([paths[0], paths[2]], paths[0], verbose=0)
    kwm.load_model(paths[0])


@pytest.mark.one_backend
@pytest.mark.parametrize("mode", ["int8", "int4", "lora"])
def test_codes_and_factors_are_refused(mode, tmp_path):
    """The sum of codes, or of factors, is that of no model's kernels."""

    def make():
        model = mlp(4, 3)
        for layer in model.layers:
            if mode == "lora":
                layer.enable_lora(2)
            else:
                layer.quantize(mode)
        return model

    found = [make() for _ in range(3)]
    before = weights_of(found[2])
    paths = [str(tmp_path / f"{i}.safetensors") for i in range(2)]
    for model, path in zip(found, paths):
        kwm.save_model(model, path)
    for models, output in ((found[:2], found[2]), (paths, tmp_path / "m")):
        with pytest.raises(ValueError, match="quantized or with LoRA"):
            kwm.merge(models, output, verbose=0)
    assert_same_bits(weights_of(found[2]), before)
    assert not (tmp_path / "m").exists()


@pytest.mark.one_backend
def test_spectral_normalization(tmp_path):
    """Kernels are merged as they are stored, which is what they multiply by."""

    def make():
        dense = keras.layers.Dense(6, name="dense")
        return sequential((4,), keras.layers.SpectralNormalization(dense))

    a, b, _ = found = models(make=make)
    for model in found:
        model(np.ones((2, 4), "float32"), training=True)
    paths = [str(tmp_path / f"{i}.safetensors") for i in range(2)]
    for model, path in zip(found, paths):
        kwm.save_model(model, path)
    report = kwm.merge(paths, tmp_path / "m", weights=[1, 3], verbose=0)
    (skipped,) = report.skipped
    assert skipped.path.endswith("vector_u")
    merged = kwm.load_model(tmp_path / "m")
    for x, y, z in zip(*map(weights_of, (a, b, merged))):
        is_vector = x.shape == (1, 6)
        wide = x if is_vector else (x.astype("float64") + 3.0 * y) / 4
        np.testing.assert_allclose(z, wide, atol=1e-6)
    # And so it computes; training brings the norm back to 1.
    x = np.random.default_rng(0).normal(size=(2, 4)).astype("float32")
    kernel, bias = (x for x in weights_of(merged) if x.shape != (1, 6))
    np.testing.assert_allclose(numpy(merged(x)), x @ kernel + bias, rtol=1e-5)
    for _ in range(30):
        merged(x, training=True)
    (kernel,) = (x for x in weights_of(merged) if x.shape == (4, 6))
    assert abs(np.linalg.norm(kernel, 2) - 1) < 1e-3


# Those that draw entries: where all are kept.
MERGEKIT = {
    "linear": {},
    "slerp": {},
    "task_arithmetic": {},
    "ties": {"density": 0.4},
    "dare": {"density": 1.0},
    "dare_ties": {"density": 1.0},
    "della": {"density": 1.0, "epsilon": 0.0},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "model_stock": {},
}


@pytest.mark.one_backend
@pytest.mark.parametrize("method", MERGEKIT)
def test_against_mergekit(method, tmp_path):
    """Its command, on the same kernels."""
    pytest.importorskip("mergekit")
    import subprocess

    count = 2 if method == "slerp" else 3
    found = models(count + 1, make=lambda: mlp(8, 10, use_bias=False))
    weights = None if method == "model_stock" else [1.0, 0.5, 2.0][:count]
    given = {**arguments(method, found), **MERGEKIT[method]}
    merged = mlp(8, 10, use_bias=False)
    kwm.merge(output=merged, weights=weights, **given)

    names = [f"{number}.safetensors" for number in range(count + 1)]
    for name, model in zip(names, found):
        arrays = {"a.weight": weights_of(model)[0]}
        safetensors.numpy.save_file(arrays, tmp_path / name)
    rows = [{"model": name} for name in names[:count]]
    for row, weight in zip(rows, weights or ()):
        row["parameters"] = {"weight": weight, **MERGEKIT[method]}
    name = "dare_linear" if method == "dare" else method
    config = {"merge_method": name, "models": rows, "dtype": "float32"}
    if method == "dare_ties":
        # By default it sums, where TIES and DELLA take the mean.
        config["parameters"] = {"normalize": True}
    if method == "slerp":
        config["base_model"] = names[0]
        config["parameters"] = {"t": weights[1] / sum(weights)}
    elif method != "linear":
        config["base_model"] = names[count]
    (tmp_path / "config.yml").write_text(json.dumps(config))
    command = pathlib.Path(sys.executable).with_name("mergekit-pytorch")
    subprocess.run(
        [command, "config.yml", "out"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    theirs = safetensors.numpy.load_file(tmp_path / "out/model.safetensors")
    np.testing.assert_allclose(
        weights_of(merged)[0], theirs["a.weight"], rtol=1e-4, atol=1e-5
    )
