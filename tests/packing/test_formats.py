"""Formats from outside, as a plug-in adds them."""

import numpy as np
import pytest
from keras import ops

import keras_weightmods as kwm
from keras_weightmods.packing import formats
from tests import models
from tests.models import mlp, normal, outputs
from tests.packing.test_packed_embedding import make_model

pytestmark = pytest.mark.one_backend


class Ternary(formats.Format):
    """The sign of each weight, and a scale for each output unit."""

    dtype = "ternary"

    def arrays(self, shape):
        return {
            "signs": (shape, "int8"),
            "scale": ((1, shape[1]), "float32"),
        }

    def pack(self, matrix):
        scale = np.abs(matrix).max(axis=0, keepdims=True)
        return {"signs": np.sign(matrix).astype("int8"), "scale": scale}

    def unpack(self, arrays, shape, xp):
        if xp is np:
            return arrays["signs"].astype("float32") * arrays["scale"]
        return ops.cast(arrays["signs"], "float32") * arrays["scale"]


@pytest.fixture
def _ternary(monkeypatch):
    monkeypatch.setattr(formats, "FORMATS", dict(formats.FORMATS))
    for name in ("pack", "packed_parameters"):
        module = f"keras_weightmods.packing.{name}.FORMATS"
        monkeypatch.setattr(module, formats.FORMATS)
    formats.register_format(Ternary())


@pytest.mark.usefixtures("_ternary")
def test_a_format_from_outside_is_packed_and_saved(tmp_path):
    model = mlp(16, 24, 4)
    x = normal(3, 16)
    expected = [
        np.sign(w) * np.abs(w).max(axis=0) if w.ndim == 2 else w
        for w in model.get_weights()
    ]
    report = kwm.pack(model, "ternary")
    kinds = {(w.dtype, w.pattern, w.activations) for w in report.weights}
    assert kinds == {("ternary", None, "float32")}
    assert all(w.rounding_error > 0 for w in report.weights)
    before = outputs(model, x)
    kwm.save_model(model, tmp_path / "model")
    loaded = kwm.load_model(tmp_path / "model")
    models.assert_same(outputs(loaded, x), before)
    for each in (model, loaded):
        kwm.unpack(each)
        for found, weight in zip(each.get_weights(), expected):
            np.testing.assert_allclose(found, weight, rtol=1e-6)
        np.testing.assert_allclose(outputs(each, x), before, atol=1e-5)


@pytest.mark.usefixtures("_ternary")
def test_it_takes_heads_and_stacks():
    pytest.importorskip("keras_hub")
    ids = np.array([[3, 1, 4]])
    of_llm = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    for model, x in (
        (make_model(), ids),
        (models.causal_lm("mixtral"), of_llm),
    ):
        report = kwm.pack(model, "ternary")
        assert {w.dtype for w in report.weights} == {"ternary"}
        before = outputs(model, x)
        kwm.unpack(model)
        np.testing.assert_allclose(outputs(model, x), before, atol=1e-4)


def test_formats_that_are_none_or_there_already_are_refused():
    for wrong in ("ternary", formats.NativeFormat("int8", None)):
        with pytest.raises(ValueError, match=r"a `Format`|a name other than"):
            formats.register_format(wrong)


@pytest.mark.parametrize("pattern", [None, "2:4", "16:32"])
@pytest.mark.parametrize("dtype", ["int8", "int4", "int3"])
def test_a_table_in_parts_is_packed_as_the_whole(dtype, pattern, monkeypatch):
    form = formats.formats_of(dtype).get(pattern)
    if form is None:
        pytest.skip("not a format")
    matrix = normal(96, 50)
    if pattern:
        matrix = models.numpy(kwm.ops.nm_project(matrix, pattern))
    whole = form.pack(matrix)
    rounded = form.unpack(whole, matrix.shape, np)
    monkeypatch.setattr(formats, "_COLUMNS", 16)
    parts = form.pack(matrix)
    models.assert_same(parts, whole)
    models.assert_same(form.unpack(parts, matrix.shape, np), rounded)
