import types

import pytest

from keras_weightmods.core.weight_keys import (
    matching_places,
    same_path,
)

pytestmark = pytest.mark.one_backend


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("dense/kernel", "dense/kernel", True),
        ("dense_7/kernel", "dense/kernel", True),
        ("model_1/dense_7/kernel", "dense_2/kernel", True),
        ("dense_7/kernel", "dense_7/bias", False),
        ("my_dense/kernel", "dense/kernel", False),
        ("kernel_1", "kernel_2", True),
        ("lora_a2/kernel", "lora_a/kernel", False),
    ],
)
def test_same_path(a, b, same):
    assert same_path(a, b) is same_path(b, a) is same


def variable(path, shape=(2, 3)):
    return types.SimpleNamespace(path=path, shape=shape)


@pytest.mark.parametrize(
    ("path", "places"),
    [
        # Equal before the same but for the model's name, before numbers.
        ("dense/kernel", [1]),
        ("net/dense/kernel", [2]),
        ("other/dense/kernel", [1]),
        ("dense_9/kernel", [1, 2, 3]),
        ("conv/kernel", []),
    ],
)
def test_matching_places(path, places):
    variables = [
        variable("dense/kernel", (3, 2)),
        variable("dense/kernel"),
        variable("net/dense/kernel"),
        variable("dense_1/kernel"),
    ]
    assert matching_places(path, [2, 3], variables) == places
