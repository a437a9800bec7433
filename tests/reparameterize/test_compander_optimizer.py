"""The paper's rule against NumPy, and around any Keras optimizer."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_weightmods as kwm
from tests.backends import breadth
from tests.models import JIT, normal, numpy, sequential

A, B = 0.7, 1.2
RATE, DECAY = 0.05, 0.1
X, Y = normal(8, 4), np.ones((8, 3), "float32")


def slope(v, a=A, b=B):
    return a / (b * (1 + (v / b) ** 2))


class Reference:
    """Adam(W) on w = a arctan(v / b), its step times the slope, on v."""

    def __init__(self, v, weight_decay=0.0, learnable=False):
        self.v = np.float64(v)
        self.weight_decay, self.learnable = weight_decay, learnable
        self.m, self.u, self.t = np.zeros_like(v), np.zeros_like(v), 0

    def step(self, a=A, b=B):
        g, self.t = gradient_of_w(self.v, a, b), self.t + 1
        self.m = 0.9 * self.m + 0.1 * g
        self.u = 0.999 * self.u + 0.001 * g**2
        # Keras adds epsilon before it corrects the bias.
        rate = RATE * np.sqrt(1 - 0.999**self.t) / (1 - 0.9**self.t)
        step = -rate * self.m / (np.sqrt(self.u) + 1e-7)
        w = a * np.arctan(self.v / b)
        decay = -RATE * self.weight_decay
        if self.learnable:
            self.v = self.v + slope(self.v, a, b) * step + decay * self.v
        else:
            self.v = self.v + slope(self.v, a, b) * (step + decay * w)


def gradient_of_w(v, a=A, b=B):
    x = np.float64(X)
    return x.T @ (2 * (x @ (a * np.arctan(v / b)) - 1) / 24)


def make(optimizer, learnable=False, **kwargs):
    keras.utils.set_random_seed(0)
    layer = kwm.CompanderDense(
        3, a=A, b=B, learnable=learnable, use_bias=False, **kwargs
    )
    model = sequential((4,), layer)
    model.compile(optimizer, "mse", jit_compile=JIT)
    return model, layer


def train(model, steps):
    batches = (np.concatenate([each] * steps) for each in (X, Y))
    model.fit(*batches, batch_size=8, verbose=0, shuffle=False)


def apply(model, gradients):
    gradients = [ops.convert_to_tensor(g, "float32") for g in gradients]
    model.optimizer.apply(gradients, model.trainable_variables)


def wrapped(inner="Adam", *args, **kwargs):
    inner = getattr(keras.optimizers, inner)(*args, **kwargs)
    return kwm.CompanderOptimizer(inner)


def adam_w(**kwargs):
    return wrapped("AdamW", RATE, weight_decay=DECAY, **kwargs)


def assert_stored(layer, expected, atol=3e-6):
    stored = numpy(layer._kernel)
    np.testing.assert_allclose(stored, expected, rtol=0, atol=atol)


@breadth("weight_decay", [DECAY, 0.0])
def test_equals_reference_with_fixed_pairs(weight_decay):
    model, layer = make(adam_w() if weight_decay else wrapped("Adam", RATE))
    reference = Reference(numpy(layer._kernel), weight_decay)
    train(model, 5)
    for _ in range(5):
        reference.step()
    assert_stored(layer, reference.v)
    assert int(model.optimizer.iterations) == 5


def test_equals_reference_with_learnable_pairs():
    model, layer = make(adam_w(), learnable=True)
    reference = Reference(numpy(layer._kernel), DECAY, learnable=True)
    reference.step()
    pair = numpy(layer.weights[-1])
    train(model, 1)
    assert_stored(layer, reference.v)
    # The first step of Adam is the learning rate.
    moved = np.abs(numpy(layer.weights[-1]) - pair)
    np.testing.assert_allclose(moved, RATE, rtol=1e-3)
    reference.step(layer.compander.a, layer.compander.b)
    train(model, 1)
    assert_stored(layer, reference.v)


@pytest.mark.one_backend
@pytest.mark.parametrize("excluded", [False, True])
def test_decay_alone(excluded):
    model, layer = make(adam_w(), learnable=True)
    if excluded:
        model.optimizer.exclude_from_weight_decay(var_names=["kernel"])
    v, pair = numpy(layer._kernel), numpy(layer.weights[-1])
    apply(model, [np.zeros(w.shape) for w in model.weights])
    assert_stored(layer, v if excluded else v - RATE * DECAY * v, atol=1e-6)
    np.testing.assert_array_equal(numpy(layer.weights[-1]), pair)


OPTIMIZERS = {
    "SGD": {"clipnorm": 0.01},
    "RMSprop": {},
    "Lion": {},
    "Adafactor": {},
    "Muon": {},
}


@pytest.mark.one_backend
@pytest.mark.parametrize("inner", OPTIMIZERS)
def test_any_optimizer_moves_by_its_step_times_the_slope(inner):
    model, layer = make(wrapped(inner, 0.01, **OPTIMIZERS[inner]))
    keras.utils.set_random_seed(0)
    plain = sequential((4,), keras.layers.Dense(3, use_bias=False))
    plain.compile(getattr(keras.optimizers, inner)(0.01, **OPTIMIZERS[inner]))
    v, w = np.float64(numpy(layer._kernel)), numpy(layer.kernel)
    plain.set_weights([w])
    apply(plain, [gradient_of_w(v)])
    train(model, 1)
    step = np.float64(plain.get_weights()[0]) - w
    assert np.abs(step).max() > 0
    assert_stored(layer, v + slope(v) * step, atol=2e-6)


def test_gradient_accumulation():
    model, layer = make(adam_w(gradient_accumulation_steps=2), learnable=True)
    reference = Reference(numpy(layer._kernel), DECAY, learnable=True)
    train(model, 1)
    assert_stored(layer, reference.v, atol=1e-6)
    train(model, 1)
    reference.step()
    assert_stored(layer, reference.v)
    assert int(model.optimizer.iterations) == 1


@pytest.mark.one_backend
def test_moving_average_is_of_the_stored_values():
    optimizer = wrapped("Adam", RATE, use_ema=True, ema_momentum=0.5)
    model, layer = make(optimizer)
    reference = Reference(numpy(layer._kernel))
    reference.step()
    average = 0.5 * reference.v
    reference.step()
    average += 0.5 * reference.v
    train(model, 2)
    assert_stored(layer, average)


def test_loss_scaling_around_it_changes_nothing():
    """Over many steps: on TensorFlow a few read a and b too late once."""
    scaled = keras.optimizers.LossScaleOptimizer(
        wrapped("Adam", RATE), initial_scale=1024.0
    )
    (model, layer), (plain, expected) = (
        make(optimizer, learnable=True)
        for optimizer in (scaled, wrapped("Adam", RATE))
    )
    train(model, 60)
    train(plain, 60)
    assert_stored(layer, numpy(expected._kernel), atol=1e-5)


@pytest.mark.one_backend
def test_config_and_state_are_saved(tmp_path):
    config = adam_w(use_ema=True).get_config()
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
    assert_stored(layer, numpy(loaded.layers[0]._kernel), atol=1e-7)


@pytest.mark.one_backend
def test_errors():
    built = keras.optimizers.SGD()
    built.build([])
    with pytest.raises(ValueError, match="`optimizer` must be one not built"):
        kwm.CompanderOptimizer(built)
    model = sequential((4,), keras.layers.Dense(3))
    optimizer = wrapped()
    with pytest.raises(ValueError, match="found no weight with a compander"):
        optimizer.build(model.trainable_variables)
    assert not optimizer.optimizer.built
    model, _ = make(optimizer, dtype="bfloat16")
    message = 'CompanderOptimizer: 1 .*`Adam` are.*"mixed_bfloat16"'
    with pytest.warns(UserWarning, match=message):
        optimizer.build(model.trainable_variables)
