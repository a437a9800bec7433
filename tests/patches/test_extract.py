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
from tests.models import (
    CONV,
    DENSE,
    HEAD,
    STATISTICS,
    assert_same_bits,
    conv_net,
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
    before = [weights_of(m) for m in checkpoints]
    signature = extract(*checkpoints, depth=3)
    lists = extract(*trio, depth=3, like=model)
    first, _, third = checkpoints
    mixed = extract(first, trio[1], third, depth=3)
    for other in (lists, mixed):
        assert positions(other) == positions(signature)
        for a, b in zip(signature, other, strict=True):
            np.testing.assert_array_equal(a.tensor, b.tensor)
        assert [e.depth for e in other] == [e.depth for e in signature]
    for checkpoint, weights in zip(checkpoints, before):
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
    assert positions(by_layer) == [DENSE, DENSE + 1]
    assert [e.depth for e in by_layer] == [2, 2]
    for pattern in (f"{norm.name}/[gb]", [f"{norm.name}/{x}" for x in "gb"]):
        by_path = extract(*models, targets=pattern, statistics="keep")
        assert positions(by_path) == [8, 9]
    everything = extract(*trio, targets="", statistics="replace", like=model)
    assert len(everything) == len(model.weights)
    for value, message in (
        ("(", "valid regular"),
        ("nothing", "matches none of 16"),
        ([], "targets"),
        (7, "targets"),
        (conv_net().layers[0], "matches none of 16"),
    ):
        with pytest.raises(ValueError, match=message):
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
def test_a_signature_of_companded_weights_is_for_these(tmp_path):
    """What fixed companders store looks like weights, and is not."""
    plain, companded = conv_net(), conv_net()
    kwm.attach_compander(companded)
    for pair in ((plain, companded), (companded, plain)):
        with pytest.raises(ValueError, match=r"2 problems[\s\S]*compander \("):
            extract(None, *pair, depth=2)
    stored = weights_of(companded)
    signature = extract(None, companded, [w + 0.1 for w in stored], depth=2)
    path = tmp_path / "a.safetensors"
    signature.save(path)
    loaded = WeightSignature.load(path)
    assert loaded.digest == signature.digest
    for each in (loaded, -signature.quantize(8), loaded + signature):
        with pytest.raises(ValueError, match="a plain weight, and compander"):
            each.apply(plain)
        each.apply(companded)
        kwm.Patch.clear(companded)
    assert_same_bits(weights_of(companded), stored)
    other = extract(None, plain, conv_net(), depth=2)
    with pytest.raises(ValueError, match="and a plain weight is expected"):
        other.apply(companded)
    with pytest.raises(ValueError, match=r"signature 2, .*Fold both"):
        WeightSignature.sum([other, signature])


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
        f"1:{second}: one float dtype is expected, not float32, bfloat16, fl",
        f"robust, 2:{third}: shape (5,), and (2,) is expected",
        f"robust, 3:{fourth}: dtype int32",
        "5 problems",
    ):
        assert part in str(error.value)
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
def test_models_with_lora_are_refused():
    plain, adapted = conv_net(), conv_net()
    adapted.layers[-1].enable_lora(2)
    for pair in ((plain, adapted), (adapted, adapted)):
        with pytest.raises(ValueError, match=r"robust, .*`kwm\.merge_lora\("):
            extract(None, *pair, depth=1)
    kwm.merge_lora(adapted)
    extract(None, plain, adapted, depth=1)
