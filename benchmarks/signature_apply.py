"""How fast a signature goes onto a model of 500 MB, and off it.

    python benchmarks/signature_apply.py
    python benchmarks/signature_apply.py --backends torch --dtype bfloat16

Two signatures: one of an eighth of the weights, the shallowest, as the paper's
is, and one of all of them, the worst case. Side by side, in turns, `np.copyto`
of the whole model between arrays that exist. The measure is the copy's time
over the call's; the bar is a quarter. Applying reads and checks the model,
keeps the clean tensors, computes the new ones, checks them and writes them;
removing compares every bit with what was written first. One process for each
backend.
"""

import argparse
import functools
import importlib.metadata
import json
import pathlib
import statistics
import sys
import time

import harness

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "signature_apply.json"
BAR = 0.25
BACKENDS = ("jax", "tensorflow", "torch")


def main():
    args = parse_arguments()
    if args.worker:
        pathlib.Path(args.json).write_text(json.dumps(measure(args)))
        return
    report = {
        "machine": harness.machine(),
        "dtype": args.dtype,
        "megabytes": args.megabytes,
        "scale": args.scale,
        "bar": BAR,
        "backends": {
            name: run_worker(args, name) for name in args.backends.split(",")
        },
    }
    harness.write_report(args.json, report)
    print_report(report)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--scale", type=float, default=1.0, help="of the patch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", default=str(RESULTS))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = set(args.backends.split(",")) - set(BACKENDS)
    if unknown:
        parser.error(f"unknown: {unknown}; there are {BACKENDS}")
    return args


def run_worker(args, backend):
    """Measures one backend in a process of its own."""
    return harness.run_worker(
        __file__,
        backend,
        "--worker",
        f"--backends={backend}",
        f"--dtype={args.dtype}",
        f"--megabytes={args.megabytes}",
        f"--scale={args.scale}",
        f"--rounds={args.rounds}",
    )


def measure(args):
    sys.path.insert(0, str(ROOT))
    import keras
    import numpy as np

    model, whole = make_model_and_signature(args)
    signatures = {"eighth": whole.truncate(1), "all": whole}
    source = [np.array(w) for w in model.get_weights()]
    target = [np.empty_like(w) for w in source]
    for a in target:
        a.fill(0)

    def copy():
        for a, b in zip(target, source):
            np.copyto(a, b)

    def apply(name):
        signatures[name].apply(model, args.scale)
        wait_for(model)

    def remove(name):
        signatures[name].remove(model)
        wait_for(model)

    calls = {
        "copyto": copy,
        **{
            f"{call.__name__} {name}": functools.partial(call, name)
            for name in signatures
            for call in (apply, remove)
        },
    }
    seconds = {name: [] for name in calls}
    for _ in range(args.rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    for a, b in zip(model.get_weights(), source):
        if a.tobytes() != b.tobytes():
            raise SystemExit("the clean model did not come back")
    # The first round touches the memory for the first time.
    steady = {name: values[1:] for name, values in seconds.items()}
    copied = statistics.median(steady["copyto"])
    size = sum(a.nbytes for a in source)
    return {
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("keras", "numpy", keras.backend.backend())
        },
        "shapes": [list(a.shape) for a in source],
        "bytes": size,
        "copy_gigabytes_per_second": size / copied / 1e9,
        "median_seconds": {
            name: statistics.median(values) for name, values in steady.items()
        },
        # Each round's own ratio: neighbours on the machine come and go.
        "ratio": {
            name: statistics.median(
                c / t for c, t in zip(steady["copyto"], steady[name])
            )
            for name in calls
            if name != "copyto"
        },
        "seconds": seconds,
    }


def make_model_and_signature(args):
    """Eight square Dense layers, and a signature that covers all of them."""
    import keras
    import numpy as np

    import keras_weightmods as kwm

    itemsize = 2 if args.dtype != "float32" else 4
    width = int((args.megabytes * 1e6 / itemsize / 8) ** 0.5)
    model = keras.Sequential(
        [
            keras.Input((width,)),
            *(
                keras.layers.Dense(
                    width,
                    dtype=args.dtype,
                    kernel_initializer=keras.initializers.RandomUniform(
                        -0.1, 0.1, seed=seed
                    ),
                )
                for seed in range(8)
            ),
        ]
    )
    rng = np.random.default_rng(0)
    clean = model.get_weights()
    robust = [
        (w.astype("float32") + rng.random(w.shape, "float32") / 100).astype(
            w.dtype
        )
        for w in clean
    ]
    signature = kwm.WeightSignature.extract(
        None, clean, robust, targets="", like=model
    )
    return model, signature


def wait_for(model):
    import keras

    if keras.backend.backend() == "jax":
        import jax

        jax.block_until_ready([v.value for v in model.weights])


def print_report(report):
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"On a model of {report['megabytes']} MB, {report['dtype']}: "
        "seconds, and np.copyto's over it",
        caption=f"{report['machine']['cpu']}, {report['machine']['cores']} "
        f"cores; bar: {report['bar']} of np.copyto",
    )
    table.add_column("backend")
    names = list(next(iter(report["backends"].values()))["ratio"])
    for name in ("copyto GB/s", *names):
        table.add_column(name, justify="right")
    for backend, result in report["backends"].items():
        table.add_row(
            backend,
            f"{result['copy_gigabytes_per_second']:.1f}",
            *(
                f"{result['median_seconds'][name]:.3f}\n"
                + verdict(result["ratio"][name], report["bar"])
                for name in names
            ),
        )
    Console().print(table)


def verdict(value, bar):
    colour = "green" if value >= bar else "red"
    return f"[{colour}]{value:.2f}[/]"


if __name__ == "__main__":
    main()
