import json

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.calibration import block_reconstruction
from keras_weightmods.core import seam
from keras_weightmods.ops.rounding import Grid
from keras_weightmods.quantization import quantize as module
from keras_weightmods.quantization.grid_weights import GridWeights
from tests import models, references
from tests.models import (
    assert_same,
    gradients,
    make_sparse,
    normal,
    numpy,
    weights_of,
)


def make_mlp(size=72):
    layers = (
        keras.layers.Dense(24, activation="relu"),
        keras.layers.LayerNormalization(),
        keras.layers.Dense(8),
    )
    return make_sparse(models.randomize(models.sequential((size,), *layers)))


def data(rows=64, size=72, seed=1):
    mix = normal(size, size, seed=2) * np.linspace(0.1, 2, size)
    return (normal(rows, size, seed=seed) @ mix).astype("float32")


def quantize(model, x, **options):
    options = {"refine": None, "verbose": 0, **options}
    return kwm.quantize(model, x, **options)


def second_moment(x):
    x = x.astype("float64")
    h = x.T @ x / len(x)
    return h + 0.01 * np.mean(np.diag(h)) * np.eye(len(h))


def test_each_kernel_for_the_inputs_that_the_rounded_ones_give():
    model, x = make_mlp(), data()
    layers = [model.layers[0], model.layers[2]]
    before = [numpy(layer.kernel).copy() for layer in layers]
    report = quantize(model, x, batch_size=16)
    inputs = [x, numpy(model.layers[1](model.layers[0](x)))]
    for w, layer, h, row in zip(
        before, layers, map(second_moment, inputs), report.kernels
    ):
        after = numpy(layer.kernel)
        assert references.is_on_grid(after, 4, 64)
        np.testing.assert_array_equal(after[w == 0], 0)
        assert row.error < 0.8 * row.nearest
        plain = h - 0.01 / 1.01 * np.mean(np.diag(h)) * np.eye(len(h))
        change, whole = after - w, np.sum(w * (plain @ w))
        error = np.sum(change * (plain @ change)) / whole
        assert row.error == pytest.approx(error, rel=1e-2)
        # It is where descending ends, or near.
        scales = np.array(
            [
                [largest_scale(group[:, unit]) for unit in range(w.shape[1])]
                for group in np.split(after, range(64, len(w), 64))
            ]
        )
        again, _ = references.descend(w, after, scales, h, 4, 64)
        assert cost(w, again, h) > 0.95 * cost(w, after, h)


def cost(w, after, h):
    return np.sum((w - after) * (h @ (w - after)))


def largest_scale(group):
    """The largest scale of which all of a group are multiples."""
    if not group.any():
        return 1.0
    for q in range(1, 9):
        scale = np.abs(group).max() / q
        if (np.rint(group / scale) * scale == group).all():
            return scale
    raise AssertionError


def test_packing_stores_it_without_loss():
    model = make_mlp()
    quantize(model, data())
    for target in kwm.find_targets(model):
        kernel = numpy(target.variable)
        packed = kwm.ops.pack_kernel(kernel, "int4")
        np.testing.assert_array_equal(kwm.ops.unpack_kernel(packed), kernel)


def test_a_model_that_is_dense_or_dense_in_part():
    model, x = models.randomize(models.mlp(72, 24, 6)), data()
    before = [numpy(t.variable).copy() for t in kwm.find_targets(model)]
    report = quantize(model, x)
    assert not report.skipped
    for w, row, target in zip(before, report.kernels, kwm.find_targets(model)):
        assert row.error < 0.8 * row.nearest < 0.01
        after = numpy(target.variable)
        assert references.is_on_grid(after, 4, 64)
        assert not np.array_equal(after, w)

    kernel = model.layers[0].kernel
    kernel.assign(kwm.ops.nm_project(kernel.value, "2:4"))
    quantize(model, x)
    packed = kwm.pack(model)
    assert [w.pattern for w in packed.weights] == ["2:4", None]
    assert [w.rounding_error for w in packed.weights] == [0, 0]


EINSUMS = [
    ("btd,dhk->bthk", (3, 2, 9), (3, 72)),
    ("bquh,uhm->bqm", (3, 6), (3, 2, 36)),
    # A stack of kernels, each with inputs of its own.
    ("bei,eio->beo", (2, 5), (2, 72)),
]


@pytest.mark.parametrize(("equation", "output", "shape"), EINSUMS)
def test_kernels_of_any_shape(equation, output, shape):
    layer = keras.layers.EinsumDense(equation, output)
    model = make_sparse(models.randomize(models.sequential(shape, layer)))
    before = numpy(layer.kernel).copy()
    x = normal(40, *shape)
    report = quantize(model, x, refine="blocks", epochs=1)
    (target,) = kwm.find_targets(model)
    order = [*target.stack_axes, *target.contraction_axes, *target.output_axes]
    after = numpy(layer.kernel)
    np.testing.assert_array_equal(after[before == 0], 0)
    stacks = 2 if target.stack_axes else 1
    for kernel in np.transpose(after, order).reshape(stacks, 72, -1):
        assert references.is_on_grid(kernel, 4, 64)
    assert report.kernels[0].error < report.kernels[0].nearest


def test_a_language_model():
    model = models.randomize(models.causal_lm("llama"), scale=0.2)
    make_sparse(model)
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 16, size=(8, 12))
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    before = {t.key: numpy(t.variable).copy() for t in kwm.find_targets(model)}
    others = [v for v in model.variables if "kernel" not in v.name]
    kept = [numpy(v.value).copy() for v in others]
    variables = [id(v) for v in model.variables]
    flags = [v.trainable for v in model.variables]
    options = {"batch_size": 4, "epochs": 2, "head": False}
    report = quantize(model, inputs, refine="blocks", **options)
    assert variables == [id(v) for v in model.variables]
    assert flags == [v.trainable for v in model.variables]
    assert not any(v.constraint for v in model.variables)
    for target in kwm.find_targets(model):
        w, after = before[target.key], numpy(target.variable)
        np.testing.assert_array_equal(after[w == 0], 0)
        contracted = target.contraction_axes, target.output_axes
        order = [*contracted[0], *contracted[1]]
        matrix = np.transpose(after, order).reshape(target.contraction_size, -1)
        assert references.is_on_grid(matrix, 4, 64)
        assert (after != w).any()
    for variable, value in zip(others, kept):
        np.testing.assert_array_equal(numpy(variable.value), value)
    kwm.assert_sparse(model)
    assert len(report.kernels) == len(before)
    assert len(report.blocks) == model.backbone.num_layers
    assert all(b.after <= b.before for b in report.blocks)
    assert sum(b.kernels for b in report.blocks) == len(before)


def test_training_a_block_gains():
    """With three bits; what does not gain is left as it was rounded."""
    errors = {}
    model = models.randomize(models.causal_lm("llama"), scale=0.2)
    make_sparse(model)
    tokens = np.random.default_rng(0).integers(2, 16, size=(64, 12))
    x = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    before = weights_of(model)
    for rate, epochs in ((1e-3, 10), (1.0, 1)):
        model.set_weights(before)
        report = quantize(
            model,
            x,
            bits=3,
            refine="blocks",
            batch_size=16,
            epochs=epochs,
            learning_rate=rate,
        )
        errors[rate] = [(b.before, b.after) for b in report.blocks]
    (first,), (second,) = errors.values()
    assert first[1] < 0.95 * first[0]
    assert second[1] == second[0] == pytest.approx(first[0], rel=1e-2)
    assert "Blocks, reconstructed" in str(report)


def test_straight_through():
    """The forward pass rounds; the gradients pass, but for what is clipped."""
    model = make_sparse(models.sequential((6,), keras.layers.Dense(3)), "1:2")
    (target,) = kwm.find_targets(model)
    w = numpy(target.variable.value).copy()
    scales = np.full((1, 2, 3), 0.0625, "float32")
    item = GridWeights(
        target,
        *map(keras.ops.convert_to_tensor, (w[None], w[None], scales)),
        Grid(4, 4),
    )
    seam.attach(model, [item])
    stored = 1.7 * w
    integers = np.clip(np.rint(stored / 0.0625), -8, 7)
    outer = keras.ops.convert_to_tensor(normal(6, 3, seed=3))
    (gradient,) = gradients(
        lambda v: keras.ops.sum(item.effective(v) * outer), stored
    )
    inside = (stored / 0.0625 >= -8) & (stored / 0.0625 <= 7)
    assert not inside.all()
    np.testing.assert_allclose(gradient, numpy(outer) * inside, rtol=1e-5)
    np.testing.assert_allclose(
        numpy(item.effective(stored)), integers * 0.0625, rtol=1e-6
    )
    seam.fold(model, GridWeights)
    assert references.is_on_grid(numpy(target.variable), 4, 4)


def test_other_patterns_stay():
    model = make_sparse(models.randomize(models.mlp(72, 24, 8)), "1:4")
    quantize(model, data())
    kwm.assert_sparse(model, "1:4")


def language_model(**options):
    preprocessor = models.gpt2_preprocessor(12, **options)
    return models.randomize(models.causal_lm("gpt2", preprocessor), scale=0.2)


@pytest.mark.one_backend
@pytest.mark.parametrize("arguments", [(), ("int4",), (None, "int4")])
def test_without_data_the_model_writes_them(arguments, monkeypatch):
    """A string that names a type is no text."""
    monkeypatch.setattr(module, "_ROWS", 4)
    model = language_model()
    sampler, preprocessor = model.sampler, model.preprocessor
    report = kwm.quantize(model, *arguments, epochs=1, verbose=0)
    assert report.bits == 4
    assert report.kernels[0].path.endswith("token_embedding/embeddings")
    assert all(k.error is not None for k in report.kernels)
    assert len(report.blocks) == model.backbone.num_layers
    assert model.sampler is sampler
    assert model.preprocessor is preprocessor


@pytest.mark.one_backend
def test_a_model_without_a_graph_is_rounded_and_says_so():
    model = models.Subclassed(16)
    model(normal(2, 16))
    report = kwm.quantize(model, normal(32, 16), verbose=0)
    assert not report.blocks
    assert "Blocks were not trained" in str(report)


@pytest.mark.one_backend
def test_the_time_that_is_left_is_shown(capsys):
    quantize(make_mlp(), data(), verbose=1)
    shown = capsys.readouterr().out
    assert "0/2" in shown
    assert "s/kernel" in shown


def test_unreached_kernels_are_rounded_to_nearest():
    model = models.Subclassed(16)
    model(normal(2, 16))
    make_sparse(model)

    class Unused(keras.Model):
        def __init__(self):
            super().__init__()
            self.model, self.spare = model, keras.layers.Dense(8)
            self.spare.build((None, 16))

        def call(self, x):
            return self.model(x)

    whole = Unused()
    whole(normal(2, 16))
    make_sparse(whole)
    report = quantize(whole, normal(32, 16))
    (spare,) = [k for k in report.kernels if k.note]
    assert spare.error is None
    assert "do not reach" in spare.note
    assert references.is_on_grid(numpy(whole.spare.kernel), 4, 64)


def test_low_precision():
    """A scale has fewer bits where the kernel's type has."""
    keras.config.set_dtype_policy("bfloat16")
    try:
        model = make_mlp()
    finally:
        keras.config.set_dtype_policy("float32")
    before = numpy(model.layers[0].kernel).astype("float32")
    quantize(model, data())
    after = numpy(model.layers[0].kernel).astype("float32")
    assert references.is_on_grid(after, 4, 64)
    np.testing.assert_array_equal(after[before == 0], 0)


def test_the_report():
    model = make_mlp()
    report = quantize(model, data())
    saved = json.loads(json.dumps(report.to_dict()))
    assert saved["kernels"][0]["shape"] == [72, 24]
    assert saved["bits"] == 4
    assert "4 bits, a scale for each 64 inputs" in str(report)
    assert "to nearest" in str(report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"bits": "int8"}, r'pack\(model, "int8"\)'),
        ({"data": "int8"}, r'pack\(model, "int8"\)'),
        ({"data": "float16"}, "bits"),
        ({"head": 1}, "head"),
        ({"refine": "swaps"}, "refine"),
        ({"damping": 0}, "damping"),
        ({"epochs": 0}, "epochs"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"batch_size": 0}, "batch_size"),
        ({"data": None}, "CausalLM"),
        ({"data": data() * np.nan}, "finite"),
        ({"refine": "blocks", "learning_rate": 1e30}, "finite"),
    ],
)
def test_wrong_arguments_leave_the_model_alone(options, message):
    model = make_mlp()
    before = weights_of(model)
    options = {"data": data(), "verbose": 0, **options}
    with pytest.raises(ValueError, match=message):
        kwm.quantize(model, **options)
    assert_same(weights_of(model), before)


def test_an_error_on_the_way_leaves_the_model_alone(monkeypatch):
    model = make_mlp()
    before, cls = weights_of(model), type(model.layers[0])

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(block_reconstruction, "_relative_error", fail)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, data(), refine="blocks")
    assert_same(weights_of(model), before)
    assert type(model.layers[0]) is cls
    assert not any(v.constraint for v in model.variables)
