"""What every kind of reparameterization owes every layer that it takes."""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
from keras import ops

import keras_weightmods as kwm
from keras_weightmods.core import seam
from tests import models
from tests.backends import breadth
from tests.core.layers import Experts
from tests.models import make_sparse, normal, numpy, sequential

HAS_HUB = importlib.util.find_spec("keras_hub") is not None


class Kind(NamedTuple):
    """A kind, with the models of `LAYERS` that it takes."""

    attach: Callable[..., Any]
    takes: tuple[str, ...]
    end: Callable[..., Any] = kwm.fold
    finish: str = r"kwm\.fold\(model\)"
    is_exact: bool = False  # bit for bit at the start, and after the end


def compander(model, **kwargs):
    return kwm.attach_compander(model, learnable=True, **kwargs)


def fixed_compander(model, **kwargs):
    return kwm.attach_compander(model, a=2.0, **kwargs)


PRODUCTS = (
    *("dense", "first axis", "middle axis", "two axes"),
    *("axes apart", "axes swapped", "ellipsis", "transposed"),
)
PACKED = (*PRODUCTS, "attention", *(["llama"] if HAS_HUB else []))
CONTRACTED = (*PACKED, "conv1d", "conv2d", "separable", "experts")
ALL = (*CONTRACTED, "depthwise")
KINDS = {
    "scaling": Kind(kwm.attach_scaling, CONTRACTED, is_exact=True),
    "compander": Kind(compander, ALL),
    "fixed compander": Kind(fixed_compander, ALL),
    "weight norm": Kind(kwm.attach_weight_norm, ALL),
    "packing": Kind(kwm.pack, PACKED, kwm.unpack, r"unpack\(model\)", True),
}
FOLDED = [name for name, kind in KINDS.items() if kind.end is kwm.fold]
EVERY = [(kind, layer) for kind in KINDS for layer in KINDS[kind].takes]
EVERYWHERE = [
    place for place, (_, layer) in enumerate(EVERY) if layer == "dense"
]


@keras.saving.register_keras_serializable("tests.contract")
class KnownExperts(Experts):
    """Kernels in plain attributes, with a leading axis of experts."""


AXES = {"contraction_axes": (1,), "stack_axes": (0,)}
kwm.register_layer_kind(KnownExperts, {"gate": AXES, "bank": AXES})


def dense(**kwargs):
    return [
        keras.layers.Dense(8, activation="relu", **kwargs),
        keras.layers.Dense(4, use_bias=False),
    ]


def einsum(equation, output, bias=None):
    return lambda: [keras.layers.EinsumDense(equation, output, bias_axes=bias)]


LAYERS = {
    "dense": ((16,), dense),
    "first axis": ((5, 8), einsum("bqm,muh->bquh", (None, 2, 3), "uh")),
    "middle axis": ((5, 8), einsum("bqm,umh->bquh", (None, 2, 3))),
    "two axes": ((5, 2, 4), einsum("bquh,uhm->bqm", (None, 3), "m")),
    "axes apart": ((5, 2, 4), einsum("bquh,umh->bqm", (None, 3))),
    "axes swapped": ((5, 4, 2), einsum("bqhu,umh->bqm", (None, 3))),
    "ellipsis": ((3, 5, 8), einsum("...x,xy->...y", 7, "y")),
    "transposed": ((5, 8), einsum("bqx,xyz->bzqy", (3, None, 2))),
    "conv1d": ((7, 4), lambda: [keras.layers.Conv1D(3, 3)]),
    "conv2d": ((5, 5, 4), lambda: [keras.layers.Conv2D(3, 3, padding="same")]),
    "separable": ((5, 5, 8), lambda: [keras.layers.SeparableConv2D(3, 3)]),
    "depthwise": ((5, 5, 3), lambda: [keras.layers.DepthwiseConv2D(3)]),
    "experts": ((8,), lambda: [KnownExperts()]),
}


def make(layer, seed=0, **kwargs):
    if layer == "attention":
        return make_sparse(models.attention_net(), seed=seed)
    if layer == "llama":
        return make_sparse(models.backbone(num_layers=2), seed=seed)
    shape, layers = LAYERS[layer]
    return make_sparse(sequential(shape, *layers(**kwargs)), seed=seed)


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def model():
    return make("dense")


def trained(model, seed=3):
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if "float" in weight.dtype:
            weight.assign(weight * rng.uniform(0.8, 1.25, weight.shape))


def inputs_for(model, batch=2):
    if hasattr(model, "token_embedding"):
        tokens = np.arange(6 * batch).reshape(batch, 6)
        return {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    return normal(batch, *model.input_shape[1:])


def outputs(model, x=None):
    return models.outputs(model, inputs_for(model) if x is None else x)


def assert_close(found, expected, share=1e-6, exact=False):
    """Compare relative to the size: a unit in the last place of 2 is 2.4e-7."""
    atol = 0 if exact else share * max(1, np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def structure(model):
    layers = model._flatten_layers()
    return (
        [(type(layer), layer.name, layer.path) for layer in layers],
        [(id(w), w.path, w.trainable) for w in model.weights],
        [(w.regularizer, w.constraint) for w in model.weights],
    )


def state(model):
    values = [numpy(w).tobytes() for w in model.weights]
    return *structure(model), values


def rows(report):
    return report.kernels if hasattr(report, "kernels") else report.weights


@breadth(("kind", "layer"), EVERY, *EVERYWHERE, indirect=["kind"])
def test_attach_then_end(kind, layer):
    model = make(layer)
    before, config, plain = structure(model), model.to_json(), outputs(model)
    values = dict(zip((w.path for w in model.weights), model.get_weights()))
    kernels = {t.path: t for t in kwm.find_targets(model, depthwise=True)}

    report = kind.attach(model)
    assert rows(report)
    skipped = {each.path for each in report.skipped}
    assert {row.path for row in rows(report)} == set(kernels) - skipped
    assert len({w.path for w in model.weights}) == len(model.weights)
    assert [(x.name, x.path) for x in model._flatten_layers()] == [
        each[1:] for each in before[0]
    ]
    exact = kind.is_exact and kind.end is kwm.fold
    assert_close(outputs(model), plain, 2e-6, exact)
    for row in rows(report):
        target = kernels[row.path]
        assert tuple(row.shape) == target.shape
        kernel = getattr(target.layer, target.attribute)
        assert_close(numpy(kernel), values[row.path])
        stays = any(w is target.variable for w in model.weights)
        assert stays == (kind.end is kwm.fold)
    kind.end(model)
    for w in model.weights:
        assert_close(numpy(w), values[w.path], exact=kind.is_exact)

    kind.attach(model)
    trained(model)
    moved = outputs(model)
    assert np.abs(moved - plain).max() > 1e-3
    ended = rows(kind.end(model))
    assert [row.path for row in ended] == [row.path for row in rows(report)]
    assert_close(outputs(model), moved, 2e-6)
    assert (structure(model), model.to_json()) == (before, config)
    assert not any(hasattr(w, "reparameterization") for w in model.weights)
    assert not rows(kind.end(model))


IN_FILES = ("dense", "first axis", "attention", "experts", "depthwise")


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("kind", "layer"),
    [each for each in EVERY if each[1] in IN_FILES],
    indirect=["kind"],
)
def test_files(kind, layer, tmp_path):
    model, other = make(layer), make(layer, seed=5)
    checkpoint, file = tmp_path / "a.weights.h5", tmp_path / "a.kwm"
    kind.attach(model)
    trained(model)
    expected = outputs(model)

    model.save_weights(checkpoint)
    kind.attach(other)
    other.load_weights(checkpoint)
    np.testing.assert_array_equal(outputs(other), expected)

    kwm.save_model(model, file)
    loaded = kwm.load_model(file)
    np.testing.assert_allclose(outputs(loaded), expected, rtol=1e-6, atol=1e-6)
    assert rows(kind.end(model))
    for again in (other, loaded):
        assert rows(kind.end(again))
        found, wanted = again._flatten_layers(), model._flatten_layers()
        assert list(map(type, found)) == list(map(type, wanted))
        models.assert_same(again.get_weights(), model.get_weights())


@pytest.mark.one_backend
def test_checkpoints_of_something_else_are_refused(kind, model, tmp_path):
    plain = make("dense", seed=5)
    path = tmp_path / "a.weights.h5"
    plain.save_weights(path)
    kind.attach(model)
    before = state(model)
    with pytest.raises(ValueError, match=kind.finish):
        model.load_weights(path)
    assert state(model) == before
    for other in {*KINDS.values()} - {kind}:
        attached = make("dense")
        other.attach(attached)
        attached.save_weights(path)
        with pytest.raises(ValueError, match=r"could not be loaded|same"):
            model.load_weights(path)
        assert state(model) == before
    model.save_weights(path)
    before = state(plain)
    with pytest.raises(ValueError, match="could not be loaded"):
        plain.load_weights(path)
    assert state(plain) == before
    # Keras does not count the variables of these.
    for layer in plain.layers:
        layer.enable_lora(2)
    with pytest.raises(ValueError, match="could not be loaded"):
        plain.load_weights(path)


@pytest.mark.one_backend
@pytest.mark.filterwarnings("ignore:.*get_config")
@pytest.mark.filterwarnings("ignore:Layer InputLayer")
def test_keras_saves_clones_and_quantizes_after_the_end(kind, model, tmp_path):
    # Its config does not hold its layers.
    wrapper = models.Subclassed()
    wrapper(normal(1, 8))
    kind.attach(model)
    kind.attach(make_sparse(wrapper))
    trained(model)
    expected = outputs(model)
    either = rf"keras_weightmods\.save_model.*{kind.finish}"
    for each in (model, wrapper):
        with pytest.raises(ValueError, match=either):
            each.save(tmp_path / "a.keras")
    with pytest.raises(ValueError, match=either):
        keras.models.clone_model(model)
    with pytest.raises(NotImplementedError, match=kind.finish):
        model.layers[0].quantize("int8", type_check=False)
    with pytest.warns(UserWarning, match=kind.finish):
        model.quantize("int8")
    np.testing.assert_array_equal(outputs(model), expected)

    kind.end(model)
    model.save(tmp_path / "a.keras")
    loaded = keras.models.load_model(tmp_path / "a.keras")
    assert type(loaded.layers[0]) is keras.layers.Dense
    np.testing.assert_array_equal(outputs(loaded), outputs(model))
    model.quantize("int8")
    assert model.layers[0].quantization_mode == "int8"


WITH_LORA = [
    (kind, layer)
    for kind, layer in EVERY
    if layer in ("dense", "first axis", "two axes", "axes apart", "conv2d")
]


@breadth(("kind", "layer"), WITH_LORA, indirect=["kind"])
def test_lora_adds_to_the_effective_weight(kind, layer, tmp_path):
    model = make(layer)
    kind.attach(model)
    trained(model)
    before, layer = outputs(model), model.layers[0]
    kernel = numpy(layer.kernel)
    layer.enable_lora(2, lora_alpha=3)
    names = {w.name for w in layer.trainable_weights}
    assert names - {"bias"} == {"lora_kernel_a", "lora_kernel_b"}
    assert_close(outputs(model), before, 2e-6)

    rng = np.random.default_rng(3)
    a, b = layer.lora_kernel_a, layer.lora_kernel_b
    b.assign(rng.normal(size=b.shape) * 0.1)
    adapted = outputs(model)
    delta = np.float64(numpy(a)) @ np.float64(numpy(b)) * 1.5
    found = numpy(layer.kernel)
    np.testing.assert_allclose(found, kernel + delta, atol=1e-6)
    model.save_weights(tmp_path / "lora.weights.h5")
    b.assign(b * 0)
    model.load_weights(tmp_path / "lora.weights.h5")
    np.testing.assert_array_equal(outputs(model), adapted)
    kind.end(model)
    assert layer.lora_enabled
    assert not layer._kernel.trainable
    assert_close(outputs(model), adapted, 5e-6)

    # It may as well be there before.
    ids = [id(w) for w in model.weights]
    kind.attach(model)
    assert {w.name for w in layer.trainable_weights} == names
    assert_close(outputs(model), adapted, 5e-6)
    kind.end(model)
    assert [id(w) for w in model.weights] == ids


@pytest.mark.parametrize("kind", ["scaling", "packing"], indirect=True)
@breadth("policy", ["mixed_bfloat16", "float16"])
def test_low_precision(kind, policy):
    einsum = keras.layers.EinsumDense("bx,xy->by", 8, dtype=policy)
    dense = keras.layers.Dense(8, dtype=policy)
    model = make_sparse(sequential((16,), dense, einsum))
    plain, known = outputs(model), [id(w) for w in model.weights]
    share = 2**-6 if "bfloat16" in policy else 2**-9
    exact = kind.is_exact and kind.end is kwm.fold
    report = kind.attach(model)
    assert_close(outputs(model), plain, share, exact)
    dtype = keras.backend.standardize_dtype(model(inputs_for(model)).dtype)
    assert dtype == policy.split("_")[-1]
    # Steps near 1 are too coarse in 16 bits to train them.
    new = [w for w in model.weights if id(w) not in known]
    if kind.end is kwm.fold:
        assert {w.dtype for w in new} <= {"float32"}
        trained(model)
    else:
        kept = "bfloat16" if policy == "bfloat16" else "float32"
        assert {row.dtype for row in report.weights} == {kept}
    expected = outputs(model)
    kind.end(model)
    # The effective weight is computed in the variable's precision.
    exact &= policy.startswith("mixed")
    assert_close(outputs(model), expected, share, exact)
    assert [id(w) for w in model.weights] == known


@pytest.mark.one_backend
@pytest.mark.parametrize("kind", FOLDED, indirect=True)
def test_regularizer_sees_the_effective_weight(kind):
    own = keras.regularizers.L2(0.1)
    model = make("dense", kernel_regularizer=own, kernel_constraint="non_neg")
    before, layer = structure(model), model.layers[0]
    kind.attach(model)
    trained(model)
    kernel = np.float64(numpy(layer.kernel))
    for _ in range(2):
        loss = ops.convert_to_numpy(model.losses[0])
        np.testing.assert_allclose(loss, 0.1 * np.sum(kernel**2), rtol=1e-5)
        kind.end(model)
    assert structure(model) == before


@pytest.mark.filterwarnings("ignore:The model .* packed weights")
@pytest.mark.parametrize("kind", ["scaling", "packing"], indirect=True)
def test_compiled_functions_are_made_anew(kind, model):
    x = inputs_for(model, batch=8)
    plain = model.predict(x, verbose=0)
    kind.attach(model)
    # Twice: JAX donates the state of the first call.
    for _ in range(2):
        assert_close(model.predict(x, verbose=0), plain, 1e-5)
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    model.fit(x, np.ones((8, 4)), batch_size=8, verbose=0)
    expected = outputs(model, x)
    assert np.abs(expected - plain).max() > 1e-4
    kind.end(model)
    # The optimizer has state of weights that are gone.
    assert not model.compiled
    assert model.optimizer is None
    assert_close(model.predict(x, verbose=0), expected, 1e-5)


@pytest.mark.one_backend
def test_parameters_of_frozen_kernels_are_frozen(kind, model):
    model.layers[0].enable_lora(2)
    model.layers[1].trainable = False
    before = [w.path for w in model.trainable_weights]
    kind.attach(model)
    assert [w.path for w in model.trainable_weights] == before


@pytest.mark.one_backend
def test_errors_change_nothing(kind, model):
    before = state(model)
    for targets, message in (
        (kwm.find_targets(make("dense")), "`targets` must be"),
        ([], "no kernel that can be"),
    ):
        with pytest.raises(ValueError, match=message):
            kind.attach(model, targets=targets)
        assert state(model) == before
    if kind.end is kwm.fold:
        model.compile("sgd", "mse")
        model.optimizer.build(model.trainable_variables)
        with pytest.raises(ValueError, match="new optimizer"):
            kind.attach(model)
        assert state(model) == before


@pytest.mark.one_backend
@pytest.mark.parametrize("second", ["compander", "packing"])
def test_a_weight_is_reparameterized_once(kind, model, second):
    kind.attach(model)
    before = state(model)
    only_once = f"only once.*{kind.finish}"
    with pytest.raises(ValueError, match=f"{only_once}|packed; `unpack"):
        KINDS[second].attach(model)
    assert state(model) == before


@pytest.mark.one_backend
def test_a_failure_while_attaching_is_rolled_back(kind, model, monkeypatch):
    before = state(model)

    def fail(*args, **kwargs):
        raise MemoryError("no room")

    if kind.attach is fixed_compander:  # which adds no weight
        monkeypatch.setattr(seam, "_create_parameters", fail)
    else:
        monkeypatch.setattr(model.layers[-1], "add_weight", fail)
    with pytest.raises(MemoryError):
        kind.attach(model)
    assert state(model) == before
    with pytest.raises(ValueError, match="already built"):
        model.layers[0].add_weight(shape=())


@pytest.mark.one_backend
def test_a_layer_with_a_saver_of_its_own_and_a_shared_kernel_are_skipped(kind):
    class Counting(keras.layers.Dense):
        def save_own_variables(self, store):
            super().save_own_variables(store)
            store["calls"] = np.ones(())

    shared = keras.layers.Dense(8), keras.layers.Dense(8)
    model = sequential((16,), Counting(8), *shared, keras.layers.Dense(4))
    models.share_kernel(*shared)
    report = kind.attach(make_sparse(model))
    (row,) = rows(report)
    assert row.shape == (8, 4)
    reasons = [skip.reason for skip in report.skipped]
    assert "save_own_variables" in reasons[0]
    assert reasons[1:] == ["shared by several layers"]


@pytest.mark.one_backend
@pytest.mark.parametrize("kind", FOLDED, indirect=True)
def test_a_pattern_survives(kind, model):
    kwm.SemiStructuredSparse.attach(model)
    constraint = model.weights[0].constraint
    kind.attach(model)
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    model.fit(inputs_for(model, 8), np.ones((8, 4)), batch_size=8, verbose=0)
    kwm.assert_sparse(model)
    kwm.fold(model)
    kwm.assert_sparse(model)
    assert model.weights[0].constraint is constraint
    kind.attach(model)
    kwm.SemiStructuredSparse.detach(model)
    kwm.fold(model)
    assert model.weights[0].constraint is None


@pytest.mark.one_backend
def test_all_kinds_in_one_model_end_apart(tmp_path):
    layers = [keras.layers.Dense(8, kernel_regularizer="l2") for _ in range(5)]
    layers.append(kwm.CompanderDense(4))
    model = make_sparse(sequential((8,), *layers))
    targets = kwm.find_targets(model)
    for kind, target in zip(KINDS.values(), targets):
        kind.attach(model, targets=[target])
    trained(model)
    expected, loss = outputs(model), numpy(sum(model.losses))
    folded = {row.path for row in kwm.fold(model).kernels}
    assert folded == {t.path for t in (*targets[:4], targets[5])}
    assert_close(outputs(model), expected, 2e-6)
    assert_close(numpy(sum(model.losses)), loss, 1e-5)
    assert not rows(kwm.fold(model))
    assert len(kwm.unpack(model).weights) == 1
    assert {type(layer) for layer in model.layers} == {keras.layers.Dense}
    model.save(tmp_path / "plain.keras")
    loaded = keras.models.load_model(tmp_path / "plain.keras")
    np.testing.assert_array_equal(outputs(loaded), outputs(model))
