"""Signatures and deltas on one model."""

import itertools

import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods import Patch
from tests.backends import breadth
from tests.models import (
    CONV,
    CONV_B,
    STATISTICS,
    assert_same_bits,
    conv_net,
    make_signature,
    random_weights,
    weights_of,
)
from tests.patches import references

DTYPES = ["bfloat16", "float32", "float16"]
# The first and the last order, and one between.
ORDERS = [*itertools.permutations(range(4))][::23] + [(2, 0, 3, 1)]


def made(dtype):
    """A model, its clean weights, and patches by name."""
    model = conv_net(dtype=dtype)
    clean = random_weights(model, 0)
    clean[CONV].reshape(-1)[:4] = -0.0
    deltas = {}
    for seed, name, share in ((1, "half", 0.5), (2, "third", 0.3)):
        rng = np.random.default_rng(seed)
        tuned = [w.copy() for w in clean]
        for place in (CONV, CONV_B, 12):
            w = tuned[place]
            at = rng.random(w.shape) < share
            w[at] += rng.normal(size=at.sum()).astype(w.dtype)
        model.set_weights(tuned)
        deltas[name] = Patch.from_models(model, clean, name=name)
    model.set_weights(clean)
    named = {"name": "signature", "depth": 1, "statistics": "average"}
    return (
        model,
        clean,
        {
            "signature": make_signature(model, 1, **named),
            "quantized": make_signature(model, 2, name="quantized").quantize(4),
            **deltas,
        },
    )


@breadth("dtype", DTYPES)
def test_the_order_leaves_no_trace(dtype):
    model, clean, patches = made(dtype)
    expected = {frozenset(): clean}

    def check():
        now = weights_of(model)
        names = frozenset(Patch.on(model))
        assert_same_bits(now, expected.setdefault(names, now))

    for order in ORDERS:
        names = [[*patches][i] for i in order]
        for name in names:
            patches[name].apply(model, 0.3)
            patches[name].apply(model, 0.7)
            check()
        for name in names:
            # Where nothing was changed, force is exact too.
            force = name in ("half", "quantized")
            report = patches[name].remove(model, force=force)
            assert not report.subtracted
            check()
        assert report.clean_nbytes == 0
    assert len(expected) > 10
    # Of a weight that deltas alone change, their entries are kept.
    half, signature = patches["half"], patches["signature"]
    of_delta = sum(e.tensor.size for e in half) * clean[CONV].itemsize
    assert half.apply(model).clean_nbytes == of_delta
    assert signature.apply(model).clean_nbytes > of_delta
    assert signature.remove(model).clean_nbytes == of_delta
    report = Patch.clear(model)
    assert (report.action, report.clean_nbytes) == ("clear", 0)
    assert_same_bits(weights_of(model), clean)


@pytest.mark.one_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_changed_since(dtype):
    model, clean, patches = made(dtype)
    half, signature = patches["half"], patches["signature"]
    for patch in (half, signature):
        patch.apply(model)
    before = weights_of(model)
    changed = [w.copy() for w in before]
    for place in (CONV, 12):  # under both, and under the delta alone
        changed[place] *= 2
    model.set_weights(changed)
    for count, call in (
        (2, lambda: patches["third"].apply(model)),
        (2, lambda: half.remove(model)),
        (1, lambda: signature.apply(model, 2.0)),
        (1, lambda: signature.remove(model)),
        (2, lambda: Patch.clear(model)),
    ):
        with pytest.raises(ValueError, match=f"changed since.*{count} prob"):
            call()
        assert_same_bits(weights_of(model), changed)
        assert len(Patch.on(model)) == 2
    report = half.remove(model, force=True)
    assert [int(key.split(":")[0]) for key in report.subtracted] == [CONV]
    signature.remove(model)
    now = weights_of(model)
    added = before[CONV].astype("float32") - clean[CONV].astype("float32")
    np.testing.assert_allclose(
        now[CONV].astype("float32"),
        changed[CONV].astype("float32") - added,
        rtol=0.05,
        atol=0.05,
    )
    at = before[12] != clean[12]
    assert np.array_equal(now[12], np.where(at, clean[12], changed[12]))
    assert_same_bits([now[CONV_B]], [clean[CONV_B]])


@pytest.mark.one_backend
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scales", [(1, 1, 1), (3,), (0.5, 0.5), (2, -0.1, 2)])
def test_statistics_of_several_patches_are_a_mixture(dtype, scales):
    model = conv_net(dtype=dtype)
    model.set_weights(random_weights(model, 0))
    clean = weights_of(model)
    robust = [random_weights(model, seed) for seed in range(1, 4)]
    found = [
        kwm.WeightSignature.extract(None, clean, each, depth=2, like=model)
        for each in robust
    ][: len(scales)]
    results = []
    for order in itertools.permutations(range(len(scales))):
        for i in order:
            found[i].apply(model, scales[i])
        results.append(weights_of(model))
        for i in order:
            found[i].remove(model)
        assert_same_bits(weights_of(model), clean)
    for other in results[1:]:
        assert_same_bits(other, results[0])
    kwm.WeightSignature.sum(found, "sum", scales).apply(model)
    results.append(weights_of(model))
    for place in STATISTICS:
        parts = [
            (scale / 2, each[place].astype("float64"))
            for scale, each in zip(scales, robust)
        ]
        expected = references.statistic(clean[place].astype("float64"), parts)
        for got in (results[0], results[-1]):
            np.testing.assert_allclose(
                got[place].astype("float64"),
                expected,
                rtol=1e-5 if dtype == "float32" else 2**-7,
                atol=1e-6 if dtype == "float32" else 2**-7,
            )


@pytest.mark.one_backend
def test_statistics_that_were_left_are_no_longer_patched():
    model = conv_net()
    model.set_weights(random_weights(model, 0))
    a, b, c = (
        make_signature(model, i, statistics="average") for i in (1, 2, 3)
    )
    a.apply(model)
    b.apply(model)
    now = weights_of(model)
    for place in STATISTICS:
        now[place] += 1
    model.set_weights(now)
    assert len(a.remove(model, force=True).skipped) == len(STATISTICS)
    b.apply(model, 0.5)
    for place in STATISTICS:
        assert_same_bits([weights_of(model)[place]], [now[place]])
    c.apply(model)
    b.remove(model)
    c.remove(model)
    for place in STATISTICS:
        assert_same_bits([weights_of(model)[place]], [now[place]])
