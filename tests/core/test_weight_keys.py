import types

import pytest

from keras_weightmods.core.weight_keys import (
    matching_places,
    same_path,
)

pytestmark = pytest.mark.one_backend


VARIABLES = [
    types.SimpleNamespace(path=path, shape=shape)
    for path, shape in (
        ("dense/kernel", (3, 2)),
        ("dense/kernel", (2, 3)),
        ("net/dense/kernel", (2, 3)),
        ("dense_1/kernel", (2, 3)),
        ("lora_a2/kernel", (2, 3)),
    )
]


@pytest.mark.parametrize(
    ("path", "places"),
    [
        # Equal before the same but for the model's name, before numbers.
        ("dense/kernel", [1]),
        ("net/dense/kernel", [2]),
        ("other/dense/kernel", [1]),
        ("dense_9/kernel", [1, 2, 3]),
        ("model_1/dense_7/kernel", [1, 3]),
        ("kernel_2", [1, 2, 3, 4]),
        ("my_dense/kernel", []),
        ("lora_a/kernel", []),
        ("dense_1/bias", []),
        ("conv/kernel", []),
    ],
)
def test_the_same_weight_of_another_model(path, places):
    assert matching_places(path, [2, 3], VARIABLES) == places
    for place in places:
        assert same_path(VARIABLES[place].path, path)
