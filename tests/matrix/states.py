"""What was done to a model before: where pairs of methods begin.

Each must go with the method that comes next, or be refused in words.
"""

import keras

import keras_weightmods as kwm
from tests import models

ROWS = 4  # of a batch
BASES = ("Dense", "LlamaCausalLM")  # of the families


def packed(model, x):
    kwm.sparsify(model, verbose=0)
    kwm.pack(model)


def rounded(model, x, refine=None, head=False):
    kwm.sparsify(model, verbose=0)
    options = {"refine": refine, "head": head, "verbose": 0}
    kwm.quantize(model, x, group_size=16, **options)


def with_lora(model, x):
    layers = {id(t.layer): t.layer for t in kwm.find_targets(model)}
    for layer in layers.values():
        layer.enable_lora(2)


def in_cast(model, x):
    """Train by CAST; return what has to be finalized."""
    trained = kwm.CAST(model, teacher="self")
    y = labels(model, x)
    trained.compile(loss=losses(y))
    trained.fit(x, y, batch_size=2, epochs=1, verbose=0)
    return trained


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
    "by adam s": lambda model, x: fit(
        model, x, kwm.AdamS(0.001, total_steps=4, targets=model)
    ),
    "by lift": lambda model, x: fit(
        model, x, kwm.SparseAdamW(0.01), [principal_masks()]
    ),
    "in cast": in_cast,
}


def principal_masks():
    return kwm.PrincipalMaskCallback(0.1, refresh_every=None)


def fit(model, x, optimizer, callbacks=(), epochs=1, shuffle=True):
    y = labels(model, x)
    # TensorFlow's XLA takes seconds to compile. KerasHub's own metrics are for
    # labels of another shape; None would leave them where they are.
    own = {"jit_compile": models.JIT, "weighted_metrics": []}
    model.compile(optimizer, losses(y), **own)
    options = {"batch_size": 2, "epochs": epochs, "verbose": 0}
    model.fit(x, y, callbacks=list(callbacks), shuffle=shuffle, **options)


def losses(y):
    return keras.tree.map_structure(lambda _: "mse", y)


def labels(model, x):
    # For batches of two rows: CLIP compares each row with all of its batch.
    rows = keras.tree.map_structure(lambda each: each[:2], x)
    return keras.tree.map_structure(
        lambda y: models.normal(ROWS, *y.shape[1:]), models.outputs(model, rows)
    )
