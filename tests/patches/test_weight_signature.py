import inspect
import json
import sys

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

import keras_weightmods as kwm
from keras_weightmods import WeightSignature, sum_signatures
from keras_weightmods.patches.tensors import Quantized
from tests.patches import references
from tests.patches.models import (
    CONV,
    CONV_B,
    DENSE,
    HEAD,
    PATHS,
    STATISTICS,
    assert_same_bits,
    make_model,
    make_signature,
    make_weights,
    weights_of,
)
from tests.test_docstrings import code_blocks

WEIGHTS_OF_TWO = [0, 1, 2, 3, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def trio(model):
    return [make_weights(model, seed) for seed in range(3)]


def positions(signature):
    return [entry.info.position for entry in signature]


def test_definition(model, trio):
    init, clean, robust = trio
    # A tensor that clean training did not move keeps all of its change.
    clean[1] = init[1].copy()
    signature = WeightSignature.extract(*trio, depth=2, like=model)
    assert positions(signature) == WEIGHTS_OF_TWO
    assert signature.depth == 2
    for entry in signature:
        place = entry.info.position
        expected = references.rws(init[place], clean[place], robust[place])
        np.testing.assert_allclose(
            signature[entry.key], expected, rtol=1e-5, atol=1e-6
        )
    np.testing.assert_allclose(
        signature.entries[1].tensor, robust[1] - init[1], rtol=1e-6
    )


def test_models_and_lists_are_one(trio):
    checkpoints = [make_model(name=name) for name in ("a", "b", None)]
    for checkpoint, weights in zip(checkpoints, trio):
        checkpoint.set_weights(weights)
    before = [weights_of(m) for m in checkpoints]
    signature = WeightSignature.extract(*checkpoints, depth=3)
    lists = WeightSignature.extract(*trio, depth=3, like=PATHS)
    mixed = WeightSignature.extract(
        checkpoints[0], trio[1], checkpoints[2], depth=3
    )
    for other in (lists, mixed):
        assert positions(other) == positions(signature)
        assert other.fingerprints == signature.fingerprints
        for a, b in zip(signature, other):
            assert a.depth == b.depth
            np.testing.assert_array_equal(a.tensor, b.tensor)
    assert signature.model_class == "Sequential"
    assert lists.model_class is None
    assert signature.method == "rws"
    assert set(signature.fingerprints) == {"init", "clean", "robust"}
    assert len(set(signature.fingerprints.values())) == 3
    for checkpoint, weights in zip(checkpoints, before):
        assert_same_bits(weights_of(checkpoint), weights)


def test_two_checkpoints(model, trio):
    _, clean, robust = trio
    signature = WeightSignature.extract(None, clean, robust, 4, like=model)
    assert signature.method == "difference"
    assert set(signature.fingerprints) == {"clean", "robust"}
    patched = signature.apply(clean)
    for place, (a, b, c) in enumerate(zip(patched, robust, clean)):
        if place in STATISTICS:
            assert a is c
        else:
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_depth_follows_execution():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.last = keras.layers.Dense(2, name="last")
            self.norm = keras.layers.LayerNormalization(name="norm")
            self.first = keras.layers.Dense(3, name="first")

        def build(self, input_shape):
            self.first.build(input_shape)
            self.norm.build((None, 3))
            self.last.build((None, 3))
            self.built = True

        def call(self, x):
            return self.last(self.norm(self.first(x)))

    model = Model()
    model(np.zeros((1, 4), "float32"))
    paths = [variable.path for variable in model.weights]
    assert "last" in paths[0]
    weights = weights_of(model)
    for depth, expected in ((1, {"first", "norm"}), (2, None)):
        signature = WeightSignature.extract(None, model, weights, depth=depth)
        found = {e.info.path.split("/")[-2] for e in signature}
        assert found == (expected or {"first", "norm", "last"})
        assert signature.depth == depth
    with pytest.raises(ValueError, match="there are 2"):
        WeightSignature.extract(None, model, weights, depth=3)


def test_targets(model, trio):
    targets = kwm.find_targets(model, include="dense")
    models = [model, trio[1], trio[2]]
    by_target = WeightSignature.extract(*models, targets=targets[:1])
    assert positions(by_target) == [DENSE, DENSE + 1]
    assert [e.depth for e in by_target] == [2, 2]
    for pattern in (r"^norm_b/", ["norm_b/gamma", "norm_b/beta"]):
        by_path = WeightSignature.extract(*trio, targets=pattern, like=PATHS)
        assert positions(by_path) == [8, 9]
    everything = WeightSignature.extract(
        *trio, targets="", statistics="replace", like=PATHS
    )
    assert len(everything) == len(PATHS)
    wrong = (
        ("(", "valid regular"),
        ("nothing", "matches none of 16"),
        ([], "targets"),
        (7, "targets"),
        (kwm.find_targets(make_model()), "weights of `init`"),
    )
    for value, message in wrong[:4]:
        with pytest.raises(ValueError, match=message):
            WeightSignature.extract(*models, targets=value)
    with pytest.raises(ValueError, match="weights of `init`"):
        WeightSignature.extract(*models, targets=wrong[4][0])
    with pytest.raises(ValueError, match="need a model"):
        WeightSignature.extract(*trio, targets=targets, like=PATHS)


@pytest.mark.parametrize("statistics", ["keep", "average", "replace"])
def test_statistics(model, trio, statistics):
    _, clean, robust = trio
    signature = WeightSignature.extract(
        *trio, depth=2, statistics=statistics, like=model
    )
    other = make_weights(model, 7)
    patched = signature.apply(other)
    for place in STATISTICS:
        pair = {"keep": (1, 0), "average": (0.5, 0.5), "replace": (0, 1)}
        own, theirs = pair[statistics]
        np.testing.assert_allclose(
            patched[place],
            own * other[place] + theirs * robust[place],
            rtol=1e-5,
            atol=1e-6,
        )
    # Quantizing leaves them alone, and a mean of signatures is their mean.
    eight = signature.quantize(8)
    for entry in eight:
        packed = isinstance(entry.tensor, Quantized)
        assert packed == (entry.info.position not in STATISTICS)
    if statistics == "replace":
        second = WeightSignature.extract(
            trio[0], clean, other, depth=2, statistics="replace", like=model
        )
        for method in ("mean", "ties"):
            mean = sum_signatures([eight, second], method)
            for place in STATISTICS:
                np.testing.assert_allclose(
                    mean.apply(clean)[place],
                    (robust[place] + other[place]) / 2,
                    rtol=1e-5,
                    atol=1e-6,
                )
        with pytest.raises(ValueError, match="negative variance"):
            signature.apply(other, scale=-30.0)


def test_state_is_not_touched():
    inputs = keras.Input((3,))
    x = keras.layers.Normalization(mean=None)(inputs)
    x = keras.layers.Dropout(0.5, seed=1)(x)
    model = keras.Model(inputs, keras.layers.Dense(2)(x))
    weights = make_weights(model, 0)
    signature = WeightSignature.extract(
        None, model, weights, targets="", statistics="replace"
    )
    assert [e.info.path.split("/")[-1] for e in signature] == ["kernel", "bias"]
    # Without a model, names and dtypes tell.
    paths = [variable.path for variable in model.weights]
    by_name = WeightSignature.extract(
        None, model.get_weights(), weights, targets="", like=paths
    )
    assert positions(by_name) == positions(signature)
    # A frozen layer is a layer like another.
    model.trainable = False
    frozen = WeightSignature.extract(None, model, weights, targets="")
    assert positions(frozen) == positions(signature)


def test_scale_acts_once(model, trio):
    signature = make_signature(model)
    clean = make_weights(model, 9)
    for scale in (0.5, -1.0, np.float32(2), 0):
        patched = signature.apply(clean, scale=scale)
        for place, (old, new) in enumerate(zip(clean, patched)):
            if place in WEIGHTS_OF_TWO:
                tensor = signature.entries[WEIGHTS_OF_TWO.index(place)].tensor
                np.testing.assert_allclose(
                    new, old + float(scale) * tensor, rtol=1e-5, atol=1e-6
                )
            else:
                assert new is old
    back = signature.remove(patched, force=True, scale=0)
    np.testing.assert_array_equal(back[0], clean[0])


def test_algebra(model):
    a, b = (make_signature(model, seed) for seed in (1, 2))
    c = a.truncate(1)

    def whole(signature):
        found = np.zeros(200)
        for entry in signature:
            start = 10 * entry.info.position
            flat = entry.dequantized().reshape(-1)[:10]
            found[start : start + flat.size] = flat
        return found

    cases = [
        (a + b, whole(a) + whole(b)),
        (a - c, whole(a) - whole(c)),
        (c - a, whole(c) - whole(a)),
        (2 * a, 2 * whole(a)),
        (np.float64(0.5) * a, whole(a) / 2),
        (a * 3, 3 * whole(a)),
        (a / 4, whole(a) / 4),
        (-a, -whole(a)),
        (sum_signatures([a, b, c]), whole(a) + whole(b) + whole(c)),
        (
            sum_signatures([a, b], weights=[2, -1]),
            2 * whole(a) - whole(b),
        ),
        (
            sum_signatures((a, b), "mean", np.array([3, 1])),
            0.75 * whole(a) + 0.25 * whole(b),
        ),
        (sum_signatures([a], "dare", drop_rate=0), whole(a)),
        (sum_signatures([a], "ties", density=1), whole(a)),
        (
            a.quantize(8) + b.quantize(4, per_channel=True),
            whole(a.quantize(8)) + whole(b.quantize(4, per_channel=True)),
        ),
    ]
    for got, expected in cases:
        np.testing.assert_allclose(whole(got), expected, rtol=1e-5, atol=1e-6)
        assert got.architecture == a.architecture
    assert not np.any(whole(a - a))
    assert (2 * a).method == "rws"
    assert (a + b).method == "sum"
    assert (a + a).fingerprints == a.fingerprints
    assert (a + b).fingerprints == {}


@pytest.mark.parametrize("density", [0.1, 0.4])
def test_ties_merges_whole_signatures(model, density):
    parts = [make_signature(model, seed) for seed in (1, 2, 3)]
    weights = [1.0, 2.0, 0.5]
    vectors = [
        np.concatenate([w * e.tensor.reshape(-1) for e in each])
        for each, w in zip(parts, weights)
    ]
    got = sum_signatures(parts, "ties", weights, density=density)
    np.testing.assert_allclose(
        np.concatenate([e.tensor.reshape(-1) for e in got]),
        references.ties(vectors, density),
        rtol=1e-5,
    )


def test_dare_is_seeded(model):
    a, b = (make_signature(model, seed) for seed in (1, 2))
    got, again, other = (
        sum_signatures([a, b], "dare", drop_rate=0.5, seed=seed)
        for seed in (3, 3, 4)
    )
    assert got.digest == again.digest != other.digest
    generator = np.random.default_rng(3)
    expected = [
        [
            np.reshape(
                references.dare(
                    e.tensor.flat, 0.5, generator.random(e.tensor.shape).flat
                ),
                e.tensor.shape,
            )
            for e in each
        ]
        for each in (a, b)
    ]
    for entry, x, y in zip(got, *expected):
        np.testing.assert_allclose(entry.tensor, x + y, rtol=1e-5, atol=1e-6)


def test_cosine_similarity(model):
    a, b = (make_signature(model, seed) for seed in (1, 2))
    got = a.cosine_similarity(b)
    x, y = (
        np.concatenate([e.tensor.reshape(-1) for e in each]) for each in (a, b)
    )
    expected = x @ y / np.sqrt((x @ x) * (y @ y))
    assert got.whole == pytest.approx(expected, rel=1e-5)
    x, y = (
        np.concatenate([e.tensor.reshape(-1) for e in each.entries[:2]])
        for each in (a, b)
    )
    first = next(iter(got.layers.values()))
    assert first == pytest.approx(x @ y / np.sqrt((x @ x) * (y @ y)), rel=1e-5)
    assert [key.split(":")[0] for key in got.layers] == ["0", "2", "6", "8"]
    assert a.cosine_similarity(-3 * a).whole == pytest.approx(-1)
    # What one of them lacks counts as zero.
    part = a.truncate(1).cosine_similarity(a)
    assert 0 < part.whole < 1
    assert list(part.layers.values()) == pytest.approx([1, 1, 0, 0])
    assert (a - a).cosine_similarity(b).whole == 0
    shifted = make_signature(model, 1, statistics="replace")
    assert shifted.cosine_similarity(a).whole == pytest.approx(1)


def test_bytes(model):
    signature = make_signature(model)
    sizes = [e.tensor.size for e in signature]
    assert signature.nbytes == 4 * sum(sizes)
    assert signature.model_nbytes == sum(w.nbytes for w in weights_of(model))
    for bits in (8, 4, 2):
        packed = sum(-(-size * bits // 8) for size in sizes)
        assert signature.quantize(bits).nbytes == packed + 4 * len(sizes)
    channels = signature.quantize(8, per_channel=True)
    scales = 2 + 1 + 1 + 1 + 3 + 1 + 1 + 1
    assert channels.nbytes == sum(sizes) + 4 * scales


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
    ratios = [
        each.model_nbytes / each.nbytes
        for each in (
            signature,
            signature.truncate(6),
            signature.quantize(8),
            signature.quantize(8, per_channel=True),
        )
    ]
    assert ratios[0] == pytest.approx(8.48, abs=0.01)
    assert ratios[1] == pytest.approx(12.9, abs=0.1)
    assert ratios[2] == pytest.approx(33.9, abs=0.1)
    assert ratios[3] == pytest.approx(33.4, abs=0.5)


def test_report(model):
    signature = make_signature(model, statistics="average", name="noise")
    report = signature.quantize(4).report()
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain == report.to_dict()
    assert plain["name"] == "noise"
    assert [row["bits"] for row in plain["rows"][:5]] == [4, 4, 4, 4, 32]
    assert plain["rows"][0]["norm"] == pytest.approx(
        np.linalg.norm(signature.quantize(4).entries[0].dequantized())
    )
    text = str(signature)
    for part in ("noise", "rws", "depth 2", "3x3x1x2", "replaces 50%"):
        assert part in text, part
    assert "noise" in repr(signature)
    assert signature.keys()[0].startswith("0:")
    with pytest.raises(KeyError):
        signature["0:nothing"]


def test_transfer_to_another_head_and_dtype(model):
    """Only what is patched must have its size, and a float dtype."""
    signature = make_signature(model)
    for dtype in ("float16", "bfloat16", "float64"):
        other = make_model(classes=7, dtype=dtype, name="another")
        before = weights_of(other)
        signature.apply(other)
        after = weights_of(other)
        for place, (old, new) in enumerate(zip(before, after)):
            if place in WEIGHTS_OF_TWO:
                entry = signature.entries[WEIGHTS_OF_TWO.index(place)]
                work = "float64" if dtype == "float64" else "float32"
                expected = old.astype(work) + entry.tensor.astype(work)
                assert new.tobytes() == expected.astype(old.dtype).tobytes()
            else:
                assert new.tobytes() == old.tobytes()
        signature.remove(other)
        assert_same_bits(weights_of(other), before)


def test_extract_lists_all_that_is_wrong(model, trio):
    init, clean, robust = ([w.copy() for w in each] for each in trio)
    init[CONV][0, 0, 0, 0] = np.nan
    clean[1] = clean[1].astype(ml_dtypes.bfloat16)
    robust[2] = np.zeros(5, "float32")
    robust[3] = robust[3].astype("int32")
    # What is not taken does not count.
    robust[HEAD] = np.full((9, 9), np.nan, "float32")
    with pytest.raises(ValueError) as error:
        WeightSignature.extract(init, clean, robust, depth=1, like=PATHS)
    message = str(error.value)
    for part in (
        "init, 0:conv/kernel: values that are not finite",
        "1:conv/bias: one dtype is expected, not init float32, clean bfloat16",
        "robust, 2:norm/gamma: shape (5,), and (2,) is expected",
        "robust, 3:norm/beta: dtype int32",
    ):
        assert part in message, part
    assert str(9) not in message
    robust[HEAD] = robust[HEAD][0]
    with pytest.raises(ValueError, match=r"14:head/kernel.*2 axes"):
        WeightSignature.extract(*trio[:2], robust, depth=1, like=PATHS)
    with pytest.raises(ValueError, match="has 3 weights, and 16 are"):
        WeightSignature.extract(init[:3], *trio[1:], depth=1, like=PATHS)
    other = keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            keras.layers.Conv2D(2, 3, name="renamed"),
            *make_model().layers[1:],
        ]
    )
    with pytest.raises(ValueError, match=r"renamed/kernel', and 'conv2d") as e:
        WeightSignature.extract(model, model, other, depth=1)
    assert "2 problems" in str(e.value)


def test_wrong_use(model, trio):
    class Sub(keras.Model):
        def call(self, x):
            return x

    extract = WeightSignature.extract
    signature = make_signature(model)
    other = make_signature(
        make_model(), 1, targets="dense", statistics="replace"
    )
    tiny = extract(
        None, [np.ones(2)], [np.ones(2)], depth=1, like=["dense/bias"]
    )
    cases = [
        (lambda: extract(*trio), "`like`"),
        (lambda: extract(*trio, like=PATHS[1:]), "`like` must hold one path"),
        (lambda: extract(*trio, like=[*PATHS[1:], 3]), "`like` must hold"),
        (lambda: extract(*trio, like=keras.layers.Dense(2)), "`like`"),
        (lambda: extract(*trio, like=Sub()), "`like` must be built"),
        (lambda: extract(*trio, depth=0, like=PATHS), "`depth` must be an int"),
        (lambda: extract(*trio, depth=2.0, like=PATHS), "`depth` must be an"),
        (lambda: extract(*trio, depth=5, like=PATHS), "there are 4"),
        (lambda: extract(*trio, like=PATHS), "depth=7, and there are 4"),
        (lambda: extract(*trio, depth=1, targets="a", like=PATHS), "not both"),
        (lambda: extract(*trio, statistics="no", like=PATHS), "`statistics`"),
        (lambda: extract(trio[0], None, trio[2], like=PATHS), "`clean`"),
        (lambda: extract(trio[0], [], trio[2], like=PATHS), "length 0"),
        (lambda: extract("a", *trio[1:], like=PATHS), "`init`"),
        (lambda: signature.truncate(0), "`depth`"),
        (lambda: other.truncate(1), "holds nothing at this depth"),
        (lambda: signature.quantize(3), "`bits`"),
        (lambda: signature.quantize(8.0), "`bits`"),
        (lambda: signature.cosine_similarity(3), "Received: int"),
        (lambda: signature + tiny, "signature 2 has 1 weights"),
        (lambda: signature * np.nan, "finite"),
        (lambda: signature * 1e39, "not finite in float32"),
        (lambda: sum_signatures([]), "`signatures`"),
        (lambda: sum_signatures([signature, 3]), "`signatures`"),
        (lambda: sum_signatures(signature), "`signatures`"),
        (lambda: sum_signatures([signature], "max"), "`method`"),
        (lambda: sum_signatures([signature], weights=[1, 2]), "`weights`"),
        (lambda: sum_signatures([signature], weights=["a"]), "`weights`"),
        (lambda: sum_signatures([signature], "mean", [0]), "sum to 0"),
        (lambda: sum_signatures([signature], "ties", density=0), "`density`"),
        (lambda: sum_signatures([signature], "ties", density=""), "`density`"),
        (lambda: sum_signatures([signature], "dare", drop_rate=1), "drop_rate"),
        (lambda: sum_signatures([signature], "dare", seed=1.5), "`seed`"),
        (lambda: signature.apply(trio[1], scale=np.inf), "`scale`"),
        (lambda: signature.apply(trio[1], scale="1"), "`scale`"),
        (lambda: signature.apply(trio[1], scale=True), "`scale`"),
        (lambda: signature.apply(trio[1][:-1]), "has 15 weights, and 16"),
        (lambda: signature.remove(trio[1]), "force=True"),
        (lambda: signature.apply(3), "`model` must be a built Keras model"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    for call in (
        lambda: signature + 1,
        lambda: signature - 1,
        lambda: signature * "a",
        lambda: signature * True,
        lambda: signature / "a",
        lambda: signature * signature,
    ):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(ZeroDivisionError):
        signature / 0


def test_apply_lists_all_that_is_wrong(model):
    signature = make_signature(model)
    weights = make_weights(model, 3)
    weights[CONV] = weights[CONV][..., :1]
    weights[CONV_B] = weights[CONV_B].astype("int8")
    with pytest.raises(ValueError) as error:
        signature.apply(weights)
    assert "2 problems" in str(error.value)
    assert "shape (3, 3, 1, 1), and (3, 3, 1, 2) is" in str(error.value)
    assert "dtype int8" in str(error.value)
    weights = make_weights(model, 3)
    weights[CONV][...] = np.inf
    weights[CONV_B] = weights[CONV_B].astype("float16")
    before = [w.copy() for w in weights]
    with pytest.raises(ValueError) as error:
        signature.apply(weights, scale=1e7)
    assert "values that are not finite" in str(error.value)
    assert "the result is not finite in float16" in str(error.value)
    assert_same_bits(weights, before)


def test_lists_with_statistics(model, trio):
    half = WeightSignature.extract(
        *trio, depth=2, statistics="average", like=model
    )
    clean = make_weights(model, 4)
    back = half.remove(half.apply(clean, 1.5), force=True, scale=1.5)
    for a, b in zip(back, clean):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="replaced as a whole") as error:
        half.remove(clean, force=True, scale=2)
    assert "4 problems" in str(error.value)


def test_numpy_only_lists_do_not_touch_a_backend(model, trio, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the backend was used")

    for name in ("convert_to_tensor", "convert_to_numpy"):
        monkeypatch.setattr(ops, name, refuse)
    signature = WeightSignature.extract(*trio, depth=2, like=PATHS)
    signature.quantize(4).remove(signature.apply(trio[0]), force=True)


def test_signatures_are_immutable(model):
    signature = make_signature(model)
    with pytest.raises(ValueError, match="read-only"):
        signature.entries[0].tensor[...] = 0


def test_examples_of_methods_run():
    module = sys.modules[WeightSignature.__module__]
    methods = vars(module.WeightSignature).values()
    blocks = [
        block
        for method in methods
        for block in code_blocks(
            inspect.getdoc(getattr(method, "__func__", method))
        )
    ]
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, "docstring", "exec"), {})
