import keras
import numpy as np
import pytest
from keras import ops
from numpy.testing import assert_allclose, assert_array_equal

from keras_weightmods import load_model, pack, quantize, save_model, unpack
from tests import models, references
from tests.backends import breadth
from tests.models import make_sparse, normal, numpy, outputs
from tests.packing.test_pack import check_checkpoints, needs_native, state


def make_model(width=16, vocabulary=37, seed=0, **kwargs):
    """An embedding, one projection and the tied head."""
    embedding = keras.layers.ReversibleEmbedding(vocabulary, width, **kwargs)
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Dense(width, use_bias=False)(embedding(tokens))
    model = keras.Model(tokens, embedding(x, reverse=True))
    embedding._embeddings.assign(normal(vocabulary, width, seed=seed))
    return make_sparse(model, seed=seed)


HEADS = "int8", "int4"
one_backend = pytest.mark.one_backend


def rounded_table(table, head):
    if head == "int8":
        scale = np.abs(table).max(axis=1, keepdims=True) / np.float32(127)
        return np.rint(table / scale).astype("float32") * scale
    result = table.copy()
    for row in result:
        for start in range(0, len(row), 64):
            part, bits = row[start : start + 64], int(head[3:])
            steps, scale = references.round_int4(part, bits)
            row[start : start + 64] = steps * np.float64(scale)
    return result


pytestmark = pytest.mark.filterwarnings("ignore:`pack` rounded")
TOKENS = np.array([[0, 36, 5, 17, 16], [15, 1, 1, 33, 32]])


@breadth(
    ("head", "arguments"),
    [
        ("int8", {"vocabulary": 16}),
        ("int8", {"logit_soft_cap": 2.0}),
        ("int8", {"width": 7}),
        ("int4", {"width": 132}),
        ("int4", {"width": 7}),
        ("int3", {"width": 132}),
        *((f"int{bits}", {"width": 33}) for bits in (2, 5, 6)),
    ],
    *(3, 5),
    ids=str,
)
def test_one_table_is_looked_up_and_multiplied(head, arguments):
    model = make_model(**arguments)
    tokens = TOKENS % arguments.get("vocabulary", 37)
    (_, layer, dense), before = model.layers, state(model)
    plain = numpy(layer.embeddings)
    table = rounded_table(plain, head)
    kernel = np.float64(numpy(dense.kernel))
    report = pack(model, head=head, targets=[])
    assert [w.dtype for w in report.weights][-1] == head
    weight = report.weights[-1]
    assert weight.activations == "int8"
    error = np.linalg.norm(table - plain) / np.linalg.norm(plain)
    assert weight.rounding_error == pytest.approx(error, rel=1e-4)
    assert not any(s.path == layer.path for s in report.skipped)
    assert layer.trainable_weights == []

    found = ops.convert_to_numpy(layer(tokens))
    assert_array_equal(found, table[tokens])
    assert_array_equal(numpy(layer.embeddings), table)
    x = np.float64(table)[tokens] @ kernel
    expected = references.round_activations(x) @ table.T
    if layer.logit_soft_cap:
        expected = np.tanh(expected / 2) * 2
    assert_allclose(outputs(model, tokens), expected, rtol=1e-4, atol=1e-4)
    unpack(model)
    assert_array_equal(numpy(layer.embeddings), table)
    after = state(model)
    assert after[:2] == before[:2]


@one_backend
@needs_native
def test_a_head_has_inputs_in_int8():
    model = make_model()
    before = state(model)
    with pytest.raises(ValueError, match=r"integers alone.*head=None"):
        pack(model, "int8", activations="float32")
    assert state(model) == before
    pack(model, "int8", activations="float32", head=None)


@one_backend
def test_mixed_precision_keeps_its_types():
    model = make_model(dtype="mixed_bfloat16", reverse_dtype="float32")
    layer = model.layers[1]
    expected = numpy(layer(TOKENS))
    pack(model, head="int8")
    found = layer(TOKENS)
    assert keras.backend.standardize_dtype(found.dtype) == "bfloat16"
    assert_allclose(numpy(found), expected, atol=0.05)
    logits = layer(found, reverse=True)
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"


@one_backend
@pytest.mark.filterwarnings("ignore:The model .* packed weights")
@pytest.mark.parametrize("head", HEADS)
def test_gradients_flow_through_the_head(head):
    inputs = keras.Input((4,))
    layer = keras.layers.ReversibleEmbedding(9, 8)
    layer.build()
    x = keras.layers.Dense(8, use_bias=False)(inputs)
    model = make_sparse(keras.Model(inputs, layer(x, reverse=True)))
    layer._embeddings.assign(normal(9, 8))
    pack(model, targets=[], head=head)
    table = np.float64(numpy(layer.embeddings))
    x = normal(5, 4, seed=1)
    (kernel,) = model.trainable_weights
    w = np.float64(numpy(kernel))
    y = references.round_activations(x @ w) @ table.T
    # The gradient ignores the rounding of the inputs.
    expected = w - 0.1 * x.T @ (2 * (y - 1) / (5 * 9)) @ table
    models.fit_step(model, x, np.ones((5, 9), "float32"))
    assert_allclose(numpy(kernel), expected, rtol=1e-4, atol=1e-5)


@one_backend
@pytest.mark.parametrize("tie_weights", [True, False])
def test_what_cannot_be_served_is_an_error(tie_weights):
    model = make_model(tie_weights=tie_weights, mask_zero=True)
    before, reason = state(model), "mask_zero is set"
    with pytest.raises(ValueError, match=reason):
        pack(model, head="int8")
    assert state(model) == before
    # Unless nobody has asked for the head.
    report = pack(model, "int8")
    assert len(report.weights) == 1
    assert reason in str([skip.reason for skip in report.skipped])


@one_backend
def test_the_head_goes_with_the_kernels():
    def dtypes(**kwargs):
        report = pack(model, **kwargs)
        unpack(model)
        return [weight.dtype for weight in report.weights]

    model = make_model()
    assert dtypes(dtype="int8") == ["int8", "int8"]
    assert dtypes(dtype="int8", head=None) == ["int8"]
    assert dtypes(dtype="int8", head="int4") == ["int8", "int4"]
    assert dtypes(dtype="bfloat16") == ["bfloat16"]
    model = make_model()
    assert dtypes(dtype="int4", targets="dense") == ["int4"]
    assert dtypes() == ["int4"]
    assert dtypes(head="int4", targets=[]) == ["int4"]
    # Both lie on the grid by now.
    assert dtypes() == ["int4", "int4"]


@one_backend
def test_lora_and_the_table_exclude_each_other():
    model = make_model()
    layer = model.layers[1]
    pack(model, head="int8")
    with pytest.raises(ValueError, match=r"unpack\(model\)"):
        layer.enable_lora(2)
    unpack(model)
    layer.enable_lora(2)
    with pytest.raises(ValueError, match="LoRA is enabled"):
        pack(model, head="int8")
    # The table of an untied head may be adapted.
    model = make_model(tie_weights=False)
    layer, x = model.layers[1], normal(2, 16)
    pack(model, head="int8")
    logits = numpy(layer(x, reverse=True))
    layer.enable_lora(2)
    before = numpy(layer(TOKENS))
    layer.lora_embeddings_b.assign(normal(2, 16))
    assert np.abs(numpy(layer(TOKENS)) - before).max() > 0.01
    assert_array_equal(numpy(layer(x, reverse=True)), logits)


@one_backend
@pytest.mark.parametrize(
    ("head", "tied"), [("int8", True), ("int4", True), ("int8", False)]
)
def test_checkpoints_with_and_without_the_library(
    head, tied, tmp_path, monkeypatch
):
    def make(seed):
        model = make_model(seed=seed, width=100, tie_weights=tied)
        return model, pack(model, head=head)

    check_checkpoints(make, TOKENS, tmp_path, monkeypatch)


@one_backend
def test_an_untied_head_is_packed_as_it_was_rounded(tmp_path):
    pytest.importorskip("keras_hub")
    sizes = {"vocabulary_size": 48, "hidden_dim": 32, "intermediate_dim": 48}
    model = models.causal_lm("llama3", **sizes, tie_word_embeddings=False)
    make_sparse(model)
    tokens = np.random.default_rng(3).integers(1, 48, (2, 10))
    inputs = {"token_ids": tokens, "padding_mask": np.arange(10) < [[4], [4]]}
    layer = model.backbone.token_embedding
    head, table = layer.reverse_embeddings, numpy(layer.embeddings)
    quantize(model, inputs, verbose=0)
    expected, before = outputs(model, inputs), state(model)[:2]
    weights = models.weights_of(model)
    kernel, hidden = numpy(head), numpy(model.backbone(inputs))

    weight = pack(model).weights[-1]
    assert (weight.path, weight.dtype) == (head.path, "int4")
    assert weight.rounding_error == 0
    assert_array_equal(numpy(layer.embeddings), table)
    assert_array_equal(numpy(layer.reverse_embeddings), kernel)
    logits = references.round_activations(np.float64(hidden)) @ kernel
    found = numpy(layer(hidden, reverse=True))
    assert_allclose(found, logits, rtol=1e-4, atol=1e-4)
    found = outputs(model, inputs)
    assert_allclose(found, expected, atol=0.05 * expected.max())

    save_model(model, tmp_path / "packed.safetensors")
    loaded = load_model(tmp_path / "packed.safetensors")
    assert_array_equal(outputs(loaded, inputs), found)
    for each in (model, loaded):
        unpack(each)
    assert state(model)[:2] == before
    models.assert_same(model.get_weights(), weights)
    models.assert_same(loaded.get_weights(), weights)


@pytest.mark.one_backend
def test_a_dense_head_has_a_type_of_its_own():
    """Though it is not 2:4, where the kernels are."""
    model = models.make_sparse(models.token_net(width=16))
    kernel = model.layers[-1].kernel
    kernel.assign(models.normal(*kernel.shape))
    tokens = np.arange(10).reshape(2, 5)
    before = models.outputs(model, tokens)
    with pytest.raises(ValueError, match="must be exactly 2:4"):
        pack(model)
    found = pack(model, head="int8").weights
    assert [(w.dtype, w.pattern) for w in found] == [
        ("float32", "2:4"),
        ("int8", None),
    ]
    assert found[-1].path == kernel.path
    after = models.outputs(model, tokens)
    np.testing.assert_allclose(after, before, atol=0.03 * np.abs(before).max())
