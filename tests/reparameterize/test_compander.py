"""attach_compander: the same start, what sees v and what sees w, errors."""

import importlib.util

import keras
import numpy as np
import pytest
from keras import ops

import keras_weightmods as kwm
from keras_weightmods.ops import compand

HAS_HUB = importlib.util.find_spec("keras_hub") is not None


# Within the range of every function at a = 0.5.
def draw():
    return keras.initializers.RandomUniform(-0.48, 0.48)


def conv_model():
    depthwise = {"depthwise_initializer": draw()}
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.SeparableConv2D(
                4, 3, pointwise_initializer=draw(), **depthwise
            ),
            keras.layers.DepthwiseConv2D(3, **depthwise),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            keras.layers.Dense(5, kernel_initializer=draw()),
        ]
    )


def dense_model(**kwargs):
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(
                5, activation="relu", kernel_initializer=draw(), **kwargs
            ),
            keras.layers.Dense(3, kernel_initializer=draw(), use_bias=False),
        ]
    )


def inputs_for(model):
    shape = (4, *model.input_shape[1:])
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def outputs(model, x):
    return ops.convert_to_numpy(model(x))


def state(model):
    return (
        [type(layer) for layer in model._flatten_layers()],
        [id(w) for w in model.weights],
        [w.numpy().tobytes() for w in model.weights],
        [(w.regularizer, w.constraint) for w in model.weights],
    )


@pytest.mark.parametrize(
    ("function", "learnable"),
    [("arctan", True), ("arctan", False), ("arsinh", True), ("erf", False)],
)
def test_same_function_before_and_after(function, learnable):
    model = conv_model()
    classes, weights, x = state(model)[0], state(model)[1], inputs_for(model)
    config, before = model.to_json(), outputs(model, x)
    report = kwm.attach_compander(model, learnable=learnable, function=function)
    assert len(report.kernels) == 4
    assert not report.skipped
    # Of their size: a unit in the last place of 2 is 2.4e-7.
    tolerance = {"rtol": 0, "atol": 1e-6 * np.abs(before).max()}
    np.testing.assert_allclose(outputs(model, x), before, **tolerance)
    for kernel in report.kernels:
        assert kernel.a == pytest.approx(0.5, rel=1e-6)
    assert "a = 0.5, b = 1" in str(report)
    extra = 4 if learnable else 0
    assert len(model.weights) == len(weights) + extra

    folded = kwm.fold(model)
    assert [k.path for k in folded.kernels] == [k.path for k in report.kernels]
    np.testing.assert_allclose(outputs(model, x), before, **tolerance)
    assert state(model)[:2] == (classes, weights)
    assert model.to_json() == config
    assert kwm.fold(model).kernels == ()


def test_pretrained_outliers():
    def outlying():
        model = dense_model()
        kernel = model.weights[0].numpy()
        kernel[0, 0], kernel[1, 1] = 3.0, -LIMIT
        model.weights[0].assign(kernel)
        return model

    LIMIT = 0.5 * np.pi / 2
    model = outlying()
    x, before = inputs_for(model), outputs(model, inputs_for(model))
    first, second = kwm.attach_compander(model, learnable=False).kernels
    assert (first.outside, first.raised) == (2, True)
    assert first.a > 1.9
    assert (second.outside, second.raised, second.a) == (0, False, 0.5)
    assert "a raised for 2 weight(s)" in str(first)
    np.testing.assert_allclose(outputs(model, x), before, rtol=0, atol=3e-6)

    model = outlying()
    plain = model.weights[0].numpy()
    report = kwm.attach_compander(model, out_of_range="clip")
    assert "clipped 2 weight(s)" in str(report)
    np.testing.assert_allclose(
        ops.convert_to_numpy(model.layers[0].kernel),
        np.clip(plain, -0.99 * LIMIT, 0.99 * LIMIT),
        atol=1e-6,
    )

    model = outlying()
    before = state(model)
    with pytest.raises(ValueError, match=r"2 larger ones, up to 3\."):
        kwm.attach_compander(model, out_of_range="error")
    assert state(model) == before


def step(model, optimizer, x, y):
    model.compile(optimizer, "mse", jit_compile=False)
    model.fit(x, y, batch_size=len(x), verbose=0)


def test_fit_follows_the_gradient_of_all_three():
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, use_bias=False)]
    )
    a, b, rate = 0.7, 1.2, 0.05
    (kernel,) = kwm.attach_compander(model, a=a, b=b).kernels
    v = np.float64(model.weights[0].numpy())
    x = np.float64(inputs_for(model))
    step(model, keras.optimizers.SGD(rate), np.float32(x), np.ones((4, 3)))
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


def test_a_and_b_come_back_from_a_step_too_far():
    model = dense_model()
    (kernel, _) = kwm.attach_compander(model).kernels
    model.layers[0].weights[-1].assign([-2.0, -2.0])
    assert kernel.a < 0.2
    small = kernel.a, kernel.b
    x, y = inputs_for(model), 10 * np.ones((4, 3))
    step(model, keras.optimizers.SGD(0.1), x, y)
    assert (kernel.a, kernel.b) != small


@pytest.mark.parametrize("value", [-1e30, -1e6, 0.0, 1e6])
def test_a_and_b_stay_positive_whatever_becomes_of_the_raw_pair(value):
    model = dense_model()
    (kernel, _) = kwm.attach_compander(model).kernels
    model.layers[0].weights[-1].assign([value, value])
    assert kernel.a > 0
    assert kernel.b > 0
    assert np.isfinite(outputs(model, inputs_for(model))).all()


def test_a_and_b_stay_positive_at_any_rate():
    model = dense_model()
    kernels = kwm.attach_compander(model).kernels
    optimizer = keras.optimizers.SGD(1e3, use_ema=True)
    step(model, optimizer, inputs_for(model), np.ones((4, 3)))
    for kernel in kernels:
        assert kernel.a > 0
        assert kernel.b > 0


def test_what_a_constraint_leaves_does_not_drift():
    # Not MaxNorm, which itself rounds the columns that it leaves.
    model = dense_model(kernel_constraint=keras.constraints.NonNeg())
    kwm.attach_compander(model)
    stored = model.layers[0]._kernel
    before = stored.numpy()
    stored.assign(stored.constraint(stored))
    positive = before > 0
    assert 0 < positive.sum() < before.size
    np.testing.assert_array_equal(stored.numpy()[positive], before[positive])
    np.testing.assert_allclose(stored.numpy()[~positive], 0, atol=1e-7)


def test_regularizer_and_constraint_see_the_effective_weight():
    model = dense_model(
        kernel_regularizer=keras.regularizers.L2(0.1),
        kernel_constraint=keras.constraints.MaxNorm(0.3),
    )
    layer = model.layers[0]
    own = state(model)[3]
    kwm.attach_compander(model)
    w = ops.convert_to_numpy(layer.kernel)
    np.testing.assert_allclose(
        ops.convert_to_numpy(model.losses[0]), 0.1 * np.sum(w**2), rtol=1e-5
    )
    stored = layer._kernel
    stored.assign(stored.constraint(stored))
    projected = ops.convert_to_numpy(layer.kernel)
    expected = ops.convert_to_numpy(keras.constraints.MaxNorm(0.3)(w))
    np.testing.assert_allclose(projected, expected, atol=1e-6)
    step(model, keras.optimizers.SGD(1.0), inputs_for(model), np.ones((4, 3)))
    w = ops.convert_to_numpy(layer.kernel)
    assert np.linalg.norm(w, axis=0).max() <= 0.3 + 1e-5
    kwm.fold(model)
    assert state(model)[3] == own


def test_nm_constraint_survives_and_can_be_detached():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    kwm.SemiStructuredSparse.attach(model)
    kwm.attach_compander(model)
    step(model, keras.optimizers.SGD(0.1), inputs_for(model), np.ones((4, 4)))
    kwm.SemiStructuredSparse.detach(model)
    kwm.fold(model)
    kwm.assert_sparse(model)
    assert model.weights[0].constraint is None


def test_checkpoints(tmp_path):
    model, other = dense_model(), dense_model()
    x = inputs_for(model)
    kwm.attach_compander(model)
    model.layers[0].weights[-1].assign([0.9, 0.8])
    model.save_weights(tmp_path / "a.weights.h5")
    kwm.attach_compander(other)
    other.load_weights(tmp_path / "a.weights.h5")
    np.testing.assert_array_equal(outputs(other, x), outputs(model, x))
    plain = dense_model()
    with pytest.raises(ValueError, match="could not be loaded"):
        plain.load_weights(tmp_path / "a.weights.h5")
    for arguments in ({"function": "erf"}, {"learnable": False}):
        other = dense_model()
        kwm.attach_compander(other, **arguments)
        with pytest.raises(ValueError, match="reparameterized in the same way"):
            other.load_weights(tmp_path / "a.weights.h5")


def test_checkpoints_of_fixed_pairs_hold_them(tmp_path):
    model, other = dense_model(), dense_model()
    x = inputs_for(model)
    kwm.attach_compander(model, learnable=False, a=0.6)
    model.save_weights(tmp_path / "a.weights.h5")
    kwm.attach_compander(other, learnable=False, a=0.6)
    other.load_weights(tmp_path / "a.weights.h5")
    np.testing.assert_array_equal(outputs(other, x), outputs(model, x))
    other = dense_model()
    kwm.attach_compander(other, learnable=False, a=0.7)
    before = state(other)
    with pytest.raises(ValueError, match=r"fixed pairs.*\(0\.6, 1\.0\)"):
        other.load_weights(tmp_path / "a.weights.h5")
    assert state(other) == before


def test_errors_leave_the_model_untouched(tmp_path):
    model = dense_model()
    model.compile("sgd", "mse")
    model.optimizer.build(model.trainable_variables)
    before = state(model)
    with pytest.raises(ValueError, match="new optimizer"):
        kwm.attach_compander(model)
    assert state(model) == before
    model.compile("sgd", "mse")
    kwm.attach_compander(model)
    before = state(model)
    for again in (kwm.attach_compander, kwm.attach_weight_norm):
        with pytest.raises(ValueError, match=r"only once.*kwm\.fold\(model\)"):
            again(model)
    with pytest.raises(ValueError, match=r"kwm\.fold\(model\)"):
        model.save(tmp_path / "model.keras")
    assert state(model) == before
    empty = keras.Sequential([keras.Input((4,)), keras.layers.ReLU()])
    with pytest.raises(ValueError, match="no kernel that can be companded"):
        kwm.attach_compander(empty)


def test_failure_while_attaching_is_rolled_back(monkeypatch):
    model = dense_model()
    before = state(model)

    def fail(*args, **kwargs):
        raise MemoryError("no room")

    monkeypatch.setattr(model.layers[-1], "add_weight", fail)
    with pytest.raises(MemoryError):
        kwm.attach_compander(model)
    assert state(model) == before


def test_frozen_kernels_have_frozen_pairs():
    model = dense_model()
    model.layers[0].trainable = False
    kwm.attach_compander(model)
    assert [w.name for w in model.trainable_weights] == [
        "kernel",
        "kernel_compander_arctan",
    ]


@pytest.mark.skipif(not HAS_HUB, reason="needs keras-hub")
def test_hub_model_companded_trained_and_folded(tmp_path):
    import keras_hub

    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=32,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=16,
    )
    model = keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)
    classes = [type(layer) for layer in model._flatten_layers()]
    tokens = np.arange(12).reshape(2, 6) % 32
    x = {"token_ids": tokens, "padding_mask": np.ones((2, 6), "int32")}
    before = outputs(model, x)
    report = kwm.attach_compander(model)
    assert len(report.kernels) == 7
    np.testing.assert_allclose(outputs(model, x), before, rtol=0, atol=1e-6)
    model.compile(
        kwm.CompanderOptimizer(keras.optimizers.AdamW(0.01)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    model.fit(x, tokens, verbose=0)
    trained = outputs(model, x)
    assert np.abs(trained - before).max() > 1e-3
    assert all(kernel.a != 0.5 for kernel in report.kernels)
    kwm.fold(model)
    np.testing.assert_allclose(outputs(model, x), trained, rtol=0, atol=1e-6)
    assert [type(layer) for layer in model._flatten_layers()] == classes
    model.save(tmp_path / "llama.keras")
    loaded = keras.models.load_model(tmp_path / "llama.keras")
    np.testing.assert_array_equal(outputs(loaded, x), outputs(model, x))


def test_bfloat16_variables_start_within_their_rounding():
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(5, dtype="bfloat16")]
    )
    plain = ops.convert_to_numpy(ops.cast(model.weights[0], "float32"))
    kwm.attach_compander(model)
    kernel = ops.convert_to_numpy(ops.cast(model.layers[0].kernel, "float32"))
    np.testing.assert_allclose(kernel, plain, rtol=2**-7)
    stored, pair = model.weights[0], model.weights[-1]
    assert (stored.dtype, pair.dtype) == ("bfloat16", "float32")
    again = compand(stored.value, 0.5, 1.0)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(ops.cast(again, "float32")), kernel
    )
