"""Call every public name with wrong arguments, one at a time.

KERAS_BACKEND=torch python -m tests.faults.wrong_calls

From the signatures: each argument of each public function, class and method is
given each of `BAD`, with the others as they should be. A call may go well, or
end in an error in words of ours: one that a `raise` of this package raises, or
one of Keras that names the argument. After an error the models that were given
are what they were. It may compute for `MOST_SECONDS`.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import hashlib
import inspect
import itertools
import os
import pathlib
import random
import re
import resource
import runpy
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

import keras_weightmods as kwm
from keras_weightmods.core import keras_compat
from tests import models
from tests.faults import raised
from tests.models import changed, normal

ROOT = pathlib.Path(__file__).absolute().parent.parent.parent
PUBLIC = runpy.run_path(str(ROOT / "docs" / "api_table.py"))["public_names"]()
MOST_SECONDS = 2.0  # of this process' own time
MOST_WAITED = 30.0
MOST_MEMORY = 4 * 2**30

# What Keras calls, and no user.
_HOOKS = (
    *("build", "get_config", "load_own_variables", "make_train_function"),
    *("add_variable_from_reference", "save_own_variables", "set_weights"),
    "update_step",
)
# What calls of ours make and users receive; what only they call; LIFT is an
# alias, and the arguments of the other companders are Keras' own.
_RECEIVED = ("Report", "Target", "Targets", "ScalingLaw", "ops.Packed")
_INTERNAL = re.compile(
    r"LIFT.*|Compander(Conv|Depth|Einsum).*|SemiStructuredSparse\.axes_of"
    r"|Patch(\.problems)?|WeightSignature(\.problems|\.with_entries)?"
    # What matplotlib says of wrong arguments will do.
    r"|(plot|reports)\..*"
)


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


def subjects():
    """Return the public functions that users call, by name."""
    found = {}
    for name, value in PUBLIC.items():
        if not name.endswith(_RECEIVED) or not inspect.isclass(value):
            found[name] = value
        for key, member in (
            vars(value).items() if inspect.isclass(value) else ()
        ):
            function = getattr(member, "__func__", member)
            is_method = inspect.isfunction(function) and (
                key == "__call__" or not key.startswith("_")
            )
            if is_method and key not in _HOOKS and "on_" not in key[:3]:
                found[f"{name}.{key}"] = function
    return {
        name: function
        for name, function in found.items()
        if parameters_of(function) and not _INTERNAL.fullmatch(name)
    }


def parameters_of(function):
    """Return the names of the arguments of a function."""
    return [
        each.name
        for each in inspect.signature(function).parameters.values()
        if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        and each.name not in ("self", "cls")
    ]


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


class Unbuilt(keras.Model):
    def call(self, x):
        return x


def _garbage():
    path = pathlib.Path("garbage.safetensors")
    path.write_bytes(b"\x10" + bytes(200))
    return path


def _raises(*args, **kwargs):
    raise ZeroDivisionError("by the user's own function")


BAD = (
    *("None", "True", "-1", "0", "3", "2**31", "2**70", "10**400", "-0.5"),
    *("np.nan", "np.inf", "1j", "''", "'nonsense'", "'('", "'a\\0b'"),
    *("'x' * 5000", "[]", "[None]", "[[1], [1, 2]]", "[-1]", "['a', 'b']"),
    *("(2, 4, 6)", "(10**9, 10**9)", "{}", "{'a': 1}", "{1, 2}", "object()"),
    *("lambda value: value", "_raises", "int", "iter([1, 2])", "'complex64'"),
    *("np.zeros((8, 0), 'float32')", "np.full((8, 8), np.nan, 'float32')"),
    *("np.array(['a', 'b'])", "np.array([None, {}], dtype=object)"),
    *("np.ones((8, 8), 'complex64')", "np.ones((8, 8), bool)"),
    *("np.ones((1, 2, 1, 2, 1), 'float32')", "np.array(3.0)"),
    *("keras.ops.ones((2, 3))", "keras.Input((3,))"),
    *("keras.Variable(np.zeros(3))", "keras.layers.Dense(2)", "Unbuilt()"),
    *("models.sequential((3,), keras.layers.ReLU())", "models.mlp(3, 5)"),
    *("kwm.find_targets(models.mlp())", "keras.optimizers.Adam()"),
    *("'.'", "'none/there'", "_garbage()", "{'x' * 5000: 1}"),
    "['x' * 5000] * 50",
)


def all_cases():
    """Return all triples (subject, argument, bad value), by their names."""
    return [
        (name, parameter, bad)
        for name, function in subjects().items()
        for parameter in parameters_of(function)
        for bad in BAD
    ]


def some_cases(count):
    """Return so many cases of each name."""
    by_name = itertools.groupby(all_cases(), key=lambda case: case[0])
    rng = random.Random(0)
    return [c for _, cases in by_name for c in rng.sample([*cases], count)]


def state_of(model):
    """Return what an error must leave: variables, classes, what is frozen."""
    if not isinstance(model, keras.layers.Layer):
        return [_digest(each) for each in model]
    layers = [
        (id(layer), type(layer), layer.trainable, layer.built)
        for layer in keras_compat.layers_of(model)
    ]
    variables = [
        (id(v), v.path, v.dtype, v.trainable, id(v.constraint))
        + ((_digest(v),) if keras_compat.has_value(v) else ())
        for v in model.variables
    ]
    optimizer = getattr(model, "optimizer", None)
    return layers, variables, id(optimizer), getattr(model, "compiled", None)


def _digest(value):
    return hashlib.sha256(models.numpy(value).tobytes()).digest()


# What a loss of Keras makes of labels of other shapes is its own.
_LOSSES = {("CAST.fit", "y"), ("CAST.evaluate", "y")}
_OF_LOSSES = RuntimeError, ValueError


class _TooLong(BaseException):
    pass


@contextlib.contextmanager
def limits():
    """Bound the memory that a process may take, and how long a call waits."""

    def stop(*_):
        raise _TooLong

    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = pathlib.Path("/proc/self/statm").read_text().split()[0]
    used = int(pages) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, before[1]))
    handler = signal.signal(signal.SIGALRM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def run(case):
    """Make one wrong call; return what is wrong with its end, or None."""
    name, parameter, bad = case
    call = call_of(name)
    before = [state_of(each) for each in call.models]
    value = eval(bad)
    if parameter not in call.arguments:
        arguments = inspect.signature(call.function).parameters
        if parameter not in arguments:
            return None  # one of **kwargs
        default = arguments[parameter].default
        if type(value) is type(default) and value == default:
            return None
    error = None
    signal.setitimer(signal.ITIMER_REAL, MOST_WAITED)
    start = time.process_time()
    try:
        result = call.function(**{**call.arguments, parameter: value})
        if call.then is not None:
            call.then(result)
    except _TooLong:
        return "hangs"
    except Exception as caught:
        error = caught
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.process_time() - start
    if seconds > MOST_SECONDS:
        return f"takes {seconds:.1f} s"
    if error is None:
        return None
    if [state_of(each) for each in call.models] != before:
        return f"changes the model, and raises {raised.summary(error)}"
    is_fine = (
        isinstance(error, ZeroDivisionError)  # the user's own
        or (isinstance(error, ImportError) and "pip install" in str(error))
        or ((name, parameter) in _LOSSES and isinstance(error, _OF_LOSSES))
        # Keras' own words, from which it takes its own frames.
        or "y_true and y_pred have different structures" in str(error)
    )
    return None if is_fine else raised.why_obscure(error, parameter)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--count", type=int, help="of each name")
    args = parser.parse_args()
    cases = all_cases() if args.count is None else some_cases(args.count)
    cases = [case for case in cases if args.only in ".".join(case)]
    failures = run_all(cases)
    print(f"{len(cases)} wrong calls, {len(failures)} of them not refused well")
    sys.exit(bool(failures))


def run_all(cases):
    """Make all wrong calls; return what is wrong, and print it."""
    failures = {}
    warnings.simplefilter("ignore")
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, limits():
        os.chdir(folder)
        try:
            # Keras imports some when they are first used.
            fit_by("sgd")
            language_model()
            for done, case in enumerate(cases):
                problem = run(case)
                if problem is not None and problem.startswith("takes"):
                    # Again, as a busy machine may be slow.
                    problem = run(case)
                if problem is not None:
                    failures[case] = problem
                    print(*case, problem, sep=" | ", flush=True)
                if done % 200 == 0:
                    gc.collect()
        finally:
            os.chdir(here)
    return failures


if __name__ == "__main__":
    main()
