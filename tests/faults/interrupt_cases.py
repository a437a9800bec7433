"""The calls that `interrupts` interrupts, on tiny models."""

import pathlib

import keras
import numpy as np

import keras_weightmods as kwm
from keras_weightmods.exporting.export import FORMATS
from tests import models

X, Y = models.normal(8, 8), models.normal(8, 4, seed=1)
A_HALF = {"total_steps": 100, "decay": "relative"}
FILE = "model.safetensors"


def mlp(*layers):
    """Return a small model with the same names each time."""
    keras.utils.set_random_seed(0)
    first = keras.layers.Dense(8, "relu", name="first")
    last = keras.layers.Dense(4, name="last")
    inputs = keras.Input((8,), name="inputs")
    return keras.Sequential([inputs, first, *layers, last], name="model")


def functional():
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((8,), name="inputs")
    for name in ("first", "second"):
        x = keras.layers.Dense(8, "relu", name=name)(x)
    outputs = keras.layers.Dense(4, name="last")(x)
    return keras.Model(inputs, outputs, name="model")


def sparse():
    return models.make_sparse(mlp())


def packed():
    return models.changed(sparse(), kwm.pack, verbose=0)


def trained(model, optimizer="sgd"):
    """Give a model a built optimizer."""
    model.compile(optimizer, "mse", jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    return model


def regularized():
    model = mlp()
    model.layers[0].kernel.regularizer = keras.regularizers.L2(0.1)
    return model


def reparameterized():
    model = mlp()
    kwm.attach_scaling(model, targets="first", verbose=0)
    kwm.attach_compander(model, targets="last", verbose=0)
    return trained(model)


def constrained():
    model = mlp(
        keras.layers.Dense(
            8, kernel_constraint=kwm.SemiStructuredSparse(), name="own"
        )
    )
    return models.changed(model, kwm.SemiStructuredSparse.attach, verbose=0)


def with_lora():
    model = sparse()
    for layer in model.layers:
        layer.enable_lora(2)
        layer.lora_kernel_b.assign(models.normal(*layer.lora_kernel_b.shape))
    return trained(model)


def cast_fitted():
    trainer = kwm.CAST(mlp())
    loss = keras.losses.MeanSquaredError()
    trainer.compile(loss=loss, jit_compile=False, run_eagerly=True)
    trainer.fit(X, Y, batch_size=4, epochs=2, verbose=0)
    return trainer


def adam_s(**how):
    model = mlp()
    optimizer = kwm.AdamS(**A_HALF, targets=model, **how)
    optimizer.build(model.trainable_variables)
    return optimizer, model


def adam_s_stepped():
    optimizer, model = adam_s()
    optimizer.apply([keras.ops.ones(v.shape) for v in model.weights])
    return optimizer, model


def a_patch(model, seed=1):
    other = models.randomize(mlp(), seed)
    return kwm.Patch.from_models(other, model, verbose=0)


def patch():
    model = mlp()
    return a_patch(model), model


def patched(*scales):
    """Return a model with patches on it after the first of them."""
    model = mlp()
    patches = [a_patch(model, 1 + place) for place in range(len(scales))]
    for each, scale in zip(patches, scales):
        each.apply(model, scale, verbose=0)
    return patches[0], model


def signature():
    model = models.conv_net()
    return models.make_signature(model), model


def applied(patch, model):
    with patch.applied(model):
        pass


def lifted(optimizer):
    """Return a callback before the model that it is for, compiled."""
    model, masks = mlp(), kwm.LIFT(0.2, seed=0)
    model.compile(optimizer, "mse", jit_compile=False, run_eagerly=True)
    return masks, model


def lift_attached():
    masks, model = lifted(kwm.SparseAdamW(1e-3))
    masks.attach(model)
    return masks, model


def companded(rate):
    model = models.changed(mlp(), kwm.attach_compander, verbose=0)
    return kwm.CompanderOptimizer(keras.optimizers.Adam(rate)), model


def build(optimizer, model):
    optimizer.build(model.trainable_variables)


def saved():
    model = models.changed(mlp(), kwm.save_model, FILE, verbose=0)
    return models.randomize(model)


def patch_saved():
    model = mlp()
    a_patch(model).save(FILE, verbose=0)
    return a_patch(model, 2)


def to_be_merged():
    files = "a.safetensors", "b.safetensors"
    for file, model in zip(files, (mlp(), models.randomize(mlp()))):
        kwm.save_model(model, file, verbose=0)
    kwm.save_model(mlp(), FILE, verbose=0)
    return (files,)


def exported():
    if "arrays" not in FORMATS:
        kwm.register_export_format("arrays", arrays_writer, ending=".bin")
    pathlib.Path("model.bin").write_bytes(b"old")
    return packed()


def arrays_writer(model):
    def write(path, progress):
        arrays = map(keras.ops.convert_to_numpy, model.weights)
        pathlib.Path(path).write_bytes(b"".join(x.tobytes() for x in arrays))

    return write


def quiet(function, *args, **kwargs):
    return lambda *given: function(*given, *args, **kwargs, verbose=0)


# By name: what makes the arguments of a call, or the only one, and the call.
# The models and optimizers among them are compared, and all files.
CASES = {
    "pack": (lambda: trained(sparse()), quiet(kwm.pack)),
    "pack_int8": (mlp, quiet(kwm.pack, "int8")),
    "pack_head": (models.token_net, quiet(kwm.pack, "int8")),
    "pack_quantized": (
        lambda: models.changed(mlp(), keras.Model.quantize, "int8"),
        quiet(kwm.pack),
    ),
    "unpack": (lambda: trained(packed()), quiet(kwm.unpack)),
    "attach_scaling": (mlp, quiet(kwm.attach_scaling)),
    "attach_compander": (regularized, quiet(kwm.attach_compander)),
    "attach_weight_norm": (mlp, quiet(kwm.attach_weight_norm)),
    "fold": (reparameterized, quiet(kwm.fold)),
    "fold_layers": (
        lambda: mlp(kwm.CompanderDense(8, name="own")),
        quiet(kwm.fold),
    ),
    "constraint_attach": (
        mlp,
        quiet(kwm.SemiStructuredSparse.attach, frozen=True),
    ),
    "constraint_detach": (constrained, kwm.SemiStructuredSparse.detach),
    "sparsify": (lambda: trained(mlp()), quiet(kwm.sparsify)),
    "sparsify_on_data": (
        mlp,
        quiet(kwm.sparsify, "2:4", X, criterion="sparsegpt", refine="swaps"),
    ),
    "sparsify_blocks": (
        functional,
        quiet(kwm.sparsify, "2:4", X, refine="blocks", epochs=1),
    ),
    "quantize": (mlp, quiet(kwm.quantize, X, refine=None)),
    "quantize_blocks": (functional, quiet(kwm.quantize, X, epochs=1)),
    "cast": (lambda: trained(mlp()), kwm.CAST),
    "cast_with_teacher": (
        lambda: (mlp(), functional()),
        lambda model, teacher: kwm.CAST(model, teacher=teacher),
    ),
    "cast_finalize": (cast_fitted, quiet(kwm.CAST.finalize)),
    "adam_s_build": (lambda: (kwm.AdamS(**A_HALF), mlp()), build),
    "adam_s_prune": (adam_s_stepped, lambda optimizer, _: optimizer.prune()),
    "set_importance": (
        lambda: adam_s(criterion="wanda")[0],
        lambda optimizer: optimizer.set_importance(2 * [np.arange(8)]),
    ),
    "merge_lora": (with_lora, lambda model: kwm.merge_lora(model, "2:4")),
    "patch_apply": (patch, quiet(kwm.Patch.apply, 0.5)),
    "patch_remove": (lambda: patched(1, 0.5), quiet(kwm.Patch.remove)),
    "patch_clear": (lambda: patched(1)[1], kwm.Patch.clear),
    "patch_subtract": (signature, kwm.Patch.subtract),
    "patch_applied": (patch, applied),
    "lift_attach": (
        lambda: (
            kwm.LIFT(0.2, also_train="last/bias", seed=0),
            trained(mlp(), "adam"),
        ),
        kwm.LIFT.attach,
    ),
    "lift_attach_sparse_adamw": (
        lambda: lifted(kwm.SparseAdamW(1e-3)),
        kwm.LIFT.attach,
    ),
    "lift_detach": (lift_attached, kwm.LIFT.detach),
    "compander_optimizer": (lambda: companded(1e-3), build),
    "save_model": (saved, quiet(kwm.save_model, FILE)),
    "load_model": (
        lambda: models.changed(packed(), kwm.save_model, FILE, verbose=0),
        lambda _: kwm.load_model(FILE, verbose=0),
    ),
    "patch_save": (patch_saved, quiet(kwm.Patch.save, FILE)),
    "merge": (to_be_merged, quiet(kwm.merge, output=FILE)),
    "export": (exported, quiet(kwm.export, "model.bin", "arrays")),
    "find_targets": (functional, kwm.find_targets),
    "sparsity_report": (
        lambda: trained(sparse()),
        quiet(kwm.sparsity_report, "2:4"),
    ),
}


class Unchanged(keras.constraints.Constraint):
    def __call__(self, value):
        return value


def compander_step():
    optimizer, model = companded(1e-2)
    # Keras applies them after the step. One that changes nothing is enough.
    model.layers[1].bias.constraint = Unchanged()
    build(optimizer, model)
    return optimizer, model


def masked_step():
    inner = keras.optimizers.Lion(1e-2)
    masks, model = lifted(kwm.MaskedOptimizer(inner))
    masks.attach(model)
    return model.optimizer, model


def apply_op_by_op(optimizer, model):
    gradients = [models.normal(*v.shape) for v in model.trainable_variables]
    gradients = list(map(keras.ops.convert_to_tensor, gradients))
    optimizer.apply(gradients, model.trainable_variables)


def fit(masks, model):
    model.fit(X, Y, batch_size=8, verbose=0, callbacks=[masks])


# In a step of a training each weight is what it was, or what it is after it:
# not all of them at once. By name as above, and what the user may call then.
STEPS = {
    "compander_step": (compander_step, apply_op_by_op, lambda *_: None),
    "masked_step": (masked_step, apply_op_by_op, lambda *_: None),
    "lift_fit": (
        lambda: lifted(keras.optimizers.AdamW(1e-2)),
        fit,
        kwm.LIFT.detach,
    ),
}
# Those that continuous integration interrupts.
SOME = (
    *("pack", "unpack", "fold", "cast", "adam_s_prune", "lift_attach"),
    "patch_remove",
)
