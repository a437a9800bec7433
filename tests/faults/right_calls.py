"""A call as it should be of each public name, for `wrong_calls`."""

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

import keras_weightmods as kwm
from tests import models
from tests.models import changed, normal


@dataclasses.dataclass
class Call:
    """A call as it should be, by the arguments that it needs."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    # Models and lists of arrays, which an error leaves as they are; None stands
    # for the models among the arguments.
    models: list[Any] | None = None
    then: Any = None  # a function that uses what the call returns

    def __post_init__(self):
        if self.models is None:
            given = keras.tree.flatten([*self.arguments.values()])
            self.models = [x for x in given if isinstance(x, keras.Model)]


def mlp():
    """Return a tiny compiled model."""
    model = models.mlp()
    model.compile("sgd", "mse")
    return model


def sparse():
    return models.make_sparse(mlp())


def constrained():
    return changed(mlp(), kwm.SemiStructuredSparse.attach, verbose=0)


def with_lora():
    model = mlp()
    model.layers[0].enable_lora(2)
    return model


def kernel():
    return normal(16, 16)


def signature():
    return models.make_signature(mlp())


def delta():
    """Return a patch, and the model that it was made from."""
    tuned, base = mlp(), mlp()
    tuned.layers[0].kernel.assign_add(0 * normal(8, 16) + 0.5)
    return kwm.Patch.from_models(tuned, base), tuned, base


def on_patch(method):
    patch, _, base = delta()
    if method in ("remove", "clear"):
        patch.apply(base)
    return Call(getattr(patch, method), {"model": base})


def cast():
    made = kwm.CAST(models.mlp())
    made.compile(loss="mse")
    return made


def on_cast(method, **arguments):
    made = kwm.CAST(models.mlp()) if method == "compile" else cast()
    if method == "finalize":
        made.fit(**TRAINED)
    return Call(getattr(made, method), arguments, [made.student])


def language_model(**sizes):
    return models.causal_lm("llama3", **sizes)


def fit_by(optimizer, *callbacks):
    model = models.mlp()
    model.compile(optimizer, "mse", jit_compile=False)
    model.fit(X, normal(8, 4), 4, callbacks=[*callbacks], verbose=0)


def fit_masked(optimizer):
    fit_by(optimizer, kwm.PrincipalMaskCallback(0.1))


X = normal(8, 8)
TRAINED = {"x": X, "y": normal(8, 4), "verbose": 0}
TOKENS = np.arange(12).reshape(2, 6)
LAW = {"tokens": [1e6, 2e6, 4e6, 8e6, 1.6e7]}
LAW["losses"] = [3 + 100 / n**0.5 for n in LAW["tokens"]]


def _extract():
    model = models.mlp(*[4] * 9)
    init, clean, robust = (models.random_weights(model, i) for i in range(3))
    given = {"init": init, "clean": clean, "robust": robust, "like": model}
    return Call(kwm.WeightSignature.extract, given, [model, init, clean])


def _on_adapter(is_read):
    model = models.randomize(language_model(), scale=0.2)
    base = [np.array(each) for each in model.get_weights()]
    kernel = kwm.find_targets(model)[0].variable
    kernel.assign_add(0 * kernel.value + 0.1)
    patch = kwm.Patch.from_models(model, base)
    model.set_weights(base)
    if not is_read:
        return Call(patch.to_lora, {"model": model, "filepath": "new_adapter"})
    patch.to_lora(model, "old_adapter", 2)
    return Call(kwm.Patch.from_lora, {"model": model, "lora": "old_adapter"})


def _on_adam_s(is_used):
    model = mlp()
    criterion = "wanda" if is_used else "magnitude"
    optimizer = kwm.AdamS(total_steps=4, criterion=criterion)
    targets = kwm.find_targets(model)
    if not is_used:
        return Call(optimizer.use_targets, {"targets": targets}, [model])
    optimizer.use_targets(targets)
    optimizer.build(model.trainable_variables)
    given = {"importance": [np.ones(8), np.ones(16)]}
    return Call(optimizer.set_importance, given, [model])


# Calls that more than one object takes part in.
CALLS: dict[str, Callable[[], Call]] = {
    "AdamS.use_targets": lambda: _on_adam_s(False),
    "AdamS.set_importance": lambda: _on_adam_s(True),
    "CAST.compile": lambda: on_cast("compile", loss="mse"),
    "CAST.fit": lambda: on_cast("fit", **TRAINED),
    "CAST.evaluate": lambda: on_cast("evaluate", **TRAINED),
    "CAST.finalize": lambda: on_cast("finalize"),
    "Patch.from_lora": lambda: _on_adapter(True),
    "Patch.to_lora": lambda: _on_adapter(False),
    "Patch.save": lambda: Call(delta()[0].save, {"filepath": "new"}),
    **{
        f"Patch.{name}": functools.partial(on_patch, name)
        for name in ("apply", "applied", "remove", "subtract", "on", "clear")
    },
    "WeightSignature.extract": _extract,
}


def _saved(save):
    save("any.safetensors")
    return "any.safetensors"


def _saved_checkpoint():
    if not os.path.isdir("checkpoints"):
        fit_by("sgd", kwm.Checkpoint("checkpoints"))
    return mlp()


# The tables below are of expressions, which are evaluated anew for each call.
# Right values of arguments by their names.
RIGHT = {
    **dict.fromkeys(("model", "output", "base"), "mlp()"),
    **dict.fromkeys(("x", "v", "w"), "kernel()"),
    "models": "[mlp(), mlp()]",
    "other": "signature()",
    "signatures": "[signature(), signature()]",
    "optimizer": "keras.optimizers.SGD()",
    "path": "'new checkpoints'",
    "filepath": "'saved.safetensors'",
    "texts": "TOKENS",
    "tokens": "LAW['tokens']",
    "losses": "LAW['losses']",
    "reason": "lambda target: None",
    "function": "lambda task: iter(())",
    "writer": "lambda model: lambda path, _: None",
    "layer_class": "Own",
    "kernels": "{'kernel': {'contraction_axes': (0,)}}",
    "mask": "np.ones((3, 5), bool)",
    "kernel": "kwm.ops.nm_project(kernel())",
    "packed": "kwm.ops.pack_kernel(kwm.ops.nm_project(kernel()))",
    **{"units": "3", "depth": "1", "name": "'mine'", "a": "0.5", "b": "1.0"},
    **{"m": "4", "pattern": "'2:4'", "shape": "(16, 16)", "verbose": "0"},
    "dtype": "'float32'",
}
# What is different, or has a default and matters, by what is called.
ARGUMENTS = {
    "AdamS": "total_steps=2",
    "assert_sparse": "model=sparse()",
    "attach_compander": "out_of_range='clip'",
    "Checkpoint.restore": "model=_saved_checkpoint()",
    "CompanderDense": "units=4",
    "compile_generate": "model=language_model()",
    "export": "model=language_model(vocabulary_size=32), filepath='exported', "
    "format='transformers'",
    "fold": "model=changed(mlp(), kwm.attach_scaling)",
    "lm_eval_model": "model=language_model()",
    "load_model": "filepath=_saved(lambda x: kwm.save_model(mlp(), x))",
    "merge_lora": "model=with_lora()",
    "pack": "model=sparse()",
    "Patch.from_models": "model=delta()[1]",
    "Patch.load": "filepath=_saved(delta()[0].save)",
    "Perplexity": "model=models.token_net()",
    "perplexity": "model=models.token_net(), length=4",
    "PrincipalMaskCallback": "density=0.1",
    "PrincipalMaskCallback.detach": "model=mlp()",
    "quantize": "data=X, group_size=8, epochs=1",
    "ScalingLaw.predict": "tokens=1e7",
    "self_generated": "keep=0.5, length=6, rows=2, "
    "model=models.causal_lm('gpt2', models.gpt2_preprocessor())",
    "SemiStructuredSparse": "axis=0",
    "SemiStructuredSparse.detach": "model=constrained()",
    "sparsify": "data=X, criterion='sparsegpt', epochs=1",
    "uncompile_generate": "model=language_model()",
    "unpack": "model=changed(sparse(), kwm.pack)",
    "ops.unpack_bits": "packed=kwm.ops.pack_bits(np.ones((3, 5), bool)), "
    "shape=(3, 5)",
    "ops.principal_mask": "density=0.1",
    "ops.sparse_matmul": "x=normal(2, 16)",
}
# What the methods are called on.
OWNERS = {
    "CAST": "cast()",
    "Checkpoint": "kwm.Checkpoint('checkpoints')",
    "Perplexity": "kwm.Perplexity(models.token_net(), length=4)",
    "PrincipalMaskCallback": "kwm.PrincipalMaskCallback(0.1)",
    "ScalingLaw": "kwm.fit_scaling_law(**LAW)",
    "SemiStructuredSparse": "kwm.SemiStructuredSparse(axis=0)",
    "Target": "kwm.find_targets(mlp())[0]",
    "Targets": "kwm.find_targets(mlp())",
    "WeightSignature": "signature()",
    **{"ops": "kwm.ops", "Patch": "kwm.Patch", "": "kwm"},
}
# How what is returned is used.
THEN: dict[str, Callable[[Any], Any]] = {
    "AdamS": fit_by,
    "Checkpoint": lambda made: fit_by("sgd", made),
    "CompanderDense": lambda layer: layer(normal(2, 4)),
    "MaskedOptimizer": fit_masked,
    "PrincipalMaskCallback": lambda made: fit_by("sgd", made),
    "ModelCard": lambda card: kwm.save_model(mlp(), "any", card=card),
    "register_layer_kind": lambda _: kwm.find_targets(
        models.sequential((8,), Own())
    ),
    "SemiStructuredSparse": lambda constraint: constraint(kernel()),
    "SparseAdamW": fit_masked,
    "SparsityMonitor": lambda made: fit_by(kwm.AdamS(total_steps=2), made),
    "SwapSparseEMAWeights": lambda made: fit_by(
        keras.optimizers.SGD(use_ema=True), made
    ),
}


def call_of(name):
    """Return the `Call` of a public name as it should be."""
    if name in CALLS:
        return CALLS[name]()
    owner, _, method = name.rpartition(".")
    function = getattr(eval(OWNERS[owner]), method)
    arguments = eval(f"dict({ARGUMENTS.get(name, '')})")
    for each in inspect.signature(function).parameters.values():
        variadic = each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        is_required = each.default is each.empty and not variadic
        is_wanted = is_required or each.name == "verbose"
        if is_wanted and each.name not in arguments:
            arguments[each.name] = eval(RIGHT[each.name])
    return Call(function, arguments, then=THEN.get(name))


class Own(keras.layers.Layer):
    """A layer that `find_targets` does not know."""

    def build(self, shape):
        self.kernel = self.add_weight((shape[-1], 4), name="kernel")

    def call(self, x):
        return x @ self.kernel
