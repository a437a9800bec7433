"""Read files that were changed at random; each ends in one clean error.

KERAS_BACKEND=torch python -m tests.faults.mutants --count 20000

Half of the files are changed in their bytes, cut or lengthened. In the others
something is changed in the header, in the JSON of an entry or in an array, and
all checksums are right again. A file may be read, as not each change matters,
or refused by an error that a `raise` of this package raises. That may take
`MORE_SECONDS` and `MORE_MEMORY` beyond what the file takes that nobody changed.

A mutant is made again by its number: `--kind model --first 123 --count 1`.
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import re
import sys
import tempfile
import time
import warnings

import keras
import numpy as np

import keras_weightmods as kwm
from keras_weightmods.cli.info import file_report
from keras_weightmods.saving import container
from tests import models
from tests.faults import raised

MORE_SECONDS = 1.0  # of this process' own time
MORE_MEMORY = 200 * 2**20


def model_file(folder):
    """A model with a packed, a scaled and a plain layer."""
    model = models.sequential(
        (8,),
        keras.layers.Dense(16, activation="relu", name="packed"),
        keras.layers.BatchNormalization(),
        keras.layers.Dense(8, name="scaled"),
        keras.layers.Dropout(0.5),
        keras.layers.Dense(4, name="plain"),
    )
    models.make_sparse(model)
    kwm.attach_scaling(model, targets="scaled/")
    kwm.pack(model, targets="packed/")
    kwm.save_model(model, path := folder / "model.safetensors")
    return path, kwm.load_model


def delta_file(folder):
    tuned = models.mlp()
    tuned.layers[0].kernel.assign_add(np.eye(8, 16))
    return saved_delta(tuned, folder)


def drawn_delta_file(folder):
    """A delta that holds a seed in place of places."""
    tuned = models.mlp(activation="tanh")
    tuned.compile(kwm.SparseAdamW(0.1), "mse", jit_compile=False)
    masks = kwm.PrincipalMaskCallback(0.25, criterion="random", seed=0)
    x, y = models.normal(8, 8), models.normal(8, 4)
    tuned.fit(x, y, callbacks=[masks], verbose=0)
    return saved_delta(tuned, folder)


def saved_delta(tuned, folder):
    base, path = models.mlp(), folder / "delta.safetensors"
    kwm.Patch.from_models(tuned, base).save(path)

    def read(path):
        patch = kwm.Patch.load(path)
        patch.apply(base)
        patch.remove(base, force=True)

    return path, read


def signature_file(folder):
    path = folder / "signature.safetensors"
    models.make_signature(models.mlp()).quantize(4).save(path)
    return path, kwm.WeightSignature.load


def checkpoint_file(folder):
    model = models.mlp()
    model.compile("adam", "mse", jit_compile=False)
    x, y = models.normal(8, 8), models.normal(8, 4)
    place = folder / "checkpoints"
    model.fit(x, y, 4, callbacks=[kwm.Checkpoint(place)], verbose=0)
    (path,) = place.iterdir()

    def read(mutant):
        os.replace(mutant, path)
        kwm.Checkpoint(place).restore(model)

    return path, read


KINDS = {
    "model": model_file,
    "delta": delta_file,
    "drawn_delta": drawn_delta_file,
    "signature": signature_file,
    "checkpoint": checkpoint_file,
}


def mutant_of(path, rng):
    """Return the bytes of a file, changed in one way or a few."""
    data = path.read_bytes()
    kind = rng.random()
    if kind < 0.5:
        return _other_bytes(data, rng)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if kind < 0.65:
        return _signed(_other_json(header, rng)) + data[8 + length :]
    about = header["__metadata__"]
    form = about["format"], int(about["version"])
    with container.Reader(path, form[0], form[1:]) as reader:
        arrays = {name: reader.read(name) for name in reader.entries}
    described = [name for name in arrays if name.endswith(".json")]
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        name = rng.choice(described if rng.random() < 0.7 else sorted(arrays))
        array = arrays[name]
        text = array.tobytes()
        if name in described:
            value = _other_json(json.loads(text), rng)
            text = json.dumps(value).encode()
        else:
            text = _other_bytes(text, rng)
        text = text[: len(text) // array.itemsize * array.itemsize]
        shape = array.shape if len(text) == array.nbytes else -1
        arrays[name] = np.frombuffer(text, array.dtype).reshape(shape)
    mutant = path.with_suffix(".mutant")
    container.write_arrays(mutant, *form, arrays)
    return mutant.read_bytes()


def _signed(header):
    """Return the bytes of a header with the checksum that it should have."""

    def text_of(header):
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if isinstance(metadata, dict) and "header_sha256" in metadata:
        metadata["header_sha256"] = "0" * 64
        digest = hashlib.sha256(text_of(header)).hexdigest()
        metadata["header_sha256"] = digest
    return text_of(header)


def _other_bytes(data, rng):
    place = rng.randrange(len(data) + 1)
    other = rng.randrange(len(data) + 1)
    first, last = sorted((place, other))
    if rng.random() < 0.5:
        last = min(first + rng.randrange(1, 9), len(data))
    return rng.choice(
        (
            lambda: data[:first],
            lambda: data[first:],
            lambda: data[:first] + data[last:],
            lambda: data[:last] + data[first:],
            lambda: data[:first] + rng.randbytes(last - first) + data[last:],
            lambda: data[:first] + bytes(last - first) + data[last:],
            lambda: data[:first] + rng.randbytes(8) + data[first:],
            lambda: data + rng.randbytes(rng.randrange(1, 100)),
        )
    )()


def _array_of(dtype):
    config = {"value": [0, 1], "dtype": dtype}
    return {"class_name": "__numpy__", "config": config}


def _layer(name, **config):
    layer = {"module": "keras.layers", "registered_name": None}
    return {**layer, "class_name": name, "config": {"name": "x", **config}}


# What stands in for a value of the JSON.
_VALUES = (
    *(0, 1, -1, 7, 2**31, 2**40, 2**63, 2**70, -(2**40), 0.5, -0.5, 1e308),
    *(float("nan"), float("inf"), True, False, None, "", "x" * 2000, "\0"),
    *("stateless scope", "float32", "../../x", "layers/x", "[red]x[/]"),
    *([], {}, [[]], [None], [2**40] * 40, [-1, 2**31], {"a": {"b": []}}),
    json.loads("[" * 51 + "]" * 51),
    json.loads("[" * 151 + "]" * 151),
    ["x"] * 5000,
    _array_of("V1000000000"),
    _array_of("S500000000"),
    _array_of("O"),
    {"class_name": "__tensor__", "config": {"value": 1, "dtype": "x"}},
    {"class_name": "__bytes__", "config": {"value": 3}},
    {"class_name": "__keras_tensor__", "config": {"shape": [2**40]}},
    {"class_name": "__lambda__", "config": {"value": "x"}},
    _layer("Dense", units=2**40),
    _layer("Dense", units=2**28),
    _layer("Reshape", target_shape=[2**20, 2**20]),
    _layer("RepeatVector", n=2**31),
    _layer("Embedding", input_dim=2**40, output_dim=2**10),
    _layer("InputLayer", batch_shape=[2**20, 2**20]),
    _layer("GaussianNoise", stddev=2**70),
    _layer("stateless scope"),
)


def _other_json(value, rng):
    """Return a JSON value of which one part is another one."""
    value = json.loads(json.dumps(value))
    places = []

    def find(inner):
        keys = range(len(inner)) if isinstance(inner, list) else list(inner)
        for key in keys:
            places.append((inner, key))
            if isinstance(inner[key], (list, dict)):
                find(inner[key])

    if isinstance(value, (list, dict)):
        find(value)
    if not places:
        return rng.choice(_VALUES)
    owner, key = rng.choice(places)
    old = owner[key]
    kind = rng.randrange(8)
    if kind == 0:
        del owner[key]
    elif kind == 1 and isinstance(owner, list):
        owner.insert(key, old)
    elif kind == 1:
        owner["x" * rng.randrange(3)] = old
    elif kind == 2:
        other, its = rng.choice(places)
        owner[key] = json.loads(json.dumps(other[its]))
    elif kind == 3 and isinstance(old, (int, float)):
        owner[key] = rng.choice((-old, old + 1, old * 1000, str(old), [old]))
    elif kind == 3 and isinstance(old, list):
        owner[key] = old * rng.choice((0, 2, 500))
    elif kind == 3 and isinstance(old, str):
        place = rng.randrange(len(old) + 1)
        owner[key] = old[:place] + rng.choice("aZ0/.[\n\0é") + old[place:]
    else:
        owner[key] = json.loads(json.dumps(rng.choice(_VALUES)))
    return value


class Cost:
    """The time and the memory that a scope takes, of Linux."""

    def __enter__(self):
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        self._before = self._kilobytes("VmRSS")
        self._start = time.process_time()
        return self

    def __exit__(self, *error):
        self.seconds = time.process_time() - self._start
        self.bytes = 1024 * (self._kilobytes("VmHWM") - self._before)

    @staticmethod
    def _kilobytes(name):
        status = pathlib.Path("/proc/self/status").read_text()
        return int(re.search(rf"^{name}:\s*(\d+)", status, re.MULTILINE)[1])


def run(kind, count, first=0):
    """Read mutants of a kind; return how many were read, {number: problem}."""
    warnings.simplefilter("ignore")
    failures = {}
    accepted = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        path, read = KINDS[kind](folder)
        honest_path = folder / "honest.safetensors"
        honest_path.write_bytes(path.read_bytes())
        mutant = folder / "mutant.safetensors"

        def read_all():
            file_report(str(mutant))
            read(mutant)

        for _ in range(2):
            mutant.write_bytes(honest_path.read_bytes())
            with Cost() as honest:
                read_all()
        for number in range(first, first + count):
            rng = random.Random(f"{kind} {number}")
            changed = mutant_of(honest_path, rng)
            # Again where it is slow, which a busy machine may be.
            for _ in range(2):
                problem, is_read = None, True
                mutant.write_bytes(changed)
                with Cost() as cost:
                    try:
                        read_all()
                    except Exception as error:
                        is_read = False
                        problem = raised.why_obscure(error)
                if (
                    cost.seconds <= honest.seconds + MORE_SECONDS
                    and cost.bytes <= honest.bytes + MORE_MEMORY
                ):
                    break
                mebibytes = cost.bytes / 2**20
                problem = f"takes {cost.seconds:.1f} s, {mebibytes:.0f} MiB"
            accepted += is_read
            if problem is not None:
                failures[number] = problem
                print(kind, number, problem, sep=" | ", flush=True)
    return accepted, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=KINDS, default=None)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args()
    failed = 0
    for kind in [args.kind] if args.kind else KINDS:
        accepted, failures = run(kind, args.count, args.first)
        read = f"{kind}: {args.count} mutants, {accepted} read"
        print(f"{read}, {len(failures)} not refused well")
        failed += len(failures)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
