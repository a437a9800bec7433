"""What the matrix does to each model, and how it knows that it went well.

A method is a function of a `Family`. It returns a text for the page, raises
`AssertionError` where something is not as it should be, and lets errors pass.
`PLAIN` names, for some, what Keras does by itself there: where that fails, too,
it is not ours.
"""

import warnings

import keras
import numpy as np

import keras_weightmods as kwm
from tests import models
from tests.matrix import states
from tests.matrix.hub_sizes import PROMPT


def forward(family):
    """Keras' own call."""
    model, x = _made(family)
    _finite(model, x)
    return f"{model.count_params()} weights"


def fit(family):
    """Keras' own fit."""
    model, x = _made(family)
    states.fit(model, x, "sgd")


def generate(family):
    """KerasHub's own generate."""
    model, x = _greedy(family)
    model.generate(_prompt(x), stop_token_ids=None)


def targets(family):
    model, _ = _made(family)
    found = kwm.find_targets(model)
    left = f", {len(found.skipped)} left" if found.skipped else ""
    return f"{len(found)}{left}"


def share(family):
    """The share of the weights in kernels that divide by 4."""
    model, _ = _made(family)
    found = kwm.find_targets(model)
    fits = [each for each in found if each.reason_not_nm(4) is None]
    weights = sum(int(np.prod(each.shape)) for each in fits)
    total = model.count_params()
    part = f"{weights / total:.1%}"
    return f"{len(found)}, {len(fits)} of them", f"{total / 1e6:.1f} M", part


def _pruned(family, method):
    model, x = _made(family)
    data = None if method == "magnitude" else x
    report = kwm.sparsify(model, "2:4", data, criterion=method, verbose=0)
    exact = kwm.sparsity_report(model).totals["exact"]
    assert exact >= len(report.kernels) > 0, f"{exact} kernels are 2:4"
    _finite(model, x)
    return str(exact)


def cast(family):
    model, x = _made(family)
    states.in_cast(model, x).finalize()
    _sparse_and_finite(model, x)


def adam_s(family):
    model, x = _made(family)
    optimizer = kwm.AdamS(0.001, total_steps=2, targets=model)
    states.fit(model, x, optimizer)
    optimizer.prune()
    _sparse_and_finite(model, x)


def constraint(family):
    model, x = _made(family)
    kwm.SemiStructuredSparse.attach(model)
    states.fit(model, x, "sgd")
    _sparse_and_finite(model, x)


def lift(family):
    model, x = _made(family)
    before = models.weights_of(model)
    masks = states.principal_masks()
    states.fit(model, x, kwm.SparseAdamW(0.01), [masks])
    chosen = {
        id(v): model.optimizer.indices_of(v)
        for v in model.optimizer.masked_variables
    }
    moved = 0
    for variable, old in zip(model.weights, before, strict=True):
        if id(variable) not in chosen:
            statistics = not variable.trainable or "seed" in variable.path
            assert statistics or np.array_equal(variable, old), variable.path
            continue
        changed = np.flatnonzero(models.numpy(variable) != old)
        outside = np.setdiff1d(changed, chosen[id(variable)])
        assert not outside.size, f"{variable.path} changed outside its mask"
        moved += len(changed)
    assert moved, "nothing was trained"


def _attached(family, attach):
    model, x = _made(family)
    before = models.outputs(model, x)
    attach(model)
    _close(models.outputs(model, x), before)
    kwm.fold(model)
    _close(models.outputs(model, x), before)


def delta(family):
    model, _ = _made(family)
    base = models.weights_of(model)
    tuned = [w + np.asarray(0.5 * (w > 0), w.dtype) for w in base]
    model.set_weights(tuned)
    tuned = models.weights_of(model)
    kwm.Patch.from_models(model, base).save("delta.safetensors")
    model.set_weights(base)
    patch = kwm.Patch.load("delta.safetensors")
    patch.apply(model)
    models.assert_same_bits(models.weights_of(model), tuned)
    patch.remove(model)
    models.assert_same_bits(models.weights_of(model), base)


def patches(family):
    model, _ = _made(family)
    before = models.weights_of(model)
    # Another one than the state "patched" has put on it.
    signature = models.make_signature(model, 3)
    signature.apply(model)
    after = models.weights_of(model)
    assert not all(map(np.array_equal, before, after)), "nothing was added"
    second = models.make_signature(model, 2)
    second.apply(model, 0.5)
    signature.remove(model)
    second.remove(model)
    models.assert_same_bits(models.weights_of(model), before)


def lora(family):
    model, x = _made(family)
    kwm.sparsify(model, verbose=0)
    layers = [t.layer for t in kwm.find_targets(model)]
    layers = [layer for layer in layers if hasattr(layer, "enable_lora")]
    if not layers:
        raise ValueError("Keras has LoRA for none of the layers")
    for layer in {id(layer): layer for layer in layers}.values():
        if not layer.lora_enabled:
            layer.enable_lora(2)
        layer.lora_kernel_b.assign(models.normal(*layer.lora_kernel_b.shape))
    kwm.merge_lora(model, "2:4")
    _sparse_and_finite(model, x)


def pack(family):
    model, x = _sparse(family)
    before, weights = models.outputs(model, x), models.weights_of(model)
    kwm.pack(model)
    kwm.unpack(model)
    # Before any call: some of DeepLabV3's layers are always in training.
    for new, old in zip(models.weights_of(model), weights, strict=True):
        np.testing.assert_array_equal(new, old)
    # Weights on the grid of int4 would round their inputs.
    report = kwm.pack(model, activations="float32")
    _close(models.outputs(model, x), before)
    return str(len(report.weights))


def head(family):
    model, x = _sparse(family)
    try:
        kwm.pack(model, head="int8")
    except ValueError as error:
        if "head" not in str(error):
            raise
        return "no"
    _finite(model, x)
    return "yes"


def quantize(family):
    model, x = _made(family)
    states.rounded(model, x, refine="scales", head=True)
    _sparse_and_finite(model, x)


def save_packed(family):
    model, x = _sparse(family)
    kwm.pack(model)
    return _loaded(model, x)


def _loaded(model, x):
    before = models.outputs(model, x)
    kwm.save_model(model, "model.safetensors")
    loaded = kwm.load_model("model.safetensors")
    _close(models.outputs(loaded, x), before)
    return "yes"


def checkpoint(family):
    """A run of two epochs, and one that was stopped after the first."""
    ends = []
    for name, epochs in (("whole", (2,)), ("parts", (1, 2))):
        for last in epochs:
            model, x = _made(family)
            # TensorFlow's order of arrays is in no checkpoint.
            callbacks = [kwm.Checkpoint(name)]
            states.fit(model, x, "adam", callbacks, last, shuffle=False)
        ends.append(models.weights_of(model))
    models.assert_same_bits(*ends)


def compiled_generate(family):
    model, x = _greedy(family)
    before = model.generate(_prompt(x), stop_token_ids=None)["token_ids"]
    kwm.compile_generate(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        after = model.generate(_prompt(x), stop_token_ids=None)["token_ids"]
    kwm.uncompile_generate(model)
    np.testing.assert_array_equal(before, after)
    is_compiled = all("generate" not in str(w.message) for w in caught)
    return "compiled" if is_compiled else "as before"


def _named(*functions):
    return {function.__name__: function for function in functions}


# In the order of the page.
METHODS = {
    **_named(forward, targets, share),
    "magnitude": lambda family: _pruned(family, "magnitude"),
    "wanda": lambda family: _pruned(family, "wanda"),
    "sparsegpt": lambda family: _pruned(family, "sparsegpt"),
    **_named(cast, adam_s, constraint, lift),
    "scaling": lambda family: _attached(family, kwm.attach_scaling),
    "compander": lambda family: _attached(family, kwm.attach_compander),
    "weight_norm": lambda family: _attached(family, kwm.attach_weight_norm),
    **_named(delta, patches, lora, pack, head, quantize),
    "save": lambda family: _loaded(*_made(family)),
    **_named(save_packed, checkpoint, compiled_generate),
}
PLAIN = {
    forward: forward,
    **dict.fromkeys((cast, adam_s, constraint, lift, checkpoint), fit),
    compiled_generate: generate,
}


def _made(family):
    keras.utils.set_random_seed(1)
    model = family.make()
    return model, family.inputs(model)


def _sparse(family):
    model, x = _made(family)
    kwm.sparsify(model, verbose=0)
    return model, x


def _greedy(family):
    model, x = _made(family)
    # The loss that PARSeq takes by default needs a tokenizer.
    model.compile(loss="mse", sampler="greedy")
    return model, x


def _prompt(x):
    """Return four tokens, and an image where a batch has them."""
    return {
        "token_ids": np.array([[3, 1, 4, 1] + [0] * (PROMPT - 4)]),
        "padding_mask": np.array([[1] * 4 + [0] * (PROMPT - 4)]),
        **{key: rows[:1] for key, rows in x.items() if key == "images"},
    }


def _finite(model, x):
    for y in keras.tree.flatten(models.outputs(model, x)):
        assert np.isfinite(y).all(), "outputs are not finite"


def _sparse_and_finite(model, x):
    kwm.assert_sparse(model)
    _finite(model, x)


def _close(after, before):
    pairs = zip(*map(keras.tree.flatten, (after, before)), strict=True)
    for new, old in pairs:
        # Masks are of bools.
        new, old = new.astype("float64"), old.astype("float64")
        size = max(1.0, float(np.abs(old).max(initial=0)))
        worst = float(np.abs(new - old).max(initial=0))
        assert worst <= 1e-4 * size, f"outputs differ by {worst:.1g}"
