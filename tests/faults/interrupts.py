"""Interrupt calls that change a model or a file: the old state, or the new.

KERAS_BACKEND=torch python -m tests.faults.interrupts --moments 30

Each public call that changes something is made on a tiny model, and Ctrl-C
comes at one moment of it: `KeyboardInterrupt` is raised where Python itself
would raise it, at the beginning of a function, at a jump back and after a
call. Two thirds of the moments lie in the functions of this package, the
others in those of Keras that it calls. Then the weights, bit for bit, the
layers with their classes, attributes and variables, the flags, the optimizer
and the files must be what they were before the call, or what they are after
it. Where they are what they were, the call is made once more, and must do what
it does without an interrupt.
"""

import argparse
import contextlib
import dis
import faulthandler
import functools
import gc
import json
import os
import pathlib
import random
import sys
import tempfile
import threading
import time
import warnings

import keras
import numpy as np
from keras.src.backend.common import global_state

import keras_weightmods as kwm
from keras_weightmods.core import keras_compat
from keras_weightmods.core.reparameterization import slots
from tests import models

MOST_SECONDS = 900  # of a case that takes 60 at most on a core of its own
PACKAGE = os.path.dirname(kwm.__file__)
KERAS = os.path.dirname(keras.__file__)
# There a signal waits for the end of a step; an error of ours would not.
DEFERS = os.path.join("jax", "kept_step.py")

# By name: a function from a folder to the objects that are compared, and the
# call.
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def mlp(*layers, size=8):
    """Return a small model with the same names each time."""
    keras.utils.set_random_seed(0)
    first, last = (
        keras.layers.Dense(8, "relu", name="first"),
        keras.layers.Dense(4, name="last"),
    )
    inputs = keras.Input((size,), name="inputs")
    return keras.Sequential([inputs, first, *layers, last], name="model")


def sparse():
    model = models.make_sparse(mlp())
    kwm.SemiStructuredSparse.attach(model, verbose=0)
    kwm.SemiStructuredSparse.detach(model)
    return model


def functional():
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((8,), name="inputs")
    for name in ("first", "second"):
        x = keras.layers.Dense(8, "relu", name=name)(x)
    outputs = keras.layers.Dense(4, name="last")(x)
    return keras.Model(inputs, outputs, name="model")


def trained(model, optimizer="sgd"):
    """Give a model a built optimizer."""
    model.compile(optimizer, "mse", jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    return model


X, Y = models.normal(8, 8), models.normal(8, 4, seed=1)


@case
def pack(_):
    model = trained(sparse())
    return [model], lambda: kwm.pack(model, verbose=0)


@case
def pack_int8(_):
    model = mlp()
    return [model], lambda: kwm.pack(model, "int8", verbose=0)


@case
def pack_head(_):
    model = models.token_net()
    return [model], lambda: kwm.pack(model, "int8", verbose=0)


@case
def unpack(_):
    model = sparse()
    kwm.pack(model, verbose=0)
    trained(model)
    return [model], lambda: kwm.unpack(model, verbose=0)


@case
def attach_scaling(_):
    model = mlp()
    return [model], lambda: kwm.attach_scaling(model, verbose=0)


@case
def attach_compander(_):
    model = mlp()
    model.layers[0].kernel.regularizer = keras.regularizers.L2(0.1)
    return [model], lambda: kwm.attach_compander(model, verbose=0)


@case
def attach_weight_norm(_):
    model = mlp()
    return [model], lambda: kwm.attach_weight_norm(model, verbose=0)


@case
def fold(_):
    model = mlp()
    kwm.attach_scaling(model, targets="first", verbose=0)
    kwm.attach_compander(model, targets="last", verbose=0)
    trained(model)
    return [model], lambda: kwm.fold(model, verbose=0)


@case
def fold_layers(_):
    model = mlp(kwm.CompanderDense(8, name="own"))
    return [model], lambda: kwm.fold(model, verbose=0)


@case
def constraint_attach(_):
    model = mlp()
    attach = kwm.SemiStructuredSparse.attach
    return [model], lambda: attach(model, frozen=True, verbose=0)


@case
def constraint_detach(_):
    layer = keras.layers.Dense(
        8, kernel_constraint=kwm.SemiStructuredSparse(), name="own"
    )
    model = mlp(layer)
    kwm.SemiStructuredSparse.attach(model, verbose=0)
    return [model], lambda: kwm.SemiStructuredSparse.detach(model)


@case
def sparsify(_):
    model = trained(mlp())
    return [model], lambda: kwm.sparsify(model, verbose=0)


@case
def sparsify_on_data(_):
    model, how = mlp(), {"criterion": "sparsegpt", "refine": "swaps"}
    return [model], lambda: kwm.sparsify(model, "2:4", X, **how, verbose=0)


@case
def sparsify_blocks(_):
    model, how = functional(), {"refine": "blocks", "epochs": 1}
    return [model], lambda: kwm.sparsify(model, "2:4", X, **how, verbose=0)


@case
def quantize(_):
    model = mlp()
    return [model], lambda: kwm.quantize(model, X, refine=None, verbose=0)


@case
def quantize_blocks(_):
    model = functional()
    return [model], lambda: kwm.quantize(model, X, epochs=1, verbose=0)


@case
def cast(_):
    model = trained(mlp())
    return [model], lambda: kwm.CAST(model)


@case
def cast_with_teacher(_):
    model, teacher = mlp(), functional()
    return [model, teacher], lambda: kwm.CAST(model, teacher=teacher)


def cast_fitted(**how):
    model = mlp()
    trainer = kwm.CAST(model, **how)
    loss = keras.losses.MeanSquaredError()
    trainer.compile(loss=loss, jit_compile=False, run_eagerly=True)
    trainer.fit(X, Y, batch_size=4, epochs=2, verbose=0)
    return trainer


@case
def cast_finalize(_):
    trainer = cast_fitted()
    return [trainer], lambda: trainer.finalize(verbose=0)


@case
def adam_s_build(_):
    model, optimizer = mlp(), kwm.AdamS(total_steps=100, decay="relative")
    build = functools.partial(optimizer.build, model.trainable_variables)
    return [model, optimizer], build


@case
def adam_s_prune(_):
    model = mlp()
    optimizer = kwm.AdamS(total_steps=100, decay="relative", targets=model)
    optimizer.build(model.trainable_variables)
    optimizer.apply([keras.ops.ones(v.shape) for v in model.weights])
    return [model, optimizer], optimizer.prune


@case
def set_importance(_):
    model = mlp()
    optimizer = kwm.AdamS(
        total_steps=100, decay="relative", criterion="wanda", targets=model
    )
    optimizer.build(model.trainable_variables)
    ranks = [np.arange(8), np.arange(8)]
    return [optimizer], lambda: optimizer.set_importance(ranks)


@case
def merge_lora(_):
    model = sparse()
    for layer in model.layers:
        layer.enable_lora(2)
        layer.lora_kernel_b.assign(models.normal(*layer.lora_kernel_b.shape))
    trained(model)
    return [model], lambda: kwm.merge_lora(model, "2:4")


def a_patch(model, seed=1):
    other = mlp()
    models.randomize(other, seed)
    return kwm.Patch.from_models(other, model, verbose=0)


@case
def patch_apply(_):
    model = mlp()
    patch = a_patch(model)
    return [model], lambda: patch.apply(model, 0.5, verbose=0)


@case
def patch_remove(_):
    model = mlp()
    patch, other = a_patch(model), a_patch(model, 2)
    patch.apply(model, verbose=0)
    other.apply(model, 0.5, verbose=0)
    return [model], lambda: patch.remove(model, verbose=0)


@case
def patch_clear(_):
    model = mlp()
    a_patch(model).apply(model, verbose=0)
    return [model], lambda: kwm.Patch.clear(model)


@case
def patch_subtract(_):
    model = models.conv_net()
    patch = models.make_signature(model)
    return [model], lambda: patch.subtract(model)


@case
def patch_applied(_):
    model = mlp()
    patch = a_patch(model)

    def call():
        with patch.applied(model):
            pass

    return [model], call


@case
def lift_attach(_):
    model = trained(mlp(), "adam")
    masks = kwm.LIFT(0.2, also_train="last/bias", seed=0)
    return [model], lambda: masks.attach(model)


@case
def lift_attach_sparse_adamw(_):
    model, masks = mlp(), kwm.LIFT(0.2, seed=0)
    model.compile(kwm.SparseAdamW(1e-3), "mse", jit_compile=False)
    return [model], lambda: masks.attach(model)


@case
def lift_detach(_):
    model, masks = mlp(), kwm.LIFT(0.2, seed=0)
    model.compile(kwm.SparseAdamW(1e-3), "mse", jit_compile=False)
    masks.attach(model)
    return [model], lambda: masks.detach(model)


@case
def compander_optimizer(_):
    model = mlp()
    kwm.attach_compander(model, verbose=0)
    optimizer = kwm.CompanderOptimizer(keras.optimizers.Adam(1e-3))
    build = functools.partial(optimizer.build, model.trainable_variables)
    return [model, optimizer], build


@case
def save_model(folder):
    model, path = mlp(), folder / "model.safetensors"
    kwm.save_model(model, path, verbose=0)
    models.randomize(model)
    return [model], lambda: kwm.save_model(model, path, verbose=0)


@case
def load_model(folder):
    model, path = sparse(), folder / "model.safetensors"
    kwm.pack(model, verbose=0)
    kwm.save_model(model, path, verbose=0)
    return [model], lambda: kwm.load_model(path, verbose=0)


@case
def patch_save(folder):
    model, path = mlp(), folder / "patch.safetensors"
    a_patch(model).save(path, verbose=0)
    other = a_patch(model, 2)
    return [model], lambda: other.save(path, verbose=0)


@case
def merge(folder):
    a, b, path = mlp(), mlp(), folder / "merged.safetensors"
    models.randomize(b)
    kwm.save_model(a, path, verbose=0)
    files = folder / "a.safetensors", folder / "b.safetensors"
    for model, file in zip((a, b), files):
        kwm.save_model(model, file, verbose=0)
    return [], lambda: kwm.merge(files, output=path, verbose=0)


@case
def export(folder):
    if "arrays" not in exporting():
        kwm.register_export_format("arrays", arrays_writer, ending=".bin")
    model, path = sparse(), folder / "model.bin"
    kwm.pack(model, verbose=0)
    path.write_bytes(b"old")
    return [model], lambda: kwm.export(model, path, "arrays", verbose=0)


def exporting():
    from keras_weightmods.exporting.export import FORMATS

    return FORMATS


def arrays_writer(model):
    def write(path, progress):
        content = b"".join(np.asarray(x).tobytes() for x in weights_of(model))
        pathlib.Path(path).write_bytes(content)

    return write


def weights_of(model):
    return map(keras.ops.convert_to_numpy, model.weights)


@case
def find_targets(_):
    model = functional()
    return [model], lambda: kwm.find_targets(model)


@case
def sparsity_report(_):
    model = trained(sparse())
    return [model], lambda: kwm.sparsity_report(model, "2:4", verbose=0)


# In a step of a training each weight is what it was, or what it is after it:
# not all of them at once. A function from a folder as above, and what the user
# may call then.
STEPS = {}


def step(function):
    STEPS[function.__name__] = CASES[function.__name__] = function
    return function


def stepped(model, optimizer):
    """Return the case of one step that is run op by op."""
    gradients = [models.normal(*v.shape) for v in model.trainable_variables]
    gradients = list(map(keras.ops.convert_to_tensor, gradients))
    return lambda: optimizer.apply(gradients, model.trainable_variables)


class Unchanged(keras.constraints.Constraint):
    def __call__(self, value):
        return value


@step
def compander_step(_):
    model = mlp()
    kwm.attach_compander(model, verbose=0)
    # Keras applies them after the step. One that changes nothing is enough.
    model.layers[1].bias.constraint = Unchanged()
    optimizer = kwm.CompanderOptimizer(keras.optimizers.Adam(1e-2))
    optimizer.build(model.trainable_variables)
    return [model], stepped(model, optimizer), None


@step
def masked_step(_):
    model, masks = mlp(), kwm.LIFT(0.2, seed=0)
    model.compile(kwm.MaskedOptimizer(keras.optimizers.Lion(1e-2)), "mse")
    masks.attach(model)
    return [model], stepped(model, model.optimizer), None


@step
def lift_fit(_):
    model, masks = mlp(), kwm.LIFT(0.2, seed=0)
    adam = keras.optimizers.AdamW(1e-2)
    model.compile(adam, "mse", jit_compile=False, run_eagerly=True)

    def call():
        model.fit(X, Y, batch_size=8, verbose=0, callbacks=[masks])

    return [model], call, lambda: masks.detach(model)


# Those that continuous integration interrupts.
SOME = ("pack", "unpack", "fold", "cast", "lift_attach", "patch_remove")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=30, help="of each call")
    parser.add_argument("--cases", nargs="*", default=[*CASES])
    args = parser.parse_args()
    failed = 0
    # What is imported is no garbage, and a collection after it is short.
    gc.collect()
    gc.freeze()
    for name in args.cases:
        began = time.perf_counter()
        # Where it hangs.
        faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
        wrong, done = run(name, args.moments)
        row = {"backend": keras.backend.backend(), "case": name, **done}
        row["seconds"] = round(time.perf_counter() - began, 1)
        print(json.dumps({**row, "wrong": len(wrong)}), flush=True)
        for moment, differences in wrong:
            print(f"  {moment}\n    {differences}"[:2000], flush=True)
        failed += len(wrong)
    if failed:
        sys.exit(f"{failed} interrupts left neither the old state nor the new")


def run(name, moments=30, seed=0):
    """Interrupt a call at so many moments.

    Returns:
        Pair of a list of what went wrong, and of the counts of what was found.
    """
    rng = random.Random(f"{name} {seed}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # What is imported, compiled or cached at first use is no change.
        for _ in range(2):
            with made(name) as (see, call, _):
                before = see()
                call()
                after = see()
        counted = Moments()
        with made(name) as (_, call, _), counted:
            call()
        wrong, found = [], {"old": 0, "new": 0}
        for kind, at in spread(counted.counts, moments, rng, name in STEPS):
            problem, state = interrupted(name, kind, at, before, after)
            if problem:
                wrong.append(problem)
            else:
                found[state] += 1
    return wrong, found


def spread(counts, moments, rng, is_step):
    """Yield pairs of a kind and a number, spread over all that there are."""
    shares = {"package": moments - moments // 3, "keras": moments // 3}
    if is_step or not counts["keras"]:
        shares["package"] = moments
        shares["keras"] = 0
    for kind, share in shares.items():
        count = counts[kind]
        share = min(share, count)
        for i in range(share):
            yield (
                kind,
                1 + rng.randrange(i * count // share, (i + 1) * count // share),
            )


def interrupted(name, kind, at, before, after):
    """Interrupt a call once; return what is wrong, if it is, and the state."""
    with made(name) as (see, call, repair):
        moments = Moments(kind, at)
        error = None
        try:
            with moments:
                call()
        except KeyboardInterrupt as raised:
            error = raised
        label = f"{kind} {at}: {moments.place}"
        if name in STEPS:
            repair()
            state = see()
            wrong = {
                key: value
                for key, value in state.items()
                if key.startswith("0 variable")
                and value not in (before[key], after[key])
            }
            if wrong:
                return (label, differences(before, before | wrong)), None
            return None, "new" if state == after else "old"
        state = see()
        if error is not None:
            # What ends only with the traceback must not change it any more.
            error = None
            gc.collect()
            if see() != state:
                return (
                    label,
                    "changes later: " + differences(state, see()),
                ), None
        if state == after and state != before:
            return None, "new"
        if state != before:
            near = min(
                (differences(other, state) for other in (before, after)),
                key=len,
            )
            return (label, near), None
        try:
            call()
        except Exception as again:
            return (label, f"again: {again!r}"), None
        if see() != after:
            return (label, "again: " + differences(after, see())), None
        return None, "old"


@contextlib.contextmanager
def made(name):
    """Yield functions: the state of a case, its call, and what follows."""
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        keras.utils.set_random_seed(0)
        # The numbers in the names that Keras gives.
        global_state.set_global_attribute("object_name_uids", None)
        objects, call, *repair = CASES[name](place)

        def seeded():
            keras.utils.set_random_seed(0)
            return call()

        see = functools.partial(state_of, objects, place)
        # On torch a layer lists its parameters when it is first asked.
        see()
        yield see, seeded, (repair and repair[0]) or (lambda: None)


def state_of(objects, folder):
    """Return all that is compared, as a flat dict."""
    found = {
        f"file {path.relative_to(folder)}": path.is_file() and path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }
    found["threads"] = threading.active_count()
    found["scopes of Keras"] = (
        keras.Variable(0.0, name="probe").path,
        keras_compat.in_stateless_scope(),
        keras_compat.get_autocast_scope(),
        keras.distribution.distribution(),
    )
    for number, each in enumerate(objects):
        own = (
            optimizer_state(each)
            if isinstance(each, keras.optimizers.Optimizer)
            else model_state(each)
        )
        found.update({f"{number} {key}": value for key, value in own.items()})
    return found


def model_state(model):
    found = {}
    for number, layer in enumerate(keras_compat.layers_of(model)):
        own = vars(layer)
        found[f"layer {number}"] = (
            layer.name,
            [(c.__module__, c.__name__) for c in type(layer).__mro__],
            sorted(own),
            layer._tracker.locked,
            layer.trainable,
            {a: type(item).__name__ for a, item in slots(layer).items()},
            [
                getattr(
                    own.get(f"{n}_function"),
                    "__name__",
                    own.get(f"{n}_function") is None,
                )
                for n in ("train", "test", "predict")
            ],
            [(v.path, v.name) for v in keras_compat.own_variables(layer)],
            {name: len(ids) for name, ids in layer._tracker.stored_ids.items()},
            getattr(layer, "lora_enabled", None),
            [
                (name, parameter.requires_grad)
                for name, parameter in parameters(layer)
            ],
        )
    for number, variable in enumerate(model.variables):
        found[f"variable {number}"] = variable_state(variable)
    if keras.backend.backend() == "torch":
        listed = {id(p) for _, p in parameters(model)}
        held = {id(v.value) for v in model.variables}
        found["not listed"] = len(held - listed), len(listed - held)
    found["compiled"] = getattr(model, "compiled", None)
    optimizer = getattr(model, "optimizer", None)
    found["optimizer"] = type(optimizer).__name__
    if optimizer is not None:
        found.update(optimizer_state(optimizer))
    patches = kwm.Patch.on(model) if isinstance(model, keras.Model) else {}
    found["patches"] = {n: each.scale for n, each in patches.items()}
    return found


def parameters(layer):
    if keras.backend.backend() != "torch":
        return ()
    return layer.named_parameters()


def optimizer_state(optimizer):
    found = {
        "optimizer attributes": (sorted(vars(optimizer)), optimizer.built),
        "optimizer locked": optimizer._tracker.locked,
    }
    for number, variable in enumerate(optimizer.variables):
        # Keras numbers the optimizers of a process in their paths.
        found[f"optimizer variable {number}"] = variable_state(variable)[1:]
    return found


def variable_state(variable):
    return (
        variable.path,
        variable.dtype,
        tuple(variable.shape),
        bool(variable.trainable),
        type(variable.constraint).__name__,
        getattr(
            variable.regularizer,
            "__name__",
            type(variable.regularizer).__name__,
        ),
        sorted(vars(variable)),
        np.asarray(keras.ops.convert_to_numpy(variable)).tobytes(),
    )


def differences(first, second):
    """Say what is different in two states."""
    rows = []
    for key in [*first, *(second.keys() - first.keys())]:
        pair = first.get(key), second.get(key)
        if pair[0] != pair[1]:
            parts = [
                f"{str(a)[:150]} -> {str(b)[:150]}"
                for a, b in zip(*map(_parts, pair))
                if a != b
            ]
            rows.append(f"{key}: {'; '.join(parts)}")
    return "\n    ".join(rows)


def _parts(value):
    return value if isinstance(value, tuple) else (value,)


class Moments:
    """A scope in which moments are counted, and Ctrl-C comes at one of them.

    Python looks for signals at the beginning of a function, at a jump back,
    and when a call has returned.

    Args:
        kind: `"package"` or `"keras"`; None to count alone.
        at: Int, the number of the moment, from 1.

    Attributes:
        counts: Dict from kinds to the moments seen.
        place: String, where the interrupt came.
    """

    def __init__(self, kind=None, at=0):
        self.kind, self.at = kind, at
        self.counts = {"package": 0, "keras": 0}
        self.place = "nowhere"
        self.depth = 0
        self.codes = {}
        self.after_call = {}

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self._begins)
        return self

    def __exit__(self, *error):
        sys.settrace(self.before)

    def _begins(self, frame, event, _):
        file, caller = frame.f_code.co_filename, frame.f_back
        # That of `with` is its user's: TensorFlow's scopes are TensorFlow's.
        while file == contextlib.__file__ and caller is not None:
            file, caller = caller.f_code.co_filename, caller.f_back
        kind = _kind(file)
        if kind is None:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self._see(kind, frame)
        return functools.partial(self._steps, kind)

    def _steps(self, kind, frame, event, _):
        if event != "opcode":
            return functools.partial(self._steps, kind)
        code = frame.f_code
        names = self.codes.get(code)
        if names is None:
            names = self.codes[code] = [
                _MATTERS[number] for number in code.co_code[::2]
            ]
        here = names[frame.f_lasti // 2]
        has_called = self.after_call.pop(id(frame), False)
        if here == "CALL":
            self.after_call[id(frame)] = True
        if has_called or here == "JUMP":
            self._see(kind, frame)
        return functools.partial(self._steps, kind)

    def _see(self, kind, frame):
        self.counts[kind] += 1
        if kind == self.kind and self.counts[kind] == self.at:
            code = frame.f_code
            file = os.path.relpath(code.co_filename, os.path.dirname(PACKAGE))
            if kind == "keras":
                file = os.path.relpath(code.co_filename, os.path.dirname(KERAS))
            self.place = f"{file}:{frame.f_lineno} in {code.co_name}"
            raise KeyboardInterrupt


def _matters(name):
    if name.startswith("CALL"):
        return "CALL"
    return "JUMP" if name.startswith("JUMP_BACKWARD") else None


_MATTERS = [_matters(dis.opname[number]) for number in range(256)]


@functools.cache
def _kind(file):
    if file.endswith(DEFERS):
        return None
    if file.startswith(PACKAGE):
        return "package"
    return "keras" if file.startswith(KERAS) else None


if __name__ == "__main__":
    main()
