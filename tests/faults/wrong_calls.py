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

import keras
import numpy as np  # noqa: F401

import keras_weightmods as kwm  # noqa: F401
from keras_weightmods.core import keras_compat
from tests import models
from tests.faults import raised
from tests.faults.right_calls import call_of, fit_by, language_model

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


class Unbuilt(keras.Model):
    def call(self, x):
        return x


def _garbage():
    path = pathlib.Path("garbage.safetensors")
    path.write_bytes(b"\x10" + bytes(200))
    return path


def _raises(*args, **kwargs):
    raise ZeroDivisionError("by the user's own function")


# Expressions, evaluated anew for each call.
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
