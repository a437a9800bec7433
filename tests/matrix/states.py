"""Models that something was done to before: where pairs of methods begin.

Each method is tried on each of them, as on any other family. What has been done
must either go with the method or be refused in words.
"""

import keras

import keras_weightmods as kwm
from tests import models

BASES = ("Dense", "LlamaCausalLM")  # of the families


def packed(model, x):
    kwm.sparsify(model, verbose=0)
    kwm.pack(model)


def rounded(model, x):
    kwm.sparsify(model, verbose=0)
    options = {"refine": None, "head": False, "verbose": 0}
    kwm.quantize(model, x, group_size=16, **options)


def with_lora(model, x):
    layers = {id(t.layer): t.layer for t in kwm.find_targets(model)}
    for layer in layers.values():
        layer.enable_lora(2)


def by_lift(model, x):
    masks = kwm.PrincipalMaskCallback(0.1, refresh_every=None)
    _fit(model, x, kwm.SparseAdamW(0.01), [masks])


def in_cast(model, x):
    trained = kwm.CAST(model, teacher="self")
    y = _labels(model, x)
    trained.compile(loss="mse")
    trained.fit(x, y, batch_size=2, epochs=1, verbose=0)


# {what was done: a function of a model and inputs}
STATES = {
    "sparse": lambda model, x: kwm.sparsify(model, verbose=0),
    "scaled": lambda model, x: kwm.attach_scaling(model),
    "companded": lambda model, x: kwm.attach_compander(model),
    "normalized": lambda model, x: kwm.attach_weight_norm(model),
    "constrained": lambda model, x: kwm.SemiStructuredSparse.attach(model),
    "packed": packed,
    "rounded": rounded,
    "quantized": lambda model, x: model.quantize("int8"),  # by Keras
    "with lora": with_lora,
    "patched": lambda model, x: models.make_signature(model).apply(model),
    "by adam s": lambda model, x: _fit(
        model, x, kwm.AdamS(0.001, total_steps=4, targets=model)
    ),
    "by lift": by_lift,
    "in cast": in_cast,
}


def _fit(model, x, optimizer, callbacks=()):
    own = {"jit_compile": models.JIT, "weighted_metrics": []}
    model.compile(optimizer, "mse", **own)
    options = {"batch_size": 2, "epochs": 1, "verbose": 0}
    model.fit(x, _labels(model, x), callbacks=list(callbacks), **options)


def _labels(model, x):
    return keras.tree.map_structure(
        lambda y: models.normal(*y.shape), models.outputs(model, x)
    )
