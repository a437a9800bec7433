import keras
import numpy as np
import pytest

from keras_weightmods.core import target_rules
from keras_weightmods.core.target_rules import register_target
from keras_weightmods.core.targets import find_targets
from keras_weightmods.utils.report import Skipped
from tests import models
from tests.backends import breadth
from tests.core.layers import Block, Experts, built
from tests.models import normal, numpy, sequential

LAST = {"data_format": "channels_last"}
DEPTHWISE = "a depthwise kernel contracts no channels"


@breadth(
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
    layer.build((2, *input_shape))
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
    ("layer", "shape"),
    [
        (keras.layers.Dense(5), (4,)),
        (keras.layers.EinsumDense("bqm,muh->bquh", (3, 2, 5)), (3, 4)),
        (keras.layers.EinsumDense("bquh,uhm->bqm", (None, 4)), (3, 2, 5)),
        (keras.layers.EinsumDense("...x,xy->...y", (6,)), (3, 4)),
        (keras.layers.EinsumDense("bthk,hdk->btd", (3, 4)), (3, 2, 5)),
        # Each kernel is as large as its input: one position.
        (keras.layers.Conv1D(5, 3, **LAST), (3, 4)),
        (keras.layers.Conv2D(5, (2, 3), **LAST), (2, 3, 4)),
    ],
)
def test_contraction_axes_compute_the_output(layer, shape):
    x = normal(2, *shape)
    y = numpy(layer(x))
    (target,) = find_targets(layer)
    assert target.variable is layer._kernel
    count = len(target.contraction_axes)
    last = tuple(range(x.ndim - count, x.ndim))
    kernel = np.float64(numpy(target.variable))
    reference = np.tensordot(x, kernel, (last, target.contraction_axes))
    np.testing.assert_allclose(y.reshape(reference.shape), reference, atol=1e-5)


def test_stack_axes_compute_the_output():
    layer = keras.layers.EinsumDense("ebd,edf->ebf", (None, 6))
    x = normal(3, 2, 4)
    y = numpy(layer(x))
    (target,) = find_targets(layer)
    assert (target.stack_axes, target.contraction_axes) == ((0,), (1,))
    for expert, kernel in enumerate(np.float64(numpy(target.variable))):
        np.testing.assert_allclose(y[expert], x[expert] @ kernel, atol=1e-5)


def test_einsum_dense_without_contraction_is_skipped():
    layer = keras.layers.EinsumDense("abc,bc->abc", (3, 4))
    layer.build((2, 3, 4))
    targets = find_targets(layer)
    assert len(targets) == 0
    assert "contracts none" in targets.skipped[0].reason


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_conv(rank, data_format):
    cls = getattr(keras.layers, f"Conv{rank}D")
    layer = cls(6, 2, groups=2, data_format=data_format)
    shape = [6] * rank
    shape.insert(rank if data_format == "channels_last" else 0, 4)
    (target,) = find_targets(built(layer, *shape))
    assert target.shape == (2,) * rank + (2, 6)
    assert target.contraction_axes == tuple(range(rank + 1))
    assert target.output_axes == (rank + 1,)
    assert target.contraction_size == 2**rank * 2


@pytest.mark.parametrize("rank", [1, 2])
def test_separable_conv(rank):
    cls = getattr(keras.layers, f"SeparableConv{rank}D")
    layer = built(cls(5, 2, depth_multiplier=2, **LAST), *(6,) * rank, 4)
    (target,) = targets = find_targets(layer)
    assert target.variable is layer.pointwise_kernel
    assert target.attribute == "pointwise_kernel"
    assert target.contraction_axes == tuple(range(rank + 1))
    assert target.output_axes == (rank + 1,)
    assert target.contraction_size == 8
    assert targets.skipped == (Skipped(layer.depthwise_kernel.path, DEPTHWISE),)


@pytest.mark.parametrize("rank", [1, 2])
def test_depthwise_kernels_where_asked_for(rank):
    depthwise = getattr(keras.layers, f"DepthwiseConv{rank}D")
    separable = getattr(keras.layers, f"SeparableConv{rank}D")
    layers = depthwise(3, depth_multiplier=2, **LAST), separable(5, 2, **LAST)
    model = sequential((6,) * rank + (4,), *layers)
    targets = find_targets(model)
    assert [t.attribute for t in targets] == ["pointwise_kernel"]
    assert {s.reason for s in targets.skipped} == {DEPTHWISE}
    found = find_targets(model, depthwise=True)
    axes, channels = tuple(range(rank)), (rank, rank + 1)
    assert [(t.shape, t.contraction_axes, t.output_axes) for t in found] == [
        ((3,) * rank + (4, 2), axes, channels),
        ((2,) * rank + (8, 1), axes, channels),
        ((1,) * rank + (8, 5), (*axes, rank), (rank + 1,)),
    ]
    assert not found.skipped


def test_register_stack_of_experts():
    axes = {"output_axes": (-1,), "stack_axes": (0,)}
    register_target(Experts, "gate", contraction_axes=(1,), **axes)
    register_target(
        Experts,
        "bank",
        contraction_axes=lambda layer: (len(layer.bank.shape) - 2,),
        stack_axes=lambda layer: [0],
    )
    targets = find_targets(sequential((4,), Block(), layer := Experts()))
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

    layer = built(Further(3), 4)
    register_target(Transposed, contraction_axes=(1,))
    assert find_targets(layer)[0].contraction_axes == (1,)
    register_target(Further, contraction_axes=(0, 1))
    assert find_targets(layer)[0].contraction_axes == (0, 1)
    register_target(keras.layers.Dense, contraction_axes=(1,))
    assert find_targets(layer)[0].contraction_axes == (0, 1)
    plain = built(keras.layers.Dense(3), 4)
    assert find_targets(plain)[0].contraction_axes == (1,)


def test_registration_overrides_what_is_left_out():
    layer = built(keras.layers.Embedding(6, 4))
    register_target(keras.layers.Embedding, "embeddings", contraction_axes=(1,))
    targets = find_targets(layer)
    assert [t.variable for t in targets] == [layer._embeddings]
    assert targets.skipped == ()


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (("Dense",), {}, "`layer_class` must be"),
        ((int,), {}, "`layer_class` must be"),
        ((Experts, 3), {}, "`attribute` must be"),
        ((Experts, "a.b"), {}, "`attribute` must be"),
        ((Experts,), {"contraction_axes": 0}, "`contraction_axes` must be a"),
        ((Experts,), {"contraction_axes": ("0",)}, "`contraction_axes` must"),
        ((Experts,), {"contraction_axes": ()}, "at least one in"),
        ((Experts,), {"stack_axes": None}, "`stack_axes` must be"),
        ((Experts,), {"stack_axes": (1,)}, "named once"),
    ],
)
def test_register_target_errors(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        register_target(*args, **{"contraction_axes": (1,)} | kwargs)
    assert Experts not in {cls for cls, _ in target_rules._RULES}


@pytest.mark.parametrize(
    ("attribute", "kwargs", "message"),
    [
        ("gate", {"contraction_axes": (3,)}, "each of its 3 axes once"),
        ("gate", {"output_axes": (2,)}, r"output_axes=\(2,\) for .* 'experts'"),
        ("gate", {"contraction_axes": (-2, 1)}, "each of its 3 axes once"),
        ("gate", {"contraction_axes": lambda layer: 1}, "must be tuples"),
        ("gaet", {}, "`keras.Variable` .*'gaet'"),
        ("name", {}, "knows in 'experts'"),
    ],
)
def test_registrations_that_do_not_fit(attribute, kwargs, message):
    layer = built(Experts(name="experts"), 4)
    register_target(Experts, attribute, **{"contraction_axes": (1,)} | kwargs)
    with pytest.raises(ValueError, match=message):
        find_targets(layer)


@pytest.mark.parametrize("name", ["SimpleRNN", "LSTM", "GRU"])
def test_recurrent_cells(name):
    layer = getattr(keras.layers, name)(8)
    model = sequential((5, 4), keras.layers.Bidirectional(layer))
    targets = find_targets(model)
    gates = {"SimpleRNN": 1, "LSTM": 4, "GRU": 3}[name]
    shapes = [(4, 8 * gates), (8, 8 * gates)] * 2
    assert [target.shape for target in targets] == shapes
    assert {target.contraction_axes for target in targets} == {(0,)}
    assert not targets.skipped


@pytest.mark.one_backend
def test_convolutional_lstm():
    layer = keras.layers.ConvLSTM2D(8, 3, name="lstm")
    targets = find_targets(sequential((2, 6, 6, 4), layer))
    shapes = [(3, 3, 4, 32), (3, 3, 8, 32)]
    assert [target.shape for target in targets] == shapes
    assert {target.contraction_axes for target in targets} == {(0, 1, 2)}
    assert not targets.skipped


@pytest.mark.one_backend
def test_low_rank_parts_of_rwkv7():
    hub = pytest.importorskip("keras_hub")
    model = hub.models.RWKV7Backbone(
        vocabulary_size=20,
        num_layers=2,
        hidden_size=16,
        head_size=8,
        intermediate_dim=32,
        gate_lora=8,
        mv_lora=8,
        aaa_lora=8,
        decay_lora=8,
    )
    targets = find_targets(model)
    own = [t.attribute for t in targets if t.attribute != "kernel"]
    first = ["w1", "w2", "a1", "a2", "g1", "g2"]
    second = ["w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2"]
    assert own == first + second
    reasons = [s.reason for s in targets.skipped if "embedding" not in s.reason]
    assert reasons == ["multiplied entry by entry, and not contracted"] * 2


@pytest.mark.one_backend
def test_gated_delta_net_has_a_depthwise_kernel():
    pytest.importorskip("keras_hub")
    model = models.backbone(
        "qwen3_5_moe",
        layer_types=["linear_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    targets = find_targets(model)
    (skipped,) = [s for s in targets.skipped if "conv1d" in s.path]
    assert skipped.reason == DEPTHWISE
    (target,) = [
        target
        for target in find_targets(model, depthwise=True)
        if target.attribute == "conv1d_weight"
    ]
    assert target.contraction_axes == (1,)
