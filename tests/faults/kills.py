"""Kill trainings at random moments; each must end as if nothing had happened.

KERAS_BACKEND=torch python -m tests.faults.kills --kills 20

A worker trains a tiny model with Dropout under `Checkpoint`, which saves at the
ends of epochs, on arrays that are shuffled but on TensorFlow. It is killed by
`kill -9` again and again: after a random time from the moment when it has begun
to train, or within a save, at a random byte. A last worker runs to the end, and
its weights and optimizer must be, bit for bit, those of one that nobody killed.
Most runs are killed more than once.

The workers are forks of this process, which has imported all there is and
computed nothing. Not for Windows.
"""

import argparse
import faulthandler
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
import traceback

import keras
import numpy as np

import keras_weightmods as kwm
from keras_weightmods.saving import container
from tests import models

METHODS = ("plain", "cast", "lift")
POLICIES = ("float32", "mixed_float16")
EPOCHS, ROWS, BATCH = 12, 24, 4
MOST_SECONDS = 240  # of a worker that takes 4 on a core of its own


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=METHODS, default=None)
    parser.add_argument("--policy", choices=POLICIES, default=None)
    parser.add_argument("--kills", type=int, default=5, help="of each of them")
    args = parser.parse_args()
    if keras.backend.backend() != "tensorflow":
        # Keras would import it in each worker, only to set its seed.
        sys.modules["tensorflow"] = None
    for policy in [args.policy] if args.policy else POLICIES:
        keras.config.set_dtype_policy(policy)
        for method in [args.method] if args.method else METHODS:
            result = survive(method, args.kills)
            print(json.dumps(result), flush=True)
            if not result["equal"]:
                sys.exit("A run that was killed ends with other weights")


def survive(method, kills):
    """Kill runs of one method so many times; return what came of it."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        keep_programs(folder / "programs")
        run(method, folder / "whole")
        whole = (folder / "whole" / "end.npz").read_bytes()
        done, runs, equal = 0, [], True
        while done < kills:
            runs.append(done)
            place = folder / f"run{len(runs)}"
            while not (place / "end.npz").exists():
                kill = {}
                if done < kills and done % 2:
                    # Every other kill comes from within a save.
                    kill = {"save": rng.randrange(1, 6)}
                    kill["byte"] = rng.randrange(20_000)
                elif done < kills:
                    kill = {"seconds": rng.uniform(0, 0.4)}
                done += run(method, place, **kill)
            equal &= (place / "end.npz").read_bytes() == whole
    backend = keras.backend.backend()
    policy = keras.config.dtype_policy().name
    about = {"backend": backend, "policy": policy, "method": method}
    of_runs = np.diff([*runs, done]).tolist()
    return {**about, "kills": done, "of_runs": of_runs, "equal": equal}


def keep_programs(folder):
    """Have JAX compile a program once for all workers."""
    if keras.backend.backend() != "jax":
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def run(method, place, seconds=None, save=None, byte=None):
    """Run a worker; return whether it was killed before it was done.

    It is killed `seconds` after its first step, or kills itself in a `save`,
    after so many bytes.
    """
    place.mkdir(exist_ok=True)
    reads, writes = os.pipe()
    worker = os.fork()
    if not worker:
        status = 1
        try:
            # Whether one hangs, and where, is in what this prints.
            faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
            os.close(reads)
            if save is not None:
                die_within_a_save(save, byte)
            train(method, place, writes)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writes)
    with open(reads, "rb") as told:
        if seconds is not None and told.read(1):
            time.sleep(seconds)
            os.kill(worker, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"A worker of {method!r} failed: status {status}")
    return status != 0


class Tell(keras.callbacks.Callback):
    """Writes to a pipe after each step; who reads it takes the first alone."""

    def __init__(self, pipe):
        super().__init__()
        self.pipe = pipe

    def on_train_batch_end(self, batch, logs=None):
        os.write(self.pipe, b".")
        # So that kills come in all epochs, on a fast machine too.
        time.sleep(0.005)


def train(method, place, pipe):
    """Train to the end, from the checkpoints that there are."""
    keras.utils.set_random_seed(0)
    first = keras.layers.Dense(16, "relu"), keras.layers.Dropout(0.25)
    model = models.sequential((8,), *first, keras.layers.Dense(4))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    callbacks = []
    # TensorFlow's XLA takes seconds to compile.
    jit = keras.backend.backend() == "jax"
    optimizer = keras.optimizers.Adam()
    if method == "cast":
        model, optimizer = kwm.CAST(model), None
    elif method == "lift":
        optimizer = kwm.SparseAdamW(0.01)
        callbacks = [kwm.PrincipalMaskCallback(0.3, refresh_every=5)]
    if keras.config.dtype_policy().name == "mixed_float16":
        # Its scale changes within an epoch.
        optimizer = keras.optimizers.LossScaleOptimizer(
            optimizer or kwm.AdamS(0.2), dynamic_growth_steps=5
        )
    model.compile(optimizer, loss, jit_compile=jit)
    x, y = models.normal(ROWS, 8), np.arange(ROWS) % 4
    fit = {"verbose": 0, "shuffle": keras.backend.backend() != "tensorflow"}
    callbacks += [kwm.Checkpoint(place / "checkpoints"), Tell(pipe)]
    model.fit(x, y, BATCH, EPOCHS, callbacks=callbacks, **fit)
    arrays = [*model.variables, *model.optimizer.variables]
    end = place / "end.part"
    with open(end, "wb") as file:
        np.savez(file, *map(keras.ops.convert_to_numpy, arrays))
    os.replace(end, place / "end.npz")


def die_within_a_save(save, byte):
    """Have this process kill itself while a save writes a certain byte."""
    write = container.write

    def dying_write(filepath, format, version, entries, arrays, *args):
        nonlocal save
        save -= 1
        write(filepath, format, version, entries, counted(arrays), *args)

    def counted(arrays):
        nonlocal byte
        for name, array in arrays:
            yield name, array
            byte -= array.nbytes
            if save <= 0 and byte < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    container.write = dying_write


if __name__ == "__main__":
    main()
