"""Nothing outside of the mask moves, whatever the optimizer does."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_weightmods as kwm
from keras_weightmods.lift.masked_state import MaskSpec
from tests.backends import breadth
from tests.lift.test_sparse_adamw import SETTINGS, steps_of
from tests.models import normal, numpy

OPTIMIZERS = {
    "SGD with momentum": lambda: keras.optimizers.SGD(
        0.1, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "Adam": lambda: keras.optimizers.Adam(0.1, weight_decay=0.1),
    "Lion": lambda: keras.optimizers.Lion(0.1, weight_decay=0.1),
    "Adafactor": lambda: keras.optimizers.Adafactor(0.1),
    "Muon": lambda: keras.optimizers.Muon(0.1),
}
KERNEL = normal(6, 5)
MASK = np.int32([0, 3, 4, 11, 12, 25, 29])


def make_variables():
    return [keras.Variable(KERNEL), keras.Variable(np.ones(4, "float32"))]


def built(inner):
    variables, optimizer = make_variables(), kwm.MaskedOptimizer(inner)
    specs = [MaskSpec("w", (6, 5), 7, 0), MaskSpec("b", (4,), None, 1)]
    optimizer.build_masked(variables, specs, variables)
    optimizer.set_masks([MASK], 0)
    return optimizer, variables


def step(optimizer, variables, steps=4):
    random = np.random.default_rng(1)
    for _ in range(steps):
        gradients = [np.float32(random.normal(size=v.shape)) for v in variables]
        optimizer.apply([*map(ops.convert_to_tensor, gradients)], variables)


def changed(variable, before=KERNEL):
    return np.flatnonzero(numpy(variable) != before).tolist()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_masked_entries_change(name):
    optimizer, variables = built(OPTIMIZERS[name]())
    step(optimizer, variables)
    assert changed(variables[0]) == MASK.tolist()
    assert changed(variables[1], np.ones(4)) == [0, 1, 2, 3]
    # Also where it has momentum for entries that are no longer masked.
    before = numpy(variables[0])
    other = np.int32([1, 2, 3, 5, 6, 7, 8])
    optimizer.set_masks([other], 4)
    step(optimizer, variables)
    assert set(changed(variables[0], before)) <= set(other.tolist())
    assert optimizer.indices_of(variables[0]).tolist() == other.tolist()


@breadth("name", SETTINGS, *range(7))
def test_a_full_mask_changes_nothing(name):
    results = []
    for everything in (None, np.arange(30, dtype="int32")):
        settings = {"weight_decay": 0.1, **SETTINGS[name]}
        optimizer = keras.optimizers.AdamW(0.05, **settings)
        variable = keras.Variable(KERNEL)
        if everything is None:
            optimizer.build([variable])
        else:
            optimizer = kwm.MaskedOptimizer(optimizer)
            optimizer.build_masked([variable], [MaskSpec("w", (6, 5), 30, 0)])
            optimizer.set_masks([everything], 0)
        step(optimizer, [variable], steps_of(name))
        every = SETTINGS[name].get("gradient_accumulation_steps", 1)
        assert int(optimizer.iterations) == steps_of(name) // every
        optimizer.finalize_variable_values([variable])
        results.append(numpy(variable))
    np.testing.assert_allclose(*results, rtol=0, atol=1e-6)


def test_equals_sparse_adamw():
    """But for where Adam adds its epsilon."""
    settings = {"epsilon": 1e-12, "weight_decay": 0.1, "clipnorm": 0.5}
    inner = keras.optimizers.AdamW(0.01, beta_2=0.95, **settings)
    optimizer, variables = built(inner)
    sparse = kwm.SparseAdamW(0.01, **settings)
    others = make_variables()
    sparse.build_masked(others, optimizer.specs)
    sparse.set_masks([MASK], 0)
    step(optimizer, variables)
    step(sparse, others)
    for pair in zip(variables, others):
        np.testing.assert_allclose(*map(numpy, pair), rtol=0, atol=1e-6)


def test_wraps_an_optimizer_built_on_more():
    inner = keras.optimizers.Adam(0.1)
    variables = make_variables()
    inner.build(variables)
    optimizer = kwm.MaskedOptimizer(inner)
    specs = [MaskSpec("w", (6, 5), 7, 0)]
    optimizer.build_masked(variables[:1], specs, variables)
    optimizer.set_masks([MASK], 0)
    step(optimizer, variables[:1])
    assert changed(variables[0]) == MASK.tolist()
    copy = kwm.MaskedOptimizer.from_config(optimizer.get_config())
    copy.optimizer.name = inner.name
    variables[0]._path = "w"
    copy.build(variables)
    assert [tuple(v.shape) for v in copy.variables] == [
        tuple(v.shape) for v in optimizer.variables
    ]


def test_constraints_apply_once_after_the_step():
    calls = []
    optimizer, variables = built(OPTIMIZERS["Adam"]())
    variables[1].constraint = lambda w: calls.append(1) or ops.clip(w, 0, 1)
    step(optimizer, variables, 3)
    assert len(calls) == 3
    assert variables[1].constraint is not None


@pytest.mark.parametrize(
    "inner",
    [
        "adam",
        keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()),
        kwm.SparseAdamW(),
    ],
)
def test_rejects(inner):
    with pytest.raises(ValueError, match="`optimizer` must be"):
        kwm.MaskedOptimizer(inner)
