import keras
import keras_hub
import numpy as np
import pytest

from keras_weightmods.core import target_rules
from keras_weightmods.core.target_rules import register_target
from keras_weightmods.core.targets import (
    Skipped,
    Targets,
    find_targets,
    resolve_targets,
    target_of,
)
from keras_weightmods.core.weight_keys import weight_keys
from keras_weightmods.sparsity.scaling import attach_scaling


def paths(targets):
    return [target.path for target in targets]


def names(targets):
    return [target.layer.name for target in targets]


def reasons(targets):
    return {skip.path: skip.reason for skip in targets.skipped}


def state_of(model):
    """All that the layers hold, by identity, and the weights by value."""
    layers = model._flatten_layers()
    return (
        [(layer, type(layer), dict(vars(layer))) for layer in layers],
        model.get_weights(),
    )


def assert_unchanged(model, state):
    layers, weights = state
    assert [layer for layer, _, _ in layers] == model._flatten_layers()
    for layer, cls, attributes in layers:
        assert type(layer) is cls
        assert vars(layer).keys() == attributes.keys()
        for name, value in attributes.items():
            assert vars(layer)[name] is value, f"{layer.name}.{name}"
        assert "call" not in vars(layer)
    for before, after in zip(weights, model.get_weights()):
        np.testing.assert_array_equal(before, after)


class Block(keras.layers.Layer):
    """Declares its parts, and so its weights, against the order of use."""

    def __init__(self, width=4, **kwargs):
        super().__init__(**kwargs)
        self.down = keras.layers.Dense(width, name="down")
        self.up = keras.layers.Dense(2 * width, name="up")
        self.gate = keras.layers.Dense(2 * width, name="gate")

    def build(self, input_shape):
        wide = (*input_shape[:-1], 2 * input_shape[-1])
        self.down.build(wide)
        self.up.build(input_shape)
        self.gate.build(input_shape)
        super().build(input_shape)

    def call(self, x):
        return self.down(keras.ops.silu(self.gate(x)) * self.up(x))


class Experts(keras.layers.Layer):
    def build(self, input_shape):
        width = input_shape[-1]
        self.gate = self.add_weight(shape=(2, width, 3), name="gate")
        self.bank = self.add_weight(shape=(2, 3, width), name="bank")
        self.bank_bias = self.add_weight(shape=(2, width), name="bank_bias")

    def call(self, x):
        hidden = keras.ops.einsum("bi,eio->ebo", x, self.gate)
        out = keras.ops.einsum("ebo,eoi->ebi", hidden, self.bank)
        return keras.ops.sum(out + self.bank_bias[:, None], axis=0)


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    """What a test registers is gone after it."""
    rules = {cls: dict(r) for cls, r in target_rules._RULES.items()}
    monkeypatch.setattr(target_rules, "_RULES", rules)


@pytest.mark.parametrize(
    ("equation", "input_shape", "output_shape", "contraction", "out", "stack"),
    [
        ("bqm,muh->bquh", (3, 4), (None, 2, 5), (0,), (1, 2), ()),
        ("bquh,uhm->bqm", (3, 2, 5), (None, 4), (0, 1), (2,), ()),
        ("btd,df->btf", (3, 4), (None, 6), (0,), (1,), ()),
        ("btd,fd->btf", (3, 4), (None, 6), (1,), (0,), ()),
        ("btd,hdk->bthk", (3, 4), (None, 2, 5), (1,), (0, 2), ()),
        ("btd,dhk->bthk", (3, 4), (None, 2, 15), (0,), (1, 2), ()),
        ("bthk,hdk->btd", (3, 2, 5), (None, 4), (0, 2), (1,), ()),
        ("...x,xy->...y", (3, 4), (6,), (0,), (1,), ()),
        ("...xz,zxy->...y", (3, 4, 2), (6,), (0, 1), (2,), ()),
        ("ab...,bc->ac...", (4, 3), (6,), (0,), (1,), ()),
        ("bte,etf->btf", (3, 4), (3, 6), (0,), (2,), (1,)),
        ("ebd, edf -> ebf", (3, 4), (3, 6), (1,), (2,), (0,)),
    ],
)
def test_einsum_dense_axes(
    equation, input_shape, output_shape, contraction, out, stack
):
    # Keras takes no blanks when it builds the layer.
    layer = keras.layers.EinsumDense(equation.replace(" ", ""), output_shape)
    batch = 2
    x = np.random.default_rng(0).normal(size=(batch, *input_shape))
    layer.build(x.shape)
    layer.equation = equation
    (target,) = find_targets(layer)
    assert target.variable is layer._kernel
    assert target.contraction_axes == contraction
    assert target.output_axes == out
    assert target.stack_axes == stack
    assert target.contraction_size == np.prod(
        [layer.kernel.shape[axis] for axis in contraction]
    )


@pytest.mark.parametrize(
    ("equation", "input_shape", "output_shape"),
    [
        ("bqm,muh->bquh", (3, 4), (None, 2, 5)),
        ("bquh,uhm->bqm", (3, 2, 5), (None, 4)),
        ("...x,xy->...y", (3, 4), (6,)),
        ("bthk,hdk->btd", (3, 2, 5), (None, 4)),
    ],
)
def test_contraction_axes_compute_the_output(
    equation, input_shape, output_shape
):
    layer = keras.layers.EinsumDense(equation, output_shape)
    x = np.random.default_rng(0).normal(size=(2, *input_shape))
    x = x.astype("float32")
    y = keras.ops.convert_to_numpy(layer(x))
    (target,) = find_targets(layer)
    kernel = keras.ops.convert_to_numpy(target.variable.value)
    count = len(target.contraction_axes)
    last = tuple(range(x.ndim - count, x.ndim))
    reference = np.tensordot(x, kernel, (last, target.contraction_axes))
    np.testing.assert_allclose(y, reference, rtol=1e-5, atol=1e-6)


def test_stack_axes_compute_the_output():
    layer = keras.layers.EinsumDense("ebd,edf->ebf", (None, 6))
    x = np.random.default_rng(0).normal(size=(3, 2, 4)).astype("float32")
    y = keras.ops.convert_to_numpy(layer(x))
    (target,) = find_targets(layer)
    kernel = keras.ops.convert_to_numpy(target.variable.value)
    (stack,) = target.stack_axes
    (contraction,) = target.contraction_axes
    for expert in range(3):
        one = np.take(kernel, expert, axis=stack)
        axis = contraction - (stack < contraction)
        reference = np.tensordot(x[expert], one, ((1,), (axis,)))
        np.testing.assert_allclose(y[expert], reference, rtol=1e-5, atol=1e-6)


def test_einsum_dense_without_contraction_is_skipped():
    layer = keras.layers.EinsumDense("abc,bc->abc", (3, 4))
    layer.build((2, 3, 4))
    targets = find_targets(layer)
    assert len(targets) == 0
    assert "contracts none" in targets.skipped[0].reason


def test_dense():
    layer = keras.layers.Dense(3)
    layer.build((2, 4))
    (target,) = find_targets(layer)
    assert target.layer is layer
    assert target.variable is layer._kernel
    assert target.attribute == "kernel"
    assert target.path == layer._kernel.path
    assert target.shape == (4, 3)
    assert target.contraction_size == 4
    assert (target.contraction_axes, target.output_axes) == ((0,), (1,))
    assert target.depth == 0
    assert target.key == f"0:{target.path}"


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_conv(rank, data_format):
    cls = getattr(keras.layers, f"Conv{rank}D")
    layer = cls(6, 2, groups=2, data_format=data_format)
    spatial = (6,) * rank
    layer.build(
        (1, *spatial, 4) if data_format == "channels_last" else (1, 4, *spatial)
    )
    (target,) = find_targets(layer)
    assert target.shape == (2,) * rank + (2, 6)
    assert target.contraction_axes == tuple(range(rank + 1))
    assert target.output_axes == (rank + 1,)
    assert target.contraction_size == 2**rank * 2


def test_conv_contraction_axes_compute_the_output():
    layer = keras.layers.Conv2D(5, (2, 3), data_format="channels_last")
    x = np.random.default_rng(0).normal(size=(1, 2, 3, 4)).astype("float32")
    y = keras.ops.convert_to_numpy(layer(x))
    (target,) = find_targets(layer)
    kernel = keras.ops.convert_to_numpy(target.variable.value)
    reference = np.tensordot(x[0], kernel, ((0, 1, 2), target.contraction_axes))
    np.testing.assert_allclose(y[0, 0, 0], reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 2])
def test_separable_conv(rank):
    cls = getattr(keras.layers, f"SeparableConv{rank}D")
    layer = cls(5, 2, depth_multiplier=2, data_format="channels_last")
    layer.build((1, *(6,) * rank, 4))
    targets = find_targets(layer)
    (target,) = targets
    assert target.variable is layer.pointwise_kernel
    assert target.attribute == "pointwise_kernel"
    assert target.contraction_axes == tuple(range(rank + 1))
    assert target.output_axes == (rank + 1,)
    assert target.contraction_size == 8
    assert targets.skipped == (
        Skipped(
            layer.depthwise_kernel.path,
            "a depthwise kernel contracts no channels",
        ),
    )


@pytest.mark.parametrize("rank", [1, 2])
def test_depthwise_conv_is_skipped(rank):
    layer = getattr(keras.layers, f"DepthwiseConv{rank}D")(2)
    layer.build((1, *(6,) * rank, 6))
    targets = find_targets(layer)
    assert len(targets) == 0
    assert "depthwise" in reasons(targets)[layer.kernel.path]


@pytest.mark.parametrize(
    "layer",
    [
        keras.layers.MultiHeadAttention(2, 4),
        keras.layers.GroupQueryAttention(4, 2, 1),
    ],
    ids=["mha", "gqa"],
)
def test_attention(layer):
    inputs = keras.Input((5, 8))
    model = keras.Model(inputs, layer(inputs, inputs))
    targets = find_targets(model)
    assert names(targets) == ["query", "key", "value", "attention_output"]
    assert [t.contraction_axes for t in targets] == [(0,)] * 3 + [(0, 1)]
    assert [t.output_axes for t in targets] == [(1, 2)] * 3 + [(2,)]
    # Norms and biases need no mention, in rank 2 neither.
    assert targets.skipped == ()


def test_embeddings_and_norms_are_left_out():
    inputs = keras.Input((5,), dtype="int32")
    x = keras.layers.Embedding(7, 4, name="tokens")(inputs)
    x = keras.layers.LayerNormalization()(x)
    head = keras.layers.ReversibleEmbedding(7, 4, tie_weights=False)
    head.build((None, 5))
    model = keras.Model(inputs, head(x, reverse=True))
    targets = find_targets(model)
    assert len(targets) == 0
    assert set(reasons(targets)) == {
        "tokens/embeddings",
        head.embeddings.path,
        head.reverse_embeddings.path,
    }
    assert all("embedding" in reason for reason in reasons(targets).values())


def test_kernel_tied_to_an_embedding_is_left_out():
    tokens = keras.layers.Embedding(7, 4)
    head = keras.layers.EinsumDense("btd,vd->btv", (None, 7))
    inputs = keras.Input((5,), dtype="int32")
    model = keras.Model(inputs, head(tokens(inputs)))
    head._tracker.unlock()
    head._kernel = tokens._embeddings
    head._tracker.lock()
    targets = find_targets(model)
    assert len(targets) == 0
    assert "embedding" in reasons(targets)[tokens._embeddings.path]


def test_shared_layer_appears_once_at_its_first_use():
    shared = keras.layers.Dense(4, name="shared")
    inputs = keras.Input((4,))
    x = shared(inputs)
    x = keras.layers.Dense(4, name="between")(x)
    model = keras.Model(inputs, shared(x))
    assert names(find_targets(model)) == ["shared", "between"]


def test_shared_variable_appears_once():
    first = keras.layers.Dense(4, use_bias=False, name="first")
    second = keras.layers.Dense(4, use_bias=False, name="second")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, second(first(inputs)))
    second._tracker.unlock()
    second._kernel = first._kernel
    second._tracker.lock()
    targets = find_targets(model)
    assert targets[0].variable is first._kernel
    assert len([t for t in targets if t.variable is first._kernel]) == 1


def test_keys_tell_equal_paths_apart():
    inputs = keras.Input((4,))
    # Built by themselves, both are named from the root.
    layers = [keras.layers.Dense(4, name="o_proj") for _ in range(2)]
    for layer in layers:
        layer.build((None, 4))
    inner = [
        keras.Model(inputs, layer(inputs), name=f"block_{i}")
        for i, layer in enumerate(layers)
    ]
    model = keras.Model(inputs, inner[1](inner[0](inputs)))
    targets = find_targets(model)
    assert paths(targets) == ["o_proj/kernel", "o_proj/kernel"]
    assert len({target.key for target in targets}) == 2
    for target in targets:
        position, path = target.key.split(":")
        assert model.weights[int(position)] is target.variable
        assert path == target.path
        assert targets[target.key] is target


def test_order_of_execution_in_nested_models():
    inputs = keras.Input((4,))
    inner = keras.Sequential(
        [keras.Input((4,)), Block(name="a"), keras.layers.Dense(4, name="b")]
    )
    nested = keras.Model(inputs, inner(Block(name="c")(inputs)), name="nested")
    model = keras.Model(inputs, Block(name="d")(nested(inputs)))
    targets = find_targets(model)
    for path, end in zip(
        paths(targets),
        [
            *("c/gate", "c/up", "c/down"),
            *("a/gate", "a/up", "a/down", "b"),
            *("d/gate", "d/up", "d/down"),
        ],
    ):
        assert path.endswith(f"{end}/kernel")
    assert [target.depth for target in targets] == list(range(10))


class OneInput(keras.Model):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def call(self, x):
        return self.block(x)


class TwoInputs(keras.Model):
    def __init__(self):
        super().__init__()
        self.last = keras.layers.Dense(2, name="last")
        self.block = Block()
        self.seen = None

    def build(self, first_shape, second_shape):
        self.block.build(first_shape)
        self.last.build(first_shape)
        super().build(first_shape)

    def call(self, first, second):
        self.seen = first
        return self.last(self.block(first) + second["x"])


@pytest.mark.parametrize("functional", [True, False])
def test_order_of_execution_in_subclassed_models(functional):
    x = np.zeros((2, 4), "float32")
    if functional:
        inputs = keras.Input((4,), name="x")
        model = keras.Model({"x": inputs}, Block()(inputs))
    else:
        model = OneInput()
        model(x)
    assert names(find_targets(model)) == ["gate", "up", "down"]


def test_order_of_execution_with_several_inputs():
    model = TwoInputs()
    x = np.zeros((2, 4), "float32")
    model(x, {"x": x})
    model.seen = None
    state = state_of(model)
    assert names(find_targets(model)) == ["gate", "up", "down", "last"]
    assert_unchanged(model, state)


def test_layers_that_do_not_run_come_last():
    class Partial(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.unused = keras.layers.Dense(4, name="unused")
            self.block = Block()

        def build(self, input_shape):
            self.unused.build(input_shape)
            self.block.build(input_shape)

        def call(self, x):
            return self.block(x)

    inputs = keras.Input((4,))
    model = keras.Model(inputs, Partial()(inputs))
    assert names(find_targets(model)) == ["gate", "up", "down", "unused"]


def test_declared_order_where_the_model_does_not_run():
    class Broken(keras.layers.Layer):
        fails = False

        def __init__(self):
            super().__init__()
            self.block = Block()

        def build(self, input_shape):
            self.block.build(input_shape)

        def call(self, x):
            x = self.block(x)
            if self.fails:
                raise RuntimeError("not on symbols")
            return x

    layer = Broken()
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layer(inputs))
    assert names(find_targets(model)) == ["gate", "up", "down"]
    Broken.fails = True
    state = state_of(model)
    assert names(find_targets(model)) == ["down", "up", "gate"]
    assert_unchanged(model, state)


def test_open_dimensions():
    inputs = keras.Input((None, None, 3))
    x = inputs
    for width in (4, 6, 8):
        x = keras.layers.Conv2D(
            width, 3, strides=2, data_format="channels_last"
        )(x)
    x = keras.layers.GlobalAveragePooling2D(data_format="channels_last")(x)
    model = keras.Model(inputs, Block(8)(x))
    found = names(find_targets(model))
    assert found[-3:] == ["gate", "up", "down"]


def llama():
    return keras_hub.models.Llama3Backbone(
        vocabulary_size=11,
        num_layers=2,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=12,
    )


def gpt2():
    return keras_hub.models.GPT2Backbone(
        vocabulary_size=11,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=12,
        max_sequence_length=6,
    )


def gemma():
    return keras_hub.models.GemmaBackbone(
        vocabulary_size=11,
        num_layers=2,
        num_query_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        hidden_dim=8,
        intermediate_dim=24,
    )


@pytest.mark.parametrize(
    ("backbone", "block", "kernels", "left_out"),
    [
        (
            llama,
            "transformer_layer_",
            {
                "self_attention/query": ((8, 2, 4), (0,)),
                "self_attention/key": ((8, 1, 4), (0,)),
                "self_attention/value": ((8, 1, 4), (0,)),
                "self_attention/attention_output": ((2, 4, 8), (0, 1)),
                "feedforward_gate_dense": ((8, 12), (0,)),
                "feedforward_intermediate_dense": ((8, 12), (0,)),
                "feedforward_output_dense": ((12, 8), (0,)),
            },
            [
                "token_embedding/embeddings",
                "token_embedding/reverse_embeddings",
            ],
        ),
        (
            gpt2,
            "transformer_layer_",
            {
                "self_attention/query": ((8, 2, 4), (0,)),
                "self_attention/key": ((8, 2, 4), (0,)),
                "self_attention/value": ((8, 2, 4), (0,)),
                "self_attention/attention_output": ((2, 4, 8), (0, 1)),
                "feedforward_intermediate_dense": ((8, 12), (0,)),
                "feedforward_output_dense": ((12, 8), (0,)),
            },
            ["token_embedding/embeddings", "position_embedding/embeddings"],
        ),
        (
            gemma,
            "decoder_block_",
            {
                "attention/query": ((2, 8, 4), (1,)),
                "attention/key": ((1, 8, 4), (1,)),
                "attention/value": ((1, 8, 4), (1,)),
                "attention/attention_output": ((2, 4, 8), (0, 1)),
                "ffw_gating": ((8, 12), (0,)),
                "ffw_gating_2": ((8, 12), (0,)),
                "ffw_linear": ((12, 8), (0,)),
            },
            ["token_embedding/embeddings"],
        ),
    ],
    ids=["llama", "gpt2", "gemma"],
)
def test_keras_hub_backbones(backbone, block, kernels, left_out):
    model = backbone()
    state = state_of(model)
    targets = find_targets(model)
    assert_unchanged(model, state)
    assert [(t.path, t.shape, t.contraction_axes) for t in targets] == [
        (f"{block}{i}/{name}/kernel", shape, axes)
        for i in range(2)
        for name, (shape, axes) in kernels.items()
    ]
    for target in targets:
        assert sorted(target.contraction_axes + target.output_axes) == list(
            range(len(target.shape))
        )
    assert sorted(reasons(targets)) == sorted(left_out)


def test_keras_hub_causal_lm():
    backbone = llama()
    task = keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)
    assert [t.variable for t in find_targets(task)] == [
        t.variable for t in find_targets(backbone)
    ]


def test_lora_leaves_the_stored_kernel():
    inputs = keras.Input((4,))
    layer = keras.layers.Dense(3)
    model = keras.Model(inputs, layer(inputs))
    layer.enable_lora(2)
    targets = find_targets(model)
    (target,) = targets
    assert target.variable is layer._kernel
    assert targets.skipped == ()


def test_subclasses_and_exchanged_classes():
    class MyDense(keras.layers.Dense):
        pass

    inputs = keras.Input((4,))
    layer = MyDense(3)
    other = Block()
    model = keras.Model(inputs, layer(other(inputs)))
    other.gate.__class__ = type("Dense", (keras.layers.Dense,), {})
    targets = find_targets(model)
    assert [t.layer for t in targets] == [
        other.gate,
        other.up,
        other.down,
        layer,
    ]


def test_scaled_layers():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, Block()(inputs))
    before = find_targets(model)
    attach_scaling(model, groups=2)
    after = find_targets(model)
    assert [t.variable for t in after] == [t.variable for t in before]
    assert after.skipped == ()


def test_second_kernel_of_a_subclass_is_skipped_with_a_way_out():
    class Gated(keras.layers.Dense):
        def build(self, input_shape):
            self.gate = self.add_weight(
                shape=(input_shape[-1], self.units), name="gate"
            )
            super().build(input_shape)

        def call(self, x):
            return super().call(x) * keras.ops.matmul(x, self.gate)

    layer = Gated(3)
    layer.build((None, 4))
    targets = find_targets(layer)
    assert [t.variable for t in targets] == [layer._kernel]
    assert "register_target" in reasons(targets)[layer.gate.path]

    register_target(Gated, "gate", contraction_axes=(0,))
    targets = find_targets(layer)
    assert {t.attribute for t in targets} == {"kernel", "gate"}
    assert targets.skipped == ()


@pytest.mark.parametrize("frozen", [False, True])
def test_unknown_layers_are_skipped_with_a_way_out(frozen):
    inputs = keras.Input((4,))
    layer = Experts(name="experts")
    model = keras.Model(inputs, layer(inputs))
    model.trainable = not frozen
    targets = find_targets(model)
    assert len(targets) == 0
    assert set(reasons(targets)) == {layer.gate.path, layer.bank.path}
    for reason in reasons(targets).values():
        assert "Experts" in reason
        assert "register_target" in reason


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_layers_are_skipped(mode):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, Block()(inputs))
    kept = keras.layers.Dense(4, name="kept")
    model = keras.Model(inputs, kept(model(inputs)))
    for layer in model._flatten_layers():
        if layer.name in ("gate", "up"):
            layer.quantize(mode)
    targets = find_targets(model)
    assert names(targets) == ["down", "kept"]
    assert list(reasons(targets).values()) == [f"quantized to {mode}"] * 2


def test_unbuilt_models():
    with pytest.raises(ValueError, match=r"must be built.*Dense|dense"):
        find_targets(keras.Sequential([keras.layers.Dense(3)]))

    class Half(keras.Model):
        def __init__(self):
            super().__init__()
            self.made = keras.layers.Dense(3)
            self.missing = keras.layers.Dense(3, name="missing")

        def build(self, input_shape):
            self.made.build(input_shape)
            self.built = True

    model = Half()
    model.build((None, 4))
    with pytest.raises(ValueError, match=r"1 layers are not built: missing"):
        find_targets(model)
    with pytest.raises(ValueError, match="Keras model or layer"):
        find_targets([model])


def test_include_and_exclude():
    model = llama()
    everything = find_targets(model)

    def found(**kwargs):
        return [target.key for target in find_targets(model, **kwargs)]

    def expected(test):
        return [target.key for target in everything if test(target)]

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
    assert found(include=lambda t: t.contraction_size == 12) == expected(
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
        find_targets(llama(), **kwargs)


def test_register_stack_of_experts():
    register_target(
        Experts,
        "gate",
        contraction_axes=(1,),
        output_axes=(-1,),
        stack_axes=(0,),
    )
    register_target(
        Experts,
        "bank",
        contraction_axes=lambda layer: (len(layer.bank.shape) - 2,),
        stack_axes=lambda layer: [0],
    )
    inputs = keras.Input((4,))
    layer = Experts()
    model = keras.Model(inputs, layer(Block()(inputs)))
    targets = find_targets(model)
    assert [t.attribute for t in targets] == ["kernel"] * 3 + ["gate", "bank"]
    for target in targets[3:]:
        assert target.layer is layer
        assert target.variable is getattr(layer, target.attribute)
        assert target.contraction_axes == (1,)
        assert target.output_axes == (2,)
        assert target.stack_axes == (0,)
    assert targets.skipped == ()


def test_most_derived_registration_wins():
    class Transposed(keras.layers.Dense):
        pass

    class Further(Transposed):
        pass

    layer = Further(3)
    layer.build((None, 4))
    register_target(Transposed, contraction_axes=(1,))
    assert find_targets(layer)[0].contraction_axes == (1,)
    register_target(Further, contraction_axes=(0, 1))
    assert find_targets(layer)[0].contraction_axes == (0, 1)
    register_target(keras.layers.Dense, contraction_axes=(1,))
    assert find_targets(layer)[0].contraction_axes == (0, 1)
    plain = keras.layers.Dense(3)
    plain.build((None, 4))
    assert find_targets(plain)[0].contraction_axes == (1,)


def test_registration_overrides_what_is_left_out():
    layer = keras.layers.Embedding(6, 4)
    layer.build((None,))
    register_target(keras.layers.Embedding, "embeddings", contraction_axes=(1,))
    targets = find_targets(layer)
    assert [t.variable for t in targets] == [layer._embeddings]
    assert targets.skipped == ()


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (("Dense",), {"contraction_axes": (0,)}, "`layer_class` must be"),
        ((int,), {"contraction_axes": (0,)}, "`layer_class` must be"),
        ((Experts, 3), {"contraction_axes": (0,)}, "`attribute` must be"),
        ((Experts, "a.b"), {"contraction_axes": (0,)}, "`attribute` must be"),
        ((Experts,), {"contraction_axes": 0}, "`contraction_axes` must be a"),
        ((Experts,), {"contraction_axes": ("0",)}, "`contraction_axes` must"),
        ((Experts,), {"contraction_axes": ()}, "at least one axis"),
        (
            (Experts,),
            {"contraction_axes": (1,), "stack_axes": None},
            "`stack_axes` must be",
        ),
        (
            (Experts,),
            {"contraction_axes": (1,), "stack_axes": (1,)},
            "named once",
        ),
    ],
)
def test_register_target_errors(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        register_target(*args, **kwargs)
    assert Experts not in target_rules._RULES


@pytest.mark.parametrize(
    ("attribute", "kwargs", "message"),
    [
        ("gate", {"contraction_axes": (3,)}, "each of its 3 axes once"),
        (
            "gate",
            {"contraction_axes": (1,), "output_axes": (2,)},
            r"stack_axes=\(\) for layer 'experts'",
        ),
        ("gate", {"contraction_axes": (-2, 1)}, "each of its 3 axes once"),
        ("gate", {"contraction_axes": lambda layer: 1}, "must be tuples"),
        ("gaet", {"contraction_axes": (1,)}, r"`keras.Variable` in `gaet`"),
        ("name", {"contraction_axes": (1,)}, r"name='experts'"),
    ],
)
def test_registrations_that_do_not_fit(attribute, kwargs, message):
    layer = Experts(name="experts")
    layer.build((None, 4))
    register_target(Experts, attribute, **kwargs)
    with pytest.raises(ValueError, match=message):
        find_targets(layer)


def test_resolve_targets():
    model, other = (
        keras.Sequential([keras.Input((4,)), Block(), keras.layers.Dense(2)])
        for _ in range(2)
    )
    targets = find_targets(model)
    assert [t.key for t in resolve_targets(model, None)] == [
        t.key for t in targets
    ]
    same = resolve_targets(model, targets)
    assert isinstance(same, Targets)
    assert list(same) == list(targets)
    assert same.skipped == targets.skipped
    first, second = targets[:2]
    assert list(resolve_targets(model, [second, first, second])) == [
        second,
        first,
    ]
    assert len(resolve_targets(model, [])) == 0
    with pytest.raises(ValueError, match=r"4 targets that it does not hold"):
        resolve_targets(other, targets)
    assert [t.key for t in resolve_targets(model, ["gate", "up"])] == [
        first.key,
        second.key,
    ]
    assert list(names(resolve_targets(model, Block))) == ["gate", "up", "down"]
    with pytest.raises(ValueError, match="`targets` must match a target"):
        resolve_targets(model, "typo")
    for wrong in (first, [first, first.variable], 3):
        with pytest.raises(ValueError, match="`targets` must be a regular"):
            resolve_targets(model, wrong)


def test_target_of():
    embedding = keras.layers.Embedding(6, 4)
    embedding.build()
    target = target_of(embedding, "embeddings")
    assert target.contraction_axes == (1,)
    assert target.key == f"0:{embedding.embeddings.path}"
    depthwise = keras.layers.DepthwiseConv2D(2)
    model = keras.Sequential(
        [keras.Input((6, 6, 1)), keras.layers.Conv2D(2, 3), depthwise]
    )
    target = target_of(depthwise, keys=weight_keys(model), depth=1)
    (_, expected) = find_targets(model, depthwise=True)
    assert vars(target) == vars(expected)
    for attribute in ("bias", "reverse_embeddings", 3):
        with pytest.raises(ValueError, match="whose axes are known"):
            target_of(embedding, attribute)


def test_select():
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(6), keras.layers.Dense(4)]
    )
    first, second = targets = find_targets(model)
    assert first.reason_not_nm(4) is None
    fitting = targets.select(lambda target: target.reason_not_nm(4))
    assert list(fitting) == [first]
    assert fitting.skipped == (Skipped(second.path, second.reason_not_nm(4)),)
    assert "6 is not a multiple of m=4" in second.reason_not_nm(4)


def test_targets_sequence():
    model = keras.Sequential([keras.Input((4,)), Block(), Experts()])
    targets = find_targets(model)
    assert len(targets) == 3
    assert [targets[i] for i in range(3)] == list(targets)
    assert targets[-1] is targets[2]
    assert targets[0] in targets
    some = targets[1:]
    assert isinstance(some, Targets)
    assert list(some) == list(targets)[1:]
    assert some.skipped == targets.skipped
    assert targets[targets[1].key] is targets[1]
    with pytest.raises(KeyError, match="no such"):
        targets["no such"]
    with pytest.raises(AttributeError):
        targets.skipped = ()
    with pytest.raises(AttributeError):
        targets[0].depth = 3


def test_print():
    model = keras.Sequential([keras.Input((4,)), Block(), Experts()])
    text = repr(find_targets(model))
    for part in ("3 targets", "gate/kernel", "(4, 8)", "register_target"):
        assert part in text
    layers = [keras.layers.Dense(4, name=f"dense_{i}") for i in range(210)]
    targets = find_targets(keras.Sequential([keras.Input((4,)), *layers]))
    assert len(str(targets).splitlines()) <= 30
    assert all(f"dense_{i}/" in targets.table() for i in range(210))
    assert str(Targets(())) == "0 targets"
    assert repr(targets[0]).startswith("Target(attribute='kernel'")
    first = targets.to_dict()["targets"][0]
    assert first["key"] == targets[0].key
    assert first["contraction_axes"] == [0]


def test_depthwise_kernels_where_asked_for():
    model = keras.Sequential(
        [
            keras.Input((6, 6, 4)),
            keras.layers.DepthwiseConv2D(3, depth_multiplier=2),
            keras.layers.SeparableConv2D(5, 2),
        ]
    )
    assert [t.attribute for t in find_targets(model)] == ["pointwise_kernel"]
    found = find_targets(model, depthwise=True)
    assert [(t.shape, t.contraction_axes, t.output_axes) for t in found] == [
        ((3, 3, 4, 2), (0, 1), (2, 3)),
        ((2, 2, 8, 1), (0, 1), (2, 3)),
        ((1, 1, 8, 5), (0, 1, 2), (3,)),
    ]
    assert not found.skipped
