"""The integers of packed weights in ONNX Runtime and OpenVINO."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers

import keras_weightmods as kwm
from keras_weightmods import native
from keras_weightmods.core.reparameterization import reparameterizations
from tests import models
from tests.exporting.test_gguf_file import packed_integers
from tests.packing.test_pack import leave_out_native

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.one_backend

TOKENS = np.random.default_rng(0).integers(50, size=(2, 5)).astype("int32")
HALF = 24


def language_model():
    """Return one with a tied head, and a product over two axes."""
    table = layers.ReversibleEmbedding(50, 96)
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    x = table(tokens)
    x = layers.EinsumDense("btd,dhe->bthe", (None, 4, HALF))(x)
    x = layers.EinsumDense("bthe,hed->btd", (None, 128), bias_axes="d")(x)
    x = layers.Dense(96, activation="relu")(x)
    model = keras.Model(tokens, table(x, reverse=True))
    return models.randomize(model, scale=0.2)


def decoded(node, arrays):
    """Integers (N, K) of a node and their scales, by its definition.

    Input 1 has the codes, low bits first, in blocks along K; input 2 a scale
    for each block. Without zero points a code stands for itself less half of
    2^bits.
    """
    numbers = {each.name: each.i for each in node.attribute}
    bits, size = numbers["bits"], numbers["N"]
    assert numbers["block_size"] == 64
    assert len(node.input) == 3
    stream = np.unpackbits(arrays[node.input[1]], axis=-1, bitorder="little")
    codes = stream.reshape(size, -1, bits) @ 2 ** np.arange(bits)
    scales = arrays[node.input[2]].reshape(size, -1).repeat(64, axis=1)
    integers = codes - 2 ** (bits - 1)
    # What fills the last block up is 0.
    assert not integers[:, numbers["K"] :].any()
    return integers[:, : numbers["K"]], scales[:, : numbers["K"]], numbers


def graph_of(path):
    """Return the nodes of a type, and the arrays, of a file."""
    graph = onnx.load(path).graph
    arrays = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
    return lambda kind: [n for n in graph.node if n.op_type == kind], arrays


def run(path, *inputs):
    session = onnxruntime.InferenceSession(path)
    names = [each.name for each in session.get_inputs()]
    return session.run(None, dict(zip(names, inputs, strict=True)))[0]


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        *(("int2", 2), ("int3", 4), ("int6", 8), ("int8", 8)),
        *(("2:4", 4), ("held", 4)),
    ],
)
def test_integers_leave_as_they_are(kind, bits, tmp_path, monkeypatch):
    if kind == "held":
        leave_out_native(monkeypatch)
        monkeypatch.setattr(native, "warn_dense", lambda reason: None)
    model, path = language_model(), str(tmp_path / "model.onnx")
    if kind == "2:4":
        models.make_sparse(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`pack` rounded")
        kwm.pack(model, {"2:4": "int4", "held": "int4"}.get(kind, kind))
    packed = models.outputs(model, TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        kwm.export(model, path, keep_packed=True, activations="float32")
    models.assert_same(models.outputs(model, TOKENS), packed)
    nodes, arrays = graph_of(path)
    products = [decoded(node, arrays) for node in nodes("MatMulNBits")]
    items = reparameterizations(model)
    assert len(items) == len(products) == 4
    assert (kind == "held") is any(item.is_held for item in items)
    for item in items:
        integers, scales = packed_integers(item)
        matches = [
            np.array_equal(found[0], integers)
            and np.array_equal(found[1], scales)
            for found in products
            if found[2]["bits"] == bits and "accuracy_level" not in found[2]
        ]
        assert sum(matches) == 1, item.target.path
    # The table of the look-up is that of the head, and nothing is dense.
    (look_up,) = nodes("GatherBlockQuantized")
    assert look_up.input[0] in {n.input[1] for n in nodes("MatMulNBits")}
    assert len([x for x in arrays.values() if x.dtype == "uint8"]) == 4
    assert max(x.size for x in arrays.values() if x.dtype != "uint8") < 1000
    kwm.unpack(model)
    expected = models.outputs(model, TOKENS)
    np.testing.assert_allclose(run(path, TOKENS), expected, atol=1e-5)
    # Sizes of batches and texts are free.
    one = run(path, TOKENS[:1, :3])
    np.testing.assert_allclose(one, expected[:1, :3], atol=1e-5)


def test_a_large_table_has_constant_scales(tmp_path):
    # torch leaves in the graph what it computes of so many, and OpenVINO takes
    # no scales that are computed.
    table = layers.ReversibleEmbedding(66_000, 32)
    tokens = keras.Input((5,), dtype="int32")
    model = keras.Model(tokens, table(table(tokens), reverse=True))
    path = str(tmp_path / "model.onnx")
    kwm.pack(model, "int8")
    kwm.export(model, path, keep_packed=True)
    nodes, arrays = graph_of(path)
    (look_up,) = nodes("GatherBlockQuantized")
    assert look_up.input[2] in arrays


def test_inputs_in_int8_and_kernels_in_floats(tmp_path):
    model, path = models.mlp(64, 32, 8), str(tmp_path / "model.onnx")
    models.make_sparse(model)
    x = models.normal(7, 64)
    first, last = (f"{layer.name}/kernel" for layer in model.layers)
    kwm.pack(model, "int8", targets=[first])
    kwm.pack(model, "float32", targets=[last])
    expected = models.outputs(model, x)
    text = "1 packed weights hold no integers and are exported in dense form"
    with pytest.warns(UserWarning, match=text) as told:
        kwm.export(model, path, keep_packed=True)
    assert __file__ in {w.filename for w in told if text in str(w.message)}
    nodes, arrays = graph_of(path)
    (node,) = nodes("MatMulNBits")
    assert decoded(node, arrays)[2]["accuracy_level"] == 4
    assert len(nodes("MatMul")) == 1
    # The runtime rounds 64 inputs together, and `pack` 32.
    limit = 0.02 * np.abs(expected).max()
    np.testing.assert_allclose(run(path, x), expected, atol=limit)


def test_lora_is_added_to_the_integers(tmp_path):
    model, path = models.mlp(64, 8), str(tmp_path / "model.onnx")
    kwm.pack(model, "int8")
    (layer,) = model.layers
    layer.enable_lora(2)
    layer.lora_kernel_b.assign(models.normal(2, 8))
    kwm.export(model, path, keep_packed=True, activations="float32")
    kwm.unpack(model)
    x = models.normal(7, 64)
    expected = models.outputs(model, x)
    np.testing.assert_allclose(run(path, x), expected, atol=1e-4)


@pytest.mark.heavy
@pytest.mark.parametrize("family", ["llama3", "mixtral"])
def test_models_of_keras_hub(family, tmp_path):
    pytest.importorskip("keras_hub")
    model, path = models.causal_lm(family), str(tmp_path / "model.onnx")
    models.randomize(model)
    x = {"padding_mask": np.ones_like(TOKENS), "token_ids": TOKENS % 20}
    kwm.pack(model, "int8")
    given = {"keep_packed": True, "activations": "float32"}
    if family == "mixtral":
        # Its experts ask how many tokens there are.
        with pytest.raises(ValueError, match=r"of fixed shapes.*\(None, None"):
            kwm.export(model, path, **given)
        specs = {n: keras.InputSpec("int32", (2, 5), name=n) for n in x}
        given["input_signature"] = [specs]
    kwm.export(model, path, **given)
    kwm.unpack(model)
    found, expected = run(path, *x.values()), models.outputs(model, x)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # In floats the sizes are free as well.
    if family == "mixtral":
        return
    kwm.export(model, path)
    found = run(path, *(each[:1, :3] for each in x.values()))
    expected = models.outputs(model, {n: v[:1, :3] for n, v in x.items()})
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_openvino_reads_the_integers(tmp_path):
    openvino = pytest.importorskip("openvino")
    model, path = language_model(), str(tmp_path / "model.onnx")
    with pytest.warns(UserWarning, match="`pack` rounded"):
        kwm.pack(model, "int4")
    kwm.export(model, path, keep_packed=True)
    converted = openvino.convert_model(path)
    # Two in a byte there too, the first in its low half.
    constants = {
        node.data.tobytes()
        for node in converted.get_ops()
        if node.get_type_name() == "Constant"
        and node.get_output_element_type(0).get_type_name() == "u4"
    }
    nodes, arrays = graph_of(path)
    for node in nodes("MatMulNBits"):
        assert arrays[node.input[1]].tobytes() in constants
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    exact["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
    found = openvino.compile_model(converted, "CPU", exact)(TOKENS)[0]
    kwm.unpack(model)
    expected = models.outputs(model, TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_is_refused(tmp_path):
    class Free(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.dense = layers.Dense(4)

        def call(self, x):
            return self.dense(x)

    model, path = Free(), tmp_path / "model.onnx"
    model(models.normal(2, 64))
    with pytest.raises(ValueError, match=r"packed weights. Call `kwm\.pack"):
        kwm.export(model, path, keep_packed=True)
    kwm.pack(model, "int8")
    for match, options in (
        (r"needs `input_signature=\[", {}),
        ("`activations` must be one of", {"activations": "int4"}),
    ):
        with pytest.raises(ValueError, match=match):
            kwm.export(model, path, keep_packed=True, **options)
    assert not path.exists()
