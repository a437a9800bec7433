"""Packing of stacks of kernels: experts of mixtures, and EinsumDense."""

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.core.reparameterization import reparameterizations
from keras_weightmods.packing.packed_parameters import PackedParameters
from tests import models
from tests.backends import breadth

X = {
    "token_ids": np.array([[3, 1, 4, 1, 5, 0], [9, 2, 6, 5, 3, 5]]),
    "padding_mask": np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]),
}
ON_TORCH = keras.backend.backend() == "torch"


def skip_most(family, chosen="qwen3_moe"):
    if not ON_TORCH and family != chosen:
        pytest.skip("the breadth is tested on torch, the fastest to start")


def mixture(family, **sizes):
    pytest.importorskip("keras_hub")
    model = models.causal_lm(family, **sizes)
    return models.make_sparse(models.randomize(model))


@pytest.mark.parametrize("family", models.MIXTURES)
def test_mixture_round_trip(family, tmp_path):
    skip_most(family)
    model = mixture(family)
    before, weights = models.outputs(model, X), models.weights_of(model)
    targets = kwm.find_targets(model)
    stacks = [target for target in targets if target.stack_axes]
    assert stacks
    report = kwm.pack(model)
    assert len(report.weights) == len(targets)
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(models.outputs(model, X), before, **close)
    assert not kwm.find_targets(model)
    kwm.assert_sparse(model, "2:4")

    kwm.save_model(model, tmp_path / "model")
    loaded = kwm.load_model(tmp_path / "model")
    models.assert_same(models.outputs(loaded, X), models.outputs(model, X))
    for each in (model, loaded):
        kwm.unpack(each)
        models.assert_same(each.get_weights(), weights)
        models.assert_same(models.outputs(each, X), before)


@pytest.mark.one_backend
@pytest.mark.parametrize("family", models.MIXTURES)
def test_generate_is_that_of_the_dense_model(family):
    skip_most(family)
    model = mixture(family, num_layers=2)
    model.compile(sampler="greedy")
    prompt = {key: value[:, :4] for key, value in X.items()}
    prompt = {
        "token_ids": np.pad(prompt["token_ids"], ((0, 0), (0, 4))),
        "padding_mask": np.pad(prompt["padding_mask"], ((0, 0), (0, 4))),
    }

    def generate():
        made = model.generate(prompt, stop_token_ids=None)
        return np.array(made["token_ids"])

    before = generate()
    kwm.pack(model)
    models.assert_same(generate(), before)
    kwm.unpack(model)
    models.assert_same(generate(), before)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_rounded_stacks_compute_with_what_they_give_back(dtype, activations):
    if activations == "int8" and dtype == "bfloat16":
        pytest.skip("int8 activations need integers")
    if not ON_TORCH and (dtype, activations) != ("int4", "int8"):
        pytest.skip("the breadth is tested on torch, the fastest to start")
    model = mixture("gpt_oss")
    # The head is not 2:4, which inputs in float do not multiply.
    report = kwm.pack(model, dtype, head=None, activations=activations)
    assert all(weight.rounding_error > 0 for weight in report.weights)
    packed = models.outputs(model, X)
    kwm.unpack(model)
    rounded = models.outputs(model, X)
    scale = np.abs(rounded).max()
    close = 1e-4 if activations == "float32" else 0.1
    np.testing.assert_allclose(packed, rounded, atol=close * scale)


def test_held_dense_without_compiled_kernels(monkeypatch, tmp_path):
    model = mixture("qwen3_moe")
    kwm.pack(model, dtype="int8")
    expected = models.outputs(model, X)
    kwm.save_model(model, tmp_path / "model")
    name = "keras_weightmods.packing.packed_parameters.reason_for_dense"
    monkeypatch.setattr(name, lambda: "no kernels in this test")
    loaded = kwm.load_model(tmp_path / "model")
    held = models.outputs(loaded, X)
    np.testing.assert_allclose(held, expected, rtol=1e-4, atol=1e-4)
    kwm.save_model(loaded, tmp_path / "again")
    monkeypatch.undo()
    again = kwm.load_model(tmp_path / "again")
    models.assert_same(models.outputs(again, X), expected)


@breadth(
    ("equation", "shape", "output_shape"),
    [
        ("bge,geh->bgh", (3, 8), (3, 5)),
        ("btge,egh->bght", (4, 3, 8), (3, 16, 4)),
        ("...ge,ghe->...gh", (4, 3, 8), (3, 7)),
    ],
    1,
)
def test_einsum_dense_with_a_stack(equation, shape, output_shape):
    keras.utils.set_random_seed(0)
    layer = keras.layers.EinsumDense(equation, output_shape)
    model = models.make_sparse(models.sequential(shape, layer))
    x = models.normal(2, *shape)
    before, weights = models.outputs(model, x), models.weights_of(model)
    kwm.pack(model)
    assert reparameterizations(model, PackedParameters)
    np.testing.assert_allclose(models.outputs(model, x), before, atol=1e-5)
    kwm.unpack(model)
    models.assert_same(model.get_weights(), weights)


def test_trained_values_of_a_stack_learn_and_keep_their_places():
    model = mixture("mixtral").backbone
    targets = [t for t in kwm.find_targets(model) if t.stack_axes]
    before = [models.numpy(t.variable) for t in targets]
    kwm.pack(model, targets=targets, trainable=True)
    models.fit_step(model, X, models.normal(*model(X).shape))
    kwm.unpack(model)
    for target, old in zip(targets, before):
        new = models.numpy(target.variable)
        assert not np.array_equal(new, old)
        np.testing.assert_array_equal(new[old == 0], 0)


def test_a_dense_stack_is_packed_in_integers_alone():
    pytest.importorskip("keras_hub")
    model = models.causal_lm("mixtral")
    before = models.outputs(model, X)
    with pytest.raises(ValueError, match="at most two nonzeros"):
        kwm.pack(model)
    models.assert_same(models.outputs(model, X), before)
    report = kwm.pack(model, "int8")
    assert {w.pattern for w in report.weights} == {None}
    packed = models.outputs(model, X)
    kwm.unpack(model)
    rounded = models.outputs(model, X)
    np.testing.assert_allclose(packed, rounded, atol=0.1 * rounded.max())
