"""Rounding of the head of a language model, by the logits that it gives."""

import tracemalloc

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.quantization import head as module
from keras_weightmods.quantization import quantize
from tests import models, references
from tests.models import normal, numpy

# Nothing here depends on the backend that test_quantize.py does not show.
pytestmark = pytest.mark.one_backend
VOCABULARY, WIDTH = 40, 96
TOKENS = np.random.default_rng(0).integers(VOCABULARY, size=(16, 12))
# Inputs of very different size: where rounding to nearest is worst.
SIZES = np.geomspace(0.05, 2, WIDTH).astype("float32")


def make(kind="tied"):
    """Return a model, and the weight of its head."""
    keras.utils.set_random_seed(0)
    embedding = keras.layers.ReversibleEmbedding(
        VOCABULARY, WIDTH, tie_weights=kind == "tied", name="embedding"
    )
    tokens = keras.Input((None,), dtype="int32")
    dense = keras.layers.Dense(WIDTH, activation="tanh", name="dense")
    x = dense(embedding(tokens)) * SIZES
    head = keras.layers.Dense(VOCABULARY, use_bias=False, name="head")
    logits = head(x) if kind == "dense" else embedding(x, reverse=True)
    model = keras.Model(tokens, logits)
    embedding.embeddings.assign(normal(VOCABULARY, WIDTH))
    # What is fitted for the head alone must not matter much at the look-up.
    dense.kernel.assign(dense.kernel * 0.2)
    dense.bias.assign(normal(WIDTH, seed=3))
    if kind == "tied":
        return model, embedding.embeddings
    table = head.kernel if kind == "dense" else embedding.reverse_embeddings
    table.assign(normal(WIDTH, VOCABULARY, seed=5))
    return model, table


def table_of(variable):
    """The head as (width, vocabulary)."""
    value = numpy(variable)
    return value.T if value.shape == (VOCABULARY, WIDTH) else value


@pytest.mark.parametrize("kind", ["tied", "untied", "dense"])
def test_logits_change_less(kind):
    model, table = make(kind)
    embedding, dense = map(model.get_layer, ("embedding", "dense"))
    _, held = models.split(TOKENS)
    x = numpy(embedding.embeddings).astype("float64")[held]
    x = np.tanh(x @ numpy(dense.kernel) + numpy(dense.bias)) * SIZES
    before = table_of(table)
    others = [v for v in model.weights if v is not table]
    kept = [numpy(v) for v in others]
    targets = "head" if kind == "dense" else []
    options = {"targets": targets, "refine": None, "verbose": 0}
    report = kwm.quantize(model, TOKENS, **options)
    (found,) = report.kernels
    assert not [skip for skip in report.skipped if skip.path == found.path]
    after = table_of(table)
    assert references.is_on_grid(after, 4, 64)
    change = x @ (after.astype("float64") - before)
    error = np.sum(change**2) / np.sum((x @ before.astype("float64")) ** 2)
    np.testing.assert_allclose(found.error, error, rtol=1e-3)
    assert found.error < 0.6 * found.nearest
    models.assert_same([numpy(v) for v in others], kept)


def test_a_table_that_is_looked_up_stays_nearer_to_itself():
    """Than one that stands in the head alone, for the same inputs of it."""
    changes = []
    for kind in ("tied", "untied"):
        model, table = make("tied")
        before = numpy(table)
        if kind == "untied":
            tied, embedding = model, model.get_layer("embedding")
            model, table = make("untied")
            for layer in ("embedding", "dense"):
                for own, other in zip(
                    model.get_layer(layer).weights,
                    tied.get_layer(layer).weights,
                ):
                    own.assign(other)
            table.assign(embedding.embeddings.value.T)
        kwm.quantize(model, TOKENS, targets=[], refine=None, verbose=0)
        changes.append(np.sum((table_of(table) - before.T) ** 2))
    assert changes[0] < 0.8 * changes[1]


def test_positions_of_weight_zero_do_not_count():
    ends = []
    for rows in (TOKENS, TOKENS[:8]):
        model, table = make()
        weight = np.ones(TOKENS.shape)
        weight[8:] = 0
        data = (rows, rows, weight[: len(rows)])
        kwm.quantize(model, data, targets=[], refine=None, verbose=0)
        ends.append(numpy(table))
    np.testing.assert_allclose(*ends, atol=1e-6)


def test_a_head_that_cannot_be_rounded_is_reported():
    model, table = make()
    model.get_layer("embedding").enable_lora(2)
    before = numpy(table)
    report = kwm.quantize(model, TOKENS, refine=None, verbose=0)
    assert [k.path for k in report.kernels] == ["dense/kernel"]
    reasons = {skip.path: skip.reason for skip in report.skipped}
    assert reasons["embedding/embeddings"] == "LoRA is enabled"
    models.assert_same(numpy(table), before)


@pytest.mark.parametrize("head", [True, False])
def test_with_the_kernels(head):
    model, table = make()
    before = numpy(table)
    report = kwm.quantize(model, TOKENS, head=head, refine=None, verbose=0)
    paths = [kernel.path.split("/")[0] for kernel in report.kernels]
    assert paths == ["embedding", "dense"][not head :]
    assert np.array_equal(before, numpy(table)) is not head
    if head:
        after = numpy(table)
        weights = kwm.pack(model).weights
        assert {weight.dtype for weight in weights} == {"int4"}
        assert [weight.rounding_error for weight in weights] == [0, 0]
        found = numpy(model.get_layer("embedding").embeddings)
        models.assert_same(found, after)


@pytest.mark.filterwarnings("ignore:All was rounded to nearest")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numpy_holds_a_large_table_once(dtype, monkeypatch):
    """When the weights are given back after the measure of nearest."""
    monkeypatch.setattr(module, "_UNITS", 512)
    model, _ = make()
    kwm.quantize(model, TOKENS, targets=[], refine=None, verbose=0)
    tokens = keras.Input((None,), dtype="int32")
    embedding = keras.layers.ReversibleEmbedding(2**15, 64, dtype=dtype)
    logits = embedding(embedding(tokens), reverse=True)
    model, table = keras.Model(tokens, logits), embedding.embeddings
    tracemalloc.start()
    try:
        kwm.quantize(model, TOKENS, refine=None, verbose=0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert references.is_on_grid(numpy(table).T, 4, 64)
    size = 2**15 * 64 * {"float32": 4, "bfloat16": 2}[dtype]
    assert peak < 1.4 * size


def test_what_gives_no_table_is_refused_and_after_errors_it_is_as_it_was(
    monkeypatch,
):
    """A row that no token reaches, which no hidden state shows, too."""
    model, table = make()
    tokens, good = TOKENS % (VOCABULARY - 1), numpy(table)
    bad = good.copy()
    bad[-1, 0] = np.nan
    for value, data, message in (
        (bad, tokens, "finite weights"),
        (good, (tokens, tokens, 0.0 * tokens), "position whose weight is not"),
    ):
        table.assign(value)
        before = models.weights_of(model)
        with pytest.raises(ValueError, match=message):
            kwm.quantize(model, data, targets=[], verbose=0)
        models.assert_same(models.weights_of(model), before)

    bias = model.get_layer("dense").bias
    bias.assign(np.full(WIDTH, np.inf))
    model.get_layer("dense").activation = keras.activations.linear
    with pytest.raises(ValueError, match="hidden states before the head"):
        kwm.quantize(model, TOKENS, targets=[], verbose=0)
    models.assert_same(numpy(table), good)
    bias.assign(np.zeros(WIDTH))
    before = models.weights_of(model)

    def fail(*args):
        raise RuntimeError("later")

    monkeypatch.setattr(quantize, "change_kernels", fail)
    with pytest.raises(RuntimeError, match="later"):
        kwm.quantize(model, TOKENS, verbose=0)
    models.assert_same(models.weights_of(model), before)
