"""Try every method on every family of models; `make matrix` does it.

    KERAS_BACKEND=torch python -m tests.matrix

Each cell runs in a process of its own, a fork of this one, which has imported
all there is and computed nothing, and has a limit of its time. It ends as

- `passed`;
- `refused`: an error in words of ours, or of Keras, that names what is wrong;
- `keras`: what Keras does by itself fails there, too;
- `unmade`: the model's constructor needs arguments of its own;
- `limit`: it took too long;
- `wrong`: another error, or a result that is not as it should be.

On JAX and TensorFlow XLA compiles without its slow passes: nothing is timed
here, and most of a cell is its compilation.

The cells are kept in a file of lines, by which a run that was stopped goes on.
`--only` makes some again, `--page` writes docs/every_model.md and runs nothing;
it needs all cells of the files that there are.
Not for Windows.
"""

import argparse
import collections
import contextlib
import importlib.metadata
import json
import os
import pathlib
import re
import select
import signal
import sys
import tempfile
import time
import warnings

import keras

from tests.faults import kills, raised
from tests.matrix import page
from tests.matrix.families import families
from tests.matrix.methods import METHODS, PLAIN

LIMIT = 300  # seconds of a cell
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    backend = keras.backend.backend()
    file = page.RESULTS / f"matrix_{backend}.jsonl"
    parser.add_argument("--results", type=pathlib.Path, default=file)
    parser.add_argument("--only", help="a regex for 'family: method'")
    parser.add_argument("--limit", type=float, default=LIMIT)
    parser.add_argument("--page", action="store_true")
    args = parser.parse_args()
    if args.page:
        try:
            page.write()
        except ValueError as error:
            sys.exit(str(error))
        return
    done = page.read(args.results)
    wanted = {
        (family, method)
        for family, method in page.cells()
        if re.search(args.only or "", f"{family}: {method}")
    }
    wrong = run(wanted, done, args.results, args.limit, bool(args.only))
    sys.exit(1 if wrong else 0)


def run(wanted, done, results, limit=LIMIT, again=False):
    """Run the cells that are not done, or all; return how many are wrong."""
    # XLA reads it when it first computes.
    os.environ.setdefault("XLA_FLAGS", QUICK)
    kinds = families()
    results.parent.mkdir(parents=True, exist_ok=True)
    names = ("keras", "keras-hub", keras.backend.backend())
    versions = {name: importlib.metadata.version(name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        kills.keep_programs(folder)
        for family, method in page.cells():
            pair = family, method
            if pair not in wanted or not page.is_left(pair, done, again):
                continue
            row = {"family": family, "method": method}
            start = time.perf_counter()
            state, note = in_a_process(kinds[family], method, limit)
            seconds = round(time.perf_counter() - start, 1)
            row |= {"state": state, "note": note, "seconds": seconds}
            done[pair] = row | {"versions": versions}
            with open(results, "a") as file:
                file.write(json.dumps(done[pair]) + "\n")
            print(f"{family}: {method}: {state}: {note}", flush=True)
    page.keep(results, done)
    counts = collections.Counter(row["state"] for row in done.values())
    print(json.dumps(counts, sort_keys=True))
    return counts["wrong"] + counts["limit"]


def in_a_process(family, method, limit):
    """Return the state of a cell, and what is to be said of it."""
    reads, writes = os.pipe()
    worker = os.fork()
    if not worker:
        try:
            os.close(reads)
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 1)
                os.dup2(nothing.fileno(), 2)
            with open(writes, "w") as pipe:
                json.dump(outcome(family, method), pipe)
        finally:
            os._exit(0)
    os.close(writes)
    with open(reads) as pipe:
        # The pipe is written to when all is done.
        if not select.select([pipe], [], [], limit)[0]:
            os.kill(worker, signal.SIGKILL)
        text = pipe.read()
    status = os.waitpid(worker, 0)[1]
    if text:
        return json.loads(text)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return "limit", f"over {limit:g} s"
    return "wrong", f"the process ended with status {status}"


def outcome(family, method):
    """Run a cell in this process; as `in_a_process`."""
    warnings.simplefilter("ignore")
    # A working folder of its own, so that nothing is left behind.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        try:
            family.make()
        # What the constructors of others raise is not known.
        except Exception as error:
            return "unmade", line(error)
        function = METHODS[method]
        try:
            return "passed", function(family) or ""
        except Exception as error:
            failure = error
        if function in PLAIN:
            try:
                PLAIN[function](family)
            except Exception as error:
                return "keras", line(error)
        if raised.why_obscure(failure) is None:
            return "refused", line(failure)
        return "wrong", raised.summary(failure)


def line(error):
    text = re.sub(r"\x1b\[\d*m", "", str(error)).strip()
    # Keras says first where it was, and in bold what is wrong.
    text = re.sub(r"^Exception encountered when calling .*\s+", "", text)
    first = text.splitlines()[:1] or [""]
    return f"{type(error).__name__}: {first[0][:200]}"


if __name__ == "__main__":
    main()
