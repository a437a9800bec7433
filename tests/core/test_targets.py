import re

import keras
import pytest

from keras_weightmods.core.layer_kinds import register_layer_kind
from keras_weightmods.core.targets import (
    Targets,
    find_targets,
    resolve_targets,
    target_of,
)
from keras_weightmods.core.weight_keys import weight_keys
from keras_weightmods.sparsity.scaling import attach_scaling
from keras_weightmods.utils.report import Skipped
from tests.core.layers import (
    Block,
    Experts,
    assert_unchanged,
    built,
    keys,
    names,
    reasons,
    state_of,
)
from tests.models import backbone, mlp, sequential

one_backend = pytest.mark.one_backend


def share_kernel(layer, variable):
    layer._tracker.unlock()
    layer._kernel = variable
    layer._tracker.lock()


@one_backend
def test_what_is_shared_appears_once_and_not_if_it_is_an_embedding():
    tokens = keras.layers.Embedding(7, 4)
    head = keras.layers.EinsumDense("btd,vd->btv", (None, 7))
    model = sequential((5,), tokens, head, dtype="int32")
    share_kernel(head, tokens._embeddings)
    targets = find_targets(model)
    assert len(targets) == 0
    assert "embedding" in reasons(targets)[tokens._embeddings.path]

    shared = keras.layers.Dense(4, name="shared")
    between = keras.layers.Dense(4, name="between")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, shared(between(shared(inputs))))
    assert names(find_targets(model)) == ["shared", "between"]

    model = mlp(4, 4, 4, use_bias=False)
    first, second = model.layers
    share_kernel(second, first._kernel)
    (target,) = find_targets(model)
    assert target.variable is first._kernel


@one_backend
def test_keys_tell_equal_paths_apart():
    # Built by themselves, both are named from the root.
    layers = [built(keras.layers.Dense(4, name="o_proj"), 4) for _ in "ab"]
    model = sequential((4,), *(sequential((4,), layer) for layer in layers))
    targets = find_targets(model)
    assert len(targets) == len({target.key for target in targets}) == 2
    for target in targets:
        position, path = target.key.split(":")
        assert model.weights[int(position)] is target.variable
        assert path == target.path == "o_proj/kernel"
        assert targets[target.key] is target


def test_keras_hub_models():
    model = backbone("llama3", num_layers=2)
    state = state_of(model)
    targets = find_targets(model)
    assert_unchanged(model, state)
    assert [(t.path, t.shape, t.contraction_axes) for t in targets] == [
        (f"transformer_layer_{i}/{name}/kernel", shape, axes)
        for i in range(2)
        for name, shape, axes in (
            ("self_attention/query", (16, 2, 8), (0,)),
            ("self_attention/key", (16, 1, 8), (0,)),
            ("self_attention/value", (16, 1, 8), (0,)),
            ("self_attention/attention_output", (2, 8, 16), (0, 1)),
            ("feedforward_gate_dense", (16, 24), (0,)),
            ("feedforward_intermediate_dense", (16, 24), (0,)),
            ("feedforward_output_dense", (24, 16), (0,)),
        )
    ]
    embeddings = "embeddings", "reverse_embeddings"
    assert sorted(reasons(targets)) == [
        f"token_embedding/{name}" for name in embeddings
    ]


@one_backend
def test_subclasses_exchanged_classes_and_lora():
    class MyDense(keras.layers.Dense):
        pass

    model = sequential((4,), Block(), MyDense(3, name="mine"))
    model.layers[0].gate.__class__ = type("Dense", (keras.layers.Dense,), {})
    model.layers[1].enable_lora(2)
    targets = find_targets(model)
    assert names(targets) == ["gate", "up", "down", "mine"]
    assert targets[3].variable is model.layers[1]._kernel
    attach_scaling(model, groups=2)
    after = find_targets(model)
    assert [t.variable for t in after] == [t.variable for t in targets]
    assert targets.skipped == after.skipped == ()


@one_backend
@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_unknown_is_skipped_with_a_way_out(frozen):
    class Gated(keras.layers.Dense):
        def build(self, input_shape):
            self.gate = self.add_weight((input_shape[-1], self.units))
            super().build(input_shape)

        def call(self, x):
            return super().call(x) * keras.ops.matmul(x, self.gate)

    model = sequential((4,), gated := Gated(4), experts := Experts())
    model.trainable = not frozen
    targets = find_targets(model)
    assert [t.variable for t in targets] == [gated._kernel]
    unknown = [gated.gate, experts.gate, experts.bank]
    found = reasons(targets)
    assert list(found) == [variable.path for variable in unknown]
    for reason, name in zip(found.values(), ["Gated", "Experts", "Experts"]):
        assert name in reason
        assert "register_layer_kind" in reason

    register_layer_kind(Gated, {"gate": {"contraction_axes": (0,)}})
    targets = find_targets(gated)
    assert {t.attribute for t in targets} == {"kernel", "gate"}
    assert targets.skipped == ()


@one_backend
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_layers_are_skipped(mode):
    model = sequential((4,), Block(), keras.layers.Dense(4, name="kept"))
    model.layers[0].gate.quantize(mode)
    model.layers[0].up.quantize(mode)
    targets = find_targets(model)
    assert names(targets) == ["down", "kept"]
    assert list(reasons(targets).values()) == [f"quantized to {mode}"] * 2


@one_backend
def test_resolve_targets():
    model, other = (
        sequential((4,), Block(), keras.layers.Dense(2)) for _ in range(2)
    )
    targets = find_targets(model)
    assert keys(resolve_targets(model)) == keys(targets)
    same = resolve_targets(model, targets)
    assert isinstance(same, Targets)
    assert list(same) == list(targets)
    assert same.skipped == targets.skipped
    first, second = targets[:2]
    twice = resolve_targets(model, [second, first, second])
    assert list(twice) == [second, first]
    assert len(resolve_targets(model, [])) == 0
    with pytest.raises(ValueError, match=r"4 targets that it does not hold"):
        resolve_targets(other, targets)
    assert keys(resolve_targets(model, ["gate", "up"])) == keys(targets[:2])
    assert names(resolve_targets(model, Block)) == ["gate", "up", "down"]


@one_backend
def test_target_of():
    embedding = built(keras.layers.Embedding(6, 4))
    target = target_of(embedding, "embeddings")
    assert target.contraction_axes == (1,)
    assert target.key == f"0:{embedding.embeddings.path}"
    depthwise = keras.layers.DepthwiseConv2D(2)
    model = sequential((6, 6, 1), keras.layers.Conv2D(2, 3), depthwise)
    target = target_of(depthwise, keys=weight_keys(model), depth=1)
    (_, expected) = find_targets(model, depthwise=True)
    assert vars(target) == vars(expected)
    with pytest.raises(ValueError, match="`register_layer_kind` knows"):
        target_of(embedding, "bias")


@one_backend
def test_targets_are_a_sequence_that_prints():
    targets = find_targets(sequential((4,), Block(), Experts()))
    some = targets[1:]
    assert isinstance(some, Targets)
    assert list(some) == [targets[i] for i in (1, 2)]
    assert some.skipped == targets.skipped
    for part in ("3 targets", "gate/kernel", "(4, 8)", "register_layer_kind"):
        assert part in repr(targets)
    assert targets.to_dict()["targets"][0]["contraction_axes"] == [0]

    first, second = targets = find_targets(mlp(8, 6, 4))
    assert first.reason_not_nm(4) is None
    fitting = targets.select(lambda target: target.reason_not_nm(4))
    assert list(fitting) == [first]
    assert fitting.skipped == (Skipped(second.path, second.reason_not_nm(4)),)
    assert "6 is not a multiple of m=4" in second.reason_not_nm(4)


class TwoWays(keras.layers.Layer):
    """Holds two layers, and uses one, or both where Keras cannot see it."""

    def __init__(self, hidden=False, **kwargs):
        super().__init__(**kwargs)
        self.hidden = hidden
        self.used, self.unused = (keras.layers.Dense(8) for _ in range(2))

    def build(self, input_shape):
        self.used.build(input_shape)

    def call(self, x):
        return self.unused(self.used(x)) if self.hidden else self.used(x)

    # Keras does not run `call` on symbols then.
    def compute_output_shape(self, input_shape):
        return input_shape


@one_backend
def test_unbuilt_models():
    with pytest.raises(ValueError, match=r"must be built.*Dense|dense"):
        find_targets(keras.Sequential([keras.layers.Dense(3)]))
    layer = TwoWays(hidden=True)
    model = sequential((8,), layer, keras.layers.Dense(2))
    with pytest.raises(ValueError, match=f"not built: {layer.unused.name}"):
        find_targets(model)
    assert not layer.unused.built


@one_backend
def test_a_layer_that_is_never_called_is_no_target():
    layer = TwoWays()
    inner = sequential((8,), layer)
    model = sequential((8,), inner, keras.layers.Dense(2))
    targets = find_targets(model)
    assert [t.layer for t in targets] == [layer.used, model.layers[-1]]
    reason = "not built, as the model does not call it"
    assert targets.skipped == (Skipped(layer.unused.path, reason),)


@one_backend
def test_a_layer_outside_of_the_graph_is_no_target():
    class Backbone(keras.Model):
        """Like KerasHub's SAM, it holds a layer for a task to call."""

        def __init__(self):
            inputs = keras.Input((None,))
            # No size that is tried fits, so symbolic tensors show nothing.
            x = keras.layers.Reshape((-1, 3))(inputs)
            used = keras.layers.Dense(4)
            super().__init__(inputs, used(x))
            self.used = used
            self.decoder = TwoWays(hidden=True)

    backbone = Backbone()
    inputs = keras.Input((9,))
    for model in (backbone, keras.Model(inputs, backbone(inputs))):
        targets = find_targets(model)
        assert [t.layer for t in targets] == [backbone.used]
        reasons = [skip.reason for skip in targets.skipped]
        assert reasons == ["not built, as the model does not call it"] * 2


@one_backend
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
    for kwargs, message in (
        ({"include": ["query", "qeury"]}, r"='qeury'.*self_attention/query"),
        ({"include": "token_embedding"}, r"Left out: token_embedding/"),
        ({"include": keras.layers.Conv2D}, r"matches none of 14"),
    ):
        with pytest.raises(ValueError, match=message):
            find_targets(model, **kwargs)
