"""Rounding of a tied embedding and head, by the logits that it gives."""

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.sparsity import quantize_sparse
from tests import models
from tests.models import normal, numpy

one_backend = pytest.mark.one_backend
VOCABULARY, WIDTH = 40, 96
TOKENS = np.random.default_rng(0).integers(VOCABULARY, size=(16, 12))


def make(tie_weights=True):
    keras.utils.set_random_seed(0)
    embedding = keras.layers.ReversibleEmbedding(
        VOCABULARY, WIDTH, tie_weights=tie_weights, name="embedding"
    )
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Dense(WIDTH, activation="tanh", name="dense")(
        embedding(tokens)
    )
    # Inputs of very different size: where rounding to nearest is worst.
    x = x * np.geomspace(0.05, 2, WIDTH).astype("float32")
    model = keras.Model(tokens, embedding(x, reverse=True))
    embedding.embeddings.assign(normal(VOCABULARY, WIDTH))
    return model, embedding


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


def test_logits_change_less_and_packing_changes_nothing():
    model, embedding = make()
    x, before = hidden_of(model), numpy(embedding.embeddings).copy()
    others = models.weights_of(model)[1:]
    (found,) = kwm.quantize_sparse(
        model, TOKENS, head=True, targets=[], verbose=0
    ).kernels
    after = numpy(embedding.embeddings).copy()
    assert found.shape == (VOCABULARY, WIDTH)
    np.testing.assert_allclose(found.error, error(x, after, before), rtol=1e-3)
    assert found.error < 0.6 * found.nearest
    models.assert_same(models.weights_of(model)[1:], others)
    (weight,) = kwm.pack(model, head="int4", targets=[]).weights
    assert weight.rounding_error == 0
    models.assert_same(numpy(embedding.embeddings), after)


@one_backend
def test_positions_of_weight_zero_do_not_count():
    ends = []
    for rows in (TOKENS, TOKENS[:8]):
        model, embedding = make()
        weight = np.ones(TOKENS.shape)
        weight[8:] = 0
        data = (rows, rows, weight[: len(rows)])
        kwm.quantize_sparse(model, data, head=True, targets=[], verbose=0)
        ends.append(numpy(embedding.embeddings))
    np.testing.assert_allclose(*ends, atol=1e-6)


@one_backend
def test_after_an_error_the_table_is_as_it_was(monkeypatch):
    model, _ = make()
    before = models.weights_of(model)

    def fail(*args):
        raise RuntimeError("later")

    monkeypatch.setattr(quantize_sparse, "change_kernels", fail)
    with pytest.raises(RuntimeError, match="later"):
        kwm.quantize_sparse(model, TOKENS, dense=True, head=True, verbose=0)
    models.assert_same(models.weights_of(model), before)


@one_backend
@pytest.mark.parametrize(
    "make_other", [models.mlp, lambda: make(tie_weights=False)[0]]
)
def test_models_without_such_a_table_are_refused(make_other):
    with pytest.raises(ValueError, match="rounds the tied embedding"):
        kwm.quantize_sparse(make_other(), TOKENS, head=True, verbose=0)


@one_backend
def test_with_the_kernels():
    model, _ = make()
    report = kwm.quantize_sparse(
        model, TOKENS, dense=True, head=True, verbose=0
    )
    paths = [kernel.path for kernel in report.kernels]
    assert [p.split("/")[0] for p in paths] == ["embedding", "dense"]
    report = kwm.pack(model)
    assert {weight.dtype for weight in report.weights} == {"int4"}
    assert [weight.rounding_error for weight in report.weights] == [0, 0]


@one_backend
@pytest.mark.parametrize(
    ("bad", "message"),
    [("row", "finite weights"), ("weights", "position whose weight is not 0")],
)
def test_what_gives_no_table_is_refused(bad, message):
    """A row that no token reaches, which no hidden state shows, too."""
    model, embedding = make()
    weight = np.ones(TOKENS.shape)
    if bad == "row":
        table = numpy(embedding.embeddings).copy()
        table[-1, 0] = np.nan
        embedding.embeddings.assign(table)
    else:
        weight[:] = 0
    before = models.weights_of(model)
    tokens = TOKENS % (VOCABULARY - 1)
    with pytest.raises(ValueError, match=message):
        kwm.quantize_sparse(
            model, (tokens, tokens, weight), head=True, targets=[], verbose=0
        )
    models.assert_same(models.weights_of(model), before)
