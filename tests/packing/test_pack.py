import gc
import importlib
import math
import warnings
import weakref

import keras
import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import keras_weightmods as kwm
from keras_weightmods import backend as backends
from keras_weightmods import find_targets, native, pack, unpack
from keras_weightmods.ops import nm_project
from keras_weightmods.ops.sparse_matmul import reason_for_dense
from keras_weightmods.utils.report import size_text
from tests import models, references
from tests.backends import breadth
from tests.models import make_sparse, mlp, normal, numpy, outputs, sequential

one_backend = pytest.mark.one_backend
needs_native = pytest.mark.skipif(
    bool(reason_for_dense()), reason="no compiled kernels here: dense"
)


def einsum_model(shape, *args):
    return sequential(shape, keras.layers.EinsumDense(*args))


MODELS = {
    "dense": lambda: mlp(16, 24, 4),
    "middle": lambda: einsum_model(
        (5, 8), "bqm,umh->bquh", (None, 2, 3), "tanh", "h"
    ),
    "axes apart": lambda: einsum_model(
        (5, 2, 4), "bquh,umh->bqm", (None, 3), "tanh"
    ),
}


def inputs_for(model, batch=2):
    return normal(batch, *model.input_shape[1:], seed=1)


def state(model):
    """Everything that must be unchanged after an error."""
    layers = model._flatten_layers()
    return (
        [type(layer) for layer in layers],
        [(id(v), v.path, v.trainable) for v in model.weights],
        [numpy(v).tobytes() for v in model.weights],
    )


# Arguments of `pack`, and how far inputs in int8 may take an output.
ROUNDED = [
    ({"dtype": "bfloat16"}, 2e-6),
    ({"dtype": "int8", "activations": "float32"}, 2e-6),
    ({"dtype": "int8"}, 0.03),
    ({"dtype": "int4", "activations": "float32"}, 2e-6),
    ({"dtype": "int4"}, 0.03),
]


def rounded(kernel, dtype, axes):
    """What packing makes of a kernel, in NumPy."""
    if dtype == "bfloat16":
        return kernel.astype(ml_dtypes.bfloat16).astype("float32")
    if dtype not in ("bfloat16", "int8"):
        # In the tiny models, a column is one group.
        moved = np.moveaxis(kernel, axes, range(len(axes)))
        columns = moved.reshape(-1, math.prod(moved.shape[len(axes) :]))
        assert len(columns) <= 64
        for column in columns.T:
            steps, scale = references.round_int4(column, int(dtype[3:]))
            column[:] = steps * np.float64(scale)
        moved = columns.reshape(moved.shape)
        return np.moveaxis(moved, range(len(axes)), axes)
    scale = np.abs(kernel).max(axis=axes, keepdims=True) / np.float32(127)
    return np.rint(kernel / scale).astype("float32") * scale


def make_for(name, pattern, seed=0):
    """One of `MODELS`; 16:32 in groups of 8."""
    keras.utils.set_random_seed(seed)
    model = MODELS[name]()
    if pattern is None:
        return model
    return make_sparse(model, pattern.replace("16:32", "4:8"), seed=seed)


# The pattern of the kernels, arguments of `pack`, and a tolerance.
CASES = [("2:4", *case) for case in ROUNDED] + [
    (None, {"dtype": f"int{bits}"}, 0.03) for bits in (8, 4, 3, 2, 5, 6)
]
CASES += [("16:32", {"dtype": f"int{bits}"}, 0.03) for bits in (8, 4)]
pytestmark = pytest.mark.filterwarnings("ignore:`pack` rounded")


@breadth(
    ("name", "pattern", "arguments", "tolerance"),
    [("dense", *case) for case in CASES]
    + [("middle", *CASES[i]) for i in (1, 5)]
    + [("axes apart", *CASES[i]) for i in (4, 6, 12)],
    *(2, 6, 7, 12),
)
def test_unpack_gives_the_rounded_kernel(name, pattern, arguments, tolerance):
    model = make_for(name, pattern)
    targets = find_targets(model)
    before = [numpy(t.variable) for t in targets]
    dtype = arguments["dtype"]
    expected = [
        rounded(kernel.copy(), dtype, t.contraction_axes)
        for kernel, t in zip(before, targets)
    ]
    report = pack(model, **arguments)
    assert {w.dtype for w in report.weights} == {dtype}
    assert {w.pattern for w in report.weights} == {pattern}
    for weight, kernel, kept in zip(report.weights, before, expected):
        error = np.linalg.norm(kept - kernel) / np.linalg.norm(kernel)
        assert weight.rounding_error == pytest.approx(error, rel=1e-4)
    x = inputs_for(model)
    packed = outputs(model, x)
    unpack(model)
    models.assert_same([numpy(t.variable) for t in targets], expected)
    found = outputs(model, x)
    assert_allclose(found, packed, atol=tolerance)
    # Inputs in int8 by default.
    is_float = arguments.get("activations") == "float32" or dtype == "bfloat16"
    assert np.allclose(found, packed, atol=2e-6) == is_float


@one_backend
@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("name", ["middle", "axes apart"])
def test_inputs_are_rounded_along_the_contraction(name, library, monkeypatch):
    if not library:
        leave_out_native(monkeypatch)
        monkeypatch.setattr(native, "warn_dense", lambda reason: None)
    model = make_sparse(MODELS[name]())
    (layer,) = model.layers
    pack(model, dtype="int8")
    x = inputs_for(model)
    flat = x.reshape(*x.shape[:2], -1)
    rounded_x = references.round_activations(flat).reshape(x.shape)
    kernel = numpy(layer.kernel)
    expected = np.einsum(layer.equation, rounded_x, kernel)
    if layer.bias is not None:
        expected += numpy(layer.bias)
    assert_allclose(outputs(model, x), np.tanh(expected), atol=2e-6)


@needs_native
def test_the_dense_kernel_is_gone():
    model = make_sparse(MODELS["dense"]())
    targets = find_targets(model)
    values = [weakref.ref(t.variable._value) for t in targets]
    report = pack(model)
    gc.collect()
    assert [value() for value in values] == [None, None]
    with pytest.raises(ValueError, match=r"replaced by packed.*unpack"):
        numpy(targets[0].variable.value)
    assert all(w.dtype in ("float32", "int32") for w in model.weights)
    totals = report.totals
    assert totals["model_bytes"] == 4 * sum(map(np.size, model.get_weights()))
    assert totals["packed_bytes"] == totals["model_bytes"] - 4 * (24 + 4)
    unpack(model)
    assert numpy(targets[0].variable).shape == (16, 24)


@one_backend
@needs_native
def test_the_report_prints_and_is_json():
    model = mlp(6, 32, 16)
    odd, last = find_targets(model)
    last.variable.assign(nm_project(last.variable, "2:4", 0))
    report = pack(model)
    (row,) = report.weights
    assert row.dense_bytes == 4 * 32 * 16
    assert row.packed_bytes == 4 * 16 * 16 + 4 * 16
    assert report.totals["packed_share"] == row.packed_bytes / row.dense_bytes
    reasons = {skip.path: skip.reason for skip in report.skipped}
    assert "6 is not a multiple of 4" in reasons[odd.path]
    assert report.to_dict()["weights"][0]["shape"] == [32, 16]
    for text in ("0.531", "6 is not", "float32 x float32", "17.00"):
        assert text in str(report)
    unpack(model)
    with pytest.warns(UserWarning, match=r"1 weights to int4.*kwm.quantize"):
        report = pack(model, dtype="int4", targets=[last])
    (row,) = report.weights
    assert row.bits == 8 * row.packed_bytes / (32 * 16) == 3.5
    assert f"{row.rounding_error:.2%}" in str(report)
    assert "int4 x int8" in str(report)
    # What lies on the grid is not rounded.
    unpack(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        report = pack(model, targets=[last])
    (row,) = report.weights
    assert (row.dtype, row.rounding_error) == ("int4", 0)


@one_backend
def test_what_was_rounded_is_packed_without_being_told():
    """Kernels on the grid, 2:4 or not, and others that are 2:4."""
    model = mlp(96, 32, 16, 8)
    quantized, sparse, both = model.layers[:3]
    # By rounding, which leaves them on the grid.
    pack(model, "int4", targets=[quantized, both])
    unpack(model)
    for layer in (sparse, both):
        layer.kernel.assign(nm_project(layer.kernel.value, "2:4"))
    before = model.get_weights()
    report = pack(model)
    kinds = [(w.dtype, w.pattern, w.rounding_error) for w in report.weights]
    assert kinds == [
        ("int4", None, 0),
        ("float32", "2:4", None),
        ("int4", "2:4", 0),
    ]
    unpack(model)
    models.assert_same(model.get_weights(), before)
    # Values that are to be trained are floats.
    report = pack(model, targets=[both], trainable=True)
    assert report.weights[0].dtype == "float32"


@one_backend
@needs_native
@pytest.mark.parametrize(
    ("pattern", "stored"),
    [
        *((p, "2:4") for p in ("1:2", "1:4", "2:4", "2:8")),
        *((p, "16:32") for p in ("3:8", "4:8", "8:16", "16:32")),
        *((p, None) for p in ("3:4", "5:8", "17:32", "16:31")),
    ],
)
def test_patterns_are_found_by_the_zeros(pattern, stored, tmp_path):
    rows = 93 if pattern == "16:31" else 96
    model = make_sparse(mlp(rows, 20), pattern)
    before, x = model.get_weights(), inputs_for(model)
    (row,) = pack(model, "int4").weights
    assert row.pattern == stored
    assert row.bits == pytest.approx((3.25 if stored else 4.25) * 32 / 20, 0.1)
    packed = outputs(model, x)
    kwm.save_model(model, tmp_path / "model")
    loaded = kwm.load_model(tmp_path / "model")
    models.assert_same(outputs(loaded, x), packed)
    unpack(loaded)
    kernel, bias = loaded.get_weights()
    assert not kernel[before[0] == 0].any()
    y = references.round_activations(x) @ kernel.astype("float64") + bias
    assert_allclose(packed, y, rtol=1e-4, atol=1e-5)
    # What lies on the grid is packed without a type.
    (again,) = pack(loaded).weights
    assert (again.dtype, again.pattern) == ("int4", stored)


@one_backend
@needs_native
def test_masks_are_slow_without_avx512(monkeypatch):
    """The form that the warning names has the same values."""
    model = make_sparse(mlp(128, 20), "8:16")
    kwm.quantize(model, normal(256, 128), refine=None, verbose=0)
    before, library = model.get_weights(), native.library()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        if library.kwm_isa() in native.AVX512:
            (row,) = pack(model).weights
            assert (row.dtype, row.pattern) == ("int4", "16:32")
            unpack(model)
        monkeypatch.setattr(library, "kwm_isa", lambda: 1)
        (row,) = pack(model, "int5").weights
        assert (row.pattern, row.rounding_error) == (None, 0)
        unpack(model)
    models.assert_same(model.get_weights(), before)
    text = "1 kernels of pattern 16:32 are packed by masks"
    with pytest.warns(UserWarning, match=text) as told:
        pack(model)
    assert __file__ in {w.filename for w in told if text in str(w.message)}


@one_backend
@needs_native
def test_half_of_the_last_rows_is_a_pattern_too():
    for kept, stored in ((8, "16:32"), (9, None)):
        model = mlp(48, 20)
        kernel = np.zeros((48, 20), "float32")
        kernel[16:32] = kernel[32 : 32 + kept] = normal(kept, 20)[:1] + 1
        model.layers[0].kernel.assign(kernel)
        (row,) = pack(model, "int8").weights
        assert row.pattern == stored


@one_backend
@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_floats_in_a_mask_are_small_in_files_alone(dtype, tmp_path):
    model = make_sparse(mlp(96, 64), "16:32")
    x, before = inputs_for(model), numpy(model.layers[0].kernel)
    with pytest.warns(UserWarning, match=r"1 kernels of pattern 16:32.*'int8'"):
        report = pack(model, None if dtype == "float32" else dtype)
    (row,) = report.weights
    assert (row.pattern, row.dtype) == ("16:32", dtype)
    assert report.totals["packed_share"] == 1
    bits = 17 if dtype == "float32" else 9
    assert report.host_bytes == 96 * 64 * bits // 8
    expected = outputs(model, x)
    kwm.save_model(model, tmp_path / "model")
    loaded = kwm.load_model(tmp_path / "model")
    models.assert_same(outputs(loaded, x), expected)
    unpack(loaded)
    found = numpy(loaded.layers[0].kernel)
    assert_allclose(found, before, rtol=0 if dtype == "float32" else 2**-8)
    assert_array_equal(found == 0, before == 0)
    with pytest.raises(ValueError, match=r"of 2:4 kernels can be trained"):
        pack(loaded, trainable=True)


@one_backend
@needs_native
@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_it_is_packed_in_the_fewest_bits(bits):
    """2:4 kernels in int4, where these are enough."""
    model = mlp(100, 32, 16)
    model.layers[1].kernel.assign(nm_project(model.layers[1].kernel, "2:4"))
    pack(model, f"int{bits}")
    unpack(model)
    before, x = model.get_weights(), inputs_for(model)
    dense, sparse = pack(model).weights
    found = outputs(model, x)
    kind = (f"int{bits}", None) if bits > 4 else ("int4", "2:4")
    assert (dense.dtype, dense.pattern) == (f"int{bits}", None)
    assert (sparse.dtype, sparse.pattern) == kind
    assert dense.rounding_error == sparse.rounding_error == 0
    assert dense.packed_bytes == 128 * 32 * bits // 8 + 2 * 32 * 2
    assert (
        sparse.packed_bytes == (32 * 16 * bits // 8 if bits > 4 else 192) + 32
    )
    unpack(model)
    models.assert_same(model.get_weights(), before)
    kernels, y = before[::2], x
    for kernel, bias in zip(kernels, before[1::2]):
        y = references.round_activations(y) @ kernel.astype("float64") + bias
        y = np.maximum(y, 0) if kernel is kernels[0] else y
    assert_allclose(found, y, rtol=1e-4, atol=1e-5)


@one_backend
@pytest.mark.parametrize("value", ["identity", "zeros"])
def test_a_plain_kernel_is_not_taken_for_a_rounded_one(value):
    """It lies on every grid; int8 inputs would change what it computes."""
    initializer = keras.initializers.get(value)
    dense = keras.layers.Dense(32, kernel_initializer=initializer)
    model = sequential((32,), dense)
    x = normal(8, 32)
    before = outputs(model, x)
    (row,) = pack(model).weights
    assert (row.dtype, row.activations) == ("float32", "float32")
    assert_allclose(outputs(model, x), before, atol=1e-6)


@one_backend
def test_an_inexact_kernel_is_named_and_nothing_changes():
    model = make_sparse(MODELS["dense"]())
    target = find_targets(model)[0]
    # A third nonzero in its first group.
    kernel = numpy(target.variable)
    kernel[np.flatnonzero(kernel[:4, 0] == 0)[0], 0] = 1.0
    target.variable.assign(kernel)
    before = state(model)
    for dtype in (None, "float32", "bfloat16"):
        with pytest.raises(ValueError, match="exactly 2:4") as error:
            pack(model, dtype)
        assert state(model) == before
        for part in (
            f"{target.path} (16, 24): 1 of 96 groups",
            *("kwm.quantize(model, data)", "'int8'", "`targets="),
        ):
            assert dtype or part in str(error.value)
        assert model.layers[1].name not in str(error.value)
    # What is exact can still be packed.
    report = pack(model, targets=find_targets(model)[1:])
    assert [w.shape for w in report.weights] == [(24, 4)]
    assert not any(s.path == target.path for s in report.skipped)


@one_backend
def test_wrong_arguments_change_nothing():
    """More wrong values are in tests/faults/wrong_calls.py."""
    model = make_sparse(MODELS["dense"]())
    infinite = make_sparse(MODELS["dense"]())
    value = numpy(infinite.layers[1].kernel)
    value[tuple(np.argwhere(value)[0])] = np.inf
    infinite.layers[1].kernel.assign(value)
    not_finite = r"finite.*dense.*NaN or infinity"
    for each, arguments, message in (
        (model, {"trainable": True, "dtype": "int4"}, "Only float32 values"),
        (model, {"dtype": "float16"}, r"`dtype`.*Received: dtype='float16'"),
        (model, {"head": "int7"}, r"`head`.*Received: head='int7'"),
        (model, {"head": "int8"}, "no head that can be packed.*skipped: none"),
        (infinite, {"dtype": "int8"}, not_finite),
        (infinite, {"dtype": "int4"}, not_finite),
    ):
        before = state(each)
        with pytest.raises(ValueError, match=message):
            pack(each, **arguments)
        assert state(each) == before
    pack(infinite)
    unpack(infinite)
    assert state(infinite) == before


@one_backend
@needs_native
def test_a_model_may_be_sparse_in_part():
    # The contraction of the last is no multiple of four.
    model = mlp(16, 24, 6, 5)
    before = state(model)
    with pytest.raises(ValueError, match=r"integers alone.*dense_?\d*/kernel"):
        pack(model, "int8", activations="float32")
    assert state(model) == before
    kernel = model.layers[0].kernel
    kernel.assign(nm_project(kernel.value, "2:4"))
    x = inputs_for(model)
    expected = outputs(model, x)
    report = pack(model, "int8")
    kinds = [(w.pattern, w.dtype, w.activations) for w in report.weights]
    dense = (None, "int8", "int8")
    assert kinds == [("2:4", "int8", "int8"), dense, dense]
    assert not report.skipped
    assert_allclose(outputs(model, x), expected, atol=0.03)


@one_backend
@pytest.mark.filterwarnings("ignore:The model .* packed weights")
def test_gradients_flow_to_the_inputs_and_not_to_frozen_values():
    model = make_sparse(mlp(8, 8, 4, activation=None, use_bias=False))
    first, second = find_targets(model)
    w, v = (np.float64(kernel) for kernel in model.get_weights())
    pack(model, targets=[second])
    x = inputs_for(model, batch=8)
    error = 2 * (np.float64(x) @ w @ v - 1) / (8 * 4)
    frozen = numpy(model.layers[1].kernel)
    models.fit_step(model, x, np.ones((8, 4), "float32"))
    expected = w - 0.1 * np.float64(x).T @ error @ v.T
    assert_allclose(numpy(first.variable), expected, rtol=1e-4, atol=1e-5)
    assert_array_equal(numpy(model.layers[1].kernel), frozen)


@breadth("name", ["dense", "axes apart"])
def test_trained_values_take_the_masked_step_of_the_dense_kernel(name):
    model = make_sparse(MODELS[name]())
    weights = model.get_weights()
    x = inputs_for(model, batch=8)
    y = np.ones(model(x).shape, "float32")
    targets = find_targets(model)
    masks = [numpy(t.variable) != 0 for t in targets]
    models.fit_step(model, x, y)
    expected = [numpy(t.variable) for t in targets]

    model.set_weights(weights)
    pack(model, trainable=True)
    values = [v for v in model.trainable_variables if "values" in v.path]
    assert len(values) == len(targets)
    models.fit_step(model, x, y)
    for target, mask, kernel in zip(targets, masks, expected, strict=True):
        trained = numpy(target.layer.kernel)
        assert_allclose(trained, kernel * mask, rtol=1e-4, atol=1e-6)
    trained = outputs(model, x)
    unpack(model)
    assert all(t.variable.trainable for t in targets)
    assert_allclose(outputs(model, x), trained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_fit_that_leaves_packed_weights_alone_is_warned_about(dtype, recwarn):
    def fit(model):
        recwarn.clear()
        model.compile("sgd", "mse")
        model.fit(np.ones((4, 8)), np.ones((4, 4)), verbose=0)
        found = [str(each.message) for each in recwarn]
        return [each for each in found if "packed weights" in each]

    model = make_sparse(mlp())
    pack(model, dtype)
    outputs(model, np.ones((4, 8)))
    (message,) = fit(model)
    assert f"it trains {16 + 4} numbers" in message
    # Once is enough.
    assert not fit(model)
    model = make_sparse(mlp())
    pack(model, dtype)
    model.layers[0].trainable = False
    model.layers[1].enable_lora(2)
    assert not fit(model)


@one_backend
def test_a_regularizer_sees_the_trained_kernel():
    regularizer = keras.regularizers.OrthogonalRegularizer(0.1)
    model = make_sparse(mlp(8, 4, kernel_regularizer=regularizer))
    expected = float(numpy(*model.losses))
    for options in ({"trainable": True}, {}):
        pack(model, **options)
        found = [float(numpy(loss)) for loss in model.losses]
        assert found == pytest.approx([expected] * len(options), rel=1e-5)
        unpack(model)
        assert float(numpy(*model.losses)) == pytest.approx(expected, rel=1e-5)


@one_backend
def test_constraints_other_than_the_pattern_forbid_training():
    layer = keras.layers.Dense(4, kernel_constraint="unit_norm")
    model = make_sparse(sequential((8,), layer))
    before = state(model)
    with pytest.raises(ValueError, match=r"constraint.*UnitNorm"):
        pack(model, trainable=True)
    assert state(model) == before
    layer._kernel.constraint = kwm.SemiStructuredSparse("2:4")
    pack(model, trainable=True)


@one_backend
def test_lora_trains_on_a_packed_base():
    model = make_sparse(MODELS["axes apart"]())
    (layer,) = model.layers
    pack(model)
    layer.enable_lora(2, lora_alpha=3)
    x = inputs_for(model, batch=4)
    before = outputs(model, x)
    frozen = [numpy(v) for v in layer.non_trainable_variables]
    models.fit_step(model, x, np.ones(before.shape, "float32"))
    assert np.abs(outputs(model, x) - before).max() > 1e-4
    models.assert_same([*map(numpy, layer.non_trainable_variables)], frozen)
    # In pure bfloat16, too.
    model = sequential((8,), keras.layers.Dense(8, dtype="bfloat16"))
    pack(make_sparse(model))
    model.layers[0].enable_lora(2)
    assert "bfloat16" in str(model(np.ones((2, 8))).dtype)


@one_backend
def test_a_preset_with_packed_layers_does_not_load(tmp_path):
    model = models.randomize(models.causal_lm("llama"))
    kwm.sparsify(model, verbose=0)
    pack(model)
    folder, backbone = str(tmp_path / "preset"), model.backbone
    backbone.save_to_preset(folder)
    with pytest.raises(ValueError, match="could not be loaded"):
        type(backbone).from_preset(folder)
    unpack(model)
    backbone.save_to_preset(folder)
    loaded = type(backbone).from_preset(folder)
    models.assert_same(loaded.get_weights(), backbone.get_weights())


def leave_out_native(monkeypatch):
    module = importlib.import_module("keras_weightmods.ops.sparse_matmul")
    backend = keras.backend.backend()
    monkeypatch.setitem(module._implementations, backend, module.dense_matmul)
    ours, reason = backends.current().products(), "a test wants it so."
    monkeypatch.setattr(ours, "reason_unavailable", lambda: reason)
    monkeypatch.setattr(native, "is_available", lambda: False)


@one_backend
@needs_native
@pytest.mark.parametrize(
    ("pattern", "arguments"),
    [("2:4", {}), *(case[:2] for case in CASES)],
)
def test_without_the_native_library_kernels_are_held_dense(
    pattern, arguments, tmp_path, monkeypatch
):
    def make(seed):
        model = make_for("axes apart", pattern, seed)
        return model, pack(model, **arguments)

    x = inputs_for(MODELS["axes apart"]())
    check_checkpoints(make, x, tmp_path, monkeypatch)


@one_backend
@needs_native
def test_a_weight_that_is_held_dense_is_saved_as_it_was_set(
    tmp_path, monkeypatch
):
    leave_out_native(monkeypatch)
    monkeypatch.setattr(native, "warn_dense", lambda reason: None)
    model, other = (make_for("dense", "2:4", seed) for seed in (0, 5))
    kernels = [numpy(layer.kernel) for layer in model.layers]
    pack(model)
    pack(other)
    other.set_weights(model.get_weights())
    kwm.save_model(other, tmp_path / "model")
    loaded = kwm.load_model(tmp_path / "model")
    models.assert_same(
        [numpy(layer.kernel) for layer in loaded.layers], kernels
    )
    unpack(other)
    models.assert_same([numpy(layer.kernel) for layer in other.layers], kernels)


def check_checkpoints(make, x, folder, monkeypatch):
    """From a packed model to one held dense, and back to the packed one."""
    paths = [folder / f"{i}.weights.h5" for i in range(2)]
    packed, in_arrays = make(0)
    assert not in_arrays.host_bytes
    packed.save_weights(paths[0])
    expected, before = outputs(packed, x), models.weights_of(packed)
    native.warn_dense.cache_clear()
    with monkeypatch.context() as patch:
        leave_out_native(patch)
        with pytest.warns(UserWarning, match="a test wants it so"):
            held_dense, report = make(5)
        # One warning is enough.
        held_dense.load_weights(paths[0])
        assert report.totals["packed_share"] == 1
        assert report.host_bytes == in_arrays.totals["packed_bytes"]
        assert f"and {size_text(report.host_bytes)} for" in str(report)
        found = outputs(held_dense, x)
        assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        held_dense.save_weights(paths[1])
    native.warn_dense.cache_clear()
    for weight in packed.weights:
        weight.assign(np.zeros(weight.shape))
    packed.load_weights(paths[1])
    models.assert_same(packed.get_weights(), before)
    unpack(packed)
    unpack(held_dense)
    models.assert_same(packed.get_weights(), held_dense.get_weights())
