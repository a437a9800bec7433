import re

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from tests import models
from tests.models import numpy, sequential

one_backend = pytest.mark.one_backend


def make_model():
    keras.utils.set_random_seed(0)
    units = {"misfit": 16, "sparse": 8, "slightly": 8, "dense": 4}
    layers = [keras.layers.Dense(n, name=name) for name, n in units.items()]
    return sequential((6,), *layers, name="model")


def sparsify(model):
    kwm.sparsify(model, targets=["sparse", "slightly"], verbose=0)
    w = numpy(model.get_layer("slightly").kernel)
    w[:4, 0] = [1.0, 2.0, 3.0, 0.0]
    model.get_layer("slightly").kernel.assign(w)


def test_rows_against_numpy():
    model = make_model()
    sparsify(model)
    before = models.weights_of(model)
    report = kwm.sparsity_report(model, (2, 4))
    assert report.pattern == "2:4"
    rows = {row.path.split("/")[-2]: row for row in report.kernels}
    assert list(rows) == ["misfit", "sparse", "slightly", "dense"]
    for name, row in rows.items():
        w = numpy(model.get_layer(name).kernel)
        assert row.shape == w.shape
        assert row.size == w.size
        assert row.zero_share == (w == 0).mean()
        if name == "misfit":
            assert (row.groups, row.violations) == (0, 0)
            continue
        groups = w.T.reshape(-1, 4)
        assert row.groups == len(groups)
        assert row.violations == ((groups != 0).sum(axis=1) > 2).sum()
        assert row.is_exact == (name == "sparse")
    kernels = np.concatenate([w.ravel() for w in before if w.ndim == 2])
    assert report.totals == {
        "kernels": 4,
        "exact": 1,
        "violations": 1 + 8,
        "zero_share": pytest.approx((kernels == 0).mean()),
        "size": kernels.size,
        "model_size": sum(w.size for w in before),
    }
    models.assert_same(models.weights_of(model), before)


@one_backend
def test_assert_sparse_names_the_worst():
    model = make_model()
    sparsify(model)
    with pytest.raises(AssertionError) as error:
        kwm.assert_sparse(model)
    lines = str(error.value).splitlines()
    assert "2 of 3 kernels are not exactly 2:4" in lines[0]
    worst = [line.split()[0] for line in lines if "/kernel" in line]
    assert worst[:2] == ["model/dense/kernel", "model/slightly/kernel"]
    assert "kernel (8 of 8)" in lines[1]
    with pytest.raises(AssertionError, match="does not fit"):
        kwm.assert_sparse(model, targets=kwm.find_targets(model))
    kwm.sparsify(model, verbose=0)
    kwm.assert_sparse(model)
    kwm.assert_sparse(model, "3:4")
    with pytest.raises(AssertionError):
        kwm.assert_sparse(model, "1:4")


@one_backend
def test_assert_sparse_of_many_kernels_is_short():
    model = models.mlp(*[4] * 50)
    with pytest.raises(AssertionError, match="49 of 49") as error:
        kwm.assert_sparse(model)
    assert len(str(error.value)) < 2000
    assert re.search(r"  and \d+ more$", str(error.value))


@one_backend
@pytest.mark.parametrize("dtype", [None, "int8"])
def test_packed_kernels_count(dtype):
    model = make_model()
    sparsify(model)
    before = kwm.sparsity_report(model).to_dict()
    kernel = kwm.find_targets(model, include="sparse")
    kwm.pack(model, dtype=dtype, targets=kernel)
    after = kwm.sparsity_report(model).to_dict()
    assert after["totals"] == before["totals"]
    assert after["skipped"] == before["skipped"]
    rows = {row["path"]: row for row in before["kernels"]}
    for row in after["kernels"]:
        assert {**row, "key": None} == {**rows[row["path"]], "key": None}
    kwm.assert_sparse(sequential((16,), model.get_layer("sparse")))
