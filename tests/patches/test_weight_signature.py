import inspect
import json
import sys

import keras
import numpy as np
import pytest
from keras import ops

from keras_weightmods import WeightSignature, sum_signatures
from tests.models import (
    CONV,
    CONV_B,
    PATHS,
    assert_same_bits,
    conv_net,
    make_signature,
    random_weights,
    weights_of,
)
from tests.test_docstrings import code_blocks

WEIGHTS_OF_TWO = [0, 1, 2, 3, 6, 7, 8, 9]


def test_scale_acts_once(model, trio):
    signature = make_signature(model)
    clean = random_weights(model, 9)
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
        other = conv_net(classes=7, dtype=dtype, name="another")
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


def test_wrong_use(model, trio):
    class Sub(keras.Model):
        def call(self, x):
            return x

    extract = WeightSignature.extract
    signature = make_signature(model)
    other = make_signature(conv_net(), 1, targets="dense", statistics="replace")
    tiny = extract(
        None, [np.ones(2)], [np.ones(2)], depth=1, like=["dense/bias"]
    )
    cases = [
        (lambda: extract(*trio), "`like`"),
        (
            lambda: extract(*trio, like=PATHS[1:]),
            "`like` must be a list of one path",
        ),
        (
            lambda: extract(*trio, like=[*PATHS[1:], 3]),
            "`like` must be a list",
        ),
        (lambda: extract(*trio, like=keras.layers.Dense(2)), "`like`"),
        (lambda: extract(*trio, like=Sub()), "`like` must be built"),
        (
            lambda: extract(*trio, depth=0, like=PATHS),
            "`depth` must be an int",
        ),
        (
            lambda: extract(*trio, depth=2.0, like=PATHS),
            "`depth` must be an",
        ),
        (lambda: extract(*trio, depth=5, like=PATHS), "kernel, 4"),
        (
            lambda: extract(*trio, like=PATHS),
            "kernel, 4. Received: depth=7",
        ),
        (
            lambda: extract(*trio, depth=1, targets="a", like=PATHS),
            "not both",
        ),
        (
            lambda: extract(*trio, statistics="no", like=PATHS),
            "`statistics`",
        ),
        (
            lambda: extract(trio[0], None, trio[2], like=PATHS),
            "`clean`",
        ),
        (
            lambda: extract(trio[0], [], trio[2], like=PATHS),
            "`clean` must be a built",
        ),
        (lambda: extract("a", *trio[1:], like=PATHS), "`init`"),
        (lambda: signature.truncate(0), "`depth`"),
        (lambda: other.truncate(1), "`depth` must be an int >= 3"),
        (lambda: signature.quantize(3), "`bits`"),
        (lambda: signature.quantize(8.0), "`bits`"),
        (lambda: signature.cosine_similarity(3), "`other`"),
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
    weights = random_weights(model, 3)
    weights[CONV] = weights[CONV][..., :1]
    weights[CONV_B] = weights[CONV_B].astype("int8")
    with pytest.raises(ValueError) as error:
        signature.apply(weights)
    assert "2 problems" in str(error.value)
    assert "shape (3, 3, 1, 1), and (3, 3, 1, 2) is" in str(error.value)
    assert "dtype int8" in str(error.value)
    weights = random_weights(model, 3)
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
    clean = random_weights(model, 4)
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
