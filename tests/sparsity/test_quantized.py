"""2:4 models that Keras quantizes keep their pattern."""

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from tests.models import make_sparse, normal, numpy, sequential


def make_model():
    keras.utils.set_random_seed(0)
    return sequential(
        (3, 16),
        keras.layers.Dense(24, name="dense"),
        keras.layers.EinsumDense("btd,dhk->bthk", (3, 2, 9), name="heads"),
        keras.layers.EinsumDense("bthk,hkd->btd", (3, 8), name="joined"),
        keras.layers.Dense(7, name="head"),
    )


INT4 = keras.quantizers.Int4QuantizationConfig
MODES = [("int8", None), ("int4", None)]
MODES += [("int4", INT4(block_size=size)) for size in (None, 8)]
if keras.backend.backend() != "torch":  # which is the fastest here
    # By default blocks of 128: the way of blocks of 8, with one block here.
    MODES.remove(("int4", None))
EACH_MODE = pytest.mark.parametrize(("mode", "config"), MODES)


def effective_kernel(layer, inputs):
    """Read off the outputs for one input at a time."""
    ones = np.eye(inputs, dtype="float32")[None]
    outputs = layer(ones) - layer(np.zeros_like(ones))
    return numpy(outputs).reshape(inputs, -1)


@EACH_MODE
def test_zeros_stay_zeros(mode, config, tmp_path):
    model = make_sparse(make_model())
    # Of (h, k) = (2, 9), flattened, 18 is no multiple of four.
    targets = kwm.find_targets(model, exclude="joined")
    before = {t.layer.name: numpy(t.variable) for t in targets}
    size = kwm.sparsity_report(model).totals["model_size"]
    model.quantize(mode, config=config)
    for name, expected in before.items():
        expected = expected.reshape(len(expected), -1)
        kernel = effective_kernel(model.get_layer(name), len(expected))
        assert not kernel[expected == 0].any()
        assert np.abs(kernel - expected).max() < 0.2 * np.abs(expected).max()
    report = kwm.sparsity_report(model)
    rows = {row.path.split("/")[-2]: row for row in report.kernels}
    assert list(rows) == ["dense", "heads", "joined", "head"]
    assert rows["heads"].shape == (24, 2, 9)
    assert rows["joined"].groups == 0
    assert all(rows[name].is_exact for name in before)
    assert not report.skipped
    assert report.totals["model_size"] == size
    kwm.assert_sparse(model)

    x = normal(2, 3, 16)
    expected = numpy(model(x))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    kwm.assert_sparse(loaded)
    assert kwm.sparsity_report(loaded).totals == report.totals
    np.testing.assert_array_equal(numpy(loaded(x)), expected)


@pytest.mark.parametrize(("mode", "config"), [MODES[0], MODES[-1]])
def test_a_dense_model_is_seen_as_dense(mode, config):
    model = make_model()
    model.quantize(mode, config=config)
    with pytest.raises(AssertionError, match="3 of 3 kernels are not exactly"):
        kwm.assert_sparse(model)
    zeros = kwm.sparsity_report(model).totals["zero_share"]
    assert zeros < (0.05 if mode == "int8" else 0.3)


def test_named_targets_are_looked_at_alone():
    model = make_model()
    model.layers[0].quantize("int8")
    report = kwm.sparsity_report(model, targets="head/")
    assert [kernel.shape for kernel in report.kernels] == [(8, 7)]
    assert len(kwm.sparsity_report(model).kernels) == 4


def test_packed_int8_is_exact_and_reloads(tmp_path):
    model = make_sparse(make_model())
    targets = kwm.find_targets(model, exclude="joined")
    zeros = [numpy(t.variable) == 0 for t in targets]
    kwm.pack(model, dtype="int8", targets=targets)
    kwm.assert_sparse(model)
    x = normal(2, 3, 16)
    expected = numpy(model(x))
    kwm.save_model(model, tmp_path / "model.safetensors")
    loaded = kwm.load_model(tmp_path / "model.safetensors")
    kwm.assert_sparse(loaded)
    np.testing.assert_allclose(numpy(loaded(x)), expected, rtol=1e-5, atol=1e-6)
    kwm.unpack(model)
    for target, zero in zip(kwm.find_targets(model, exclude="joined"), zeros):
        assert not numpy(target.variable)[zero].any()
