"""Rounding of the head of a language model, by the logits that it gives."""

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.quantization import quantize
from tests import models, references
from tests.models import normal, numpy

one_backend = pytest.mark.one_backend
VOCABULARY, WIDTH = 40, 96
TOKENS = np.random.default_rng(0).integers(VOCABULARY, size=(16, 12))


def make(kind="tied"):
    """Return a model, its head's weight (vocabulary, width) and the layer."""
    keras.utils.set_random_seed(0)
    is_tied = kind == "tied"
    embedding = keras.layers.ReversibleEmbedding(
        VOCABULARY, WIDTH, tie_weights=is_tied, name="embedding"
    )
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Dense(WIDTH, activation="tanh", name="dense")(
        embedding(tokens)
    )
    # Inputs of very different size: where rounding to nearest is worst.
    x = x * np.geomspace(0.05, 2, WIDTH).astype("float32")
    head = keras.layers.Dense(VOCABULARY, use_bias=False, name="head")
    logits = head(x) if kind == "dense" else embedding(x, reverse=True)
    model = keras.Model(tokens, logits)
    embedding.embeddings.assign(normal(VOCABULARY, WIDTH))
    table = {
        "tied": embedding.embeddings,
        "untied": getattr(embedding, "reverse_embeddings", None),
        "dense": head.kernel if kind == "dense" else None,
    }[kind]
    if not is_tied:
        table.assign(normal(WIDTH, VOCABULARY, seed=5))
    return model, table


def table_of(variable):
    """The head as (vocabulary, width)."""
    value = numpy(variable).copy()
    return value if value.shape == (VOCABULARY, WIDTH) else value.T


def hidden_of(model):
    """What enters the head, in float64."""
    embedding, dense = (
        model.get_layer(name) for name in ("embedding", "dense")
    )
    table, kernel = numpy(embedding.embeddings), numpy(dense.kernel)
    x = np.tanh(table.astype("float64")[TOKENS] @ kernel + numpy(dense.bias))
    return x.reshape(-1, WIDTH) * np.geomspace(0.05, 2, WIDTH)


def error(x, after, before):
    """Energy of the change of the logits, over theirs."""
    change = x @ (after.astype("float64") - before).T
    return np.sum(change**2) / np.sum((x @ before.astype("float64").T) ** 2)


@pytest.mark.parametrize("kind", ["tied", "untied", "dense"])
def test_logits_change_less(kind):
    model, table = make(kind)
    targets = [] if kind != "dense" else "head"
    x, before = hidden_of(model), table_of(table)
    others = [v for v in model.weights if v is not table]
    kept = [numpy(v).copy() for v in others]
    report = kwm.quantize(model, TOKENS, targets=targets, verbose=0)
    (found,) = report.kernels
    assert not [skip for skip in report.skipped if skip.path == found.path]
    after = table_of(table)
    assert references.is_on_grid(after.T, 4, 64)
    np.testing.assert_allclose(found.error, error(x, after, before), rtol=1e-3)
    assert found.error < 0.6 * found.nearest
    models.assert_same([numpy(v) for v in others], kept)


def test_packing_changes_nothing():
    model, table = make()
    kwm.quantize(model, TOKENS, targets=[], verbose=0)
    after = table_of(table)
    (weight,) = kwm.pack(model, targets=[], head="int4").weights
    assert weight.rounding_error == 0
    models.assert_same(numpy(model.get_layer("embedding").embeddings), after)


@one_backend
def test_positions_of_weight_zero_do_not_count():
    ends = []
    for rows in (TOKENS, TOKENS[:8]):
        model, table = make()
        weight = np.ones(TOKENS.shape)
        weight[8:] = 0
        data = (rows, rows, weight[: len(rows)])
        kwm.quantize(model, data, targets=[], verbose=0)
        ends.append(numpy(table))
    np.testing.assert_allclose(*ends, atol=1e-6)


@one_backend
def test_after_an_error_the_table_is_as_it_was(monkeypatch):
    model, _ = make()
    before = models.weights_of(model)

    def fail(*args):
        raise RuntimeError("later")

    monkeypatch.setattr(quantize, "change_kernels", fail)
    with pytest.raises(RuntimeError, match="later"):
        kwm.quantize(model, TOKENS, verbose=0)
    models.assert_same(models.weights_of(model), before)


@one_backend
def test_a_head_that_cannot_be_rounded_is_reported():
    model, _ = make()
    model.get_layer("embedding").enable_lora(2)
    before = models.weights_of(model)
    report = kwm.quantize(model, TOKENS, refine=None, verbose=0)
    assert [k.path for k in report.kernels] == ["dense/kernel"]
    reasons = {skip.path: skip.reason for skip in report.skipped}
    assert reasons["embedding/embeddings"] == "LoRA is enabled"
    models.assert_same(models.weights_of(model)[0], before[0])


@one_backend
@pytest.mark.parametrize("head", [True, False])
def test_with_the_kernels(head):
    model, table = make()
    before = table_of(table)
    report = kwm.quantize(model, TOKENS, head=head, refine=None, verbose=0)
    paths = [kernel.path.split("/")[0] for kernel in report.kernels]
    assert paths == ["embedding", "dense"][not head :]
    assert np.array_equal(before, table_of(table)) is not head
    if head:
        weights = kwm.pack(model).weights
        assert {weight.dtype for weight in weights} == {"int4"}
        assert [weight.rounding_error for weight in weights] == [0, 0]


@one_backend
@pytest.mark.parametrize(
    ("bad", "message"),
    [("row", "finite weights"), ("weights", "position whose weight is not 0")],
)
def test_what_gives_no_table_is_refused(bad, message):
    """A row that no token reaches, which no hidden state shows, too."""
    model, table = make()
    weight = np.ones(TOKENS.shape)
    if bad == "row":
        value = numpy(table).copy()
        value[-1, 0] = np.nan
        table.assign(value)
    else:
        weight[:] = 0
    before = models.weights_of(model)
    tokens = TOKENS % (VOCABULARY - 1)
    with pytest.raises(ValueError, match=message):
        data = tokens, tokens, weight
        kwm.quantize(model, data, targets=[], verbose=0)
    models.assert_same(models.weights_of(model), before)
