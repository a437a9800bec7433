"""Interrupt calls that change a model or a file: the old state, or the new.

KERAS_BACKEND=torch python -m tests.faults.interrupts --moments 30

Each public call that changes something is made on a tiny model, and Ctrl-C
comes at one moment of it. `KeyboardInterrupt` is raised where Python itself
would raise it: at the beginning of a function, at a jump back and after a call.
Two thirds of the moments lie in the functions of this package, the others in
those of Keras that it calls. Afterwards everything must be as before the call,
or as after it: weights, bit for bit, layers with their classes, attributes and
variables, flags, the optimizer and files. If everything is as before, the call
is made again, and must do what it does without an interrupt.
"""

import argparse
import contextlib
import dis
import faulthandler
import functools
import gc
import json
import os
import random
import re
import sys
import tempfile
import threading
import time
import warnings

import keras
from keras.src.backend.common import global_state

import keras_weightmods as kwm
from tests.faults.interrupt_cases import CASES, STEPS
from tests.faults.states import differences, state_of

MOST_SECONDS = 900  # of a case that takes 60 at most on a core of its own
ROOTS = {
    kind: os.path.dirname(module.__file__)
    for kind, module in {"package": kwm, "keras": keras}.items()
}
# There a signal waits for the end of a step; an error of ours would not.
DEFERS = os.path.join("jax", "kept_step.py")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=30, help="of each call")
    parser.add_argument("--cases", nargs="*", default=[*CASES, *STEPS])
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
        for place, problem in wrong:
            print(f"  {place}\n    {problem}"[:2000], flush=True)
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
        with made(name) as (_, call, _), Moments() as counted:
            call()
        wrong, found = [], {"old": 0, "new": 0}
        for kind, at in spread(counted.counts, moments, rng, name in STEPS):
            with made(name) as made_again:
                interrupt = Moments(kind, at)
                end = end_of(interrupt, *made_again, before, after)
            if end in found:
                found[end] += 1
            else:
                wrong.append((f"{kind} {at}: {interrupt.place}", end))
    return wrong, found


def spread(counts, moments, rng, is_step):
    """Yield pairs of a kind and a number, spread over all that there are."""
    in_keras = 0 if is_step or not counts["keras"] else moments // 3
    for kind, share in ("package", moments - in_keras), ("keras", in_keras):
        count = counts[kind]
        share = min(share, count)
        for i in range(share):
            bounds = i * count // share, (i + 1) * count // share
            yield kind, 1 + rng.randrange(*bounds)


def end_of(interrupt, see, call, repair, before, after):
    """Return how an interrupted call ends: "old", "new", or what is wrong."""
    error = None
    try:
        with interrupt:
            call()
    except KeyboardInterrupt as raised:
        error = raised
    if repair is not None:
        repair()
        state = see()
        wrong = {
            key: value
            for key, value in state.items()
            if re.match(r"\d+ variable", key)
            and value not in (before[key], after[key])
        }
        if wrong:
            return differences(before, before | wrong)
        return "new" if state == after else "old"
    state = see()
    if error is not None:
        # What ends only with the traceback must not change it any more.
        error = None
        gc.collect()
        later = see()
        # A thread that draws may end with it.
        state["threads"] = later["threads"]
        if later != state:
            return "changes later: " + differences(state, later)
    if state == after and state != before:
        return "new"
    if state != before:
        both = (differences(other, state) for other in (before, after))
        return min(both, key=len)
    try:
        call()
    except Exception as again:
        return f"again: {again!r}"
    return "old" if see() == after else "again: " + differences(after, see())


@contextlib.contextmanager
def made(name):
    """Yield functions: the state of a case, its call, and what follows."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        keras.utils.set_random_seed(0)
        # The numbers in the names that Keras gives.
        global_state.set_global_attribute("object_name_uids", None)
        make, call, *repair = {**CASES, **STEPS}[name]
        objects = make()
        objects = objects if isinstance(objects, tuple) else (objects,)

        def seeded():
            keras.utils.set_random_seed(0)
            return call(*objects)

        # One that an earlier case has left behind is told of once.
        threads = {*threading.enumerate()}
        see = functools.partial(state_of, objects, threads)
        # On torch a layer lists its parameters when it is first asked.
        see()
        repair = functools.partial(*repair, *objects) if repair else None
        yield see, seeded, repair


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
        self.kind, self.at, self.place = kind, at, "nowhere"
        self.counts = dict.fromkeys(ROOTS, 0)
        self.has_called = set()

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self._begins)
        return self

    def __exit__(self, *error):
        sys.settrace(self.before)

    def _begins(self, frame, event, _):
        file, caller = frame.f_code.co_filename, frame.f_back
        # A `with` belongs to its caller: TensorFlow's scopes are TensorFlow's.
        while file == contextlib.__file__ and caller is not None:
            file, caller = caller.f_code.co_filename, caller.f_back
        kind = _kind(file)
        if kind is None:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self._see(kind, frame)
        return functools.partial(self._steps, kind)

    def _steps(self, kind, frame, event, _):
        if event == "opcode":
            name = _names_of(frame.f_code)[frame.f_lasti // 2]
            is_after_call = id(frame) in self.has_called
            self.has_called.discard(id(frame))
            if name.startswith("CALL"):
                self.has_called.add(id(frame))
            if is_after_call or name.startswith("JUMP_BACKWARD"):
                self._see(kind, frame)
        return functools.partial(self._steps, kind)

    def _see(self, kind, frame):
        self.counts[kind] += 1
        if kind == self.kind and self.counts[kind] == self.at:
            code = frame.f_code
            file = os.path.relpath(code.co_filename, ROOTS[kind])
            self.place = f"{file}:{frame.f_lineno} in {code.co_name}"
            raise KeyboardInterrupt


@functools.cache
def _names_of(code):
    return [dis.opname[number] for number in code.co_code[::2]]


@functools.cache
def _kind(file):
    if file.endswith(DEFERS):
        return None
    return next((k for k, root in ROOTS.items() if file.startswith(root)), None)


if __name__ == "__main__":
    main()
