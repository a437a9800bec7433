"""fold ends every kind of reparameterization, all of them at once."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_weightmods as kwm


def outputs(model):
    x = np.random.default_rng(0).normal(size=(4, 8)).astype("float32")
    return ops.convert_to_numpy(model(x))


def test_every_kind_in_one_model(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(8, kernel_regularizer="l2"),
            keras.layers.Dense(8),
            keras.layers.Dense(8),
            kwm.CompanderDense(4),
        ]
    )
    scaled, normalized, companded, _ = kwm.find_targets(model)
    kwm.attach_scaling(model, targets=[scaled])
    kwm.attach_weight_norm(model, targets=[normalized])
    kwm.attach_compander(model, targets=[companded])
    parameters = [w for w in model.weights if w.name not in ("kernel", "bias")]
    assert len(parameters) == 4
    for parameter in parameters:
        parameter.assign(parameter * 1.2)
    before, loss = outputs(model), ops.convert_to_numpy(model.losses[0])
    model.compile("sgd", "mse")
    model.optimizer.build(model.trainable_variables)

    report = kwm.fold(model)
    assert len(report.kernels) == 4
    assert str(report).startswith("4 kernels, 0 skipped")
    assert {type(layer) for layer in model.layers} == {keras.layers.Dense}
    assert len(model.weights) == 8
    assert not any(hasattr(w, "reparameterization") for w in model.weights)
    assert not model.compiled
    np.testing.assert_allclose(outputs(model), before, rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        ops.convert_to_numpy(model.losses[0]), loss, rtol=1e-5
    )
    model.save(tmp_path / "plain.keras")
    loaded = keras.models.load_model(tmp_path / "plain.keras")
    np.testing.assert_array_equal(outputs(loaded), outputs(model))


def test_a_plain_model_is_left_as_it_is():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.compile("sgd", "mse")
    optimizer, before = model.optimizer, outputs(model)
    assert kwm.fold(model).kernels == ()
    assert model.optimizer is optimizer
    np.testing.assert_array_equal(outputs(model), before)


@pytest.mark.parametrize("end", [kwm.fold, kwm.unpack])
def test_what_is_no_model(end):
    with pytest.raises(ValueError, match="must be a Keras model or layer"):
        end(None)
