"""How much memory and time it takes to merge files of 500 MB.

    python -m benchmarks.merge
    python -m benchmarks.merge --backends torch --methods ties,slerp

Each method in a process of its own: the files are written by another one. The
peak is that of the process, and what it is above that of a process that has
imported Keras and this library, and merged nothing. Side by side the median of
five copies of one file, written through to the disk as the merged one is, and
as that to where no file is yet. The measure of time is the bytes that are read
and written over the seconds: the share that merging has of the copy's. One
process for each backend; on each, the same NumPy.
"""

import os
import pathlib
import statistics
import tempfile

from benchmarks import harness

METHODS = (
    *("linear", "slerp", "task_arithmetic", "ties", "dare", "dare_ties"),
    *("della", "breadcrumbs", "model_stock", "iso_c"),
)
PEAK_BAR, COPY_BAR = 600, 0.3
COPIES = 5
_WITHOUT_BASE = ("linear", "slerp")


def main():
    args = parse_arguments()
    about = {
        "megabytes": args.megabytes,
        "peak_bar_megabytes": PEAK_BAR,
        "copy_bar": COPY_BAR,
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
    import keras_weightmods as kwm

    kwm.merge  # noqa: B018 - imports Keras and the library
    if method == "nothing":
        return {"peak_bytes": harness.peak_bytes()}
    paths = [str(folder / f"{number}.safetensors") for number in range(3)]
    size, output = os.path.getsize(paths[0]), folder / "output.safetensors"

    def copied_once():
        output.unlink(missing_ok=True)
        return harness.seconds_of(copy, paths[0], output)

    copied = statistics.median(copied_once() for _ in range(COPIES))
    output.unlink()
    base = None if method in _WITHOUT_BASE else paths[2]
    seconds = harness.seconds_of(
        kwm.merge, paths[:2], output, method, base=base, verbose=0
    )
    models = 3 if base is None else 4
    return {
        "seconds": seconds,
        "copy_seconds": copied,
        "bytes_per_second": models * size / seconds,
        "copied_per_second": 2 * size / copied,
        "peak_bytes": harness.peak_bytes(),
    }


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
