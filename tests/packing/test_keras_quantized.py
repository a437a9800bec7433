import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops, quantizers
from numpy.testing import assert_allclose, assert_array_equal

from keras_weightmods import find_targets, load_model, pack, save_model, unpack
from keras_weightmods.packing.packed_parameters import PackedParameters
from tests import models, references
from tests.backends import breadth
from tests.models import normal, numpy, outputs, sequential
from tests.packing.test_pack import state

one_backend = pytest.mark.one_backend
pytestmark = pytest.mark.filterwarnings("ignore:Layer .* does not have a")

# A layer, and the axes of its kernel that are contracted.
LAYERS = {
    "dense": (lambda: keras.layers.Dense(9, use_bias=False), (128,), (0,)),
    "middle": (
        lambda: keras.layers.EinsumDense("bqm,muh->bquh", (None, 2, 3)),
        *((5, 128), (0,)),
    ),
    "axes apart": (
        lambda: keras.layers.EinsumDense("bquh,uhm->bqm", (None, 9)),
        *((5, 2, 64), (0, 1)),
    ),
    "units first": (
        lambda: keras.layers.EinsumDense("bqm,umh->bquh", (None, 2, 3)),
        *((5, 128), (1,)),
    ),
}


def int4(block_size):
    return quantizers.Int4QuantizationConfig(block_size=block_size)


def fitted(kind=quantizers.GPTQConfig, **settings):
    return kind(dataset=[np.arange(9)], tokenizer=(), **settings)


# Mode and config, and in what `pack` keeps the integers, if it does.
CASES = {
    "int8": ("int8", None, "int8"),
    "int4": ("int4", int4(-1), "int4"),
    "gptq": ("gptq", fitted(group_size=64), "int4"),
    "gptq 3": ("gptq", fitted(weight_bits=3, group_size=128), "int3"),
    # With zero points off the middle they have a bit more.
    "int4 in 64": ("int4", int4(64), "int5"),
    "gptq 8": ("gptq", fitted(weight_bits=8, group_size=-1), "int8"),
    "int4 in 32": ("int4", int4(32), None),
    "order": ("gptq", fitted(group_size=64, activation_order=True), None),
    "awq": ("awq", fitted(quantizers.AWQConfig, group_size=64), None),
}


def make(name="dense", case="int8"):
    """A layer that Keras has quantized, with its integers and their scales."""
    keras.utils.set_random_seed(0)
    layer, shape, axes = LAYERS[name]
    model = sequential(shape, layer())
    (layer,), (mode, config, _) = model.layers, CASES[case]
    kernel = np.moveaxis(numpy(layer.kernel), axes, range(len(axes)))
    rows = int(np.prod(kernel.shape[: len(axes)]))
    matrix = ops.convert_to_tensor(kernel.reshape(rows, -1))
    if mode == "int8" or case == "int4":
        span = (-127, 127) if mode == "int8" else (-8, 7)
        codes, scale = quantizers.abs_max_quantize(matrix, 0, span)
        model.quantize(mode, config=config)
        codes, scale = numpy(codes), 1 / numpy(scale)
    elif mode == "int4":
        size = config.block_size
        found = quantizers.abs_max_quantize_grouped_with_zero_point(
            matrix, size
        )
        codes, scale, zero = map(numpy, found)
        model.quantize(mode, config=config)
        codes = codes - np.float32(np.repeat(zero, size, 0))
        scale = np.repeat(scale, size, 0)
    else:
        layer.quantize(mode, config=config)
        codes, scale = calibrate(layer, mode, config, rows)
    shape = kernel.shape
    back = range(len(axes)), axes
    return model, *(
        np.moveaxis(
            np.broadcast_to(np.float32(each), matrix.shape).reshape(shape),
            *back,
        )
        for each in (codes, scale)
    )


def calibrate(layer, mode, config, rows):
    """Do what calibration does to a layer, with integers by chance."""
    rng, bits = np.random.default_rng(0), getattr(config, "weight_bits", 4)
    columns, groups = layer.kernel_scale.shape
    codes = rng.integers(1, 2**bits, (columns, rows)).astype("uint8")
    scale = rng.uniform(0.002, 0.02, (columns, groups)).astype("float32")
    zero = np.full((columns, groups), 2 ** (bits - 1), "uint8")
    order = np.arange(rows) * groups // rows
    if getattr(config, "activation_order", False):
        rng.shuffle(order)
    own = np.ones(rows, "float32")
    if mode == "awq":
        own = rng.uniform(0.5, 2, rows).astype("float32")
        layer.awq_scales.assign(own)
    held = codes
    if bits == 4:
        held = ops.convert_to_tensor(codes)
        held, _, _ = quantizers.pack_int4(held, 0, "uint8")
    layer.quantized_kernel.assign(held)
    layer.kernel_scale.assign(scale)
    layer.kernel_zero.assign(zero)
    layer.g_idx.assign(order)
    del layer._kernel
    setattr(layer, f"is_{mode}_calibrated", True)
    integers = codes.astype("float32") - 2 ** (bits - 1)
    return integers.T, (scale[:, order] / own).T


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def kernel_of(layer, shape, axes):
    """What a layer multiplies by: its outputs for unit vectors."""
    rows = int(np.prod([shape[axis] for axis in axes]))
    units = np.eye(rows, dtype="float32")[None]
    if axes == (0, 1):
        units = units.reshape(1, rows, *shape[:2])
    made = ops.convert_to_numpy(layer(units))[0]
    moved = np.moveaxis(np.zeros(shape), axes, range(len(axes))).shape
    return np.moveaxis(made.reshape(moved), range(len(axes)), axes)


@breadth(
    ("name", "case"),
    [("dense", case) for case in CASES]
    + [("middle", case) for case in CASES]
    + [("axes apart", case) for case in CASES]
    + [("units first", "int8")],
    *range(len(CASES)),
    *(len(CASES), 2 * len(CASES)),
)
def test_integers_of_keras_are_kept(name, case):
    model, codes, scale = make(name, case)
    (layer,), (_, shape, axes) = model.layers, LAYERS[name]
    kept = CASES[case][2]
    plain = kernel_of(layer, codes.shape, axes)
    assert_allclose(plain, np.float64(codes) * scale, rtol=2e-6, atol=1e-8)
    x = normal(2, *shape, seed=1)
    flat = x.reshape(*x.shape[: x.ndim - len(axes)], -1)
    inputs = references.round_activations(flat).reshape(x.shape)
    before, quantized = state(model), outputs(model, x)
    if kept is None:
        with pytest.raises(ValueError, match="1 of 1 kernels") as error:
            pack(model)
        assert state(model) == before
        assert_array_equal(outputs(model, x), quantized)
    report = pack(model, None if kept else "int8")
    (row,) = report.weights
    assert (row.dtype, row.integers) == (
        (kept, "kept") if kept else ("int8", "rounded again")
    )
    kernel = numpy(layer.kernel)
    if kept:
        if kept != "int8":
            scale = scale.astype(ml_dtypes.bfloat16).astype("float32")
        assert_array_equal(kernel, codes * scale)
        assert row.rounding_error < (1e-7 if kept == "int8" else 0.002)
    else:
        change = relative(kernel, plain)
        assert row.rounding_error == pytest.approx(change, rel=1e-3)
        assert f"this one by {change:.2%}" in str(error.value)
    equation = getattr(layer, "equation", "bm,mu->bu")
    expected = np.einsum(equation, inputs, np.float64(kernel))
    assert_allclose(outputs(model, x), expected, atol=1e-5)
    # Both round activations, or one of them, and scales or more in bfloat16.
    assert relative(expected, quantized) < 0.02
    unpack(model)
    assert_array_equal(numpy(layer.kernel), kernel)
    assert (layer.quantization_mode, len(layer.weights)) == (None, 1)
    expected = np.einsum(equation, x, kernel)
    assert_allclose(outputs(model, x), expected, atol=1e-5)


def causal_lm(mode, config=None, **sizes):
    """A tiny language model that Keras has quantized, and inputs for it."""
    sizes = {"hidden_dim": 64, "intermediate_dim": 128, **sizes}
    model = models.randomize(models.causal_lm(**sizes), scale=0.2)
    model.quantize(mode, config=config)
    tokens = np.arange(10).reshape(2, 5)
    ones = np.ones_like(tokens)
    return model, {"token_ids": tokens, "padding_mask": ones}


@one_backend
@pytest.mark.parametrize(
    ("mode", "config", "tied", "kept"),
    [
        ("int4", int4(64), True, {"int4", "int5"}),
        ("int4", int4(-1), True, {"int4"}),
        ("int8", None, True, {"int8"}),
        ("int8", None, False, {"int8"}),
    ],
)
def test_language_models(mode, config, tied, kept, tmp_path):
    model, x = causal_lm(mode, config, tie_word_embeddings=tied)
    quantized = outputs(model, x)
    report = pack(model)
    packed = {weight.path.split("/")[-1] for weight in report.weights}
    assert packed - {"reverse_embeddings"} == {"kernel", "embeddings"}
    assert ("reverse_embeddings" in packed, report.skipped) == (not tied, ())
    assert {w.integers for w in report.weights} == {"kept"}
    assert {w.dtype for w in report.weights} <= kept
    assert relative(outputs(model, x), quantized) < 0.03
    assert "kept" in str(report)

    path = tmp_path / "model.safetensors"
    save_model(model, path)
    expected = outputs(model, x)
    loaded = load_model(path)
    assert_array_equal(outputs(loaded, x), expected)
    for each in (model, loaded):
        unpack(each)
        assert find_targets(each).skipped[0].path.endswith("embeddings")
    plain = outputs(model, x)
    assert_array_equal(outputs(loaded, x), plain)
    # Without the rounding of activations, which Keras does in int8.
    assert relative(plain, quantized) < (0.02 if mode == "int8" else 0.005)
    model.backbone.from_config(model.backbone.get_config())


@one_backend
def test_a_backbone_that_keras_loaded_quantized(tmp_path):
    model, x = causal_lm("int8")
    backbone = model.backbone
    # By a map of dtype policies.
    loaded = type(backbone).from_config(backbone.get_config())
    loaded.set_weights(backbone.get_weights())
    quantized = outputs(loaded, x)
    pack(loaded)
    assert relative(outputs(loaded, x), quantized) < 0.03
    path = tmp_path / "backbone.safetensors"
    save_model(loaded, path)
    expected = outputs(loaded, x)
    assert_array_equal(outputs(load_model(path), x), expected)


@one_backend
def test_what_is_not_packed_stays_with_keras():
    model, x = causal_lm("int8")
    quantized = outputs(model, x)
    report = pack(model, targets="feedforward")
    layers = model._flatten_layers()
    packed = {weight.path.split("/")[1] for weight in report.weights}
    for layer in layers:
        if layer.name in packed:
            assert layer.quantization_mode is None
        elif isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense)):
            assert layer.quantization_mode == "int8"
    embedding = model.backbone.token_embedding
    assert embedding.quantization_mode == "int8"
    assert relative(outputs(model, x), quantized) < 0.03
    # The rest, the head too, later.
    pack(model)
    assert embedding.quantization_mode is None
    assert relative(outputs(model, x), quantized) < 0.03


def test_a_model_without_a_graph():
    model = models.Subclassed()
    x = normal(2, 8)
    model(x)
    model.quantize("int8")
    quantized = outputs(model, x)
    assert {w.integers for w in pack(model).weights} == {"kept"}
    assert relative(outputs(model, x), quantized) < 0.03


@one_backend
def test_the_tables_of_a_layer_are_packed_together():
    model, x = causal_lm("int8", tie_word_embeddings=False)
    embedding = model.backbone.token_embedding
    embedding.enable_lora(2)
    quantized = outputs(model, x)
    report = pack(model)
    assert [skip.reason for skip in report.skipped] == [
        "LoRA is enabled",
        "another table of its layer is not packed",
    ]
    assert embedding.quantization_mode == "int8"
    assert relative(outputs(model, x), quantized) < 0.03


@one_backend
def test_lora_on_integers_of_keras():
    model, *_ = make("middle", "int8")
    (layer,) = model.layers
    layer.enable_lora(2)
    layer.lora_kernel_b.assign(normal(*layer.lora_kernel_b.shape))
    x = normal(2, 5, 128)
    quantized = outputs(model, x)
    pack(model)
    assert relative(outputs(model, x), quantized) < 0.02
    assert [v.name for v in layer.trainable_weights] == [
        "lora_kernel_a",
        "lora_kernel_b",
    ]


@one_backend
def test_sparse_integers_stay_sparse():
    model = sequential((128,), keras.layers.Dense(9))
    models.make_sparse(model)
    model.quantize("int8")
    x = normal(2, 128)
    quantized = outputs(model, x)
    (row,) = pack(model).weights
    assert (row.dtype, row.pattern, row.integers) == ("int8", "2:4", "kept")
    assert relative(outputs(model, x), quantized) < 0.02


@one_backend
@pytest.mark.parametrize("mode", ["gptq", "awq"])
def test_what_keras_itself_calibrates(mode):
    model = sequential((None, 64), keras.layers.Dense(9))
    (layer,) = model.layers
    structure = {
        "pre_block_layers": [lambda ids: ops.one_hot(ids, 64)],
        "sequential_blocks": [layer],
    }
    kind = quantizers.GPTQConfig if mode == "gptq" else quantizers.AWQConfig
    config = fitted(
        kind,
        group_size=64,
        num_samples=1,
        sequence_length=4,
        quantization_layer_structure=structure,
        **({"symmetric": True} if mode == "gptq" else {}),
    )
    model.quantize(mode, config=config)
    x = normal(2, 4, 64)
    quantized = outputs(model, x)
    (row,) = pack(model, "int8").weights
    # Even of awq, whose calibration of 3.15 sees no data: its scales are 1.
    assert (row.dtype, row.integers) == ("int8", "kept")
    assert relative(outputs(model, x), quantized) < 0.02


@one_backend
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_gives_the_integers_back(error, monkeypatch):
    model, x = causal_lm("int8")
    before, quantized = state(model), outputs(model, x)
    plain, calls = PackedParameters.create_parameters, []

    def fail(item, add_weight):
        plain(item, add_weight)
        calls.append(item)
        if len(calls) == 3:
            raise error

    monkeypatch.setattr(PackedParameters, "create_parameters", fail)
    with pytest.raises(error):
        pack(model)
    assert state(model) == before
    assert_array_equal(outputs(model, x), quantized)
