"""Models that something was done to before: where pairs of methods begin.

Each method is tried on each of them, as on any other family. What has been done
must either go with the method or be refused in words.
"""

import keras

import keras_weightmods as kwm
from tests import models

BASES = ("Dense", "LlamaCausalLM")  # of the families


def sparse(model, x):
    kwm.sparsify(model, verbose=0)


def scaled(model, x):
    kwm.attach_scaling(model)


def companded(model, x):
    kwm.attach_compander(model)


def normalized(model, x):
    kwm.attach_weight_norm(model)


def constrained(model, x):
    kwm.SemiStructuredSparse.attach(model)


def packed(model, x):
    kwm.sparsify(model, verbose=0)
    kwm.pack(model)


def rounded(model, x):
    kwm.sparsify(model, verbose=0)
    options = {"refine": None, "head": False, "verbose": 0}
    kwm.quantize(model, x, group_size=16, **options)


def quantized(model, x):
    """By Keras."""
    model.quantize("int8")


def with_lora(model, x):
    layers = {id(t.layer): t.layer for t in kwm.find_targets(model)}
    for layer in layers.values():
        layer.enable_lora(2)


def patched(model, x):
    models.make_signature(model).apply(model)


def by_adam_s(model, x):
    _fit(model, x, kwm.AdamS(0.001, total_steps=4, targets=model))


def by_lift(model, x):
    masks = kwm.PrincipalMaskCallback(0.1, refresh_every=None)
    _fit(model, x, kwm.SparseAdamW(0.01), [masks])


def in_cast(model, x):
    trained = kwm.CAST(model, teacher="self")
    y = _labels(model, x)
    trained.compile(loss="mse")
    trained.fit(x, y, batch_size=2, epochs=1, verbose=0)


STATES = {
    state.__name__.replace("_", " "): state
    for state in (
        *(sparse, scaled, companded, normalized, constrained, packed, rounded),
        *(quantized, with_lora, patched, by_adam_s, by_lift, in_cast),
    )
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
