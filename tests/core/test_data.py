"""Data as `fit` takes them; strings are in the tests of CAST and sparsify."""

import math

import keras
import numpy as np
import pytest

from keras_weightmods.core import data
from tests.models import assert_same, normal

X, WEIGHT = normal(10, 3), np.arange(10.0)


class Parts(keras.utils.PyDataset):
    """Batches of four rows, or no end of them."""

    def __init__(self, count=3):
        super().__init__()
        self.count = count

    @property
    def num_batches(self):
        return self.count

    def __getitem__(self, index):
        part = slice(4 * (index % 3), 4 * (index % 3) + 4)
        return X[part], X[part], WEIGHT[part]


def generator():
    return (Parts()[i] for i in range(3))


def dataset():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((X, X, WEIGHT)).batch(4)


@pytest.mark.parametrize("kind", [None, Parts, generator, dataset])
def test_batches_of_all_kinds_are_the_same(kind):
    expected = [(X[i : i + 4], WEIGHT[i : i + 4]) for i in range(0, 10, 4)]
    found = data.batches(X, 4, WEIGHT) if kind is None else data.batches(kind())
    assert_same(list(found), expected)


def test_batches_of_nested_arrays():
    first, _ = next(data.batches({"a": X, "b": WEIGHT}, 4))
    assert_same(first, {"a": X[:4], "b": WEIGHT[:4]})
    assert len(list(data.batches(normal(70, 2)))) == 3


def test_batch_count():
    assert data.batch_count(X, 4) == 3
    assert data.batch_count(X) == 1
    assert data.batch_count(X, 4, validation_split=0.25) == 2
    assert data.batch_count(Parts()) == data.batch_count(dataset()) == 3
    assert data.batch_count([1, 2]) == 2
    assert data.batch_count(Parts(None)) == math.inf
    assert data.batch_count(dataset().repeat()) == math.inf
    assert data.batch_count(dataset().filter(lambda *_: True)) is None
    assert data.batch_count(generator()) is None


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


def test_holds_strings():
    import tensorflow as tf

    texts = ["a", "b"]
    for x in (texts, np.array(texts), np.array(texts, object), {"x": texts}):
        assert data.holds_strings(x)
    assert data.holds_strings(tf.data.Dataset.from_tensor_slices(texts))
    for x in (X, {"x": X}, generator(), dataset(), None):
        assert not data.holds_strings(x)


def test_labels_of_strings_may_be_a_list():
    class Task:
        name = "task"
        preprocessor = "there is one"

        def preprocess_samples(self, x, y=None, sample_weight=None):
            return np.array([list(map(ord, x)), y]).T, y, sample_weight

    x, y, weights = data.preprocess(Task(), ["a", "b"], [0, 1], [1.0, 0.5])
    assert data.batch_count((x, y)) == 1
    assert [each.shape for each in (y, weights)] == [(2,), (2,)]
