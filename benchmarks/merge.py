"""How much memory and time it takes to merge files of 500 MB.

    python -m benchmarks.merge
    python -m benchmarks.merge --backends torch --methods ties,slerp

Each method in a process of its own: the files are written by another one. The
peak is that of the process after one merge, and what it is above that of a
process that has imported Keras and this library, and merged nothing. The other
backends, and the SciPy and pandas that Keras imports where it finds them, are
hidden, as in an environment of one backend. Two copies of one file take turns
with merging. Like the merged file, they are written through to the disk, to a
new place. Medians are shown. The first copy does not count: a virtual machine
may have to request memory again, and the copy then takes two to four times as
long. Speeds are the bytes read and written over the seconds, and the measure is
the ratio of merging to the copy. Each backend has one process, with the same
NumPy.
"""

import os
import pathlib
import statistics
import sys
import tempfile

from benchmarks import harness

METHODS = (
    *("linear", "slerp", "task_arithmetic", "ties", "dare", "dare_ties"),
    *("della", "breadcrumbs", "model_stock", "iso_c"),
)
PEAK_BAR, COPY_BAR = 600, 0.3
# Fewer where they have taken that many seconds.
ROUNDS, ENOUGH = 3, 30
_WITHOUT_BASE = ("linear", "slerp")
# What each backend comes without.
_OPTIONAL = {
    "jax": {"tensorflow", "torch", "pandas"},
    "tensorflow": {"jax", "torch", "scipy", "pandas"},
    "torch": {"jax", "tensorflow", "scipy", "pandas"},
}


def main():
    args = parse_arguments()
    about = {
        "megabytes": args.megabytes,
        "peak_bar_megabytes": PEAK_BAR,
        "copy_bar": COPY_BAR,
        "rounds": ROUNDS,
        "enough_seconds": ENOUGH,
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        environment = {"KWM_MERGE_FOLDER": folder}
        harness.compare_backends(
            args, measure, about, print_report, environment
        )


def parse_arguments():
    parser = harness.parser_of_workers(__doc__, "merge.json")
    parser.add_argument(
        "--methods", type=harness.subset(METHODS), default=METHODS
    )
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--folder", help="for the files; default: the system's")
    return parser.parse_args()


def measure(args):
    folder = pathlib.Path(os.environ["KWM_MERGE_FOLDER"])
    _, _, task = args.worker.partition(":")
    if task == "write":
        return write_files(folder, args.megabytes)
    if task:
        return merge_files(folder, task)
    backend = args.worker

    def run(what):
        return harness.run_worker(backend, f"--worker={backend}:{what}")

    run("write")
    imported = run("nothing")["peak_bytes"]
    results = {}
    for method in args.methods:
        found = run(method)
        found["added_bytes"] = found["peak_bytes"] - imported
        found["of_copy"] = (
            found["bytes_per_second"] / found["copied_per_second"]
        )
        results[method] = found
    return {
        "versions": harness.versions("numpy"),
        "file_bytes": os.path.getsize(folder / "0.safetensors"),
        "imported_bytes": imported,
        "methods": results,
    }


def write_files(folder, megabytes):
    """Write three models: a table of a fifth, and square kernels."""
    import keras
    import numpy as np

    import keras_weightmods as kwm

    width = 1024
    layers = max(1, round(0.8 * megabytes * 1e6 / (4 * width**2)))
    rows = round(0.2 * megabytes * 1e6 / (4 * width))
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(rows, width)(tokens)
    for _ in range(layers):
        x = keras.layers.Dense(width)(x)
    # Not Sequential, which Keras builds anew for each of its layers.
    model = keras.Model(tokens, x)
    for number in range(3):
        random = np.random.default_rng(number)
        for variable in model.weights:
            noise = random.normal(size=variable.shape).astype("float32")
            variable.assign(noise)
        kwm.save_model(model, folder / f"{number}.safetensors")
    return {}


def merge_files(folder, method):
    backend = os.environ["KERAS_BACKEND"]
    sys.meta_path[:] = [
        _Without(_OPTIONAL[backend], finder) for finder in sys.meta_path
    ]
    import keras_weightmods as kwm

    kwm.merge  # noqa: B018 - imports Keras and the library
    if method == "nothing":
        return {"peak_bytes": harness.peak_bytes()}
    paths = [str(folder / f"{number}.safetensors") for number in range(3)]
    size, output = os.path.getsize(paths[0]), folder / "output.safetensors"
    base = None if method in _WITHOUT_BASE else paths[2]
    copied, merged, peaks = [], [], []
    while len(merged) < ROUNDS and sum(merged) < ENOUGH:
        for _ in range(2):
            last = harness.seconds_of(copy, paths[0], output)
            output.unlink()
        copied.append(last)
        arguments = paths[:2], output, method
        merged.append(
            harness.seconds_of(kwm.merge, *arguments, base=base, verbose=0)
        )
        peaks.append(harness.peak_bytes())
        output.unlink()
    copied, seconds = map(statistics.median, (copied, merged))
    models = 3 if base is None else 4
    return {
        "seconds": seconds,
        "copy_seconds": copied,
        "bytes_per_second": models * size / seconds,
        "copied_per_second": 2 * size / copied,
        "peak_bytes": peaks[0],
    }


class _Without:
    """A finder of modules that does not find some packages."""

    def __init__(self, packages, finder):
        self.packages, self.finder = packages, finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.packages:
            return None
        return self.finder.find_spec(name, path, target)


def copy(source, target):
    """Copy a file, and wait for the disk."""
    with open(source, "rb") as old, open(target, "wb") as new:
        while part := old.read(1 << 22):
            new.write(part)
        new.flush()
        os.fsync(new.fileno())


def print_report(report):
    table = harness.table(
        f"Two files of {report['megabytes']} MB into one",
        text=("backend", "method"),
        numbers=("seconds", "peak MB", "above imports", "of a copy's MB/s"),
    )
    for backend, result in report["backends"].items():
        for method, found in result["methods"].items():
            peak = found["peak_bytes"] / 1e6
            table.add_row(
                backend,
                method,
                f"{found['seconds']:.1f}",
                harness.verdict(peak, report["peak_bar_megabytes"], form=".0f"),
                f"{found['added_bytes'] / 1e6:.0f}",
                harness.verdict(found["of_copy"], report["copy_bar"], ">="),
            )
    harness.print_all(table, harness.describe(report))


if __name__ == "__main__":
    main()
