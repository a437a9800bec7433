import keras
import pytest

from keras_weightmods.core.targets import find_targets
from tests.core.layers import keys
from tests.models import backbone


def test_include_and_exclude():
    model = backbone("llama3", num_layers=2)
    everything = find_targets(model)

    def found(**kwargs):
        return keys(find_targets(model, **kwargs))

    def expected(test):
        return keys(filter(test, everything))

    block = model.get_layer("transformer_layer_1")
    attention = type(block._self_attention_layer)
    query = r"transformer_layer_\d+/.*query"
    assert found(include=query) == expected(lambda t: "query" in t.path)
    assert found(include=["query", "gate"]) == expected(
        lambda t: "query" in t.path or "gate" in t.path
    )
    assert found(exclude=query) == expected(lambda t: "query" not in t.path)
    assert found(include=block) == expected(lambda t: "layer_1/" in t.path)
    assert found(exclude=[block, "gate"]) == expected(
        lambda t: "layer_0/" in t.path and "gate" not in t.path
    )
    assert found(include=keras.layers.EinsumDense) == expected(
        lambda t: isinstance(t.layer, keras.layers.EinsumDense)
    )
    assert found(exclude=attention) == expected(
        lambda t: "attention" not in t.path
    )
    assert found(include=lambda t: t.contraction_size == 24) == expected(
        lambda t: "output_dense" in t.path
    )
    assert found(include="query", exclude=block) == expected(
        lambda t: "layer_0/self_attention/query" in t.path
    )
    # The place in the model does not depend on the choice.
    chosen = find_targets(model, include="gate")
    assert [t.depth for t in chosen] == [4, 11]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"include": ["query", "qeury"]},
            r"include='qeury'.*transformer_layer_0/self_attention/query",
        ),
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
