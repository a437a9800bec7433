"""attach_compander: the range, the gradient, what sees v and what sees w."""

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from tests.backends import breadth
from tests.models import fit_step, normal, numpy, outputs, sequential


# Within the range of every function at a = 0.5.
def draw():
    return keras.initializers.RandomUniform(-0.48, 0.48)


def dense_model(**kwargs):
    hidden = keras.layers.Dense(5, "relu", kernel_initializer=draw(), **kwargs)
    last = keras.layers.Dense(3, kernel_initializer=draw(), use_bias=False)
    return sequential((6,), hidden, last)


X = normal(4, 6)


@breadth(
    ("function", "learnable"),
    [("arctan", True), ("arctan", False), ("arsinh", False), ("erf", True)],
)
def test_starts_with_the_pair_and_the_function_of_the_model(
    function, learnable
):
    model = dense_model()
    before = outputs(model, X)
    report = kwm.attach_compander(model, learnable=learnable, function=function)
    np.testing.assert_allclose(outputs(model, X), before, rtol=0, atol=1e-6)
    # By default twice a where b is trained.
    b = 1 if learnable else 0.5
    assert f"a = 0.5, b = {b}" in str(report)
    for kernel in report.kernels:
        assert kernel.a == pytest.approx(0.5, rel=1e-6)
    assert len(model.weights) == (5 if learnable else 3)


LIMIT = 0.5 * np.pi / 2
ENDS = [LIMIT * 0.995, LIMIT, LIMIT * 1.5, 4.0]


@pytest.mark.one_backend
@pytest.mark.parametrize("largest", ENDS)
@pytest.mark.parametrize("own", [True, False])
def test_weights_at_and_beyond_the_range(own, largest):
    weight = np.float32([[0.1, largest], [-largest, -0.2]])

    def draw(shape, dtype=None):
        return weight

    def make(**kwargs):
        if own:
            layer = kwm.CompanderDense(2, kernel_initializer=draw, **kwargs)
            layer.build((None, 2))
            return layer, layer.compander
        model = sequential((2,), keras.layers.Dense(2, use_bias=False))
        model.set_weights([weight])
        (kernel,) = kwm.attach_compander(model, **kwargs).kernels
        return model.layers[0], kernel

    layer, kernel = make(out_of_range="clip")
    assert (kernel.outside, kernel.raised) == (2, False)
    assert "clipped 2 weight(s)" in kernel.detail
    expected = np.clip(weight, -0.99 * LIMIT, 0.99 * LIMIT)
    np.testing.assert_allclose(numpy(layer.kernel), expected, atol=1e-6)
    for learnable in (True, False):
        layer, kernel = make(out_of_range="raise_a", learnable=learnable)
        assert (kernel.outside, kernel.raised) == (2, True)
        assert "a raised for 2 weight(s)" in kernel.detail
        assert kernel.a == pytest.approx(largest / (0.99 * np.pi / 2), 1e-5)
        np.testing.assert_allclose(numpy(layer.kernel), weight, rtol=1e-5)
        if own:  # The same `a` in a copy, whatever is drawn there.
            config = layer.get_config()
            assert config["a"] > 0.5
            assert config["out_of_range"] == "clip"


def test_fit_follows_the_gradient_of_all_three():
    model = sequential((4,), keras.layers.Dense(3, use_bias=False))
    a, b, rate = 0.7, 1.2, 0.05
    report = kwm.attach_compander(model, a=a, b=b, learnable=True)
    (kernel,) = report.kernels
    v = np.float64(model.weights[0].numpy())
    x = np.float64(normal(4, 4))
    optimizer = keras.optimizers.SGD(rate)
    fit_step(model, np.float32(x), np.ones((4, 3)), optimizer)
    w = a * np.arctan(v / b)
    to_w = x.T @ (2 * (x @ w - 1) / 12)
    slope = a / (b * (1 + (v / b) ** 2))
    np.testing.assert_allclose(
        model.weights[0].numpy(), v - rate * to_w * slope, atol=1e-6
    )
    da, db = np.sum(to_w * w) / a, -np.sum(to_w * slope * v) / b
    for value, start, gradient in ((kernel.a, a, da), (kernel.b, b, db)):
        half = start - 1e-3
        raw = half - 1 / (4 * half)
        raw -= rate * gradient * half / np.sqrt(raw**2 + 1)
        assert value == pytest.approx(
            1e-3 + (raw + np.sqrt(raw**2 + 1)) / 2, rel=1e-5
        )


@pytest.mark.one_backend
@pytest.mark.parametrize("value", [-1e30, 0.0, 1e6])
def test_a_and_b_stay_positive_and_move_whatever_the_raw_pair(value):
    model = dense_model()
    (kernel, _) = kwm.attach_compander(model, learnable=True).kernels
    model.layers[0].weights[-1].assign([value, value])
    before = kernel.a, kernel.b
    assert np.isfinite(outputs(model, X)).all()
    optimizer = keras.optimizers.SGD(1e3, use_ema=True)
    fit_step(model, X, 10 * np.ones((4, 3)), optimizer)
    assert min(kernel.a, kernel.b, *before) > 0
    assert (kernel.a, kernel.b) != before or abs(value) > 1e3


@pytest.mark.one_backend
def test_a_constraint_sees_the_effective_weight():
    model = dense_model(kernel_constraint=keras.constraints.MaxNorm(0.3))
    kwm.attach_compander(model, learnable=True)
    fit_step(model, X, np.ones((4, 3)), keras.optimizers.SGD(1.0))
    kernel = numpy(model.layers[0].kernel)
    assert np.linalg.norm(kernel, axis=0).max() <= 0.3 + 1e-5
    # What it leaves does not drift. MaxNorm itself rounds the columns.
    model = dense_model(kernel_constraint=keras.constraints.NonNeg())
    kwm.attach_compander(model, learnable=True)
    stored = model.layers[0]._kernel
    before = numpy(stored)
    after = numpy(stored.constraint(stored))
    assert 0 < np.mean(before > 0) < 1
    np.testing.assert_array_equal(after[before > 0], before[before > 0])
    np.testing.assert_allclose(after[before <= 0], 0, atol=1e-7)


@pytest.mark.one_backend
def test_checkpoints_of_fixed_pairs_hold_them(tmp_path):
    def attached(**arguments):
        model = dense_model()
        kwm.attach_compander(model, **arguments)
        return model

    attached(a=0.6).save_weights(tmp_path / "a.weights.h5")
    other = attached(a=0.7)
    before = outputs(other, X)
    with pytest.raises(ValueError, match=r"fixed pairs.*\(0\.6, 0\.6\)"):
        other.load_weights(tmp_path / "a.weights.h5")
    np.testing.assert_array_equal(outputs(other, X), before)
    with pytest.raises(ValueError, match="reparameterized in the same way"):
        attached(function="erf").load_weights(tmp_path / "a.weights.h5")


@pytest.mark.one_backend
@pytest.mark.parametrize("own", [True, False])
def test_a_model_file_keeps_a_raised_pair(own, tmp_path):
    raised = {"a": 0.002, "b": 0.002, "out_of_range": "raise_a"}
    last = kwm.CompanderDense(3, **raised) if own else keras.layers.Dense(3)
    model = sequential((6,), keras.layers.Dense(5), last)
    targets = kwm.find_targets(model)
    if own:
        kwm.attach_compander(model, targets=targets[:1], function="erf")
    else:
        kwm.attach_compander(model, learnable=False, **raised)
    kwm.save_model(model, tmp_path / "a.kwm")
    loaded = kwm.load_model(tmp_path / "a.kwm")
    np.testing.assert_array_equal(outputs(loaded, X), outputs(model, X))
    pairs = zip(kwm.fold(model).kernels, kwm.fold(loaded).kernels, strict=True)
    for saved, found in pairs:
        assert (found.a, found.function) == (saved.a, saved.function)
        # A layer's own config holds the pair alone.
        assert own or (found.raised, found.outside) == (True, saved.outside)
