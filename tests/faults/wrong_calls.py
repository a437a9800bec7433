"""Call every public name with wrong arguments, one at a time.

KERAS_BACKEND=torch python -m tests.faults.wrong_calls

From the signatures: each argument of each public function, class and method is
given each of `BAD`, with the others as they should be. A call may go well, or
end in an error in words of ours: one that a `raise` of this package raises, or
one of Keras that names the argument. After an error the models that were given
are what they were. It may compute for `MOST_SECONDS`.
"""

import argparse
import collections
import contextlib
import dataclasses
import gc
import hashlib
import inspect
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
from tests.models import normal

ROOT = pathlib.Path(__file__).absolute().parent.parent.parent
PUBLIC = runpy.run_path(str(ROOT / "docs" / "api_table.py"))["public_names"]()
MOST_SECONDS = 2.0  # of this process' own time
MOST_WAITED = 30.0
MOST_MEMORY = 4 * 2**30

# What Keras calls, and no user.
_HOOKS = {
    "build",
    "get_config",
    "load_own_variables",
    "make_train_function",
    "add_variable_from_reference",
    "save_own_variables",
    "set_weights",
    "update_step",
}
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
    """A call as it should be.

    Attributes:
        function: Callable.
        arguments: Dict, those without a default and what makes the others
            matter.
        models: List of models and lists of arrays, which an error leaves as
            they are.
        then: Callable of what the call returns, or None: how it is used.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]
    models: list[Any] = dataclasses.field(default_factory=list)
    then: Any = None


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


def scaled():
    model = mlp()
    kwm.attach_scaling(model)
    return model


def packed():
    model = sparse()
    kwm.pack(model)
    return model


def kernel():
    return normal(16, 16)


def signature(model=None):
    return models.make_signature(model or mlp())


def delta():
    """Return a patch, and the model that it was made from."""
    tuned, base = mlp(), mlp()
    tuned.layers[0].kernel.assign_add(0 * normal(8, 16) + 0.5)
    return kwm.Patch.from_models(tuned, base), tuned, base


def on_patch(method, is_on=False, **arguments):
    def make():
        patch, _, base = delta()
        if is_on:
            patch.apply(base)
        given = {"model": base} if "filepath" not in arguments else {}
        return Call(getattr(patch, method), given | arguments, [base])

    return make


def cast(is_compiled=True):
    made = kwm.CAST(models.mlp())
    if is_compiled:
        made.compile(loss="mse")
    return made


def on_cast(method, is_compiled=True, **arguments):
    made = cast(is_compiled)
    return Call(getattr(made, method), arguments, [made.student])


def _finalize():
    made = cast()
    made.fit(X, normal(8, 4), verbose=0)
    return Call(made.finalize, {}, [made.student])


def language_model(family="llama3", *args, **kwargs):
    return models.causal_lm(family, *args, **kwargs)


def fit_by(optimizer, *callbacks):
    model = models.mlp()
    model.compile(optimizer, "mse", jit_compile=False)
    model.fit(X, normal(8, 4), 4, callbacks=[*callbacks], verbose=0)


def fit_with(callback, make_optimizer=keras.optimizers.SGD):
    fit_by(make_optimizer(), callback)


def fit_masked(optimizer):
    fit_by(optimizer, kwm.PrincipalMaskCallback(0.1))


X = normal(8, 8)
TOKENS = np.arange(12).reshape(2, 6)
LAW = {"tokens": [1e6, 2e6, 4e6, 8e6, 1.6e7]}
LAW["losses"] = [3 + 100 / n**0.5 for n in LAW["tokens"]]


def _extract():
    model = models.mlp(*[4] * 9)
    init, clean, robust = (models.random_weights(model, i) for i in range(3))
    given = {"init": init, "clean": clean, "robust": robust, "like": model}
    return Call(kwm.WeightSignature.extract, given, [model, init, clean])


def _adapter():
    """Write a LoRA adapter; return its patch and their base."""
    model = models.randomize(language_model(), scale=0.2)
    base = [np.array(each) for each in model.get_weights()]
    kernel = kwm.find_targets(model)[0].variable
    kernel.assign_add(0 * kernel.value + 0.1)
    patch = kwm.Patch.from_models(model, base)
    model.set_weights(base)
    patch.to_lora(model, "old_adapter", 2)
    return patch, model


def _to_lora():
    patch, model = _adapter()
    given = {"model": model, "filepath": "new_adapter"}
    return Call(patch.to_lora, given, [model])


def _from_lora():
    _, model = _adapter()
    given = {"model": model, "lora": "old_adapter"}
    return Call(kwm.Patch.from_lora, given, [model])


def _use_targets():
    model = mlp()
    optimizer = kwm.AdamS(total_steps=4)
    given = {"targets": kwm.find_targets(model)}
    return Call(optimizer.use_targets, given, [model])


def _set_importance():
    model = mlp()
    optimizer = kwm.AdamS(total_steps=4, criterion="wanda")
    optimizer.use_targets(kwm.find_targets(model))
    optimizer.build(model.trainable_variables)
    given = {"importance": [np.ones(8), np.ones(16)]}
    return Call(optimizer.set_importance, given, [model])


# Calls that more than one object takes part in.
CALLS: dict[str, Callable[[], Call]] = {
    "AdamS.use_targets": _use_targets,
    "AdamS.set_importance": _set_importance,
    "CAST.compile": lambda: on_cast("compile", False, loss="mse"),
    "CAST.fit": lambda: on_cast("fit", x=X, y=normal(8, 4), verbose=0),
    "CAST.evaluate": lambda: on_cast(
        "evaluate", x=X, y=normal(8, 4), verbose=0
    ),
    "CAST.finalize": _finalize,
    "Patch.from_lora": _from_lora,
    "Patch.to_lora": _to_lora,
    "Patch.save": on_patch("save", filepath="new.safetensors"),
    "Patch.apply": on_patch("apply"),
    "Patch.applied": on_patch("applied"),
    "Patch.remove": on_patch("remove", is_on=True),
    "Patch.subtract": on_patch("subtract"),
    "Patch.on": on_patch("on"),
    "Patch.clear": on_patch("clear", is_on=True),
    "WeightSignature.extract": _extract,
}


def _saved(save, filepath):
    def path():
        save(filepath)
        return filepath

    return path


def _saved_checkpoint():
    if not os.path.isdir("checkpoints"):
        fit_with(kwm.Checkpoint("checkpoints"))
    return mlp()


# Right values of arguments by their names: functions that make them.
RIGHT: dict[str, Callable[[], Any]] = {
    "model": mlp,
    "models": lambda: [mlp(), mlp()],
    "output": mlp,
    "other": signature,
    "units": lambda: 3,
    "optimizer": keras.optimizers.SGD,
    "path": lambda: "new checkpoints",
    "filepath": lambda: "saved.safetensors",
    "texts": lambda: TOKENS,
    "tokens": lambda: LAW["tokens"],
    "losses": lambda: LAW["losses"],
    "signatures": lambda: [signature(), signature()],
    "base": mlp,
    "depth": lambda: 1,
    "reason": lambda: lambda target: None,
    "function": lambda: lambda task: iter(()),
    "name": lambda: "mine",
    "writer": lambda: lambda model: lambda path, _: None,
    "layer_class": lambda: Own,
    "kernels": lambda: {"kernel": {"contraction_axes": (0,)}},
    **dict.fromkeys(("x", "v", "w"), kernel),
    "a": lambda: 0.5,
    "b": lambda: 1.0,
    "m": lambda: 4,
    "pattern": lambda: "2:4",
    "mask": lambda: np.ones((3, 5), bool),
    "kernel": lambda: kwm.ops.nm_project(kernel()),
    "packed": lambda: kwm.ops.pack_kernel(kwm.ops.nm_project(kernel())),
    "shape": lambda: (16, 16),
    "dtype": lambda: "float32",
    "verbose": lambda: 0,
}
# What is different, or has a default and matters, by what is called.
ARGUMENTS: dict[str, dict[str, Callable[[], Any]]] = {
    "AdamS": {"total_steps": lambda: 2},
    "assert_sparse": {"model": sparse},
    "attach_compander": {"out_of_range": lambda: "clip"},
    "Checkpoint.restore": {"model": _saved_checkpoint},
    "compile_generate": {"model": language_model},
    "export": {
        "model": lambda: language_model(vocabulary_size=32),
        "filepath": lambda: "exported",
        "format": lambda: "transformers",
    },
    "fold": {"model": scaled},
    "lm_eval_model": {"model": language_model},
    "load_model": {
        "filepath": _saved(
            lambda path: kwm.save_model(models.mlp(), path), "model.safetensors"
        )
    },
    "merge_lora": {"model": lambda: with_lora()},
    "pack": {"model": sparse},
    "Patch.from_models": {"model": lambda: delta()[1]},
    "Patch.load": {
        "filepath": _saved(
            lambda path: delta()[0].save(path), "delta.safetensors"
        )
    },
    "Perplexity": {"model": models.token_net},
    "perplexity": {"model": models.token_net, "length": lambda: 4},
    "PrincipalMaskCallback": {"density": lambda: 0.1},
    "PrincipalMaskCallback.detach": {"model": mlp},
    "quantize": {
        "data": lambda: X,
        "group_size": lambda: 8,
        "epochs": lambda: 1,
    },
    "ScalingLaw.predict": {"tokens": lambda: 1e7},
    "self_generated": {
        "model": lambda: language_model("gpt2", models.gpt2_preprocessor()),
        "keep": lambda: 0.5,
        "length": lambda: 6,
        "rows": lambda: 2,
    },
    "SemiStructuredSparse": {"axis": lambda: 0},
    "SemiStructuredSparse.detach": {"model": lambda: constrained()},
    "sparsify": {
        "data": lambda: X,
        "criterion": lambda: "sparsegpt",
        "epochs": lambda: 1,
    },
    "uncompile_generate": {"model": language_model},
    "unpack": {"model": packed},
    "ops.unpack_bits": {
        "packed": lambda: kwm.ops.pack_bits(np.ones((3, 5), bool)),
        "shape": lambda: (3, 5),
    },
    "ops.principal_mask": {"density": lambda: 0.1},
    "ops.sparse_matmul": {"x": lambda: normal(2, 16)},
}
# What the methods are called on.
OWNERS: dict[str, Callable[[], Any]] = {
    "CAST": cast,
    "Checkpoint": lambda: kwm.Checkpoint("checkpoints"),
    "ops": lambda: kwm.ops,
    "Patch": lambda: kwm.Patch,
    "Perplexity": lambda: kwm.Perplexity(models.token_net(), length=4),
    "PrincipalMaskCallback": lambda: kwm.PrincipalMaskCallback(0.1),
    "ScalingLaw": lambda: kwm.fit_scaling_law(**LAW),
    "SemiStructuredSparse": lambda: kwm.SemiStructuredSparse(axis=0),
    "Target": lambda: kwm.find_targets(mlp())[0],
    "Targets": lambda: kwm.find_targets(mlp()),
    "WeightSignature": signature,
}
# How what is returned is used.
THEN: dict[str, Callable[[Any], Any]] = {
    "AdamS": lambda made: fit_by(made),
    "Checkpoint": lambda made: fit_with(made),
    "CompanderDense": lambda layer: layer(normal(2, 4)),
    "MaskedOptimizer": lambda made: fit_masked(made),
    "PrincipalMaskCallback": lambda made: fit_with(made),
    "register_layer_kind": lambda _: kwm.find_targets(Own.model()),
    "SemiStructuredSparse": lambda constraint: constraint(kernel()),
    "SparseAdamW": lambda made: fit_masked(made),
    "SparsityMonitor": lambda made: fit_with(
        made, lambda: kwm.AdamS(total_steps=2)
    ),
    "SwapSparseEMAWeights": lambda made: fit_with(
        made, lambda: keras.optimizers.SGD(use_ema=True)
    ),
}


def call_of(name):
    """Return the `Call` of a public name as it should be."""
    if name in CALLS:
        return CALLS[name]()
    owner, _, method = name.rpartition(".")
    function = getattr(OWNERS[owner]() if owner else kwm, method)
    makers = dict(ARGUMENTS.get(name, {}))
    for each in inspect.signature(function).parameters.values():
        variadic = each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        is_required = each.default is each.empty and not variadic
        if is_required or each.name == "verbose":
            makers.setdefault(each.name, RIGHT[each.name])
    arguments = {key: make() for key, make in makers.items()}
    given = keras.tree.flatten([*arguments.values()])
    given = [each for each in given if isinstance(each, keras.Model)]
    return Call(function, arguments, given, THEN.get(name))


def constrained():
    kwm.SemiStructuredSparse.attach(model := mlp(), verbose=0)
    return model


def with_lora():
    model = mlp()
    model.layers[0].enable_lora(2)
    return model


class Own(keras.layers.Layer):
    """A layer that `find_targets` does not know."""

    def build(self, shape):
        self.kernel = self.add_weight((shape[-1], 4), name="kernel")

    def call(self, x):
        return x @ self.kernel

    @classmethod
    def model(cls):
        return models.sequential((8,), cls())


class Unbuilt(keras.Model):
    def call(self, x):
        return x


def _garbage():
    path = pathlib.Path("garbage.safetensors")
    path.write_bytes(b"\x10" + bytes(200))
    return path


BAD: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "-1": lambda: -1,
    "0": lambda: 0,
    "3": lambda: 3,
    "2**31": lambda: 2**31,
    "2**70": lambda: 2**70,
    "10**400": lambda: 10**400,
    "-0.5": lambda: -0.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "1j": lambda: 1j,
    "''": lambda: "",
    "'nonsense'": lambda: "nonsense",
    "'('": lambda: "(",
    "'a\\0b'": lambda: "a\0b",
    "'x' * 5000": lambda: "x" * 5000,
    "[]": lambda: [],
    "[None]": lambda: [None],
    "[[1], [1, 2]]": lambda: [[1], [1, 2]],
    "[-1]": lambda: [-1],
    "['a', 'b']": lambda: ["a", "b"],
    "(2, 4, 6)": lambda: (2, 4, 6),
    "(10**9, 10**9)": lambda: (10**9, 10**9),
    "{}": dict,
    "{'a': 1}": lambda: {"a": 1},
    "{1, 2}": lambda: {1, 2},
    "object()": object,
    "a function": lambda: lambda value: value,
    "a function that raises": lambda: _raises,
    "a class": lambda: int,
    "an iterator": lambda: iter([1, 2]),
    "'complex64'": lambda: "complex64",
    "array of no columns": lambda: np.zeros((8, 0), "float32"),
    "array of NaN": lambda: np.full((8, 8), np.nan, "float32"),
    "array of strings": lambda: np.array(["a", "b"]),
    "array of objects": lambda: np.array([None, {}], dtype=object),
    "array of complex": lambda: np.ones((8, 8), "complex64"),
    "array of bools": lambda: np.ones((8, 8), bool),
    "array of five axes": lambda: np.ones((1, 2, 1, 2, 1), "float32"),
    "scalar array": lambda: np.array(3.0),
    "a tensor": lambda: keras.ops.ones((2, 3)),
    "a symbol": lambda: keras.Input((3,)),
    "a variable": lambda: keras.Variable(np.zeros(3)),
    "a layer": lambda: keras.layers.Dense(2),
    "a model not built": Unbuilt,
    "a model without weights": lambda: models.sequential(
        (3,), keras.layers.ReLU()
    ),
    "another model": lambda: models.mlp(3, 5),
    "targets of another model": lambda: kwm.find_targets(models.mlp()),
    "an optimizer": lambda: keras.optimizers.Adam(),
    "a folder": lambda: ".",
    "a path in no folder": lambda: "none/there",
    "a file of something else": _garbage,
}


def _raises(*args, **kwargs):
    raise ZeroDivisionError("by the user's own function")


def all_cases():
    """Return all triples (subject, argument, bad value), by their names."""
    return [
        (name, parameter, bad)
        for name, function in subjects().items()
        for parameter in parameters_of(function)
        for bad in BAD
    ]


def some_cases(count, seed=0):
    """Return a part of all cases, of each name about as many."""
    cases = all_cases()
    random.Random(seed).shuffle(cases)
    seen = collections.Counter()
    ranked = []
    for place, (name, *_) in enumerate(cases):
        seen[name] += 1
        ranked.append((seen[name], place))
    return sorted(cases[place] for _, place in sorted(ranked)[:count])


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


class _TooLong(BaseException):
    pass


@contextlib.contextmanager
def limits():
    """Bound the memory that a process may take, and how long a call waits."""

    def stop(*_):
        raise _TooLong

    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, before[1]))
    handler = signal.signal(signal.SIGALRM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def run(case):
    """Make one wrong call.

    Returns:
        String, what is wrong with what came of it; None where nothing is.
    """
    name, parameter, bad = case
    call = call_of(name)
    before = [state_of(each) for each in call.models]
    value = BAD[bad]()
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
    if isinstance(error, ZeroDivisionError):
        return None  # the user's own
    if isinstance(error, ImportError) and "pip install" in str(error):
        return None
    if isinstance(error, RuntimeError) and (name, parameter) in _LOSSES:
        return None
    # Keras' own words, from which it takes its own frames.
    if "y_true and y_pred have different structures" in str(error):
        return None
    return raised.why_obscure(error, parameter)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--count", type=int, default=None)
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
