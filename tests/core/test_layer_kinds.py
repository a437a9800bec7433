import contextlib

import keras
import numpy as np
import pytest
from keras import ops

import keras_weightmods as kwm
from keras_weightmods.core import layer_kinds
from keras_weightmods.core.layer_kinds import register_layer_kind
from keras_weightmods.core.products import Products
from keras_weightmods.core.targets import find_targets
from keras_weightmods.core.watched import called_by
from keras_weightmods.utils.report import Skipped
from tests import models
from tests.backends import breadth
from tests.core.layers import Experts, built
from tests.models import normal, numpy, sequential

LAST = {"data_format": "channels_last"}
FIRST = {"data_format": "channels_first"}
DEPTHWISE = "a depthwise kernel contracts no channels"


@breadth(
    ("equation", "input_shape", "output_shape", "contraction", "out", "stack"),
    [
        ("bqm,muh->bquh", (3, 4), (None, 2, 5), (0,), (1, 2), ()),
        ("bquh,uhm->bqm", (3, 2, 5), (None, 4), (0, 1), (2,), ()),
        ("btd,fd->btf", (3, 4), (None, 6), (1,), (0,), ()),
        ("btd,hdk->bthk", (3, 4), (None, 2, 5), (1,), (0, 2), ()),
        ("bthk,hdk->btd", (3, 2, 5), (None, 4), (0, 2), (1,), ()),
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


RECURRENT = {"SimpleRNN": 8, "LSTM": 32, "GRU": 24}


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("layer", "shape", "kernels"),
    [
        *(
            (
                getattr(keras.layers, f"Conv{rank}D")(6, 2, groups=2, **form),
                (6,) * rank + (4,) if form is LAST else (4,) + (6,) * rank,
                [((2,) * rank + (2, 6), tuple(range(rank + 1)))],
            )
            for rank in (1, 2, 3)
            for form in (LAST, FIRST)
        ),
        (
            keras.layers.SeparableConv1D(5, 2, depth_multiplier=2, **LAST),
            (6, 4),
            [((2, 4, 2), (0,)), ((1, 8, 5), (0, 1))],
        ),
        (
            keras.layers.SeparableConv2D(5, 2, **LAST),
            (6, 6, 4),
            [((2, 2, 4, 1), (0, 1)), ((1, 1, 4, 5), (0, 1, 2))],
        ),
        (
            keras.layers.DepthwiseConv2D(3, depth_multiplier=2, **LAST),
            (6, 6, 4),
            [((3, 3, 4, 2), (0, 1))],
        ),
        *(
            (
                keras.layers.Bidirectional(getattr(keras.layers, name)(8)),
                (5, 4),
                [((4, units), (0,)), ((8, units), (0,))] * 2,
            )
            for name, units in RECURRENT.items()
        ),
        (
            keras.layers.ConvLSTM2D(8, 3, **LAST),
            (2, 6, 6, 4),
            [((3, 3, 4, 32), (0, 1, 2)), ((3, 3, 8, 32), (0, 1, 2))],
        ),
    ],
)
def test_axes_of_other_layers(layer, shape, kernels):
    model = sequential(shape, layer)
    found = find_targets(model, depthwise=True)
    assert [(t.shape, t.contraction_axes) for t in found] == kernels
    for target in found:
        axes = target.contraction_axes + target.output_axes
        assert axes == tuple(range(len(target.shape)))
    assert not found.skipped
    targets = find_targets(model)
    depthwise = [t.path for t in found if "depthwise" in t.path]
    for target in found:
        # No function of `layer_calls` multiplies by them, or in cells.
        is_unread = "depthwise" in target.path or "cell" in target.path
        reason = layer_kinds.reason_unread(target.layer, target.attribute)
        assert (reason is not None) is is_unread, target.path
        assert "register_layer_kind" not in str(reason)  # does not help there
    assert targets.skipped == tuple(Skipped(p, DEPTHWISE) for p in depthwise)
    assert [t.path for t in targets] == [
        t.path for t in found if t.path not in depthwise
    ]


def kernel_axes(*axes, **others):
    return {"kernel": {"contraction_axes": axes, **others}}


@pytest.mark.one_backend
def test_most_derived_registration_wins():
    class Transposed(keras.layers.Dense):
        pass

    class Further(Transposed):
        pass

    layer = built(Further(3), 4)
    register_layer_kind(Transposed, kernel_axes(1))
    assert find_targets(layer)[0].contraction_axes == (1,)
    register_layer_kind(Further, kernel_axes(0, 1))
    assert find_targets(layer)[0].contraction_axes == (0, 1)
    register_layer_kind(keras.layers.Dense, kernel_axes(1))
    assert find_targets(layer)[0].contraction_axes == (0, 1)
    # What is left out by itself.
    layer = built(keras.layers.Embedding(6, 4))
    register_layer_kind(
        keras.layers.Embedding, {"embeddings": {"contraction_axes": (1,)}}
    )
    targets = find_targets(layer)
    assert [t.variable for t in targets] == [layer._embeddings]
    assert targets.skipped == ()


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("attribute", "axes", "message"),
    [
        ("gate", {"contraction_axes": (3,)}, "each of its 3 axes once"),
        ("gate", {"output_axes": (2,)}, r"output_axes=\(2,\).*'experts'"),
        ("gate", {"contraction_axes": lambda layer: 1}, "must be tuples"),
        ("gaet", {}, "`keras.Variable` .*'gaet'"),
        ("name", {}, "knows in 'experts'"),
    ],
)
def test_registrations_that_do_not_fit(attribute, axes, message):
    layer = built(Experts(name="experts"), 4)
    axes = {"contraction_axes": (1,)} | axes
    register_layer_kind(Experts, {attribute: axes})
    with pytest.raises(ValueError, match=message):
        find_targets(layer)


@keras.saving.register_keras_serializable("tests.kinds")
class Mixer(keras.layers.Layer):
    """A layer of a plug-in: a matrix in a table (out, in), and two experts."""

    def build(self, input_shape):
        width = input_shape[-1]
        self.mix = self.add_weight(shape=(16, width), name="mix")
        self.up = self.add_weight(shape=(2, 16, 8), name="up")

    def call(self, x):
        x = ops.tanh(ops.einsum("...i,oi->...o", x, self.mix))
        return ops.sum(ops.einsum("...i,eio->...eo", x, self.up), axis=-2)


def call_mixer(layer, multiply, x):
    x = ops.expand_dims(ops.tanh(multiply("mix", x)), -2)
    return ops.sum(multiply("up", x, stacked=True), axis=-2)


@pytest.fixture
def mixer():
    up = {
        "contraction_axes": lambda layer: (len(layer.up.shape) - 2,),
        "stack_axes": lambda layer: [0],
        "output_axes": (-1,),
    }
    mix = {"contraction_axes": (1,)}
    register_layer_kind(Mixer, {"mix": mix, "up": up}, call_mixer)
    keras.utils.set_random_seed(0)
    model = sequential((5, 16), Mixer(), keras.layers.Dense(4))
    targets = find_targets(model)
    assert [(t.stack_axes, t.contraction_axes) for t in targets] == [
        ((), (1,)),
        ((0,), (1,)),
        ((), (0,)),
    ]
    assert targets.skipped == ()
    return model


@pytest.mark.one_backend
def test_every_method_takes_a_kind_from_outside(mixer, tmp_path):
    model, x = mixer, normal(64, 5, 16)
    report = kwm.sparsify(model, "2:4", x, criterion="sparsegpt", verbose=0)
    assert [k.criterion for k in report.kernels] == ["sparsegpt"] * 3
    kwm.assert_sparse(model)
    report = kwm.quantize(model, x, refine=None, head=False, verbose=0)
    assert all(k.error <= k.nearest for k in report.kernels)
    before, weights = models.outputs(model, x), models.weights_of(model)
    report = kwm.pack(model, activations="float32")
    assert [(w.dtype, w.rounding_error) for w in report.weights] == [
        ("int4", 0)
    ] * 3
    np.testing.assert_allclose(models.outputs(model, x), before, atol=1e-5)
    kwm.save_model(model, tmp_path / "model")
    loaded = kwm.load_model(tmp_path / "model")
    models.assert_same(models.outputs(loaded, x), models.outputs(model, x))
    kwm.unpack(model)
    models.assert_same(models.weights_of(model), weights)


@pytest.mark.one_backend
def test_training_takes_a_kind_from_outside(mixer):
    model, x = mixer, normal(16, 5, 16)
    y = np.ones((16, 5, 4), "float32")
    lift = kwm.PrincipalMaskCallback(0.1, filter_rank=2)
    model.compile(kwm.SparseAdamW(0.1), "mse")
    before = models.weights_of(model)
    model.fit(x, y, verbose=0, callbacks=[lift])
    for old, new in zip(before[:2], models.weights_of(model)):
        assert 0 < np.mean(old != new) < 0.2
    model.compile("sgd", "mse")
    assert len(kwm.attach_compander(model, verbose=0).kernels) == 3
    outputs = models.outputs(model, x)
    kwm.fold(model)
    np.testing.assert_allclose(models.outputs(model, x), outputs, atol=1e-5)
    cast = kwm.CAST(model)
    cast.compile(loss="mse", jit_compile=models.JIT)
    cast.fit(x, y, verbose=0)
    cast.finalize()
    kwm.assert_sparse(model)


KINDS = [
    (keras.layers.Dense(6, activation="tanh"), (3, 4)),
    (keras.layers.EinsumDense("...x,xy->...y", 6, bias_axes="y"), (3, 4)),
    (keras.layers.EinsumDense("bquh,uhm->bqm", (3, 6)), (3, 2, 4)),
    (keras.layers.EinsumDense("bhqu,uhm->bmq", (6, 3)), (4, 3, 2)),
    (keras.layers.EinsumDense("bei,eio->boe", (5, 3)), (3, 4)),
    (keras.layers.EinsumDense("bnei,enio->beno", (3, 2, 5)), (2, 3, 4)),
    (keras.layers.Conv1D(6, 3, padding="causal", dilation_rate=2), (9, 4)),
    (keras.layers.Conv2D(6, (2, 3), (2, 1), "same"), (7, 6, 4)),
    (keras.layers.Conv2D(6, 2, groups=2, activation="relu"), (5, 5, 4)),
    (keras.layers.Conv3D(3, 2, padding="same", **LAST), (3, 4, 3, 2)),
    (keras.layers.SeparableConv2D(5, 3), (6, 7, 4)),
    (keras.layers.SeparableConv1D(5, 3, dilation_rate=2), (9, 4)),
    (keras.layers.Conv2DTranspose(3, 2, 2), (4, 4, 8)),
]
# On torch convolutions take their channels first too.
if keras.backend.backend() == "torch":
    KINDS += [
        (keras.layers.Conv2D(6, 3, padding="same", **FIRST), (4, 5, 6)),
        (keras.layers.Conv2D(6, 3, groups=2, **FIRST), (4, 5, 6)),
        (keras.layers.SeparableConv2D(5, 3, **FIRST), (4, 5, 6)),
    ]


@breadth(("layer", "shape"), KINDS, 2, 7)
def test_each_kind_is_called_as_its_class_is(layer, shape):
    model = models.randomize(sequential(shape, layer))
    x = normal(3, *shape)
    expected = numpy(model(x))
    seen = called_by_kind(model, x)
    np.testing.assert_allclose(seen, expected, rtol=1e-4, atol=1e-5)


def called_by_kind(model, x):
    called = []
    with contextlib.ExitStack() as stack:
        for layer in dict.fromkeys(t.layer for t in find_targets(model)):
            kind = layer_kinds.kind_with_call(layer)
            assert kind.reason(layer) is None

            def call(plain, *args, kind=kind, layer=layer, **kwargs):
                called.append(layer)
                return kind.call(layer, Products(layer, plain), *args, **kwargs)

            stack.enter_context(called_by(layer, call))
        outputs = models.outputs(model, x)
    assert called
    return outputs


@pytest.mark.one_backend
@pytest.mark.parametrize("family", [*models.MIXTURES, "gemma4_moe"])
def test_banks_of_experts_are_called_as_their_classes_are(family):
    pytest.importorskip("keras_hub")
    model = models.randomize(models.backbone(family), scale=1.0)
    ids = np.random.default_rng(0).integers(1, 20, (4, 8))
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    if "gemma4" in family:
        x["position_ids"] = np.broadcast_to(np.arange(8), ids.shape)
    expected = models.outputs(model, x)
    found = called_by_kind(model, x)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.one_backend
def test_the_bank_of_another_keras_hub_is_refused(monkeypatch):
    pytest.importorskip("keras_hub")
    model = models.make_sparse(models.backbone("mixtral"))
    monkeypatch.setattr(layer_kinds, "KERAS_HUB", "0.31")
    report = kwm.pack(model)
    reasons = {s.reason for s in report.skipped if "expert" in s.path}
    assert len(reasons) == 1
    assert "of MixtralMoeExperts of KerasHub 0.32" in reasons.pop()


@pytest.mark.one_backend
def test_low_rank_parts_of_rwkv7():
    hub = pytest.importorskip("keras_hub")
    ranks = dict.fromkeys(("gate_lora", "mv_lora", "aaa_lora", "decay_lora"), 8)
    model = hub.models.RWKV7Backbone(16, 8, 2, 20, 32, **ranks)
    targets = find_targets(model)
    own = [t.attribute for t in targets if t.attribute != "kernel"]
    first = ["w1", "w2", "a1", "a2", "g1", "g2"]
    second = ["w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2"]
    assert own == first + second
    reasons = [s.reason for s in targets.skipped if "embedding" not in s.reason]
    assert reasons == ["multiplied entry by entry, and not contracted"] * 2
