"""Distillation, as `CAST` does it."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_weightmods as kwm
from keras_weightmods.ops.distillation import chunk_positions
from tests import models, references
from tests.models import numpy, two_heads
from tests.sparsity import casts
from tests.sparsity.casts import compiled, cross_entropy, fit, make_data

one_backend = pytest.mark.one_backend

# Most runs here are too short for the published pull, and say so.
pytestmark = pytest.mark.filterwarnings("ignore:AdamS. this schedule")


@one_backend
@pytest.mark.parametrize("mask_zero", [False, True])
def test_both_losses_honour_weights_and_masks(mask_zero):
    model = models.token_net(mask_zero=mask_zero)
    options = {"distillation_weight": 0.25, "temperature": 2.0}
    cast = compiled(model=model, teacher="self", **options)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 20, size=(3, 5))
    x[:, -1] = 0
    y = rng.integers(4, size=(3, 5))
    weight = rng.uniform(0, 2, size=(3, 5)).astype("float32")
    taught = numpy(model(x))
    for variable in model.trainable_variables:
        variable.assign_add(rng.normal(size=variable.shape) * 0.5)
    total = weight.astype("float64")
    if mask_zero:
        # Keras takes the mean over what is not masked.
        total = total * (x != 0) * x.size / (x != 0).sum()
    y_pred = cast(x, training=True)
    logits = (z.reshape(-1, 20) for z in (numpy(y_pred), taught))
    (expected, entropy, kl), _ = references.distillation(
        *logits, y.ravel(), total.ravel() / total.size, 0.25, 2.0
    )
    loss = cast.compute_loss(x, y, y_pred, weight)
    assert float(numpy(loss)) == pytest.approx(expected, rel=1e-5)
    results = {m.name: float(m.result()) for m in cast.metrics if m.variables}
    assert results["student_loss"] == pytest.approx(entropy, rel=1e-5)
    assert results["distillation_loss"] == pytest.approx(kl, rel=1e-5)
    assert kl > 0.01


@one_backend
def test_the_models_own_losses_count_once():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8,))
    l2 = {"activity_regularizer": "l2", "kernel_regularizer": "l2"}
    hidden = keras.layers.Dense(8, **l2)(inputs)
    heads = {name: keras.layers.Dense(4, name=name)(hidden) for name in "ab"}
    model = keras.Model(inputs, heads)
    cast = kwm.CAST(model, distillation_weight=0.5)
    cast.compile(loss={"a": cross_entropy(), "b": cross_entropy()})
    x, label = make_data(4)
    y = {"a": label, "b": label[::-1]}
    weight = {"a": np.float32([1, 0, 1, 1]), "b": np.float32([0, 0, 0, 2])}
    for _ in range(2):
        y_pred = cast(x, training=True)
        loss = cast.compute_loss(x, y, y_pred, weight)
    expected = 0
    for k, label in y.items():
        z = numpy(y_pred[k])
        (_, entropy, _), _ = references.distillation(
            z, z, label, weight[k] / 4, 0.5, 1.0
        )
        expected += entropy
    own = sum(float(numpy(v)) for v in model.losses)
    assert len(model.losses) == 2
    assert float(numpy(loss)) == pytest.approx(0.5 * (expected + own), rel=1e-5)


@one_backend
@pytest.mark.parametrize("as_dict", [False, True])
def test_outputs_losses_and_metrics_by_name(as_dict):
    x, y = make_data()
    # The same weights: nothing to learn, if z is taught by z.
    cast = kwm.CAST(two_heads(as_dict), teacher=two_heads(as_dict))
    cast.compile(
        loss={"z": cross_entropy(), "a": cross_entropy()},
        loss_weights={"z": 1.0, "a": 0.5},
        metrics={"a": ["accuracy"]},
    )
    history = fit(cast, (x, {"z": y, "a": y[::-1]}), batch_size=len(x))
    assert {"a_accuracy", "a_loss", "z_loss"} <= set(history)
    assert history["distillation_loss"] == [pytest.approx(0, abs=1e-6)]


def test_the_teacher_is_the_frozen_start():
    model = casts.make_mlp()
    x, _ = make_data()
    start = numpy(model(x))
    cast = compiled(model=model, teacher="self")
    frozen = model.layers[-1]
    frozen_bias = numpy(frozen.bias)
    # Freezing after the copy was taken moves variables to another list.
    frozen.bias.trainable = False
    fit(cast, epochs=3)
    np.testing.assert_array_equal(numpy(cast.teacher(x)), start)
    np.testing.assert_array_equal(numpy(frozen.bias), frozen_bias)
    assert np.abs(numpy(model(x)) - start).max() > 1e-4
    assert not cast.teacher.trainable_variables
    cast.finalize()
    # The scales are gone from the model, not from the teacher.
    np.testing.assert_array_equal(numpy(cast.teacher(x)), start)


@one_backend
@pytest.mark.parametrize(
    ("last", "warnings"),
    [
        (keras.layers.Dense(4, activation="softmax"), 1),
        (keras.layers.Softmax(), 1),
        (keras.layers.Dense(1), 1),
        (keras.layers.Dense(4), 0),
    ],
)
def test_outputs_that_are_no_logits(last, warnings, recwarn):
    model = models.sequential((8,), keras.layers.Dense(4), last)
    kwm.CAST(model, teacher=None, scaling_groups=0)
    assert not [w for w in recwarn if "logits" in str(w.message)]
    kwm.CAST(model)
    warned = [w for w in recwarn if "`teacher=None`" in str(w.message)]
    assert len(warned) == warnings


class TwoOfOneName(keras.layers.Layer):
    """Its two kernels have the same path, as in some KerasHub backbones."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.pair = [keras.layers.Dense(8, name="o_proj") for _ in range(2)]
        for layer in self.pair:
            layer.build((None, 8))

    def call(self, x):
        first, second = self.pair
        return second(ops.tanh(first(x)))


@one_backend
def test_gradients_do_not_add_up():
    layers = TwoOfOneName(name="two"), keras.layers.Dense(4)
    model = models.sequential((8,), *layers)
    paths = [v.path for v in model.trainable_variables]
    assert len(set(paths)) < len(paths)
    # The first moment is the gradient, and the weights do not move.
    optimizer = kwm.AdamS(0.0, beta_1=0.0, l1=1e-9, total_steps=4)
    cast = compiled(optimizer, model, teacher="self")
    gradients = []
    for _ in range(2):
        fit(cast, make_data(8), batch_size=8)
        gradients.append([numpy(s["momentum"]) for s in cast.adam_s._states])
    for first, second in zip(*gradients, strict=True):
        assert np.abs(first).max() > 0
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-8)


@one_backend
@pytest.mark.parametrize(("classes", "positions"), [(49152, 341), (2**18, 256)])
def test_chunks_of_a_large_vocabulary_are_not_small(classes, positions):
    assert chunk_positions(classes) == positions
