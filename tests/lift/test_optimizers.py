"""SparseAdamW and MaskedOptimizer, step by step.

SparseAdamW follows LIFT's algorithm 1, in NumPy and float64. With a full mask
both are the optimizer of Keras, and with any nothing moves outside of it.
"""

import keras
import numpy as np
import pytest
from keras import ops

import keras_weightmods as kwm
from keras_weightmods.lift.masked_state import MaskSpec
from tests.backends import breadth
from tests.models import normal, numpy

RATE = 0.05
KERNEL = normal(6, 5)
MASK = np.int32([0, 3, 4, 11, 12, 25, 29])


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

    def step(self, gradient, rate=RATE):
        g, self.t = gradient.astype("float64").reshape(-1), self.t + 1
        m = self.b1 * self.m + (1 - self.b1) * g
        v = self.b2 * self.v + (1 - self.b2) * g**2
        mean = m / (1 - self.b1**self.t)
        root = np.sqrt(v / (1 - self.b2**self.t))
        step = mean / (root + self.eps) + self.decay * self.w
        w = self.w - rate * step
        for name, new in (("m", m), ("v", v), ("w", w)):
            old = getattr(self, name)
            setattr(self, name, np.where(self.mask, new, old))


def built(optimizer, masks, values):
    variables = [keras.Variable(value) for value in values]
    specs = [
        MaskSpec(v.path, tuple(v.shape), None if m is None else len(m), i)
        for i, (v, m) in enumerate(zip(variables, masks))
    ]
    optimizer.build_masked(variables, specs, variables)
    optimizer.set_masks([np.int32(m) for m in masks if m is not None], 0)
    return optimizer, variables


def step(optimizer, variables, seed=0, dtype="float32", mean=0):
    shapes = [tuple(v.shape) for v in variables]
    gradients = [normal(*s, seed=seed + 9 * i) for i, s in enumerate(shapes)]
    gradients = [ops.cast(gradient + mean, dtype) for gradient in gradients]
    optimizer.apply(gradients, variables)
    return [numpy(ops.cast(gradient, "float32")) for gradient in gradients]


def changed(variable, before):
    return np.flatnonzero(numpy(variable) != before).tolist()


def assert_close(variables, others):
    for pair in zip(variables, others, strict=True):
        np.testing.assert_allclose(*map(numpy, pair), rtol=0, atol=3e-6)


OPTIMIZERS = {
    "SparseAdamW": lambda **kwargs: kwm.SparseAdamW(RATE, **kwargs),
    "MaskedOptimizer": lambda **kwargs: kwm.MaskedOptimizer(
        keras.optimizers.AdamW(RATE, beta_2=0.95, epsilon=1e-7, **kwargs)
    ),
}


@breadth("name", OPTIMIZERS)
def test_equals_algorithm_1(name):
    bias, new = normal(4, seed=1), np.int32([0, 2, 3, 11, 13, 25, 28])
    optimizer = OPTIMIZERS[name](weight_decay=0.1)
    optimizer, variables = built(optimizer, [MASK, None], [KERNEL, bias])
    pairs = (KERNEL, MASK), (bias, np.arange(4))
    references = [Reference(*pair, 0.1) for pair in pairs]
    for i in range(6):
        if i == 3:
            optimizer.set_masks([new], 3)
            references[0].move(new)
        gradients = step(optimizer, variables, i)
        for reference, gradient in zip(references, gradients):
            reference.step(gradient)
    assert_close(
        variables, [r.w.reshape(v.shape) for r, v in zip(references, variables)]
    )
    assert changed(variables[0], KERNEL) == np.union1d(MASK, new).tolist()
    assert optimizer.indices_of(variables[0]).tolist() == new.tolist()


WRAPPED = {
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "Adam": {"weight_decay": 0.1},
    "Lion": {"weight_decay": 0.1},
    "Adafactor": {},
    "Muon": {},
}


@breadth("name", WRAPPED, 1)
def test_only_masked_entries_change(name):
    inner = getattr(keras.optimizers, name)(0.1, **WRAPPED[name])
    ones = np.ones(4, "float32")
    optimizer = kwm.MaskedOptimizer(inner)
    optimizer, variables = built(optimizer, [MASK, None], [KERNEL, ones])
    for i in range(4):
        step(optimizer, variables, i)
    assert changed(variables[0], KERNEL) == MASK.tolist()
    assert changed(variables[1], ones) == [0, 1, 2, 3]
    # Also where it has momentum for entries that are no longer masked.
    before = numpy(variables[0])
    other = np.int32([1, 2, 3, 5, 6, 7, 8])
    optimizer.set_masks([other], 4)
    for i in range(4):
        step(optimizer, variables, i)
    assert set(changed(variables[0], before)) <= set(other.tolist())
    assert optimizer.indices_of(variables[0]).tolist() == other.tolist()


SETTINGS = {
    "clipping by norm": {"clipnorm": 0.5},
    "clipping by value": {"clipvalue": 0.3},
    "clipping by global norm": {"global_clipnorm": 0.5},
    "weight decay": {"weight_decay": 0.1},
    "average": {"use_ema": True, "ema_overwrite_frequency": 7},
    "accumulation": {
        **{"gradient_accumulation_steps": 3, "weight_decay": 0.1},
        "use_ema": True,
    },
}


@pytest.mark.one_backend
@pytest.mark.parametrize("name", SETTINGS)
def test_a_full_mask_is_the_adamw_of_keras(name):
    settings = {"weight_decay": 0.0, "epsilon": 1e-12, **SETTINGS[name]}
    values, masks = [KERNEL, normal(4, seed=1)], [np.arange(30), None]
    adamw = keras.optimizers.AdamW(RATE, beta_2=0.95, **settings)
    plain = adamw, [keras.Variable(value) for value in values]
    plain[0].build(plain[1])
    wrapped = kwm.MaskedOptimizer(adamw.from_config(adamw.get_config()))
    sparse = kwm.SparseAdamW(RATE, **settings)
    all_of = plain, built(wrapped, masks, values), built(sparse, masks, values)
    for optimizer, variables in all_of:
        for i in range(24):
            step(optimizer, variables, i)
        every = settings.get("gradient_accumulation_steps", 1)
        assert int(optimizer.iterations) == 24 // every
        optimizer.finalize_variable_values(variables)
        assert_close(variables, plain[1])


@pytest.mark.one_backend
def test_state_is_compact():
    optimizer = kwm.SparseAdamW(gradient_accumulation_steps=2)
    built(optimizer, [np.arange(500)], [normal(100, 100)])
    shapes = [tuple(v.shape) for v in optimizer.variables if len(v.shape)]
    # The moments, the indices and what is accumulated.
    assert shapes == [(500,)] * 4


@pytest.mark.one_backend
def test_clipping_measures_masked_entries():
    gradient = np.float32([100.0, 3.0, 100.0, 4.0])
    optimizer = kwm.SparseAdamW(global_clipnorm=1.0)
    optimizer, variables = built(optimizer, [[1, 3]], [gradient])
    optimizer.apply([ops.convert_to_tensor(gradient)], variables)
    moment = numpy(optimizer._moments[0][0])
    np.testing.assert_allclose(moment, [0.06, 0.08], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_in_16_bits_are_trained_as_in_float32(dtype):
    # Steps of 3e-4 on weights of about 1, which both dtypes round away.
    rate, half = 3e-4, 2.0 ** (-8 if dtype == "bfloat16" else -11)
    kernel = ops.cast(normal(4, 4), dtype)
    bias = ops.cast(normal(4, seed=1), dtype)
    indices, whole = np.int32([0, 5, 9]), np.arange(4)
    optimizer = kwm.SparseAdamW(rate)
    optimizer, variables = built(optimizer, [indices, None], [kernel, bias])
    starts = [numpy(v).astype("float32") for v in variables]
    exact = [Reference(*p) for p in zip(starts, (indices, whole))]
    for i in range(64):
        for r, gradient in zip(exact, step(optimizer, variables, i, dtype, 2)):
            r.step(gradient, rate)
    for v, r, start in zip(variables, exact, starts):
        received = numpy(v).astype("float64").reshape(-1)
        moved = np.abs(r.w - start.reshape(-1))[r.mask]
        assert moved.min() > 0.015
        np.testing.assert_allclose(received, r.w, rtol=half, atol=2e-6)
        assert np.array_equal(received[~r.mask], start.reshape(-1)[~r.mask])
    # What is written into a weight is the weight from then on.
    variables[0].assign(ops.ones((4, 4), dtype=dtype))
    step(optimizer, variables, 0, dtype)
    received = numpy(variables[0]).astype("float32").reshape(-1)
    np.testing.assert_allclose(received[indices], 1, atol=2 * rate + half)


@pytest.mark.one_backend
def test_what_16_bits_round_away_is_warned_about():
    kernel = ops.cast(KERNEL, "bfloat16")
    for name, settings in (
        ("MaskedOptimizer", {}),
        ("SparseAdamW", {"use_ema": True}),
    ):
        with pytest.warns(UserWarning, match=f'{name}: 1 .*"mixed_bfloat16"'):
            built(OPTIMIZERS[name](**settings), [MASK], [kernel])


@pytest.mark.one_backend
def test_wraps_an_optimizer_built_on_more():
    inner = keras.optimizers.Adam(0.1)
    variables = [keras.Variable(KERNEL), keras.Variable(normal(4))]
    inner.build(variables)
    optimizer = kwm.MaskedOptimizer(inner)
    specs = [MaskSpec("w", (6, 5), 7, 0)]
    optimizer.build_masked(variables[:1], specs, variables)
    optimizer.set_masks([MASK], 0)
    step(optimizer, variables[:1])
    assert changed(variables[0], KERNEL) == MASK.tolist()


@pytest.mark.one_backend
def test_constraints_apply_once_after_the_step():
    calls = []
    optimizer = kwm.MaskedOptimizer(keras.optimizers.Adam(0.1))
    masks, values = [MASK, None], [KERNEL, normal(4)]
    optimizer, variables = built(optimizer, masks, values)
    variables[1].constraint = lambda w: calls.append(1) or ops.clip(w, 0, 1)
    for i in range(3):
        step(optimizer, variables, i)
    assert len(calls) == 3
    assert variables[1].constraint is not None


@pytest.mark.one_backend
def test_config_builds_the_state():
    optimizer = kwm.SparseAdamW(weight_decay=0.1)
    optimizer, variables = built(optimizer, [MASK, None], [KERNEL, normal(3)])
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


@pytest.mark.one_backend
def test_errors():
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    for inner in (scaled, kwm.SparseAdamW()):
        with pytest.raises(ValueError, match="`optimizer` must be"):
            kwm.MaskedOptimizer(inner)
    optimizer, variable = kwm.SparseAdamW(), keras.Variable(KERNEL)
    optimizer.build([variable])
    assert not optimizer.built
    with pytest.raises(ValueError, match="has masks of 0 variables"):
        step(optimizer, [variable])
