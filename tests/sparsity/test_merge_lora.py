import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from tests import models
from tests.models import make_sparse, normal, numpy, sequential

one_backend = pytest.mark.one_backend


def make_model():
    keras.utils.set_random_seed(0)
    return sequential(
        (3, 8, 4),
        keras.layers.Conv2D(8, 2, padding="same", name="conv"),
        keras.layers.Reshape((24, 8)),
        keras.layers.EinsumDense("btd,dhk->bthk", (24, 2, 4), name="heads"),
        keras.layers.EinsumDense("bthk,hkd->btd", (24, 8), name="joined"),
        keras.layers.Dense(6, name="dense"),
        keras.layers.Dense(3, name="odd"),
    )


ADAPTED = "conv", "heads", "joined", "dense"
X = normal(4, 3, 8, 4)


def adapt(model):
    random = np.random.default_rng(1)
    expected = {}
    for name in ADAPTED:
        layer = model.get_layer(name)
        base = numpy(layer.kernel).astype("float64")
        layer.enable_lora(2, lora_alpha=3)
        factors = layer.lora_kernel_a, layer.lora_kernel_b
        for v in factors:
            v.assign(0.3 * random.normal(size=v.shape))
        a, b = (numpy(v).astype("float64") for v in factors)
        change = np.tensordot(a, b, 1) * 3 / 2
        expected[name] = base, base + change
    return expected


def kernels(model):
    return {name: numpy(model.get_layer(name).kernel) for name in ADAPTED}


@one_backend
def test_dense_merge_computes_the_same():
    model = make_model()
    expected = adapt(model)
    before = numpy(model(X))
    names = [v.path.split("/", 1)[1] for v in make_model().weights]
    report = kwm.merge_lora(model)
    assert [k.path.split("/")[-2] for k in report.kernels] == list(ADAPTED)
    for name, kernel in kernels(model).items():
        np.testing.assert_allclose(kernel, expected[name][1], atol=1e-5)
    np.testing.assert_allclose(numpy(model(X)), before, rtol=1e-4, atol=1e-5)
    assert [v.path.split("/", 1)[1] for v in model.weights] == names
    assert all(v.trainable for v in model.weights)
    configs = [layer.get_config() for layer in model.layers]
    assert not any(config.get("lora_rank") for config in configs)


def test_merge_ends_exactly_sparse():
    model = make_model()
    make_sparse(model)
    expected = adapt(model)
    kwm.merge_lora(model, "2:4")
    targets = kwm.find_targets(model, exclude="odd")
    kwm.assert_sparse(model, "2:4", targets=targets)
    for name, kernel in kernels(model).items():
        base, merged = expected[name]
        wanted = np.where(base != 0, merged, 0)
        np.testing.assert_allclose(kernel, wanted, atol=1e-5)


@one_backend
def test_fit_merge_and_adapt_again():
    model = make_model()
    make_sparse(model)
    kernel = model.get_layer("dense")._kernel
    for _ in range(2):
        for name in ADAPTED:
            model.get_layer(name).enable_lora(2)
        model.compile(keras.optimizers.Adam(1e-2), "mse")
        frozen = numpy(kernel)
        model.fit(X, normal(4, 24, 3, seed=2), epochs=2, verbose=0)
        np.testing.assert_array_equal(numpy(kernel), frozen)
        kwm.merge_lora(model, pattern="2:4")
        assert not model.compiled
        kwm.assert_sparse(model)
        assert np.abs(numpy(kernel) - frozen).max() > 0
        np.testing.assert_array_equal(numpy(kernel)[frozen == 0], 0)


@one_backend
def test_embedding_and_mixed_precision():
    layers = keras.layers.Embedding(7, 8), keras.layers.Dense(4)
    model = sequential((None,), *layers, dtype="int32")
    wanted = []
    for layer, name in zip(model.layers, ("embeddings", "kernel")):
        layer.dtype_policy = keras.DTypePolicy("mixed_bfloat16")
        layer.enable_lora(2)
        factors = [getattr(layer, f"lora_{name}_{which}") for which in "ab"]
        a, b = (normal(*v.shape, seed=3) for v in factors)
        factors[0].assign(a)
        factors[1].assign(b)
        base = getattr(layer, f"_{name}")
        wanted.append((base, numpy(base) + a.astype("float64") @ b))
    kwm.merge_lora(model)
    # Not rounded to bfloat16, which the layers compute in.
    for base, value in wanted:
        np.testing.assert_allclose(numpy(base), value, rtol=1e-5)


@one_backend
def test_errors_leave_the_model_alone():
    model = make_model()
    with pytest.raises(ValueError, match="without any"):
        kwm.merge_lora(model)
    adapt(model)
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"exactly 2:4.*4 that are not"):
        kwm.merge_lora(model, "2:4")
    models.assert_same(model.get_weights(), before)


@one_backend
def test_packed_and_quantized_layers_are_refused():
    model = models.mlp(8, 4)
    make_sparse(model)
    kwm.pack(model)
    model.layers[0].enable_lora(2)
    with pytest.raises(ValueError, match="unpack"):
        kwm.merge_lora(model, pattern="2:4")
    kwm.unpack(model)
    kwm.merge_lora(model, pattern="2:4")
    kwm.assert_sparse(model)
    model.layers[0].enable_lora(2)
    model.quantize("int8")
    with pytest.raises(ValueError, match="before `quantize`"):
        kwm.merge_lora(model)
