"""The layers with a compander: as the plain ones, but for how they train."""

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from tests.backends import breadth
from tests.models import fit_step, normal, numpy, outputs, sequential

# Within the range of every function at a = 0.5.
DRAW = keras.initializers.RandomUniform(-0.48, 0.48, seed=1)
KERNEL = {"kernel_initializer": DRAW}
DEPTHWISE = {"depthwise_initializer": DRAW}
LAYERS = {
    "Dense": ((3,), {"activation": "tanh", **KERNEL}, (6,)),
    "EinsumDense": (
        ("bqm,muh->bquh", (None, 2, 3)),
        {"bias_axes": "uh", **KERNEL},
        (4, 5),
    ),
    "Conv1D": ((4, 3), {"padding": "causal", **KERNEL}, (7, 2)),
    "Conv2D": ((4, 3), {"groups": 2, **KERNEL}, (6, 6, 4)),
    "Conv3D": ((2, 2), {"strides": 2, **KERNEL}, (4, 4, 4, 2)),
    "DepthwiseConv2D": ((3,), {"depth_multiplier": 2, **DEPTHWISE}, (5, 5, 2)),
}


def make(name, companded=True, **kwargs):
    args, own, shape = LAYERS[name]
    module, prefix = (kwm, "Compander") if companded else (keras.layers, "")
    layer = getattr(module, prefix + name)(*args, **own, **kwargs)
    return sequential(shape, layer)


def inputs_for(model):
    return normal(4, *model.input_shape[1:])


def train(model):
    x = inputs_for(model)
    y = np.ones(model(x).shape, "float32")
    fit_step(model, x, y, keras.optimizers.Adam(0.02))


@breadth("name", LAYERS)
def test_starts_as_the_plain_layer_saves_loads_and_folds(name, tmp_path):
    model = make(name, learnable=True)
    plain = make(name, companded=False)
    layer = model.layers[0]
    x = inputs_for(model)
    before = outputs(plain, x)
    np.testing.assert_allclose(outputs(model, x), before, rtol=0, atol=1e-6)
    assert isinstance(layer, type(plain.layers[0]))
    assert layer.compander.outside == 0

    train(model)
    assert layer.compander.a != pytest.approx(0.5, abs=1e-4)
    assert layer.compander.b != pytest.approx(1.0, abs=1e-4)
    trained = outputs(model, x)
    model.save(tmp_path / "companded.keras")
    loaded = keras.models.load_model(tmp_path / "companded.keras")
    assert type(loaded.layers[0]) is type(layer)
    np.testing.assert_array_equal(outputs(loaded, x), trained)
    assert loaded.layers[0].compander.a == layer.compander.a
    model.save_weights(tmp_path / "companded.weights.h5")
    other = make(name, learnable=True)
    other.load_weights(tmp_path / "companded.weights.h5")
    np.testing.assert_array_equal(outputs(other, x), trained)

    (kernel,) = kwm.fold(model).kernels
    assert kernel.a == loaded.layers[0].compander.a
    assert [w.shape for w in model.weights] == [w.shape for w in plain.weights]
    assert not [key for key in vars(layer) if "compander" in key]
    np.testing.assert_allclose(outputs(model, x), trained, rtol=0, atol=1e-6)
    model.save(tmp_path / "plain.keras")
    loaded = keras.models.load_model(tmp_path / "plain.keras")
    assert type(loaded.layers[0]) is type(plain.layers[0])
    np.testing.assert_array_equal(outputs(loaded, x), outputs(model, x))


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__()
        self.dense = kwm.CompanderDense(4, **kwargs)

    def call(self, x):
        return self.dense(x)


def test_built_by_fit():
    draw = keras.initializers.Constant(3.0)
    model = Subclassed(kernel_initializer=draw, out_of_range="raise_a")
    optimizer = keras.optimizers.SGD(0.0)
    fit_step(model, np.ones((2, 5)), np.ones((2, 4)), optimizer)
    layer = model.dense
    assert layer.compander.outside == 20
    assert layer.compander.raised
    assert layer.compander.a > 3.0 / (np.pi / 2)
    np.testing.assert_allclose(numpy(layer.kernel), 3.0, rtol=1e-5)


@pytest.mark.one_backend
def test_what_is_in_the_range_depends_on_the_dtype():
    draw = keras.initializers.Constant(0.9)
    own = {"function": "arsinh", "kernel_initializer": draw}
    for a, dtype, outside in ((0.5, "float32", 0), (0.01, "float16", 4)):
        layer = kwm.CompanderDense(2, a=a, dtype=dtype, **own)
        layer.build((None, 2))
        assert layer.compander.outside == outside
        assert np.isfinite(numpy(layer._kernel)).all()


@pytest.mark.one_backend
def test_a_quantized_dtype_is_refused():
    with pytest.raises(ValueError, match="cannot be built quantized"):
        make("Dense", dtype="int8_from_float32")


@pytest.mark.one_backend
def test_lora_rank_in_the_constructor():
    model = make("Dense", lora_rank=2)
    names = [w.name for w in model.trainable_weights]
    assert names == ["bias", "lora_kernel_a", "lora_kernel_b"]
    train(model)


@pytest.mark.one_backend
def test_subclass_folds_only_with_a_plain_class_to_go_back_to():
    class Own(kwm.CompanderDense):
        def call(self, x):
            return 2 * super().call(x)

    model = sequential((4,), Own(3), keras.layers.Dense(2))
    kwm.attach_compander(model, targets=kwm.find_targets(model)[1:])
    classes = [type(layer) for layer in model.layers]
    with pytest.raises(ValueError, match="a subclass of CompanderDense"):
        kwm.fold(model)
    assert [type(layer) for layer in model.layers] == classes
    assert len(model.weights) == 4
