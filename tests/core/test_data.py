"""Data as `fit` takes them; strings are in the tests of CAST and sparsify."""

import math

import keras
import numpy as np
import pytest

from keras_weightmods.core import data
from tests import models
from tests.backends import breadth
from tests.models import assert_same, normal, numpy

X, WEIGHT = normal(10, 3), np.arange(10.0)


class Parts(keras.utils.PyDataset):
    """Batches of four rows, or no end of them."""

    def __init__(self, count=3, arrays=(X, X, WEIGHT), make=lambda *a: a):
        super().__init__()
        self.count, self.arrays, self.make = count, arrays, make

    @property
    def num_batches(self):
        return self.count

    def __getitem__(self, index):
        part = slice(4 * (index % 3), 4 * (index % 3) + 4)
        return self.make(*(array[part] for array in self.arrays))


def generator():
    return (Parts()[i] for i in range(3))


def dataset(data=(X, X, WEIGHT)):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(data).batch(4)


@pytest.mark.one_backend
def test_batches_of_all_kinds_are_the_same():
    expected = [(X[i : i + 4], WEIGHT[i : i + 4]) for i in range(0, 10, 4)]
    assert_same(list(data.batches(X, 4, WEIGHT)), expected)
    for kind in (Parts, generator, dataset):
        assert_same(list(data.batches(kind())), expected)
    first, _ = next(data.batches({"a": X, "b": WEIGHT}, 4))
    assert_same(first, {"a": X[:4], "b": WEIGHT[:4]})
    assert len(list(data.batches(normal(70, 2)))) == 3


@pytest.mark.one_backend
def test_batch_count():
    assert data.batch_count(X, 4, validation_split=0.25) == 2
    for given, expected in (
        (X, 1),
        (Parts(), 3),
        (dataset(), 3),
        ([1, 2], 2),
        (Parts(None), math.inf),
        (dataset().repeat(), math.inf),
        (generator(), None),
    ):
        assert data.batch_count(given) == expected


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("least", "rows", "read", "enough"),
    [(1, 0, 1, 0), (2, 3, 2, 1), (1, 5, 2, 2), (9, 5, 3, 2), (1, 99, 3, 3)],
)
@pytest.mark.parametrize("kind", [Parts, generator])
def test_first_batches(kind, least, rows, read, enough):
    first, found, x = data.first_batches(kind(), least, rows)
    expected = list(data.batches(Parts()))
    assert_same(first, expected[:read])
    assert found == enough
    assert_same(list(data.batches(x)), expected)


@pytest.mark.one_backend
def test_holds_strings():
    texts = ["a", "b"]
    for x in (texts, np.array(texts, object), {"x": texts}, dataset(texts)):
        assert data.holds_strings(x)
    for x in ({"x": X}, generator(), dataset(), None):
        assert not data.holds_strings(x)


ROWS = np.random.default_rng(0).integers(1, 12, size=(10, 6))


def row_batches(make):
    return Parts(3, (ROWS,), make)


def as_dict(part):
    return {"token_ids": part, "padding_mask": np.ones_like(part)}


def loader():
    from torch.utils.data import DataLoader

    return DataLoader([(row, row) for row in ROWS], batch_size=4)


FORMS = {
    "tensor": lambda: keras.ops.convert_to_tensor(ROWS),
    "lists": ROWS.tolist,
    "triple": lambda: (as_dict(ROWS), ROWS, np.ones(ROWS.shape)),
    "PyDataset of triples": lambda: row_batches(
        lambda x: (as_dict(x), x, x > 0)
    ),
    "generator of lists": lambda: (ROWS[i : i + 4].tolist() for i in (0, 4, 8)),
    "tf.data of dicts": lambda: dataset((as_dict(ROWS), ROWS)),
    "DataLoader": loader,
}


@pytest.fixture(scope="module")
def language_model():
    return models.causal_lm("gpt2", models.gpt2_preprocessor(6))


@breadth("form", FORMS, 0)
def test_rows_of_tokens_in_every_form(form, language_model):
    found = data.calibration_batches(language_model, FORMS[form](), 4)
    for name, expected in as_dict(ROWS).items():
        joined = np.concatenate([numpy(x[name]) for x, _ in found])
        np.testing.assert_array_equal(joined, expected)
    assert [len(numpy(x["token_ids"])) for x, _ in found] == [4, 4, 2]
    assert_same(list(data.rows(FORMS[form]())), list(ROWS))


@breadth("make", [list, np.array, tuple, iter])
def test_strings_in_every_form(make, language_model):
    texts = ["abc", "dab"]
    found = data.calibration_batches(language_model, make(texts), 1)
    expected, _, weights = language_model.preprocessor(texts)
    for i, (x, weight) in enumerate(found):
        row = numpy(expected["token_ids"])[i : i + 1]
        np.testing.assert_array_equal(numpy(x["token_ids"]), row)
        np.testing.assert_array_equal(weight, numpy(weights)[i : i + 1])
    assert list(data.rows(make(texts))) == texts


@pytest.mark.one_backend
@pytest.mark.parametrize("make", [list, np.array, iter, "\n".join, dataset])
def test_strings_where_a_preprocessor_takes_prompts(make):
    """Each is a response to none, all of which counts."""
    model = models.causal_lm("gemma3", models.gemma3_preprocessor())
    # TensorFlow forgets SentencePiece's when a seed is set, as was just done.
    model.preprocessor = models.gemma3_preprocessor()
    texts = ["abc dab", "cab"]
    given = make(texts)
    found = data.calibration_batches(model, given, 1)
    texts = [given] if isinstance(given, str) else texts
    if make is not iter:
        assert list(data.rows(given)) == texts
    strings = {"prompts": [""] * len(texts), "responses": texts}
    expected, _, weights = model.preprocessor(strings)
    tokens = np.concatenate([numpy(x["token_ids"]) for x, _ in found])
    np.testing.assert_array_equal(tokens, numpy(expected["token_ids"]))
    used = np.concatenate([numpy(weight) for _, weight in found])
    np.testing.assert_array_equal(used, numpy(weights))


@pytest.mark.one_backend
def test_strings_that_a_preprocessor_does_not_take(language_model):
    def refuses(samples, **kwargs):
        raise TypeError(f"Received: {samples}")

    model = models.causal_lm("gpt2", language_model.preprocessor)
    model.preprocess_samples = refuses
    with pytest.raises(ValueError, match="does not take these") as caught:
        data.calibration_batches(model, ["long"] * 999, 4)
    assert len(str(caught.value)) < 800
    assert caught.value.__suppress_context__


@pytest.mark.one_backend
def test_rows_of_several_lengths_are_padded(language_model):
    texts = [[3, 4, 5], [6]]
    ((x, weights),) = data.calibration_batches(language_model, texts, 2)
    mask = [[1, 1, 1], [1, 0, 0]]
    assert x["token_ids"].tolist() == [[3, 4, 5], [6, 0, 0]]
    assert x["padding_mask"].tolist() == weights.tolist() == mask
    found = [row.tolist() for row in data.rows(x)]
    assert found == [row.tolist() for row in data.rows(texts)] == texts


@pytest.mark.one_backend
def test_labels_of_strings_may_be_a_list():
    class Task:
        name = "task"
        preprocessor = "there is one"

        def preprocess_samples(self, x, y=None, sample_weight=None):
            return np.array([list(map(ord, x)), y]).T, y, sample_weight

    x, y, weights = data.preprocess(Task(), ["a", "b"], [0, 1], [1.0, 0.5])
    assert data.batch_count((x, y)) == 1
    assert [each.shape for each in (y, weights)] == [(2,), (2,)]


@pytest.mark.one_backend
@pytest.mark.parametrize("size", [1, 3, 8, 64])
def test_every_eighth_row_is_held_out(size):
    """Whatever the batches, empty ones too; rows of weight 0 do not count."""
    x, weights = np.arange(40), np.ones((40, 3))
    weights[30:] = 0
    pairs = [
        ({"x": x[i : i + size]}, weights[i : i + size])
        for i in range(0, 40, size)
    ]
    pairs.insert(1, ({"x": x[:0]}, weights[:0]))
    fit, held = (
        np.concatenate([each["x"] for each, _ in part])
        for part in data.held_out(pairs)
    )
    assert held.tolist() == [7, 15, 23]
    assert sorted([*fit, *held]) == x.tolist()
    few = [({"x": x[:3]}, None)]
    fit, held = data.held_out(few)
    assert held[0][0]["x"].tolist() == [2]
    one = [({"x": x[:1]}, None)]
    assert data.held_out(one) == (one, [])
