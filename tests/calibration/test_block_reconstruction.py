"""`sparsify(refine=...)`: swaps, and blocks trained one after the other."""

import gc
import weakref
from typing import Any

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.calibration import block_reconstruction
from keras_weightmods.calibration.walk import Walk
from tests import models
from tests.models import assert_same, numpy, sequential, weights_of

# On each backend test_quantize.py trains a block.
pytestmark = pytest.mark.one_backend


def data(rows=128, size=16, seed=0):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(size, size))
    return (rng.normal(size=(rows, size)) @ mixing).astype("float32")


def make_net():
    tanh = keras.layers.Dense(16, activation="tanh")
    norm = keras.layers.LayerNormalization()
    layers = keras.layers.Dense(24, "relu"), norm, tanh, keras.layers.Dense(8)
    return models.randomize(sequential((16,), *layers))


def refine(model, x, refine="blocks", **options):
    options = {"batch_size": 16, "epochs": 10, "verbose": 0, **options}
    return kwm.sparsify(
        model, "2:4", x, criterion="sparsegpt", refine=refine, **options
    )


def test_a_block_in_bfloat16_learns_as_much():
    errors = []
    for dtype in ("float32", "bfloat16"):
        layer = keras.layers.Dense(8, use_bias=False, dtype=dtype)
        model = models.randomize(sequential((16,), layer))
        (block,) = refine(model, data(), learning_rate=1e-2).blocks
        errors.append((block.before, block.after))
    (before, after), _ = errors
    assert after < 0.9 * before
    np.testing.assert_allclose(*errors, rtol=0.05)


@pytest.mark.parametrize("size", [0.01, 10.0])
def test_the_size_of_the_weights_changes_nothing(size):
    x, errors = data(), []
    for factor in (1.0, size):
        layer = keras.layers.Dense(8, use_bias=False)
        model = models.randomize(sequential((16,), layer))
        model.set_weights([factor * model.get_weights()[0]])
        (block,) = refine(model, x, learning_rate=1e-2).blocks
        errors.append((block.before, block.after))
    assert errors[0][1] < 0.9 * errors[0][0]
    np.testing.assert_allclose(errors[1], errors[0], rtol=0.02)


@pytest.mark.parametrize("method", ["sparsify", "quantize"])
def test_training_that_is_undone_is_no_secret(method):
    call = {"sparsify": refine, "quantize": kwm.quantize}[method]
    options = {"refine": "blocks", "learning_rate": 50.0, "verbose": 0}
    with pytest.warns(UserWarning, match="of 3 of 3 blocks") as seen:
        call(make_net(), data(), **options)
    # The line that calls it, and for sparsify that of `refine`.
    assert {each.filename for each in seen if "of 3" in str(each.message)} == {
        __file__
    }


def test_a_linear_layer_ends_at_its_least_squares():
    """Weighted by the energy of each position, on the support it has.

    What regularizes the model's own training does not count.
    """
    layer = keras.layers.Dense(8, use_bias=False, kernel_regularizer="l2")
    model = models.randomize(sequential((16,), layer))
    (dense,) = weights_of(model)
    x = data(128)
    report = refine(model, x, batch_size=64, epochs=100, learning_rate=1e-1)
    (pruned,) = weights_of(model)
    x, held = models.split(x.astype("float64"))
    y = x @ dense
    energy = (y**2).sum(1)
    batches = energy.reshape(-1, 56)
    floor = np.repeat(1e-3 * batches.mean(1) + keras.config.epsilon(), 56)
    root = 1 / np.sqrt(energy + floor)
    best = 0.0
    for unit in range(8):
        kept = pruned[:, unit] != 0
        a, b = x[:, kept] * root[:, None], y[:, unit] * root
        solution = np.linalg.lstsq(a, b, rcond=None)[0]
        best += ((a @ solution - b) ** 2).sum() / len(x)
    reached = np.sum(((x @ pruned - y) * root[:, None]) ** 2) / len(x)
    (block,) = report.blocks
    assert best <= reached * (1 + 1e-4)
    assert reached < 1.03 * best < 0.8 * block.before
    # What is reported is of the rows held out.
    energy = ((held @ dense) ** 2).sum(1)
    floor = 1e-3 * energy.mean() + keras.config.epsilon()
    change = ((held @ (pruned - dense)) ** 2).sum(1)
    expected = np.mean(change / (energy + floor))
    assert block.after == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", [("swaps", "blocks"), "swaps", "blocks"])
def test_outputs_get_nearer_and_nothing_else_changes(kind):
    """This holds for a frozen model too, which stays frozen."""
    x, errors = data(512), {}
    for name in (None, kind):
        model = make_net()
        model.trainable = kind == "blocks"
        dense, before = numpy(model(x)), weights_of(model)
        flags = [v.trainable for v in (*model.layers, *model.variables)]
        report = refine(model, x, name)
        kwm.assert_sparse(model, "2:4")
        errors[name] = np.square(numpy(model(x)) - dense).mean()
        for variable, value in zip(model.weights, before):
            if variable.name != "kernel":
                np.testing.assert_array_equal(numpy(variable), value)
        after = [v.trainable for v in (*model.layers, *model.variables)]
        assert flags == after
        assert not any(v.constraint for v in model.variables)
    assert errors[kind] < 0.9 * errors[None]
    with_blocks = "blocks" in kind
    assert len(report.blocks) == (3 if with_blocks else 0)
    assert all(b.after < b.before and b.kernels == 1 for b in report.blocks)
    assert ("Blocks, reconstructed" in str(report)) == with_blocks


class Choice(keras.layers.Dense):
    """Gives the place of the largest output, an int."""

    def call(self, x):
        return keras.ops.argmax(super().call(x), axis=-1)


def test_a_block_that_gives_no_float_is_named():
    model = sequential((16,), keras.layers.Dense(8), Choice(4))
    with pytest.warns(UserWarning, match="choice' gives no float.*1 kernels"):
        report = refine(models.randomize(model), data())
    assert len(report.blocks) == 1
    kwm.assert_sparse(model, "2:4")


def test_blocks_learn_from_the_dense_model():
    model, x = make_net(), data(32)
    parts = keras.Model(model.inputs, [layer.output for layer in model.layers])
    dense, seen = [numpy(y) for y in parts(x)], []

    def visit(group, moment, note):
        for target in group:
            target.variable.assign(target.variable.value * 0.5)

    def rebuild(operation, targets, fit, held):
        calls, taught, used = map(list.__add__, fit, held)
        outputs = np.concatenate([numpy(y) for y in taught])
        inputs = np.concatenate([numpy(args[0]) for args, _ in calls])
        seen.append((model.layers.index(operation), inputs, outputs))
        assert (len(targets), used, len(held[0])) == (1, [None, None], 1)

    batches = [(x[:16], None)], visit, rebuild, [(x[16:], None)]
    Walk(model, kwm.find_targets(model), *batches)()
    after = [numpy(y) for y in parts(x)]
    assert [place for place, *_ in seen] == [0, 2, 3]
    for place, inputs, outputs in seen:
        np.testing.assert_allclose(outputs, dense[place], atol=1e-5)
        expected = after[place - 1] if place else x
        np.testing.assert_allclose(inputs, expected, atol=1e-5)


def test_a_language_model_and_its_padding():
    """A block of seven kernels; what is in padding does not matter."""
    results = []
    for filling in (1, 7):
        model = models.randomize(models.causal_lm("llama"), scale=0.2)
        rng = np.random.default_rng(0)
        tokens = rng.integers(2, 16, size=(8, 12))
        mask = np.broadcast_to(np.arange(12) < 9, tokens.shape)
        tokens = np.where(mask, tokens, filling)
        inputs = {"token_ids": tokens, "padding_mask": mask.astype("int32")}
        report = refine(
            model,
            (inputs, None, mask.astype("float32")),
            batch_size=4,
            epochs=2,
        )
        kwm.assert_sparse(model, "2:4")
        results.append(weights_of(model))
    blocks = report.blocks
    assert sum(b.kernels for b in blocks) == len(report.kernels)
    assert len(blocks) == model.backbone.num_layers
    assert all(block.after < block.before for block in blocks)
    for a, b in zip(*results):
        np.testing.assert_allclose(a, b, atol=2e-3)


def test_refused_or_failed_the_model_is_as_it_was(monkeypatch):
    model, x = make_net(), data()
    subclassed = models.Subclassed(16)
    subclassed(x)
    for each, data_, options, message in (
        (model, x, {"refine": "both"}, "refine"),
        (model, None, {"refine": "swaps"}, "data"),
        (model, x, {"learning_rate": 1e30}, "finite"),
        (subclassed, x, {}, "functional model"),
    ):
        own = weights_of(each)
        with pytest.raises(ValueError, match=message):
            refine(each, data_, **options)
        assert_same(weights_of(each), own)
    before = weights_of(model)
    flags = [v.trainable for v in model.variables]

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(block_reconstruction, "relative_error", fail)
    with pytest.raises(KeyboardInterrupt):
        refine(model, x)
    assert_same(weights_of(model), before)
    assert flags == [v.trainable for v in model.variables]
    assert not any(v.constraint for v in model.variables)


def test_the_optimizer_of_a_block_is_freed_with_the_next(monkeypatch):
    """Also the gradients that Keras leaves on torch."""
    alive, adam = [], block_reconstruction.SparseAdam

    class Seen(adam):
        def __init__(self, *args):
            super().__init__(*args)
            alive.append([each() is not None for each in made])
            made.append(weakref.ref(self))

    made: list[Any] = []
    monkeypatch.setattr(block_reconstruction, "SparseAdam", Seen)
    model = make_net()
    gc.collect()
    gc.disable()
    try:
        refine(model, data(), epochs=1)
    finally:
        gc.enable()
    assert alive == [[], [False], [False, False]]
    values = [variable.value for variable in model.variables]
    assert all(getattr(value, "grad", None) is None for value in values)


@pytest.mark.parametrize("recompute", [False, True])
def test_layers_are_computed_again_in_the_backward_pass(recompute):
    class Counted(keras.layers.Dense):
        def call(self, inputs):
            runs.append(self.name)
            return super().call(inputs)

    layers = Counted(24, "relu", name="a"), Counted(8, name="b")
    runs: list[str] = []
    model = models.randomize(sequential((16,), *layers))
    weights, x = weights_of(model), keras.ops.convert_to_tensor(data(32))
    taught = keras.ops.stop_gradient(0.5 * model(x))
    fit = block_reconstruction.Batches([((x,), {})], [taught], [None])
    found = []
    for again in (False, recompute):
        model.set_weights(weights)
        runs.clear()
        loss = block_reconstruction.relative_error
        part = block_reconstruction.Part(model, model, loss, fit, again)
        losses = block_reconstruction.train_part(
            part, model.trainable_variables, fit, fit, 1, 1e-2
        )
        found.append([losses, *weights_of(model)])
    # Measured, trained, in the backward pass and measured again.
    assert "".join(runs) == ("ababbaab" if recompute else "ababab")
    assert_same(*found)
