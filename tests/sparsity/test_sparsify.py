import json

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.core.layer_kinds import GENERATED
from keras_weightmods.sparsity import criteria, sparsify
from keras_weightmods.sparsity.criteria import Criterion
from tests import models, references
from tests.backends import breadth
from tests.models import assert_same, normal, randomize, weights_of
from tests.sparsity.casts import Batches

CRITERIA = ("magnitude", "wanda", "sparsegpt")
one_backend = pytest.mark.one_backend


def make_mlp():
    units = {24: "relu", 8: "tanh", 3: None}
    layers = (keras.layers.Dense(n, activation=a) for n, a in units.items())
    return randomize(models.sequential((16,), *layers))


def by_method(method, w, x, n, m):
    if method == "magnitude":
        return np.where(references.nm_mask(w, n, m, 0), w, 0.0)
    if method == "wanda":
        return references.wanda(w, x, n, m)
    x = x.astype("float64")
    return references.sparsegpt(w, x.T @ x / len(x), n, m)


# JAX compiles for 17 seconds.
@one_backend
@breadth("pattern", ["2:4", "1:4"])
@pytest.mark.parametrize("method", CRITERIA)
def test_layer_by_layer_on_the_sparse_prefix(method, pattern):
    model = make_mlp()
    n, m = kwm.ops.parse_pattern(pattern)
    weights = [v.astype("float64") for v in weights_of(model)]
    x = normal(40, 16, seed=1)
    report = kwm.sparsify(
        model, pattern, x, criterion=method, batch_size=16, verbose=0
    )
    hidden, held = models.split(x.astype("float64"))
    if method == "magnitude":  # which fits nothing
        hidden = held = x.astype("float64")
    activations = [lambda z: np.maximum(z, 0), np.tanh, lambda z: z]
    for i, activation in enumerate(activations):
        w, bias = weights[2 * i : 2 * i + 2]
        sparse = by_method(method, w, hidden, n, m)
        found = weights_of(model)[2 * i]
        np.testing.assert_allclose(found, sparse, rtol=5e-3, atol=5e-4)
        change = np.sum((held @ (sparse - w)) ** 2)
        error = change / np.sum((held @ w) ** 2)
        assert report.kernels[i].error == pytest.approx(error, rel=1e-2)
        hidden, held = (
            activation(rows @ sparse + bias) for rows in (hidden, held)
        )
    kwm.assert_sparse(model, pattern)
    assert [k.criterion for k in report.kernels] == [method] * 3
    keys = [target.key for target in kwm.find_targets(model)]
    assert [k.key for k in report.kernels] == keys
    json.dumps(report.to_dict())


EINSUMS = [
    ("...x,xy->...y", 6, (3, 8), "btx->btx"),
    ("bquh,uhm->bqm", (3, 6), (3, 2, 4), "bquh->bquh"),
    # The kernel's order of the contracted axes, not the input's.
    ("bhqu,uhm->bqm", (3, 6), (4, 3, 2), "bhqu->bquh"),
    ("btd,ndh->btnh", (3, 2, 5), (3, 8), "btd->btd"),
    # A stack of kernels, each with inputs of its own.
    ("bei,eio->beo", (3, 5), (3, 8), "bei->ebi"),
]


@breadth(("equation", "output", "shape", "rows"), EINSUMS, 4)
def test_einsum_dense(equation, output, shape, rows):
    layer = keras.layers.EinsumDense(equation, output)
    model = randomize(models.sequential(shape, layer))
    (target,) = kwm.find_targets(model)
    kernel = weights_of(model)[0].astype("float64")
    x = normal(30, *shape, seed=1)
    kwm.sparsify(model, "2:4", x, criterion="sparsegpt", verbose=0)
    order = [*target.stack_axes, *target.contraction_axes, *target.output_axes]
    stacks = int(np.prod([target.shape[i] for i in target.stack_axes]))
    size = (stacks, target.contraction_size, -1)
    rows = np.einsum(rows, models.split(x)[0]).reshape(stacks, -1, size[1])
    kernels = np.transpose(kernel, order).reshape(size)
    expected = [
        by_method("sparsegpt", w, r, 2, 4) for w, r in zip(kernels, rows)
    ]
    actual = np.transpose(weights_of(model)[0], order).reshape(size)
    np.testing.assert_allclose(actual, expected, rtol=5e-3, atol=5e-4)
    kwm.assert_sparse(model, "2:4")


@one_backend
def test_a_criterion_is_one_entry_in_a_table(monkeypatch):
    def keep_the_smallest(weights, inputs, pattern):
        scores = inputs.norms[:, None] / (1e-6 + keras.ops.abs(weights))
        mask = kwm.ops.nm_mask(scores, pattern)
        return keras.ops.where(mask, weights, 0.0)

    entry = Criterion(keep_the_smallest)
    monkeypatch.setitem(criteria.CRITERIA, "smallest", entry)
    x, model = normal(40, 16, seed=1), make_mlp()
    before = weights_of(model)[0]
    report = kwm.sparsify(model, data=x, criterion="smallest", verbose=0)
    assert "2:4 by smallest" in str(report)
    x_fit, _ = models.split(x)
    scores = np.sqrt(np.mean(x_fit**2, 0))[:, None] / np.abs(before)
    kept = np.where(references.nm_mask(scores, 2, 4, 0), before, 0.0)
    np.testing.assert_array_equal(weights_of(model)[0], kept)
    options = {"criterion": "smallest", "refine": "swaps", "verbose": 0}
    kwm.sparsify(model := make_mlp(), data=x, **options)
    kwm.assert_sparse(model)
    assert kwm.CAST(make_mlp(), init="smallest").init == "smallest"


@one_backend
def test_errors_are_those_on_rows_that_nothing_was_fitted_to():
    x = normal(512, 64, seed=1)
    for rows, least, match in (
        (1, 0.0, r"1 of 1 kernels .*fewer rows .* \(1 for 64 inputs\)"),
        (32, 0.3, r"1 of 1 kernels .*fewer rows .* \(28 for 64 inputs\)"),
        (32, 0.3, r"magnitude"),
    ):
        model = randomize(models.sequential((64,), keras.layers.Dense(32)))
        w = weights_of(model)[0]
        with pytest.warns(UserWarning, match=match):
            report = kwm.sparsify(
                model, "2:4", x[:rows], criterion="sparsegpt", verbose=0
            )
        others = x[rows:].astype("float64")
        change = np.sum((others @ (weights_of(model)[0] - w)) ** 2)
        (kernel,) = report.kernels
        assert kernel.error >= least
        if least:
            expected = change / np.sum((others @ w) ** 2)
            assert kernel.error == pytest.approx(expected, rel=0.2)
            assert "by magnitude" in kernel.note


@one_backend
def test_swaps_that_are_worse_on_rows_held_out_are_left_out(monkeypatch):
    def spoilt(dense, pruned, *args):
        return keras.ops.negative(pruned)

    x, found = normal(128, 16), []
    for refine in (None, "swaps"):
        monkeypatch.setattr(sparsify, "refined", spoilt)
        model = make_mlp()
        report = kwm.sparsify(
            model, data=x, criterion="wanda", refine=refine, verbose=0
        )
        found.append(weights_of(model))
    assert_same(*found)
    assert all("no swaps" in kernel.note for kernel in report.kernels)


@one_backend
def test_rows_of_weight_zero_are_left_out():
    x = normal(24, 16, seed=1)
    padded = np.concatenate([x, np.full((3, 16), 1e3, "float32")])
    weights = np.array([1] * 24 + [0] * 3)
    found = []
    for data in (x, Batches(x, x, 4), (padded, np.zeros(27), weights)):
        model = make_mlp()
        kwm.sparsify(model, "2:4", data, criterion="wanda", verbose=0)
        found.append(weights_of(model))
    for expected, *others in zip(*found, strict=True):
        for each in others:
            np.testing.assert_allclose(each, expected, rtol=1e-5)


@one_backend
def test_what_does_not_fit_stays_dense():
    model = randomize(models.mlp(6, 8, 4))
    model.trainable = False
    before = weights_of(model)
    report = kwm.sparsify(
        model, "2:4", normal(9, 6), criterion="wanda", verbose=0
    )
    assert_same(weights_of(model)[:2], before[:2])
    assert [k.shape for k in report.kernels] == [(8, 4)]
    assert "multiple of m=4" in report.skipped[-1].reason
    assert not model.trainable_variables
    with pytest.raises(ValueError, match="no kernel that fits"):
        kwm.sparsify(model, "2:4", targets=kwm.find_targets(model)[:1])


class Endless(Batches):
    num_batches = None


X = normal(4, 16)


@one_backend
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"criterion": "wanda"}, "calibration data"),
        ({"data": "wanda"}, "Pass `criterion='wanda'`"),
        ({"criterion": "wanda", "data": normal(0, 16)}, "arrays of rows"),
        ({"criterion": "wanda", "data": iter([normal(0, 16)])}, "with rows"),
        ({"criterion": "wanda", "data": Endless(X, X, 2)}, "endless"),
        ({"data": normal(4, 15)}, "incompatible|shape"),
        (
            {"criterion": "wanda", "data": np.where(X.max() > X, X, np.nan)},
            "NaN",
        ),
        ({"criterion": "sparsegpt", "data": X * np.inf}, "NaN"),
    ],
)
def test_wrong_arguments_leave_the_model_alone(arguments, message):
    model = make_mlp()
    before = weights_of(model)
    with pytest.raises(ValueError, match=message):
        kwm.sparsify(model, **arguments)
    assert_same(weights_of(model), before)


@one_backend
def test_an_error_on_the_way_leaves_the_model_alone():
    model = make_mlp()
    before = weights_of(model)
    # The first kernel is pruned when this is found.
    bias = model.layers[1].bias
    bias.assign(np.full(bias.shape, np.nan))
    infinite = weights_of(model)
    with pytest.raises(ValueError, match=model.layers[2].kernel.path):
        kwm.sparsify(model, data=X, criterion="wanda", verbose=0)
    assert_same(weights_of(model), infinite)
    bias.assign(before[3])

    def interrupt(*args):
        raise KeyboardInterrupt

    model.layers[2].call = interrupt
    with pytest.raises(KeyboardInterrupt):
        kwm.sparsify(model, data=X, criterion="sparsegpt", verbose=0)
    assert_same(weights_of(model), before)
    assert not any(hasattr(layer, GENERATED) for layer in model.layers)


@one_backend
def test_kernels_with_nan_or_scales_are_refused():
    model = make_mlp()
    kernel = model.layers[1].kernel
    value = kernel.numpy()
    kernel.assign(value * np.nan)
    for message in (kernel.path, "fold"):
        if message == "fold":
            kernel.assign(value)
            kwm.attach_scaling(model)
        before = weights_of(model)
        with pytest.raises(ValueError, match=message):
            kwm.sparsify(model)
        assert_same(weights_of(model), before)
