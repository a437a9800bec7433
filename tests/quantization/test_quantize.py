import json

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods import native
from keras_weightmods.calibration import block_reconstruction
from keras_weightmods.core import seam
from keras_weightmods.ops.rounding import Grid
from keras_weightmods.quantization import quantize as module
from keras_weightmods.quantization.grid_weights import GridWeights
from tests import models, references
from tests.backends import breadth
from tests.models import (
    assert_same,
    gradients,
    make_sparse,
    normal,
    numpy,
    weights_of,
)

one_backend = pytest.mark.one_backend


def make_mlp(dtype=None):
    layers = (
        keras.layers.Dense(24, activation="relu", dtype=dtype),
        keras.layers.LayerNormalization(dtype=dtype),
        keras.layers.Dense(8, dtype=dtype),
    )
    return make_sparse(models.randomize(models.sequential((72,), *layers)))


def data(rows=256, size=72):
    mix = normal(size, size, seed=2) * np.linspace(0.1, 2, size)
    return (normal(rows, size, seed=1) @ mix).astype("float32")


def quantize(model, x, **options):
    options = {"refine": None, "verbose": 0, **options}
    return kwm.quantize(model, x, **options)


def kernels_of(model):
    return [numpy(target.variable) for target in kwm.find_targets(model)]


@one_backend
def test_each_kernel_for_the_inputs_that_the_rounded_ones_give():
    model, x = make_mlp(), data()
    before = kernels_of(model)
    report = quantize(model, x, batch_size=16)
    after = kernels_of(model)
    _, x = models.split(x)
    inputs = [x, numpy(model.layers[1](model.layers[0](x)))]
    for w, new, x, row in zip(before, after, inputs, report.kernels):
        assert references.is_on_grid(new, 4, 64)
        np.testing.assert_array_equal(new[w == 0], 0)
        assert row.error < 0.9 * row.nearest
        h = x.astype("float64").T @ x / len(x)
        change = new - w
        error = np.sum(change * (h @ change)) / np.sum(w * (h @ w))
        assert row.error == pytest.approx(error, rel=1e-2)
    with pytest.warns(UserWarning, match="scale for each 64 inputs.*=32"):
        quantize(make_mlp(), data(), group_size=32)
    saved = json.loads(json.dumps(report.to_dict()))
    assert (saved["bits"], saved["kernels"][0]["shape"]) == (4, [72, 24])
    for text in ("4 bits, a scale for each 64 inputs", "to nearest"):
        assert text in str(report)
    packed = kwm.pack(model)
    assert [w.pattern for w in packed.weights] == ["2:4"] * 2
    assert [w.rounding_error for w in packed.weights] == [0, 0]
    kwm.unpack(model)
    assert_same(kernels_of(model), after)


@one_backend
def test_a_dense_model_and_one_of_another_pattern():
    model, x = models.randomize(models.mlp(72, 24, 6)), data()
    before = kernels_of(model)
    report = quantize(model, x, bits="int4")
    assert not report.skipped
    for w, row, after in zip(before, report.kernels, kernels_of(model)):
        assert row.error < 0.9 * row.nearest < 0.01
        assert references.is_on_grid(after, 4, 64)
        assert not np.array_equal(after, w)
    make_sparse(model, "1:4")
    quantize(model, x)
    kwm.assert_sparse(model, "1:4", targets=kwm.find_targets(model)[:1])


@one_backend
@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_pack_finds_what_has_other_bits(bits):
    model = models.randomize(models.mlp(72, 24, 6))
    report = quantize(model, data(), bits=f"int{bits}")
    assert report.bits == bits
    after = kernels_of(model)
    assert all(references.is_on_grid(w, bits, 64) for w in after)
    weights = kwm.pack(model).weights
    assert {w.dtype for w in weights} == {f"int{bits}"}
    assert [w.rounding_error for w in weights] == [0, 0]
    kwm.unpack(model)
    assert_same(kernels_of(model), after)


@one_backend
def test_never_worse_than_rounding_to_nearest_on_rows_held_out(monkeypatch):
    """A kernel that too few rows are fitted to, and a model that is spoilt."""
    x = normal(40, 72)
    model = models.randomize(models.mlp(72, 8, 4))
    before = kernels_of(model)
    with pytest.warns(UserWarning, match="35 for 72 inputs"):
        report = quantize(model, x)
    kernel = report.kernels[0]
    assert kernel.error == kernel.nearest
    assert "to nearest" in kernel.note
    expected = references.nearest(before[0], 4)
    np.testing.assert_allclose(kernels_of(model)[0], expected, atol=1e-6)
    _, held = models.split(x.astype("float64"))
    change = held @ (expected - before[0])
    error = np.sum(change**2) / np.sum((held @ before[0]) ** 2)
    assert kernel.error == pytest.approx(error, rel=1e-3)

    def spoil(operation, targets, *args, **kwargs):
        for target in targets:
            target.variable.assign(-target.variable.value)

    monkeypatch.setattr(module, "train_block", spoil)
    model = models.randomize(models.mlp(72, 8, 4))
    with pytest.warns(UserWarning, match="All was rounded to nearest"):
        report = quantize(model, data(), refine="blocks")
    for w, after in zip(before, kernels_of(model)):
        np.testing.assert_allclose(after, references.nearest(w, 4), atol=1e-6)
    assert report.held_out[0] == report.held_out[1]
    assert "All was rounded to nearest" in str(report)
    assert not report.blocks
    assert [w.rounding_error for w in kwm.pack(model).weights] == [0, 0]


@breadth(
    ("equation", "output", "shape"),
    [
        ("btd,dhk->bthk", (3, 2, 9), (3, 72)),
        ("bquh,uhm->bqm", (3, 6), (3, 2, 36)),
        # A stack of kernels, each with inputs of its own.
        ("bei,eio->beo", (2, 5), (2, 72)),
    ],
)
def test_kernels_of_any_shape_and_their_blocks(equation, output, shape):
    layer = keras.layers.EinsumDense(equation, output)
    model = make_sparse(models.randomize(models.sequential(shape, layer)))
    (before,) = kernels_of(model)
    x = data(1024, int(np.prod(shape))).reshape(-1, *shape)
    report = quantize(model, x, refine="blocks", epochs=1)
    (after,), (target,) = kernels_of(model), kwm.find_targets(model)
    np.testing.assert_array_equal(after[before == 0], 0)
    order = [*target.stack_axes, *target.contraction_axes, *target.output_axes]
    stacks = 2 if target.stack_axes else 1
    for kernel in np.transpose(after, order).reshape(stacks, 72, -1):
        assert references.is_on_grid(kernel, 4, 64)
    assert report.kernels[0].error < report.kernels[0].nearest
    (block,) = report.blocks
    assert block.after <= block.before


@one_backend
def test_no_gradients_are_kept(monkeypatch):
    """On torch they took 92 bytes for each weight of a head."""
    made = []

    def round_kept(*arguments):
        made.append(rounded(*arguments))
        return made[-1]

    rounded = module.round_kept
    monkeypatch.setattr(module, "round_kept", round_kept)
    kwm.quantize(make_mlp(), data(), refine=None, verbose=0)
    assert made
    assert not any(x.values.requires_grad for x in made)


@one_backend
def test_blocks_of_a_language_model():
    """With two bits; what does not gain is left as it was rounded."""
    llama = models.randomize(models.causal_lm("llama"), scale=0.2)
    ids = np.random.default_rng(0).integers(2, 16, size=(32, 12))
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    before, targets = weights_of(make_sparse(llama)), kwm.find_targets(llama)
    variables = [(id(v), v.trainable) for v in llama.variables]
    errors = []
    options = {"bits": 2, "refine": "blocks", "head": False, "batch_size": 16}
    for rate, epochs in ((1e-3, 10), (1.0, 1)):
        llama.set_weights(before)
        kept = kernels_of(llama)
        report = quantize(
            llama, x, epochs=epochs, learning_rate=rate, **options
        )
        assert [(id(v), v.trainable) for v in llama.variables] == variables
        assert not any(v.constraint for v in llama.variables)
        for target, w, after in zip(targets, kept, kernels_of(llama)):
            np.testing.assert_array_equal(after[w == 0], 0)
            axes = *target.contraction_axes, *target.output_axes
            matrix = np.transpose(after, axes)
            matrix = matrix.reshape(target.contraction_size, -1)
            assert references.is_on_grid(matrix, 2, 64)
            assert (after != w).any()
        for variable, w in zip(llama.weights, before):
            if "kernel" not in variable.name:
                np.testing.assert_array_equal(numpy(variable), w)
        (block,) = report.blocks
        assert block.kernels == len(report.kernels) == len(targets)
        errors.append((block.before, block.after))
    first, second = errors
    assert first[1] < 0.95 * first[0]
    assert second[1] == second[0] == pytest.approx(first[0], rel=1e-2)


@one_backend
def test_kernels_are_fitted_to_the_first_positions_of_texts(monkeypatch):
    llama = models.causal_lm("llama")
    ids = np.zeros((32, 12), "int32")
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    found = []

    def change_kernels(model, kernels, batches, *rest):
        for part in (batches, rest[3]):
            found.append(sum(len(x["token_ids"]) for x, _ in part))
        return []

    monkeypatch.setattr(module, "change_kernels", change_kernels)
    for positions in (96, 10_000):
        monkeypatch.setattr(module, "_POSITIONS", positions)
        quantize(llama, x, batch_size=4)
    assert found == [7, 4, 28, 4]


@breadth("compiled", [True, False])
@breadth("dtype", ["float32", "bfloat16"])
def test_straight_through(dtype, compiled, monkeypatch):
    """The forward pass rounds; the gradients pass, but for what is clipped."""
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    model = make_sparse(models.sequential((6,), keras.layers.Dense(3)), "1:2")
    (target,) = kwm.find_targets(model)
    w = numpy(target.variable.value).copy()
    scales = np.full((1, 2, 3), 0.0625, "float32")
    item = GridWeights(
        target,
        lambda variable: keras.ops.convert_to_tensor(w),
        keras.ops.convert_to_tensor(scales),
        Grid(4, 4),
    )
    seam.attach(model, [item])
    stored = numpy(keras.ops.cast(1.7 * w, dtype)).astype("float32")
    integers = np.clip(np.rint(stored / 0.0625), -8, 7)
    outer = keras.ops.convert_to_tensor(normal(6, 3, seed=3))
    (gradient,) = gradients(
        lambda v: keras.ops.sum(
            item.effective(keras.ops.cast(v, dtype)) * outer
        ),
        stored,
    )
    rtol = 1e-5 if dtype == "float32" else 2**-8
    inside = (stored / 0.0625 >= -8) & (stored / 0.0625 <= 7)
    assert not inside.all()
    np.testing.assert_allclose(gradient, numpy(outer) * inside, rtol=rtol)
    np.testing.assert_allclose(
        numpy(item.effective(stored)), integers * 0.0625, rtol=1e-6
    )
    seam.fold(model, GridWeights)
    assert references.is_on_grid(numpy(target.variable), 4, 4)


@one_backend
def test_without_data_the_model_writes_them(monkeypatch):
    """A string that names a type is no text."""
    monkeypatch.setattr(module, "_ROWS", 4)
    preprocessor = models.gpt2_preprocessor(12)
    model = models.randomize(models.causal_lm("gpt2", preprocessor), scale=0.2)
    sampler, preprocessor = model.sampler, model.preprocessor
    report = kwm.quantize(model, "int3", epochs=1, verbose=0)
    assert report.bits == 3
    assert report.kernels[0].path.endswith("token_embedding/embeddings")
    assert all(k.error is not None for k in report.kernels)
    assert len(report.blocks) == model.backbone.num_layers
    assert model.sampler is sampler
    assert model.preprocessor is preprocessor


@one_backend
def test_a_model_without_a_graph_and_what_no_data_reach():
    class Unused(models.Subclassed):
        def __init__(self):
            super().__init__(16)
            self.spare = keras.layers.Dense(8)
            self.spare.build((None, 16))

    model = Unused()
    model(normal(2, 16))
    make_sparse(model)
    report = kwm.quantize(model, data(128, 16), verbose=0)
    assert not report.blocks
    assert "Without blocks and scales, which take the graph" in str(report)
    (spare,) = [k for k in report.kernels if k.note]
    assert spare.error is None
    assert "do not reach" in spare.note
    assert references.is_on_grid(numpy(model.spare.kernel), 4, 64)


def test_low_precision(capsys):
    """A scale has fewer bits where the kernel's type has."""
    model = make_mlp("bfloat16")
    before = kernels_of(model)
    refine = ("blocks", "scales")
    quantize(model, data(), verbose=1, refine=refine, epochs=1)
    for w, after in zip(before, kernels_of(model)):
        assert references.is_on_grid(after, 4, 64)
        np.testing.assert_array_equal(after[w == 0], 0)
    shown = capsys.readouterr().out
    assert "0/2" in shown
    assert "s/kernel" in shown


@one_backend
def test_wrong_arguments_and_errors_leave_the_model_alone(monkeypatch):
    """More wrong values are in tests/faults/wrong_calls.py."""
    model = make_mlp()
    before, cls = weights_of(model), type(model.layers[0])
    for options, message in (
        ({"bits": "int8"}, r'pack\(model, "int8"\)'),
        ({"bits": 7}, "bits"),
        ({"group_size": "64"}, "group_size"),
        ({"group_size": 0}, "group_size"),
        ({"head": 1}, "head"),
        ({"refine": "swaps"}, "refine"),
        ({"data": "int8"}, r'pack\(model, "int8"\)'),
        ({"data": None}, "CausalLM"),
        ({"data": data() * np.nan}, "finite"),
        ({"refine": "blocks", "learning_rate": 1e30}, "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            kwm.quantize(model, **{"data": data(), "verbose": 0, **options})
        assert_same(weights_of(model), before)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(block_reconstruction, "relative_error", fail)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, data(), refine="blocks")
    assert_same(weights_of(model), before)
    assert type(model.layers[0]) is cls
    assert not any(v.constraint for v in model.variables)
