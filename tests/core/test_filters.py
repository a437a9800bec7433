import re

import keras
import pytest

from keras_weightmods.core.targets import find_targets
from tests.core.layers import keys
from tests.models import backbone


@pytest.mark.one_backend
def test_include_and_exclude():
    model = backbone("llama3", num_layers=2)
    everything = find_targets(model)
    block = model.get_layer("transformer_layer_1")
    attention = type(block._self_attention_layer)
    query = r"transformer_layer_\d+/.*query"
    for kwargs, path in (
        ({"include": query}, "query"),
        ({"include": ["query", "gate"]}, "query|gate"),
        ({"exclude": query}, "^(?!.*query)"),
        ({"include": block}, "layer_1/"),
        ({"exclude": [block, "gate"]}, "layer_0/(?!.*gate)"),
        ({"include": keras.layers.EinsumDense}, "attention"),
        ({"exclude": attention}, "^(?!.*attention)"),
        ({"include": lambda t: t.contraction_size == 24}, "output_dense"),
        ({"include": "query", "exclude": block}, "layer_0/.*query"),
    ):
        expected = [t.key for t in everything if re.search(path, t.path)]
        assert keys(find_targets(model, **kwargs)) == expected
    # The place in the model does not depend on the choice.
    chosen = find_targets(model, include="gate")
    assert [t.depth for t in chosen] == [4, 11]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"include": ["query", "qeury"]}, r"='qeury'.*self_attention/query"),
        ({"include": "token_embedding"}, r"Left out: token_embedding/"),
        ({"include": keras.layers.Conv2D}, r"matches none of 14"),
        ({"include": "("}, r"`include` must be a valid regular expr"),
        ({"exclude": 3}, r"`exclude` must be .*exclude=3"),
        ({"exclude": [int]}, r"`exclude` must be "),
    ],
)
def test_include_and_exclude_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        find_targets(backbone("llama3", num_layers=2), **kwargs)
