"""Values that must be refused: `wrong_calls` passes if a call goes well."""

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from tests import models

pytestmark = pytest.mark.one_backend
X = np.ones((8, 16), "float32")
SPARSEGPT = {"criterion": "sparsegpt", "data": X}


def merge(model, **kwargs):
    kwm.merge(
        [models.mlp(16, 32, 8) for _ in range(2)], model, verbose=0, **kwargs
    )


CASES = [
    (kwm.sparsify, {"pattern": "5:4"}, "`pattern`"),
    (kwm.sparsify, {"criterion": "sparsegpt"}, "`data`"),
    (kwm.sparsify, {**SPARSEGPT, "refine": "blocks", "epochs": 0}, "`epochs`"),
    (kwm.quantize, {}, "`data`"),
    (kwm.quantize, {"data": X, "bits": 7}, "`bits`"),
    (kwm.quantize, {"data": X, "epochs": 0}, "`epochs`"),
    (kwm.quantize, {"data": X, "learning_rate": 0}, "`learning_rate`"),
    (kwm.pack, {"dtype": "int7"}, "`dtype`"),
    (kwm.pack, {"dtype": ""}, "`dtype`"),
    (kwm.pack, {"dtype": "int8", "activations": 8}, "`activations`"),
    (kwm.pack, {"dtype": "int8", "trainable": 1}, "`trainable`"),
    (kwm.self_generated, {"rows": 0}, "`rows`"),
    (merge, {"method": "mean"}, "`method`"),
    (merge, {"method": "linear", "weights": 0.5}, "`weights`"),
    (merge, {"method": "dare", "base": X, "seed": -1}, "`seed`"),
    (kwm.attach_compander, {"targets": "none"}, "`targets`"),
    (kwm.SemiStructuredSparse.attach, {"pattern": "4:2"}, "`pattern`"),
]


@pytest.mark.parametrize(("call", "kwargs", "message"), CASES)
def test_wrong_values_are_refused(call, kwargs, message):
    model = models.mlp(16, 32, 8)
    before = models.weights_of(model)
    classes = [type(layer) for layer in model.layers]
    with pytest.raises(ValueError, match=message):
        call(model, **kwargs)
    models.assert_same(models.weights_of(model), before)
    assert [type(layer) for layer in model.layers] == classes


def test_many_kernels_make_no_long_message():
    layers = [keras.layers.Dense(4, name=f"{'d' * 80}_{i}") for i in range(40)]
    model = models.make_sparse(models.sequential((4,), *layers))
    other = models.sequential((4,), keras.layers.Dense(4))
    with pytest.raises(ValueError) as caught:
        kwm.merge([model, other], model, verbose=0)
    errors = [caught]
    kwm.pack(model, "int8", verbose=0)
    for call in (
        lambda: kwm.pack(model),
        lambda: kwm.attach_compander(model),
        lambda: kwm.attach_scaling(model),
        lambda: kwm.quantize(model, np.ones((8, 4)), head=False),
        lambda: kwm.sparsify(model),
        lambda: kwm.AdamS(total_steps=2, targets=model).build(other.weights),
        lambda: kwm.merge([model, model], model, verbose=0),
        lambda: kwm.Patch.from_models(model, other),
        lambda: model.fit(
            X[:, :4], X[:, :4], callbacks=[kwm.PrincipalMaskCallback(0.5)]
        ),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        errors.append(caught)
    long = [str(x.value) for x in errors if len(str(x.value)) > 2000]
    assert long == []
    assert "40 weights, the first sequential" in str(errors[1].value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kwm.AdamS(1e-3, total_steps=0), "`total_steps`"),
        (lambda: kwm.AdamS(1e-3, total_steps=4, ramp=3), "`ramp`"),
        (lambda: kwm.PrincipalMaskCallback(2.0), "`density`"),
        (lambda: kwm.Checkpoint("folder", save_freq=0), "`save_freq`"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
