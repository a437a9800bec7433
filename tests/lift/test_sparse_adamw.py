"""SparseAdamW against LIFT's algorithm 1 in NumPy, float64."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_weightmods as kwm
from keras_weightmods.lift.masked_state import MaskSpec
from tests.backends import breadth
from tests.models import normal, numpy

RATE = 0.05


class Reference:
    """Algorithm 1 of LIFT, with weight decay, for one matrix."""

    b1, b2, eps = 0.9, 0.95, 1e-6

    def __init__(self, w, indices, decay=0.0):
        self.w, self.decay = w.astype("float64").reshape(-1), decay
        self.m, self.v = np.zeros_like(self.w), np.zeros_like(self.w)
        self.t = 0
        self.move(indices)

    def move(self, indices):
        mask = np.zeros(self.w.size, bool)
        mask[indices] = True
        self.mask = mask
        self.m, self.v = np.where(mask, self.m, 0), np.where(mask, self.v, 0)

    def step(self, gradient):
        g, self.t = gradient.astype("float64").reshape(-1), self.t + 1
        m = self.b1 * self.m + (1 - self.b1) * g
        v = self.b2 * self.v + (1 - self.b2) * g**2
        mean = m / (1 - self.b1**self.t)
        root = np.sqrt(v / (1 - self.b2**self.t))
        step = mean / (root + self.eps) + self.decay * self.w
        w = self.w - RATE * step
        for name, new in (("m", m), ("v", v), ("w", w)):
            old = getattr(self, name)
            setattr(self, name, np.where(self.mask, new, old))


def built(masks, values=(), **kwargs):
    """An optimizer with variables of these masks; None for all entries."""
    variables = [keras.Variable(value) for value in values]
    optimizer = kwm.SparseAdamW(RATE, **kwargs)
    specs = [
        MaskSpec(v.path, tuple(v.shape), None if m is None else len(m), i)
        for i, (v, m) in enumerate(zip(variables, masks))
    ]
    optimizer.build_masked(variables, specs)
    optimizer.set_masks([np.int32(m) for m in masks if m is not None], 0)
    return optimizer, variables


def step(optimizer, variables, *gradients):
    optimizer.apply([ops.convert_to_tensor(g) for g in gradients], variables)


def choice(size, count, seed=0):
    random = np.random.default_rng(seed)
    return np.sort(random.choice(size, count, replace=False))


@pytest.mark.parametrize("decay", [None, 0.1])
def test_equals_algorithm_1(decay):
    kernel, bias = normal(6, 5), normal(4, seed=1)
    old, new = choice(30, 9), choice(30, 9, seed=1)
    assert 0 < len(np.intersect1d(old, new)) < 9
    masks, values = [old, None], [kernel, bias]
    optimizer, variables = built(masks, values, weight_decay=decay)
    pairs = zip(values, [old, np.arange(4)])
    references = [Reference(*pair, decay or 0.0) for pair in pairs]
    for i in range(6):
        if i == 3:
            optimizer.set_masks([np.int32(new)], 3)
            references[0].move(new)
        gradients = [normal(6, 5, seed=10 + i), normal(4, seed=20 + i)]
        step(optimizer, variables, *gradients)
        for reference, gradient in zip(references, gradients):
            reference.step(gradient)
    for variable, reference in zip(variables, references):
        found = numpy(variable).reshape(-1)
        np.testing.assert_allclose(found, reference.w, rtol=0, atol=3e-6)
    changed = np.flatnonzero(numpy(variables[0]) != kernel)
    assert changed.tolist() == np.union1d(old, new).tolist()
    assert optimizer.indices_of(variables[0]).tolist() == new.tolist()


SETTINGS = {
    "plain": {},
    "clipping by norm": {"clipnorm": 0.5},
    "clipping by value": {"clipvalue": 0.3},
    "clipping by global norm": {"global_clipnorm": 0.5},
    "weight decay": {"weight_decay": 0.1},
    "average": {"use_ema": True, "ema_overwrite_frequency": 7},
    "accumulation": {"gradient_accumulation_steps": 3, "weight_decay": 0.1},
    "both of these": {"use_ema": True, "gradient_accumulation_steps": 3},
}


def steps_of(name):
    """Fewer where JAX, run eagerly, compiles every step anew."""
    compiles = "gradient_accumulation_steps" in SETTINGS[name]
    return 6 if compiles and keras.backend.backend() == "jax" else 60


@breadth("name", SETTINGS, *range(7))
def test_a_full_mask_is_the_adamw_of_keras(name):
    """And so is a variable without a mask."""
    values = [normal(6, 5), normal(4, seed=1)]
    settings = {"weight_decay": 0.0, "epsilon": 1e-12, **SETTINGS[name]}
    optimizer, variables = built([np.arange(30), None], values, **settings)
    expected = keras.optimizers.AdamW(RATE, beta_2=0.95, **settings)
    others = [keras.Variable(value) for value in values]
    expected.build(others)
    for i in range(steps_of(name)):
        gradients = normal(6, 5, seed=i), normal(4, seed=100 + i)
        step(optimizer, variables, *gradients)
        step(expected, others, *gradients)
    optimizer.finalize_variable_values(variables)
    expected.finalize_variable_values(others)
    for pair in zip(variables, others):
        np.testing.assert_allclose(*map(numpy, pair), rtol=0, atol=1e-6)


def test_state_is_compact():
    """0.075 of Adam's two moments at 5 %, besides a few scalars."""
    masks, settings = [choice(10_000, 500)], {"gradient_accumulation_steps": 2}
    optimizer, _ = built(masks, [normal(100, 100)], **settings)
    large = [v for v in optimizer.variables if len(v.shape)]
    assert [tuple(v.shape) for v in large] == [(500,)] * 4
    names = {v.path.rpartition("/")[2].rpartition("_")[0] for v in large}
    assert names == {"gradient_accumulator", "indices", "momentum", "velocity"}


def test_clipping_measures_masked_entries():
    gradient = np.float32([100.0, 3.0, 100.0, 4.0])
    optimizer, variables = built([[1, 3]], [gradient], global_clipnorm=1.0)
    step(optimizer, variables, gradient)
    moment = numpy(optimizer._moments[0][0])
    np.testing.assert_allclose(moment, [0.06, 0.08], rtol=1e-5)


def test_average_of_unmasked_entries_is_exact():
    kernel, mask = normal(20, 20), choice(400, 20)
    settings = {"use_ema": True, "ema_momentum": 0.7}
    optimizer, (variable,) = built([mask], [kernel], **settings)
    for i in range(5):
        step(optimizer, [variable], normal(20, 20, seed=i))
    trained = numpy(variable).reshape(-1).copy()
    optimizer.finalize_variable_values([variable])
    averaged = numpy(variable).reshape(-1)
    changed = np.flatnonzero(averaged != kernel.reshape(-1))
    assert changed.tolist() == mask.tolist()
    assert not np.array_equal(averaged, trained)


def test_half_precision():
    kernel = ops.cast(normal(4, 4), "bfloat16")
    optimizer, (variable,) = built([[0, 5, 9]], [kernel])
    before = numpy(variable)
    for _ in range(300):  # more steps than bfloat16 can count
        optimizer.apply([ops.ones((4, 4), dtype="bfloat16")], [variable])
    after = numpy(variable)
    assert np.flatnonzero(after != before).tolist() == [0, 5, 9]
    # A gradient of 1 is a step of the learning rate, up to rounding.
    assert np.all(np.abs((before - after)[after != before] / 300 - RATE) < 0.02)


def test_errors():
    with pytest.raises(ValueError, match="`beta_2` must be"):
        kwm.SparseAdamW(beta_2=1.0)
    with pytest.raises(ValueError, match="`epsilon` must be"):
        kwm.SparseAdamW(epsilon=0)
    optimizer = kwm.SparseAdamW()
    variable = keras.Variable(normal(3, 3))
    optimizer.build([variable])
    assert not optimizer.built
    with pytest.raises(ValueError, match="no masks yet"):
        optimizer.apply([ops.ones((3, 3))], [variable])
    optimizer, variables = built([[0]], [normal(2, 2)])
    with pytest.raises(ValueError, match="built already"):
        optimizer.build_masked(variables, optimizer.specs)


def test_config_builds_the_state():
    masks, values = [[0, 2], None], [normal(2, 2), normal(3)]
    optimizer, variables = built(masks, values, weight_decay=0.1)
    config = optimizer.get_config()
    copy = kwm.SparseAdamW.from_config(config)
    copy.build(variables)
    assert copy.built
    assert copy.mask_step == -1
    assert [tuple(v.shape) for v in copy.variables] == [
        tuple(v.shape) for v in optimizer.variables
    ]
    assert copy.get_config() == config
    with pytest.raises(ValueError, match="was restored with masks"):
        kwm.SparseAdamW.from_config(config).build(variables[1:])
