import functools
import json

import keras
import numpy as np
import pytest

from keras_weightmods import WeightSignature
from keras_weightmods.patches.combine import elected_mean
from tests.backends import breadth
from tests.models import (
    CONV,
    CONV_B,
    assert_same_bits,
    conv_net,
    make_signature,
    random_weights,
    sequential,
    weights_of,
)
from tests.patches import references


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
    for part in ("noise", "rws", "3x3x1x2", "replaces 50%"):
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
    extract = WeightSignature.extract
    lists = functools.partial(extract, *trio)
    of = functools.partial(lists, like=model)
    sum_of = WeightSignature.sum
    signature = make_signature(model)
    other = make_signature(conv_net(), 1, targets="dense", statistics="replace")
    one = [np.ones(2)]
    tiny = sequential((2,), keras.layers.LayerNormalization(center=False))
    tiny = extract(None, one, one, depth=1, like=tiny)
    first, clean, robust = trio
    cases = [
        (lambda: lists(), "`like`"),
        (lambda: lists(like=clean), "`like` must be a built Keras model"),
        (lambda: of(depth=5), "kernel, 4"),
        (lambda: of(name=b"x"), "`name` must be a non-empty"),
        (lambda: of(depth=1, targets="a"), "not both"),
        (lambda: extract(first, None, robust, like=model), "`clean`"),
        (lambda: other.truncate(1), "`depth` must be an int >= 3"),
        (lambda: signature + tiny, "signature 2 has 1 weights"),
        (lambda: signature * np.nan, "finite"),
        (lambda: signature * 1e39, "not finite in float32"),
        (lambda: sum_of([signature], weights=[1, 2]), "`weights`"),
        (lambda: sum_of([signature], "mean", [0]), "sum to 0"),
        (lambda: sum_of([signature], density=0.2), 'is for "ties"'),
        (lambda: sum_of([signature], "ties", drop_rate=0), '"dare"'),
        (lambda: signature.apply(clean[:-1]), "has 15 weights, and 16"),
        (lambda: signature.remove(clean), "a built Keras model"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    for call in (
        lambda: signature + 1,
        lambda: signature * "a",
        lambda: signature * True,
        lambda: signature * signature,
    ):
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
    before = [w.copy() for w in weights]
    with pytest.raises(ValueError, match="values that are not fin") as error:
        signature.apply(weights, scale=1e7)
    assert "the result is not finite in float16" in str(error.value)
    assert_same_bits(weights, before)


@pytest.mark.one_backend
def test_ties_without_a_majority():
    a = np.array([1.0, 0.0, 3.0])
    got = elected_mean([a, -a + [0, 0, 1]], [1.0, 1.0])
    np.testing.assert_array_equal(got, [0.0, 0.0, 3.0])


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
        (a + b, whole(a) + whole(b)),
        (a - c, whole(a) - whole(c)),
        (c - a, whole(c) - whole(a)),
        (2 * a, 2 * whole(a)),
        (np.float64(0.5) * a, whole(a) / 2),
        (a * 3, 3 * whole(a)),
        (a / 4, whole(a) / 4),
        (-a, -whole(a)),
        (WeightSignature.sum([a, b, c]), whole(a) + whole(b) + whole(c)),
        (WeightSignature.sum([a, b], weights=[2, -1]), 2 * whole(a) - whole(b)),
        (WeightSignature.sum((a, b), "mean", np.array([3, 1])), mean),
        (WeightSignature.sum([a], "dare", drop_rate=0), whole(a)),
        (WeightSignature.sum([a], "ties", density=1), whole(a)),
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
    a, b = (make_signature(model, seed) for seed in (1, 2))
    got, again, other = (
        WeightSignature.sum([a, b], "dare", drop_rate=0.9, seed=seed)
        for seed in (3, 3, 4)
    )
    assert got.digest == again.digest != other.digest
    generator = np.random.default_rng(3)

    def dropped(tensor):
        uniform = generator.random(tensor.shape).flat
        found = references.dare(tensor.flat, 0.9, uniform)
        return np.reshape(found, tensor.shape)

    expected = [[dropped(e.tensor) for e in each] for each in (a, b)]
    for entry, x, y in zip(got, *expected):
        np.testing.assert_allclose(entry.tensor, x + y, rtol=1e-5, atol=1e-6)


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
