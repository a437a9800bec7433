"""Signatures and deltas on one model."""

import itertools

import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods import Patches
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

NAMES = ("signature", "quantized", "half", "third")


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def patched(request, tmp_path):
    """A model, its clean weights, and what puts a patch on it by name."""
    model = conv_net(dtype=request.param)
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
        deltas[name] = tmp_path / f"{name}.safetensors"
        kwm.save_delta(model, clean, deltas[name])
    model.set_weights(clean)
    signatures = {
        "signature": make_signature(model, 1, depth=1, statistics="average"),
        "quantized": make_signature(model, 2, depth=2).quantize(4),
    }

    def add(name, scale=0.7):
        if name in deltas:
            return kwm.apply_delta(model, deltas[name], scale, name)
        return Patches(model).add(signatures[name], scale, name)

    return model, clean, add


def test_the_order_leaves_no_trace(patched):
    model, clean, add = patched
    patches = Patches(model)
    expected = {frozenset(): clean}

    def check():
        now = weights_of(model)
        assert_same_bits(now, expected.setdefault(frozenset(patches), now))

    for order in itertools.permutations(NAMES):
        for name in order:
            add(name)
            check()
        for name in order:
            # Where nothing was changed, force is exact too.
            report = patches.remove(name, force=name in ("half", "quantized"))
            assert not report.subtracted
            check()
    assert len(expected) == 16
    assert patches.clean_nbytes == 0


def test_sum_against_numpy(patched):
    model, clean, add = patched
    for name in NAMES:
        add(name, 0.5)
    Patches(model).rescale("half", -1.0)
    entries = [w.astype("float64") for w in clean]
    for name, scale in Patches(model).scales.items():
        for entry in Patches(model)[name].change:
            flat = entries[entry.position].reshape(-1)
            if name in ("half", "third"):
                values = entry.tensor.values.astype("float64")
                flat[entry.tensor.places] += scale * values
            else:
                tensor = entry.dequantized("float64").reshape(-1)
                own = clean[entry.position].astype("float64").reshape(-1)
                flat += scale * (tensor - entry.replaced * own)
    eps = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}
    for got, want in zip(weights_of(model), entries):
        bound = 4 * eps[got.dtype.name]
        np.testing.assert_allclose(
            got.astype("float64"), want, rtol=bound, atol=bound
        )


def test_what_is_kept(patched):
    """Of a weight that deltas alone change, the entries that they change."""
    model, clean, add = patched
    patches = Patches(model)
    add("half")
    of_delta = sum(e.tensor.places.size for e in patches["half"].change)
    itemsize = clean[CONV].itemsize
    assert patches.clean_nbytes == of_delta * itemsize
    add("signature")
    assert patches.clean_nbytes > of_delta * itemsize
    patches.remove("signature")
    assert patches.clean_nbytes == of_delta * itemsize
    report = patches.clear()
    assert (report.action, report.clean_nbytes) == ("clear", 0)
    assert_same_bits(weights_of(model), clean)


def test_weights_changed_since(patched):
    model, clean, add = patched
    for name in ("half", "signature"):
        add(name, 1.0)
    patches = Patches(model)
    before = weights_of(model)
    changed = [w.copy() for w in before]
    for place in (CONV, 12):  # under both, and under the delta alone
        changed[place] *= 2
    model.set_weights(changed)
    for count, call in (
        (2, lambda: add("third")),
        (2, lambda: patches.remove("half")),
        (1, lambda: patches.rescale("signature", 2.0)),
        (1, lambda: patches["signature"].change.remove(model)),
        (2, lambda: kwm.remove_delta(model)),
        (2, patches.clear),
        (2, patches.clean_fingerprint),
    ):
        with pytest.raises(ValueError, match=f"changed since.*{count} prob"):
            call()
        assert_same_bits(weights_of(model), changed)
        assert len(patches) == 2
    report = kwm.remove_delta(model, force=True)
    assert [int(key.split(":")[0]) for key in report.subtracted] == [CONV]
    patches.remove("signature")
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
    patches, results = Patches(model), []
    for order in itertools.permutations(range(len(scales))):
        for i in order:
            patches.add(found[i], scales[i], f"{i}")
        results.append(weights_of(model))
        for i in order:
            patches.remove(f"{i}")
        assert_same_bits(weights_of(model), clean)
    for other in results[1:]:
        assert_same_bits(other, results[0])
    kwm.sum_signatures(found, "sum", scales).apply(model)
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


def test_statistics_that_were_left_are_no_longer_patched():
    model = conv_net()
    model.set_weights(random_weights(model, 0))
    a, b, c = (
        make_signature(model, i, statistics="average") for i in (1, 2, 3)
    )
    patches = Patches(model)
    patches.add(a, name="a")
    patches.add(b, name="b")
    now = weights_of(model)
    for place in STATISTICS:
        now[place] += 1
    model.set_weights(now)
    assert len(patches.remove("a", force=True).skipped) == len(STATISTICS)
    patches.rescale("b", 0.5)
    for place in STATISTICS:
        assert_same_bits([weights_of(model)[place]], [now[place]])
    patches.add(c, name="c")
    patches.remove("b")
    patches.remove("c")
    for place in STATISTICS:
        assert_same_bits([weights_of(model)[place]], [now[place]])
