"""The walk of `sparsify` through a model."""

import contextlib
import warnings
import weakref
from functools import partial

import keras
import numpy as np
import pytest
from keras import ops

import keras_weightmods as kwm
from keras_weightmods.calibration import inputs, walk
from keras_weightmods.core import keras_compat
from keras_weightmods.core.watched import called_by
from keras_weightmods.utils.matrix import to_stack
from tests import models, references
from tests.backends import breadth
from tests.models import normal, numpy, randomize, sequential, weights_of


def branching():
    x = keras.Input((16,))
    first = keras.layers.Dense(16, activation="relu")(x)
    left = keras.layers.Dense(16, activation="tanh")(first)
    right = keras.layers.Dense(16)(first) * 0.5
    joined = keras.layers.Add()([left, right, first])
    return keras.Model(x, {"a": keras.layers.Dense(4)(joined), "b": left})


def masked():
    return sequential(
        (6,),
        keras.layers.Embedding(20, 16, mask_zero=True),
        keras.layers.Dense(16, activation="relu"),
        keras.layers.GlobalAveragePooling1D(),
        keras.layers.Dense(4),
        dtype="int32",
    )


def llm(depth=2):
    return models.causal_lm(hidden_dim=8, intermediate_dim=12, num_layers=depth)


def make_tokens(samples=6, length=5):
    ids = np.random.default_rng(0).integers(1, 20, (samples, length))
    return {"token_ids": ids, "padding_mask": np.ones_like(ids)}


MODELS = {
    branching: normal(20, 16, seed=1),
    llm: make_tokens(),
    lambda: models.nested_net(16): normal(20, 16, seed=1),
    lambda: models.shared_net(16): normal(20, 16, seed=1),
    masked: np.random.default_rng(0).integers(0, 3, (20, 6)),
    models.attention_net: normal(8, 5, 16, seed=1),
}
one_backend = pytest.mark.one_backend


@breadth(("make", "x"), list(MODELS.items()))
def test_the_walk_is_the_model_run_for_each_kernel(make, x, monkeypatch):
    """What is cached between layers is what the whole model would give."""
    results = []
    for whole in (False, True):
        model = randomize(make())
        if whole:
            monkeypatch.setattr(keras_compat, "graph_of", lambda _: None)
            monkeypatch.setattr(inputs.Rows, "same", lambda a, b: a is b)
        report = kwm.sparsify(model, "2:4", x, criterion="sparsegpt", verbose=0)
        assert {k.criterion for k in report.kernels} == {"sparsegpt"}
        kwm.assert_sparse(model, "2:4")
        results.append(weights_of(model))
        for layer in model._flatten_layers():
            assert "call" not in vars(layer)
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.one_backend
def test_blocks_of_a_backbone_that_is_called_by_keyword(recwarn):
    """Whatever the order of its inputs, which never change places."""
    found = []
    for order in (list, reversed):
        model = models.causal_lm("gemma3", num_layers=3)
        assert list(model.input) != sorted(model.input)
        x = make_tokens(16, 8)
        # Rows of several lengths: a mask that is taken for tokens shows.
        x["padding_mask"] = np.tril(np.ones((16, 8), "int32"), 2)
        report = kwm.sparsify(
            model,
            "2:4",
            {key: x[key] for key in order(list(x))},
            criterion="wanda",
            refine="blocks",
            epochs=1,
            verbose=0,
        )
        assert [block.kernels for block in report.blocks] == [7, 7, 7]
        found.append(weights_of(model))
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert not [w for w in recwarn if "structure" in str(w.message)]


class Whole(keras.Model):
    """A model with blocks of its own, which nothing can look into."""

    def __init__(self, name="whole"):
        super().__init__(name=name)
        self.blocks = [keras.layers.Dense(8, "relu") for _ in range(3)]

    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@one_backend
def test_a_model_that_cannot_be_entered_is_no_block():
    x = normal(256, 8) @ normal(8, 8, seed=1)
    inputs = keras.Input((8,))
    model = keras.Model(inputs, keras.layers.Dense(4)(Whole()(inputs)))
    for make, name, reason, count in (
        (lambda: model, "whole", "no functional model", 1),
        (lambda: models.shared_net(8), "functional", "called several times", 0),
    ):
        match = rf"blocks of '{name}.* not trained.*{reason}"
        with pytest.warns(UserWarning, match=match):
            report = kwm.quantize(make(), x, epochs=1, verbose=0)
        assert len(report.blocks) == count
    # Where the graph repeats it, it is one.
    outputs = keras.layers.Dense(4)(Whole("other")(Whole()(inputs)))
    report = kwm.quantize(keras.Model(inputs, outputs), x, epochs=1, verbose=0)
    assert [block.kernels for block in report.blocks] == [3, 3, 1]


@one_backend
def test_blocks_are_run_as_often_as_they_must():
    model = llm(depth=3)
    layers = *model.backbone.transformer_layers, model.backbone.token_embedding
    calls = dict.fromkeys(layers, 0)

    def call(layer, plain, *args, **kwargs):
        calls[layer] += 1
        return plain(*args, **kwargs)

    options = {"targets": kwm.find_targets(model), "batch_size": 2}
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(called_by(layer, partial(call, layer)))
        kwm.sparsify(
            model, "2:4", make_tokens(), criterion="wanda", verbose=0, **options
        )
    # Query, key and value share their inputs, and gate and value: 4 passes,
    # and one for the outputs, which nothing after the last block needs.
    batches = 4  # one of them of the row held out
    assert list(calls.values()) == [n * batches for n in (5, 5, 4, 1)]


@one_backend
def test_only_what_is_needed_is_kept(monkeypatch):
    model = models.mlp(*[8] * 9)
    outputs, alive = [], []
    run = walk.Walk.run

    def watched(self, *arguments):
        result = run(self, *arguments)
        alive.append(sum(ref() is not None for ref in outputs))
        outputs.extend(map(weakref.ref, result or []))
        return result

    monkeypatch.setattr(walk.Walk, "run", watched)
    kwm.sparsify(model, "2:4", normal(4, 8), criterion="wanda", verbose=0)
    assert len(alive) == 9
    assert max(alive) <= 2


class Square(keras.layers.Layer):
    """Known to `find_targets`, but not what its inputs are."""

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(8, 8), name="kernel")

    def call(self, x):
        return ops.matmul(x, self.kernel)


@one_backend
def test_a_layer_that_nobody_can_read_goes_by_magnitude():
    kwm.register_layer_kind(Square, {"kernel": {"contraction_axes": (0,)}})
    model = randomize(sequential((8,), Square(), keras.layers.Dense(4)))
    before = numpy(model.layers[0].kernel)
    report = kwm.sparsify(
        model, "2:4", normal(5, 8), criterion="wanda", verbose=0
    )
    assert [k.criterion for k in report.kernels] == ["magnitude", "wanda"]
    assert "cannot be read" in report.kernels[0].note
    assert "magnitude" in report.table()
    expected = before * references.nm_mask(before, 2, 4, 0)
    np.testing.assert_array_equal(numpy(model.layers[0].kernel), expected)


class Unused(models.Subclassed):
    """Holds a layer that no call of it leads to."""

    def __init__(self):
        super().__init__()
        self.spare = keras.layers.Dense(8, name="spare")
        self.spare.build((None, 16))


def train(criterion, init):
    def fit(model, x, targets):
        teacher = Unused()
        teacher(x)
        options = {"teacher": teacher, "scaling_groups": 0}
        cast = kwm.CAST(model, targets=targets, init=init, **options)
        options = {"decay": "relative", "criterion": criterion}
        cast.compile(kwm.AdamS(1e-3, 4, **options), "mse", run_eagerly=True)
        cast.fit(x, np.zeros((len(x), 4)), 16, verbose=0)
        return cast.init_report

    return fit


REACH = {
    "quantize": lambda m, x, t: kwm.quantize(m, x, targets=t, verbose=0),
    "wanda": lambda m, x, t: kwm.sparsify(
        m, "2:4", x, criterion="wanda", targets=t, verbose=0
    ),
    "sparsegpt": lambda m, x, t: kwm.sparsify(
        m, "2:4", x, criterion="sparsegpt", targets=t, verbose=0
    ),
    "swaps": lambda m, x, t: kwm.sparsify(
        m, "2:4", x, refine="swaps", targets=t, verbose=0
    ),
    "CAST by inputs": train("wanda", "dense"),
    "CAST pruned by inputs": train("magnitude", "wanda"),
    "CAST pruned, by inputs": train("wanda", "magnitude"),
}


@breadth("name", REACH, 0, 1, 6)
def test_data_that_reach_no_kernel_are_refused(name):
    model, x = Unused(), normal(16, 8)
    model(x)
    randomize(model)
    before = models.weights_of(model)
    with pytest.raises(ValueError, match=r"reach none.*spare/kernel: the data"):
        REACH[name](model, x, model.spare)
    models.assert_same_bits(models.weights_of(model), before)


@one_backend
@pytest.mark.parametrize("name", REACH)
def test_a_kernel_that_no_data_reach_is_named(name):
    model, x = Unused(), normal(16, 8)
    model(x)
    randomize(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = REACH[name](model, x, [model.spare, model.last])
    told = [str(each.message) for each in caught]
    told += [f"{k.path}: {k.note}" for k in getattr(report, "kernels", ())]
    assert any("spare/kernel: the data do not reach it" in x for x in told)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("place", [None, (0, 0), (6, 2)])
def test_weights_are_checked_in_parts(monkeypatch, dtype, place):
    monkeypatch.setattr(walk, "_ENTRIES", 6)
    value = normal(7, 3)
    if place:
        value[place] = np.nan
    variable = keras.Variable(value, dtype=dtype)
    if place is None:
        walk.check_finite([variable])
    else:
        with pytest.raises(ValueError, match=variable.path):
            walk.check_finite([variable])


@one_backend
def test_rows_held_out_are_measured_on_first_use():
    """They take memory only after the factor of the others."""
    model = randomize(models.mlp(8, 12, 4))
    kernel, bias, *_ = weights_of(model)
    fit, held = normal(6, 8), normal(3, 8, seed=1)
    expected, found = [], []
    for rows in (fit, held):
        expected.append([rows, np.maximum(rows @ kernel + bias, 0)])
    expected[0] = [x.T @ x / len(x) for x in expected[0]]

    def visit(group, moments, note):
        assert "held" not in vars(moments)
        found.append([numpy(x[0]) for x in (moments.fit, moments.held)])
        assert moments.rows == 6

    targets = list(kwm.find_targets(model))
    walk.Walk(model, targets, [(fit, None)], visit, held=[(held, None)])()
    for pair, own in zip(found, zip(*expected, strict=True), strict=True):
        for a, b in zip(pair, own, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["plain", "padded", "stack", "none held"])
def test_errors_of_candidates(case):
    """Those of the outputs, on positions that count."""
    stacks = 3 if case == "stack" else 1
    layer = keras.layers.Dense(4)
    if stacks == 3:
        layer = keras.layers.Conv1D(6, 1, groups=3)
    model = randomize(sequential((5, 12), layer))
    (target,) = kwm.find_targets(model)
    fit, held = normal(8, 5, 12), normal(2, 5, 12, seed=1)
    weights = np.ones((2, 5))
    if case == "padded":
        weights[:, 3:] = 0
        held[:, 3:] = np.nan
    seen = []

    def visit(group, moments, note):
        axes = target.contraction_axes, target.stack_axes
        before = numpy(to_stack(target.variable, *axes, stacks))
        candidates = [before, 0 * before, np.round(before, 1)]
        seen.append((before, candidates, moments.errors(before, candidates)))

    pairs = [] if case == "none held" else [(held, weights)]
    walk.Walk(model, [target], [(fit, None)], visit, held=pairs)()
    ((before, candidates, errors),) = seen
    rows = held[:, :3] if case == "padded" else held if pairs else fit
    x = rows.reshape(-1, stacks, 12 // stacks).transpose(1, 0, 2)
    x = x.astype("float64")
    whole = np.square(x @ before).sum()
    expected = [np.square(x @ (w - before)).sum() / whole for w in candidates]
    np.testing.assert_allclose(errors, expected, rtol=1e-4, atol=1e-7)


@one_backend
def test_rows_held_out_must_be_finite():
    model = randomize(models.mlp(8, 4))
    before, x = weights_of(model), normal(64, 8)
    # Every eighth row is held out.
    x[7] = np.nan
    with pytest.raises(ValueError, match=r"finite activations.*kernel"):
        kwm.sparsify(model, "2:4", x, criterion="sparsegpt", verbose=0)
    models.assert_same_bits(weights_of(model), before)
