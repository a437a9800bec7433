import functools
import json

import keras
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_weightmods as kwm
from keras_weightmods import WeightSignature
from keras_weightmods.patches.entry import Quantized
from keras_weightmods.patches.signature import residual
from tests.backends import breadth
from tests.models import (
    CONV,
    CONV_B,
    DENSE,
    HEAD,
    STATISTICS,
    assert_same_bits,
    conv_net,
    make_signature,
    mlp,
    random_weights,
    sequential,
    weights_of,
)
from tests.patches import references

extract = WeightSignature.extract
WEIGHTS_OF_TWO = [0, 1, 2, 3, 6, 7, 8, 9]


@pytest.mark.one_backend
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.sampled_from([-170, 0, 150]))
def test_residual(seed, exponent):
    rng = np.random.default_rng(seed)
    init = np.zeros((3, 2))
    clean, robust = rng.normal(size=(2, 3, 2))
    got = residual(robust, clean * 10.0**exponent)
    expected = references.rws(init, clean, robust)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)
    # What is left has nothing of the reference, and once is enough.
    assert abs(np.vdot(got, clean)) < 1e-12
    np.testing.assert_allclose(residual(got, clean), got, rtol=1e-9, atol=1e-12)


def positions(signature):
    return [entry.position for entry in signature]


def test_definition(model, trio):
    init, clean, robust = trio
    # A tensor that clean training did not move keeps all of its change.
    clean[1] = init[1].copy()
    signature = extract(*trio, depth=2, statistics="keep", like=model)
    assert positions(signature) == WEIGHTS_OF_TWO
    assert (signature.method, signature.depth) == ("rws", 2)
    for entry in signature:
        expected = references.rws(*(each[entry.position] for each in trio))
        np.testing.assert_allclose(entry.tensor, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        signature.entries[1].tensor, robust[1] - init[1], rtol=1e-6
    )
    # Without a start it is the difference.
    signature = extract(None, clean, robust, 4, statistics="keep", like=model)
    assert signature.method == "difference"
    patched = signature.apply(clean)
    for place, (a, b, c) in enumerate(zip(patched, robust, clean)):
        if place in STATISTICS:
            assert a is c
        else:
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_models_and_lists_are_one(model, trio):
    checkpoints = [conv_net(name=name) for name in ("a", "b", None)]
    for checkpoint, weights in zip(checkpoints, trio):
        checkpoint.set_weights(weights)
    signature = extract(*checkpoints, depth=3)
    first, _, third = checkpoints
    for other in (
        extract(*trio, depth=3, like=model),
        extract(first, trio[1], third, depth=3),
    ):
        assert [(e.position, e.depth) for e in other] == [
            (e.position, e.depth) for e in signature
        ]
        for a, b in zip(signature, other, strict=True):
            np.testing.assert_array_equal(a.tensor, b.tensor)
    for checkpoint, weights in zip(checkpoints, trio):
        assert_same_bits(weights_of(checkpoint), weights)


def test_depth_follows_execution():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.last = keras.layers.Dense(2, name="last")
            self.norm = keras.layers.LayerNormalization(name="norm")
            self.first = keras.layers.Dense(3, name="first")

        def call(self, x):
            return self.last(self.norm(self.first(x)))

    model = Model()
    model(np.zeros((1, 4), "float32"))
    assert "last" in model.weights[0].path
    weights = weights_of(model)
    for depth, layers in enumerate(("first norm", "first last norm"), start=1):
        signature = extract(None, model, weights, depth=depth)
        found = {e.info.path.split("/")[-2] for e in signature}
        assert sorted(found) == layers.split()
        assert signature.depth == depth
    with pytest.raises(ValueError, match="kernel, 2"):
        extract(None, model, weights, depth=3)


@pytest.mark.one_backend
def test_targets(model, trio):
    models = [model, trio[1], trio[2]]
    dense, norm = model.layers[5], model.layers[3]
    by_layer = extract(*models, targets=dense)
    assert [(e.position, e.depth) for e in by_layer] == [
        (DENSE, 2),
        (DENSE + 1, 2),
    ]
    for pattern in (f"{norm.name}/[gb]", [f"{norm.name}/{x}" for x in "gb"]):
        by_path = extract(*models, targets=pattern, statistics="keep")
        assert positions(by_path) == [8, 9]
    everything = extract(*trio, targets="", statistics="replace", like=model)
    assert len(everything) == len(model.weights)
    for value in ("nothing", conv_net().layers[0]):
        with pytest.raises(ValueError, match="matches none of 16"):
            extract(*models, targets=value)


@pytest.mark.one_backend
@pytest.mark.parametrize("statistics", ["keep", "average", "replace"])
def test_statistics(model, trio, statistics):
    _, clean, robust = trio
    fields = {"depth": 2, "statistics": statistics, "like": model}
    signature = extract(*trio, **fields)
    other = random_weights(model, 7)
    patched = signature.apply(other)
    share = {"keep": 0, "average": 0.5, "replace": 1}[statistics]
    for place in STATISTICS:
        expected = (1 - share) * other[place] + share * robust[place]
        np.testing.assert_allclose(
            patched[place], expected, rtol=1e-5, atol=1e-6
        )
    # Quantizing leaves them alone, and a mean of signatures is their mean.
    eight = signature.quantize(8)
    for entry in eight:
        packed = isinstance(entry.tensor, Quantized)
        assert packed == (entry.position not in STATISTICS)
    if statistics == "replace":
        second = extract(*trio[:2], other, **fields)
        for method in ("mean", "ties"):
            found = WeightSignature.sum([eight, second], method).apply(clean)
            for place in STATISTICS:
                mean = (robust[place] + other[place]) / 2
                np.testing.assert_allclose(
                    found[place], mean, rtol=1e-5, atol=1e-6
                )
        with pytest.raises(ValueError, match="negative variance"):
            signature.apply(other, scale=-30.0)


@pytest.mark.one_backend
def test_state_is_not_touched_and_frozen_layers_are_layers():
    inputs = keras.Input((3,))
    x = keras.layers.Normalization(mean=None)(inputs)
    x = keras.layers.Dropout(0.5, seed=1)(x)
    model = keras.Model(inputs, keras.layers.Dense(2)(x))
    weights = random_weights(model, 0)
    options = {"targets": "", "statistics": "replace"}
    signature = extract(None, model, weights, **options)
    assert [e.info.path.split("/")[-1] for e in signature] == ["kernel", "bias"]
    for frozen in (model, model.layers[-1].kernel):
        model.trainable = True
        frozen.trainable = False
        found = extract(None, model, weights, **options)
        assert found.digest == signature.digest


@pytest.mark.one_backend
def test_extract_lists_all_that_is_wrong(model, trio):
    init, clean, robust = ([w.copy() for w in each] for each in trio)
    init[CONV][0, 0, 0, 0] = np.nan
    clean[1] = clean[1].astype(ml_dtypes.bfloat16)
    robust[2] = np.zeros(5, "float32")
    robust[3] = robust[3].astype("int32")
    # What is not taken does not count.
    robust[HEAD] = np.full((9, 9), np.nan, "float32")
    with pytest.raises(ValueError, match="not finite") as error:
        extract(init, clean, robust, depth=1, like=model)
    first, second, third, fourth = (
        v.path.removeprefix(f"{model.name}/") for v in model.weights[:4]
    )
    for part in (
        f"init, 0:{first}: values that are not finite",
        f"robust, 1:{second}: dtype float32, and bfloat16 is expected",
        f"robust, 2:{third}: shape (5,), and (2,) is expected",
        f"robust, 3:{fourth}: dtype int32",
        "6 problems",
    ):
        assert part in str(error.value)
    same = [*trio[1][:HEAD], *trio[2][HEAD:]]
    with pytest.warns(UserWarning, match="is empty.* all of the 6 weights"):
        extract(*trio[:2], same, depth=1, like=model)
    robust[HEAD] = robust[HEAD][0]
    with pytest.raises(ValueError, match=r"14:dense_\w+/kernel.*2 axes"):
        extract(*trio[:2], robust, depth=1, like=model)
    with pytest.raises(ValueError, match="has 3 weights, and 16 are"):
        extract(init[:3], *trio[1:], depth=1, like=model)
    renamed = keras.layers.Conv2D(2, 3, name="renamed")
    other = sequential((6, 6, 1), renamed, *conv_net().layers[1:])
    message = r"2 problems[\s\S]*renamed/kernel', and 'conv2d"
    with pytest.raises(ValueError, match=message):
        extract(model, model, other, depth=1)


@pytest.mark.one_backend
def test_defaults(model, trio):
    """Half of the statistics, seven layers or all."""
    average = extract(*trio, depth=4, like=model, statistics="average")
    found = extract(*trio, like=model)
    assert (found.digest, found.depth) == (average.digest, 4)
    many = mlp(*[2] * 10)
    assert extract(None, many, many.get_weights()).depth == 7


@pytest.mark.one_backend
def test_models_with_lora_and_quantized_ones_are_refused():
    plain, adapted = conv_net(), conv_net()
    adapted.layers[-1].enable_lora(2)
    for pair in ((plain, adapted), (adapted, adapted)):
        with pytest.raises(ValueError, match=r"robust, .*`kwm\.merge_lora\("):
            extract(None, *pair, depth=1)
    kwm.merge_lora(adapted)
    extract(None, plain, adapted, depth=1)
    for model in (plain, adapted):
        model.layers[-1].quantize("int8")
    with pytest.raises(ValueError, match=r"robust, .*before Keras' `quantize"):
        extract(None, plain, adapted, depth=1)


@pytest.mark.one_backend
def test_bytes_of_vgg16():
    """The bars, and the paper's figures, on the smaller VGG-16: no head."""
    with keras.device("cpu"):
        vgg = keras.applications.VGG16(weights=None, include_top=False)
    weights = vgg.get_weights()
    signature = WeightSignature.extract(None, vgg, weights)
    assert signature.depth == 7
    assert len(signature) == 14
    paths = {e.info.path.split("/")[0] for e in signature}
    assert "block3_conv3" in paths
    assert "block4_conv1" not in paths
    for each, ratio, error in (
        (signature, 8.48, 0.01),
        (signature.truncate(6), 12.9, 0.1),
        (signature.quantize(8), 33.9, 0.1),
    ):
        found = each.model_nbytes / each.nbytes
        assert found == pytest.approx(ratio, abs=error)


@pytest.mark.one_backend
def test_report(model):
    signature = make_signature(model, statistics="average", name="noise")
    report = signature.quantize(4).report()
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain == report.to_dict()
    assert [row["bits"] for row in plain["rows"][:5]] == [4, 4, 4, 4, 32]
    kernel = signature.quantize(4).entries[0].dequantized()
    assert plain["rows"][0]["norm"] == pytest.approx(np.linalg.norm(kernel))
    for part in ("noise", "rws", "3x3x1x2", "50%"):
        assert part in str(report)
    assert "noise" in repr(signature)
    with pytest.raises(ValueError, match="read-only"):
        signature.entries[0].tensor[...] = 0


@breadth("dtype", ["bfloat16", "float16", "float64"])
def test_transfer_to_another_head_and_dtype(model, dtype):
    """Only what is patched must have its size, and a float dtype."""
    signature = make_signature(model)
    other = conv_net(classes=7, dtype=dtype, name="another")
    before = weights_of(other)
    work = "float64" if dtype == "float64" else "float32"
    expected = list(before)
    for entry in signature:
        total = before[entry.position].astype(work) + entry.tensor.astype(work)
        expected[entry.position] = total
    expected = [new.astype(old.dtype) for new, old in zip(expected, before)]
    signature.apply(other)
    assert_same_bits(weights_of(other), expected)
    signature.remove(other)
    assert_same_bits(weights_of(other), before)


@pytest.mark.one_backend
def test_wrong_use(model, trio):
    lists = functools.partial(extract, *trio)
    sum_of = WeightSignature.sum
    signature = make_signature(model)
    other = make_signature(model, 1, targets="dense", statistics="replace")
    tiny = make_signature(mlp())
    first, clean, robust = trio
    for call, message in (
        (lambda: lists(), "`like`"),
        (lambda: lists(like=model, depth=5), "kernel, 4"),
        (lambda: lists(like=model, depth=1, targets="a"), "not both"),
        (lambda: extract(first, None, robust, like=model), "`clean`"),
        (lambda: other.truncate(1), "`depth` must be an int >= 3"),
        (lambda: signature + tiny, "signature 2 has 4 weights"),
        (lambda: signature * np.nan, "finite"),
        (lambda: sum_of([signature], weights=[1, 2]), "`weights`"),
        (lambda: signature * 1e39, "not finite in float32"),
        (lambda: sum_of([signature], "mean", [0]), "sum to 0"),
        (lambda: sum_of([signature], density=0.2), 'is for "ties"'),
        (lambda: signature.apply(clean[:-1]), "has 15 weights, and 16"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for call in (lambda: signature + 1, lambda: signature * signature):
        with pytest.raises(TypeError):
            call()


@pytest.mark.one_backend
def test_apply_lists_all_that_is_wrong(model):
    signature = make_signature(model)
    weights = random_weights(model, 3)
    weights[CONV] = weights[CONV][..., :1]
    weights[CONV_B] = weights[CONV_B].astype("int8")
    with pytest.raises(ValueError, match=r"2 problems[\s\S]*int8") as error:
        signature.apply(weights)
    assert "shape (3, 3, 1, 1), and (3, 3, 1, 2) is" in str(error.value)
    weights = random_weights(model, 3)
    weights[CONV][...] = np.inf
    weights[CONV_B] = weights[CONV_B].astype("float16")
    match = r"values that are not fin[\s\S]*the result is not finite in float16"
    with pytest.raises(ValueError, match=match):
        signature.apply(weights, scale=1e7)


@pytest.mark.one_backend
def test_algebra(model):
    a, b = (make_signature(model, seed) for seed in (1, 2))
    c, small, tiny = a.truncate(1), a.quantize(8), b.quantize(4)

    def whole(signature):
        found = np.zeros(200)
        for entry in signature:
            start = 10 * entry.info.position
            flat = entry.dequantized().reshape(-1)[:10]
            found[start : start + flat.size] = flat
        return found

    mean = 0.75 * whole(a) + 0.25 * whole(b)
    cases = [
        (a - c, whole(a) - whole(c)),
        (c - a, whole(c) - whole(a)),
        (np.float64(0.5) * a, whole(a) / 2),
        (a * 3, 3 * whole(a)),
        (a / 4, whole(a) / 4),
        (-a, -whole(a)),
        (WeightSignature.sum([a, b, c]), whole(a) + whole(b) + whole(c)),
        (WeightSignature.sum([a, b], weights=[2, -1]), 2 * whole(a) - whole(b)),
        (WeightSignature.sum((a, b), "mean", np.array([3, 1])), mean),
        (small + tiny, whole(small) + whole(tiny)),
    ]
    for got, expected in cases:
        np.testing.assert_allclose(whole(got), expected, rtol=1e-5, atol=1e-6)
        assert got.architecture == a.architecture
    assert not np.any(whole(a - a))
    assert (2 * a).method == "rws"
    assert (a + b).method == "sum"


@pytest.mark.one_backend
@pytest.mark.parametrize("density", [0.1, 0.4])
def test_ties_merges_whole_signatures(model, density):
    parts = [make_signature(model, seed) for seed in (1, 2, 3)]
    weights = [1.0, 2.0, 0.5]
    vectors = [flat(each) for each in parts]
    got = WeightSignature.sum(parts, "ties", weights, density=density)
    expected = references.ties(vectors, density, weights)
    np.testing.assert_allclose(flat(got), expected, rtol=1e-5)


@pytest.mark.one_backend
def test_dare_is_seeded(model):
    parts = [make_signature(model, seed) for seed in (1, 2)]
    got, again, other = (
        WeightSignature.sum(parts, "dare", density=0.1, seed=seed)
        for seed in (3, 3, 4)
    )
    assert got.digest == again.digest != other.digest
    generator = np.random.default_rng(3)
    x, y = (
        np.concatenate(
            [
                references.dare(
                    e.tensor.flat, 0.9, generator.random(e.tensor.shape).flat
                )
                for e in each
            ]
        )
        for each in parts
    )
    np.testing.assert_allclose(flat(got), x + y, rtol=1e-5, atol=1e-6)


def flat(entries):
    return np.concatenate([entry.tensor.reshape(-1) for entry in entries])


@pytest.mark.one_backend
def test_cosine_similarity(model):
    a, b = (make_signature(model, seed) for seed in (1, 2))
    x, y = flat(a), flat(b)
    expected = x @ y / np.sqrt((x @ x) * (y @ y))
    assert a.cosine_similarity(b) == pytest.approx(expected, rel=1e-5)
    assert a.cosine_similarity(-3 * a) == pytest.approx(-1)
    # What one of them lacks counts as zero.
    assert 0 < a.truncate(1).cosine_similarity(a) < 1
    assert (a - a).cosine_similarity(b) == 0
    shifted = make_signature(model, 1, statistics="replace")
    assert shifted.cosine_similarity(a) == pytest.approx(1)
