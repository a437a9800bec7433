"""The paper's rule against NumPy, and around any Keras optimizer."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_weightmods as kwm

A, B = 0.7, 1.2
RATE, DECAY = 0.05, 0.1


class Reference:
    """Adam(W) on w = a arctan(v / b), its step times the slope, on v."""

    def __init__(self, v, weight_decay=0.0, learnable=False):
        self.v = np.float64(v)
        self.weight_decay, self.learnable = weight_decay, learnable
        self.m, self.u, self.t = np.zeros_like(v), np.zeros_like(v), 0

    def step(self, gradient_of_w, a=A, b=B):
        g, self.t = np.float64(gradient_of_w), self.t + 1
        self.m = 0.9 * self.m + 0.1 * g
        self.u = 0.999 * self.u + 0.001 * g**2
        # Keras adds epsilon before it corrects the bias.
        rate = RATE * np.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t)
        step = -rate * self.m / (np.sqrt(self.u) + 1e-7)
        w = a * np.arctan(self.v / b)
        slope = a / (b * (1 + (self.v / b) ** 2))
        decay = -RATE * self.weight_decay
        if self.learnable:
            self.v = self.v + slope * step + decay * self.v
        else:
            self.v = self.v + slope * (step + decay * w)


def make(optimizer, learnable=False, a=A, b=B, seed=0, **kwargs):
    keras.utils.set_random_seed(seed)
    layer = kwm.CompanderDense(
        3, a=a, b=b, learnable=learnable, use_bias=False, **kwargs
    )
    model = keras.Sequential([keras.Input((4,)), layer])
    model.compile(optimizer, "mse", jit_compile=False)
    return model, layer


def batch():
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    return x, np.ones((8, 3), "float32")


def train(model, steps):
    x, y = batch()
    model.fit(x, y, batch_size=8, epochs=steps, verbose=0, shuffle=False)


def eager(model, steps, optimizer=None):
    """As `train`, with the gradients from their formulas, and not compiled."""
    optimizer = optimizer or model.optimizer
    if not optimizer.built:
        optimizer.build(model.trainable_variables)
    layer = model.layers[0]
    for _ in range(steps):
        v = np.float64(layer._kernel.numpy())
        if not isinstance(layer, kwm.CompanderDense):
            x = np.float64(batch()[0])
            apply(optimizer, model, [x.T @ (2 * (x @ v - 1) / 24)])
            continue
        a, b = layer.compander.a, layer.compander.b
        to_w = gradient_of_w(v, a, b)
        to_v = to_w * a / (b * (1 + (v / b) ** 2))
        gradients = [to_v]
        if layer.compander.learnable:
            pair = np.array([a, b]) - 1e-3
            raw = pair - 1 / (4 * pair)
            to_pair = [np.sum(to_w * np.arctan(v / b)), -np.sum(to_v * v) / b]
            gradients.append(to_pair * pair / np.sqrt(raw**2 + 1))
        apply(optimizer, model, gradients)


def gradient_of_w(v, a=A, b=B):
    x, _ = batch()
    x = np.float64(x)
    return x.T @ (2 * (x @ (a * np.arctan(v / b)) - 1) / 24)


def wrapped(inner="Adam", *args, **kwargs):
    return kwm.CompanderOptimizer(
        getattr(keras.optimizers, inner)(*args, **kwargs)
    )


@pytest.mark.parametrize("weight_decay", [0.0, DECAY])
def test_equals_reference_with_fixed_pairs(weight_decay):
    optimizer = (
        wrapped("AdamW", RATE, weight_decay=weight_decay)
        if weight_decay
        else wrapped("Adam", RATE)
    )
    model, layer = make(optimizer)
    reference = Reference(layer._kernel.numpy(), weight_decay)
    train(model, 5)
    for _ in range(5):
        reference.step(gradient_of_w(reference.v))
    np.testing.assert_allclose(
        layer._kernel.numpy(), reference.v, rtol=0, atol=3e-6
    )
    assert int(optimizer.iterations) == 5


def test_equals_reference_with_learnable_pairs():
    """Weight decay acts on v alone, and a and b take plain Adam steps."""
    model, layer = make(wrapped("AdamW", RATE, weight_decay=DECAY), True)
    reference = Reference(layer._kernel.numpy(), DECAY, learnable=True)
    reference.step(gradient_of_w(reference.v))
    pair = layer.weights[-1].numpy().copy()
    eager(model, 1)
    np.testing.assert_allclose(
        layer._kernel.numpy(), reference.v, rtol=0, atol=3e-6
    )
    # The first step of Adam is the learning rate.
    moved = np.abs(layer.weights[-1].numpy() - pair)
    np.testing.assert_allclose(moved, RATE, rtol=1e-3)
    a, b = layer.compander.a, layer.compander.b
    reference.step(gradient_of_w(reference.v, a, b), a, b)
    eager(model, 1)
    np.testing.assert_allclose(
        layer._kernel.numpy(), reference.v, rtol=0, atol=3e-6
    )


@pytest.mark.parametrize("learnable", [True, False])
def test_decay_alone(learnable):
    model, layer = make(wrapped("AdamW", RATE, weight_decay=DECAY), learnable)
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    v = np.float64(layer._kernel.numpy())
    pair = layer.compander.a, layer.compander.b
    apply(optimizer, model, [np.zeros(w.shape) for w in model.weights])
    slope = A / (B * (1 + (v / B) ** 2))
    decayed = v if learnable else slope * A * np.arctan(v / B)
    np.testing.assert_allclose(
        layer._kernel.numpy(), v - RATE * DECAY * decayed, atol=1e-6
    )
    assert (layer.compander.a, layer.compander.b) == pair


def apply(optimizer, model, gradients):
    variables = model.trainable_variables
    gradients = [ops.convert_to_tensor(g, "float32") for g in gradients]
    if keras.backend.backend() != "jax":
        optimizer.apply(gradients, variables)
        return
    new, state = optimizer.stateless_apply(
        [v.value for v in optimizer.variables],
        gradients,
        [v.value for v in variables],
    )
    for variable, value in zip(
        variables + optimizer.variables, new + state, strict=True
    ):
        variable.assign(value)


def test_exclusions_are_kept():
    model, layer = make(wrapped("AdamW", RATE, weight_decay=DECAY), True)
    model.optimizer.exclude_from_weight_decay(var_names=["kernel"])
    model.optimizer.build(model.trainable_variables)
    before = layer._kernel.numpy()
    apply(model.optimizer, model, [np.zeros(w.shape) for w in model.weights])
    np.testing.assert_allclose(layer._kernel.numpy(), before, atol=1e-7)


def test_plain_sgd_is_unchanged():
    kernels = []
    for optimizer in (wrapped("SGD", 0.1), keras.optimizers.SGD(0.1)):
        model, layer = make(optimizer, learnable=True)
        eager(model, 3)
        kernels.append(layer._kernel.numpy())
    np.testing.assert_allclose(*kernels, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "inner",
    ["RMSprop", "Lion", "Nadam", "Adafactor", "Muon", "Adagrad", "Ftrl"],
)
def test_any_optimizer_moves_by_its_step_times_the_slope(inner):
    """Its step on a plain layer with the same w is the reference."""
    model, layer = make(wrapped(inner, 0.01))
    keras.utils.set_random_seed(0)
    plain = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, use_bias=False)]
    )
    v = np.float64(layer._kernel.numpy())
    w = ops.convert_to_numpy(layer.kernel)
    plain.layers[0].kernel.assign(w)
    plain.compile(
        getattr(keras.optimizers, inner)(0.01), "mse", jit_compile=False
    )
    eager(plain, 1)
    eager(model, 1)
    step = np.float64(plain.layers[0].kernel.numpy()) - w
    slope = A / (B * (1 + (v / B) ** 2))
    assert np.abs(step).max() > 0
    np.testing.assert_allclose(
        layer._kernel.numpy(), v + slope * step, rtol=0, atol=2e-6
    )


def test_clipping_acts_on_the_gradient_of_w():
    model, layer = make(wrapped("SGD", 1.0, clipnorm=0.01))
    v = np.float64(layer._kernel.numpy())
    eager(model, 1)
    g = gradient_of_w(v)
    slope = A / (B * (1 + (v / B) ** 2))
    expected = v - slope * 0.01 * g / np.linalg.norm(g)
    np.testing.assert_allclose(layer._kernel.numpy(), expected, atol=1e-6)


def test_gradient_accumulation():
    optimizer = wrapped(
        "AdamW", RATE, weight_decay=DECAY, gradient_accumulation_steps=2
    )
    model, layer = make(optimizer, learnable=True)
    reference = Reference(layer._kernel.numpy(), DECAY, learnable=True)
    eager(model, 1)
    np.testing.assert_allclose(layer._kernel.numpy(), reference.v, atol=1e-6)
    eager(model, 1)
    reference.step(gradient_of_w(reference.v))
    np.testing.assert_allclose(layer._kernel.numpy(), reference.v, atol=3e-6)
    assert int(optimizer.iterations) == 1


def test_moving_average_is_of_the_stored_values():
    optimizer = wrapped("Adam", RATE, use_ema=True, ema_momentum=0.5)
    model, layer = make(optimizer)
    reference = Reference(layer._kernel.numpy())
    reference.step(gradient_of_w(reference.v))
    average = reference.v
    reference.step(gradient_of_w(reference.v))
    average = 0.5 * average + 0.5 * reference.v
    eager(model, 2)
    optimizer.finalize_variable_values(model.trainable_variables)
    np.testing.assert_allclose(layer._kernel.numpy(), average, atol=3e-6)


def test_swap_ema_weights_finds_the_averages():
    optimizer = wrapped("Adam", RATE, use_ema=True, ema_momentum=0.5)
    model, layer = make(optimizer)
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    x = np.ones((4, *model.input_shape[1:]), "float32")
    y = np.ones(model(x).shape, "float32")
    model.fit(x, y, epochs=2, verbose=0, callbacks=[swap])
    average = optimizer._model_variables_moving_average[0]
    np.testing.assert_array_equal(layer._kernel.numpy(), average.numpy())


def test_constraints_hold_after_the_step():
    model, layer = make(
        wrapped("Adam", 0.5), kernel_constraint=keras.constraints.MaxNorm(0.2)
    )
    eager(model, 2)
    w = ops.convert_to_numpy(layer.kernel)
    assert np.linalg.norm(w, axis=0).max() <= 0.2 + 1e-5
    assert layer._kernel.constraint is not None


def test_loss_scaling_around_it_changes_nothing():
    """Over many steps: on TensorFlow a few read a and b too late once."""
    kernels = []
    for scaled in (False, True):
        optimizer = wrapped("Adam", RATE)
        if scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(
                optimizer, initial_scale=1024.0
            )
        model, layer = make(optimizer, learnable=True)
        train(model, 60)
        kernels.append(layer._kernel.numpy())
    np.testing.assert_allclose(*kernels, rtol=0, atol=1e-5)


def test_mixed_float16_trains():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model, layer = make(wrapped("Adam", RATE), learnable=True)
    finally:
        keras.config.set_dtype_policy(policy)
    before = layer._kernel.numpy()
    train(model, 2)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert np.isfinite(layer._kernel.numpy()).all()
    assert np.abs(layer._kernel.numpy() - before).max() > 1e-3


def test_learning_rate_is_that_of_the_inner_optimizer():
    optimizer = wrapped("Adam", RATE)
    assert float(optimizer.learning_rate) == pytest.approx(RATE)
    optimizer.learning_rate = 0.2
    assert float(optimizer.optimizer.learning_rate) == pytest.approx(0.2)


def test_config_and_state_are_saved(tmp_path):
    optimizer = wrapped("AdamW", RATE, weight_decay=DECAY, use_ema=True)
    config = optimizer.get_config()
    again = kwm.CompanderOptimizer.from_config(config)
    assert again.get_config() == config
    assert again.use_ema
    assert not again.optimizer.use_ema
    model, layer = make(wrapped("Adam", RATE), learnable=True)
    train(model, 2)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is kwm.CompanderOptimizer
    train(model, 1)
    train(loaded, 1)
    np.testing.assert_allclose(
        loaded.layers[0]._kernel.numpy(), layer._kernel.numpy(), atol=1e-7
    )


def test_other_weights_are_updated_as_ever():
    """Those under weight normalization among them."""

    def model_of(optimizer):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input((4,)), keras.layers.Dense(4), keras.layers.Dense(3)]
        )
        targets = kwm.find_targets(model)
        kwm.attach_weight_norm(model, targets=targets[:1])
        kwm.attach_compander(model, targets=targets[1:])
        model.compile(optimizer, "mse", jit_compile=False)
        train(model, 1)
        return model.weights[0].numpy(), model.weights[1].numpy()

    ours = model_of(wrapped("Adam", RATE))
    keras_own = model_of(keras.optimizers.Adam(RATE))
    for a, b in zip(ours, keras_own):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        "adam",
        None,
        lambda: wrapped(),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()),
    ],
)
def test_wrong_optimizers(wrong):
    wrong = wrong() if callable(wrong) else wrong
    with pytest.raises(ValueError, match="`optimizer` must be"):
        kwm.CompanderOptimizer(wrong)


def test_errors_of_build():
    built = keras.optimizers.Adam()
    built.build([keras.Variable(np.ones(2), name="w")])
    with pytest.raises(ValueError, match="one not built yet"):
        kwm.CompanderOptimizer(built)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    optimizer = wrapped()
    with pytest.raises(ValueError, match="found no weight with a compander"):
        optimizer.build(model.trainable_variables)
    assert not optimizer.optimizer.built
    kwm.attach_compander(model)
    model.weights[-1].trainable = False
    with pytest.raises(ValueError, match="must be trained too"):
        optimizer.build(model.trainable_variables)
    model.weights[-1].trainable = True
    optimizer.build(model.trainable_variables)
