import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods import SemiStructuredSparse, SwapSparseEMAWeights
from keras_weightmods.ops import nm
from tests import models
from tests.backends import breadth
from tests.models import numpy, sequential

one_backend = pytest.mark.one_backend
RNG = np.random.default_rng(0)
X, Y = models.normal(32, 8), models.normal(32, 4, seed=1)
NonNeg = keras.constraints.NonNeg
SwapEMAWeights = keras.callbacks.SwapEMAWeights


def dense_model(n=2, constrained=True, **kwargs):
    constraint = SemiStructuredSparse(f"{n}:4") if constrained else None
    return models.mlp(8, 4, kernel_constraint=constraint, **kwargs)


def mixed_model():
    """A Conv2D, an EinsumDense that contracts two axes, and one skipped."""
    keras.utils.set_random_seed(2)
    return sequential(
        (4, 4, 3),
        keras.layers.Conv2D(8, 2, name="conv"),
        keras.layers.Reshape((9, 2, 4)),
        keras.layers.EinsumDense("bquh,uhm->bqm", (None, 6), name="einsum"),
        keras.layers.Dense(4, name="odd"),
        name="net",
    )


def fit(model, optimizer, epochs=2, **kwargs):
    model.compile(optimizer=optimizer, loss="mse")
    model.fit(X, Y, 8, epochs, verbose=0, shuffle=False, **kwargs)


def step(model, optimizer):
    variables = model.trainable_variables
    values = [RNG.normal(size=v.shape).astype("float32") for v in variables]
    optimizer.apply(list(map(keras.ops.convert_to_tensor, values)), variables)


def violations(kernel, n, axis=0):
    return int(nm.nm_violations(kernel, f"{n}:4", axis))


EMA = {"use_ema": True, "ema_momentum": 0.8}
OPTIMIZERS = {
    "ema": lambda o: o.Adam(0.2, **EMA),
    "adamw": lambda o: o.AdamW(0.05, weight_decay=0.1),
    "muon": lambda o: o.Muon(0.05),
    "momentum": lambda o: o.SGD(0.05, momentum=0.9),
    "accumulation": lambda o: o.Adam(0.05, gradient_accumulation_steps=2),
    "ema_overwrite": lambda o: o.Adam(0.2, ema_overwrite_frequency=3, **EMA),
    "ema_multi": lambda o: o.MultiOptimizer(lambda _: o.Adam(0.2, **EMA)),
    "ema_scaled": lambda o: o.LossScaleOptimizer(o.Adam(0.2, **EMA)),
}


def callbacks(name):
    return [SwapSparseEMAWeights()] if name.startswith("ema") else []


@breadth("name", OPTIMIZERS)
def test_exactly_nm_after_fit(name):
    # n counts the weights kept: 1:4 and 2:4 must differ.
    n = 1 + list(OPTIMIZERS).index(name) % 2
    dtype = "mixed_float16" if name == "ema_scaled" else None
    model = dense_model(n, dtype=dtype)
    before = numpy(model.layers[0].kernel)
    fit(model, OPTIMIZERS[name](keras.optimizers), callbacks=callbacks(name))
    kernel = numpy(model.layers[0].kernel)
    assert violations(kernel, n) == 0
    assert np.count_nonzero(kernel) == n * kernel.size // 4
    assert not np.isin(kernel[kernel != 0], before).any()


class Recorder(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(violations(self.model.layers[0].kernel.value, 2))

    on_test_begin = on_train_end = lambda self, logs=None: self.on_epoch_end(0)


def fit_with_averages(*callbacks):
    model = dense_model()
    # A fresh mask at most steps makes the average dense.
    optimizer = keras.optimizers.Adam(0.4, use_ema=True, ema_momentum=0.9)
    kwargs = {"validation_data": (X, Y), "callbacks": list(callbacks)}
    fit(model, optimizer, epochs=3, **kwargs)
    return model


@breadth("swap_on_epoch", [True, False])
def test_averages_are_exact_with_the_callback_alone(swap_on_epoch):
    recorders = [Recorder(), Recorder()]
    plain = fit_with_averages(SwapEMAWeights(swap_on_epoch), recorders[0])
    callback = SwapSparseEMAWeights(swap_on_epoch)
    sparse = fit_with_averages(
        callback,
        keras.callbacks.EarlyStopping(restore_best_weights=True),
        recorders[1],
    )
    # Keras shows and leaves dense averages, and the check says so.
    assert max(recorders[0].seen) > 0
    with pytest.raises(AssertionError, match="not exactly 2:4"):
        kwm.assert_sparse(plain, "2:4")
    assert len(recorders[1].seen) >= 5
    assert recorders[1].seen == [0] * len(recorders[1].seen)
    kwm.assert_sparse(sparse, "2:4")


@one_backend
@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_showing_the_average_does_not_change_it(swap_on_epoch):
    def average_of(model):
        kernels = [v for v in model.optimizer.variables if v.shape == (8, 4)]
        (average,) = [v for v in kernels if "average" in v.path]
        return numpy(average)

    callback = SwapSparseEMAWeights(swap_on_epoch=swap_on_epoch)
    plain, swapped = fit_with_averages(), fit_with_averages(callback)
    projected = nm.nm_project(numpy(plain.layers[0].kernel), "2:4", 0)
    kernel = swapped.layers[0].kernel
    np.testing.assert_array_equal(average_of(swapped), average_of(plain))
    np.testing.assert_array_equal(numpy(kernel), numpy(projected))
    swapped.evaluate(X, Y, callbacks=[callback], verbose=0)
    assert violations(kernel, 2) == 0
    # Weights written between two fits win over a remembered average.
    kernel.assign(np.zeros((8, 4)))
    callback.on_epoch_begin(0)
    assert violations(kernel, 2) == 0


@one_backend
def test_attach_warns_of_averages():
    for wrap in (lambda o: o, keras.optimizers.LossScaleOptimizer):
        model = dense_model(constrained=False)
        model.compile(wrap(keras.optimizers.SGD(use_ema=True)), "mse")
        with pytest.warns(UserWarning, match="SwapSparseEMAWeights"):
            SemiStructuredSparse.attach(model)


@one_backend
def test_attach_projects_skips_and_reports():
    model = mixed_model()
    before = {w.path: numpy(w) for w in model.weights}
    report = SemiStructuredSparse.attach(model, "1:4")
    conv, _, einsum, odd = model.layers
    keys = [kernel.key for kernel in report.kernels]
    assert keys == ["0:net/conv/kernel", "2:net/einsum/kernel"]
    (reason,) = [s.reason for s in report.skipped if s.path == "net/odd/kernel"]
    assert "6 is not a multiple of m=4" in reason
    assert "net/odd/kernel" in str(report)
    for kernel, axes in ((conv.kernel, (0, 1, 2)), (einsum.kernel, (0, 1))):
        expected = nm.nm_project(before[kernel.path], "1:4", axes)
        np.testing.assert_array_equal(numpy(kernel), numpy(expected))
        assert kernel.constraint.axis == axes
    np.testing.assert_array_equal(numpy(odd.kernel), before[odd.kernel.path])
    step(model, keras.optimizers.Adam(0.1))
    assert violations(conv.kernel, 1, (0, 1, 2)) == 0
    assert violations(einsum.kernel, 1, (0, 1)) == 0

    # A second attach replaces the pattern; detach keeps the weights.
    SemiStructuredSparse.attach(
        model, "2:2", targets=kwm.find_targets(model)[:1]
    )
    assert conv.kernel.constraint.pattern == "2:2"
    weights = models.weights_of(model)
    conv.kernel.constraint = NonNeg()
    assert len(SemiStructuredSparse.detach(model).kernels) == 1
    models.assert_same(models.weights_of(model), weights)
    # A constraint of another class stays.
    report = SemiStructuredSparse.attach(model)
    assert [k.path for k in report.kernels] == ["net/einsum/kernel"]
    assert any("NonNeg" in s.reason for s in report.skipped)
    assert isinstance(conv.kernel.constraint, NonNeg)


@one_backend
def test_errors_leave_the_model_unchanged():
    model = mixed_model()
    model.layers[2].kernel.assign(np.full((2, 4, 6), np.nan))
    weights = models.weights_of(model)
    for pattern, message in (
        ("5:1000", "no kernel that fits pattern 5:1000"),
        ("2:4", "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            SemiStructuredSparse.attach(model, pattern)
    models.assert_same(models.weights_of(model), weights)
    assert all(w.constraint is None for w in model.weights)


def test_attach_takes_hold_of_a_model_trained_before():
    model = dense_model(constrained=False)
    fit(model, keras.optimizers.Adam(0.1), epochs=1)
    SemiStructuredSparse.attach(model, "1:4")
    model.fit(X, Y, verbose=0)
    assert violations(model.layers[0].kernel, 1) == 0
    SemiStructuredSparse.detach(model)
    model.fit(X, Y, verbose=0)
    assert violations(model.layers[0].kernel, 1) > 0


@breadth("name", ["momentum", "adamw", "ema"])
def test_frozen_mask_survives_fit(name, tmp_path):
    model = dense_model(constrained=False)
    SemiStructuredSparse.attach(model, "1:4", frozen=True)
    kernel = model.layers[0].kernel
    before = numpy(kernel)
    fit(model, OPTIMIZERS[name](keras.optimizers), callbacks=callbacks(name))
    np.testing.assert_array_equal(numpy(kernel) != 0, before != 0)
    assert not np.isin(numpy(kernel)[before != 0], before).any()
    if name == "momentum":
        model.save(tmp_path / "model.keras")
        match = "does not hold the constraints of 1 weights"
        with pytest.warns(UserWarning, match=match) as caught:
            kwm.save_model(model, tmp_path / "model.safetensors")
        assert caught[0].filename == __file__
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        kernel = loaded.layers[0].kernel
        assert kernel.constraint is None
        SemiStructuredSparse.attach(loaded, "1:4", frozen=True)
        step(loaded, keras.optimizers.Adam(1.0))
        np.testing.assert_array_equal(numpy(kernel) != 0, before != 0)


@one_backend
def test_frozen_keeps_exactly_n_where_a_group_is_zero():
    model = mixed_model()
    kernel = model.layers[0].kernel
    kernel.assign(zeros := np.zeros(kernel.shape))
    SemiStructuredSparse.attach(model, "2:4", frozen=True)
    step(model, keras.optimizers.Adam(0.1))
    expected = numpy(nm.nm_mask(zeros, "2:4", (0, 1, 2)))
    np.testing.assert_array_equal(numpy(kernel) != 0, expected)


@one_backend
def test_kernels_whose_axis_or_mask_is_not_known():
    kernel = RNG.normal(size=(8, 4)).astype("float32")
    model = dense_model(constrained=False)
    SemiStructuredSparse.attach(model, frozen=True)
    for constraint, w in (
        (SemiStructuredSparse(), kernel[None]),
        (SemiStructuredSparse(frozen=True), kernel),
        (model.layers[0].kernel.constraint, kernel[:4]),
    ):
        with pytest.raises(ValueError, match="attach"):
            constraint(w)


@one_backend
def test_detach_reaches_nested_and_private_constraints():
    constraint = SemiStructuredSparse("1:2", axis=0)
    inputs = keras.Input((3, 4))
    layers = keras.layers
    attention = layers.MultiHeadAttention(2, 2, kernel_constraint=constraint)
    lstm = layers.LSTM(2, recurrent_constraint=constraint)
    model = keras.Model(inputs, lstm(attention(inputs, inputs)))
    assert len(SemiStructuredSparse.detach(model).kernels) == 5
    assert SemiStructuredSparse.detach(model).kernels == ()
    assert "SemiStructuredSparse" not in model.to_json()
    dense = dense_model()
    config = dense.layers[0].get_config()["kernel_constraint"]
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == SemiStructuredSparse().get_config()
    with pytest.raises(ValueError, match="kernel_constraint"):
        dense.layers[0].enable_lora(2)
    SemiStructuredSparse.detach(dense)
    dense.layers[0].enable_lora(2)
