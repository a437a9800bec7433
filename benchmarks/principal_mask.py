"""How near the fast selections of LIFT come to the exact rule, and how fast.

    python benchmarks/principal_mask.py
    python benchmarks/principal_mask.py --backends torch --part agreement

Agreement: for every matrix of SmolLM2-135M and filter ranks 32 and 128, the
share of the exact rule's entries (the whole SVD, 5 % of the matrix) that the
default selection of `principal_mask` finds. Beside it what the usual randomized
SVD (2 power iterations, 10 more vectors than the rank) and plain magnitudes
find.

Time: one selection in a 4096 x 4096 matrix at filter rank 128, of independent
normal entries, whose spectrum is flatter than that of any trained matrix; the
default against the same with the exact SVD, taking turns after a first fast one
that compiles.
"""

import argparse
import importlib.metadata
import json
import pathlib
import statistics
import sys
import time

import harness

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "principal_mask.json"
BACKENDS = ("jax", "tensorflow", "torch")
RANKS = (32, 128)
DENSITY = 0.05
SIDE, TIMED_RANK = 4096, 128

AGREEMENT_BAR = 0.98
SPEED_BAR = 10.0


def main():
    args = parse_arguments()
    if args.worker:
        pathlib.Path(args.json).write_text(json.dumps(measure(args)))
        return
    backends = args.backends.split(",")
    unknown = set(backends) - set(BACKENDS)
    if unknown:
        raise SystemExit(f"unknown: {unknown}; there are {BACKENDS}")
    options = [f"--part={args.part}", f"--repeats={args.repeats}"]
    if args.matrices:
        options.append(f"--matrices={args.matrices}")
    report = {
        "machine": harness.machine(),
        "density": DENSITY,
        "backends": {
            name: harness.run_worker(
                __file__, name, f"--worker={name}", *options
            )
            for name in backends
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
    parser.add_argument(
        "--part", choices=("both", "agreement", "time"), default="both"
    )
    parser.add_argument("--matrices", type=int, help="only the first so many")
    parser.add_argument("--repeats", type=int, default=1, help="of the timing")
    parser.add_argument("--json", default=str(RESULTS))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(args):
    import keras

    sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
    result = {
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("keras", keras.backend.backend())
        }
    }
    if args.part != "time":
        result["agreement"] = measure_agreement(args)
    if args.part != "agreement":
        result["time"] = measure_time(args.repeats)
    return result


def measure_agreement(args):
    from keras import ops
    from rich.progress import track
    from smollm2 import load_smollm2

    import keras_weightmods as kwm
    from keras_weightmods.ops.nm import to_matrix

    targets = kwm.find_targets(load_smollm2(dtype="float32"))
    rows = []
    for target in track(targets[: args.matrices], description=args.worker):
        axes = target.contraction_axes
        matrix = ops.convert_to_numpy(to_matrix(target.variable, axes))
        magnitudes = select(matrix, selection="magnitude")
        for rank in RANKS:
            exact = select(matrix, filter_rank=rank, method="exact")
            shares = {
                "default": select(matrix, filter_rank=rank),
                "randomized": randomized(matrix, rank),
                "magnitude": magnitudes,
            }
            rows.append(
                {
                    "path": target.path,
                    "shape": matrix.shape,
                    "rank": rank,
                    **{
                        name: float((mask & exact).sum() / exact.sum())
                        for name, mask in shares.items()
                    },
                }
            )
    return rows


def select(matrix, **arguments):
    from keras import ops

    from keras_weightmods.ops import principal_mask

    mask = principal_mask(matrix, density=DENSITY, **arguments)
    return ops.convert_to_numpy(mask)


def randomized(matrix, rank, iterations=2, oversampling=10):
    """The mask by a randomized SVD with a library's usual settings."""
    import numpy as np

    random = np.random.default_rng(0)
    size = (matrix.shape[1], rank + oversampling)
    y = matrix @ random.normal(size=size).astype("float32")
    for _ in range(iterations):
        y = matrix @ (matrix.T @ np.linalg.qr(y)[0])
    basis = np.linalg.qr(y)[0]
    u, s, vh = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    near = np.abs(basis @ (u[:, :rank] * s[:rank]) @ vh[:rank])
    count = round(DENSITY * matrix.size)
    return near >= np.partition(near.reshape(-1), -count)[-count]


def measure_time(repeats):
    import numpy as np
    from keras import ops

    matrix = ops.convert_to_tensor(
        np.random.default_rng(0).normal(size=(SIDE, SIDE)).astype("float32")
    )
    seconds = {"auto": [], "exact": []}
    select(matrix, filter_rank=TIMED_RANK)
    masks = {}
    for _ in range(repeats):
        for method, times in seconds.items():
            began = time.perf_counter()
            masks[method] = select(
                matrix, filter_rank=TIMED_RANK, method=method
            )
            times.append(time.perf_counter() - began)
    both = (masks["auto"] & masks["exact"]).sum()
    return {
        "seconds": seconds,
        "ratio": statistics.median(seconds["exact"])
        / statistics.median(seconds["auto"]),
        "share": float(both / masks["exact"].sum()),
    }


def print_report(report):
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(
        title=f"Share of the exact {DENSITY:.0%} mask, SmolLM2-135M",
        box=box.SIMPLE_HEAD,
    )
    for column in ("backend", "rank"):
        table.add_column(column, no_wrap=True)
    for column in ("matrices", "least", "median", "randomized", "magnitude"):
        table.add_column(column, justify="right", no_wrap=True)
    for backend, result in report["backends"].items():
        for rank in RANKS:
            rows = [r for r in result.get("agreement", []) if r["rank"] == rank]
            if not rows:
                continue
            least = min(row["default"] for row in rows)
            colour = "green" if least >= AGREEMENT_BAR else "red"
            medians = [
                statistics.median(row[name] for row in rows)
                for name in ("default", "randomized", "magnitude")
            ]
            table.add_row(
                backend,
                str(rank),
                str(len(rows)),
                f"[{colour}]{least:.4f}[/] >= {AGREEMENT_BAR}",
                *(f"{value:.4f}" for value in medians),
            )
    if table.row_count:
        console.print(table)
    for backend, result in report["backends"].items():
        if "time" not in result:
            continue
        timed = result["time"]
        exact, fast = (
            statistics.median(timed["seconds"][name])
            for name in ("exact", "auto")
        )
        colour = "green" if timed["ratio"] >= SPEED_BAR else "red"
        console.print(
            f"{backend}, {SIDE} x {SIDE}, rank {TIMED_RANK}: exact "
            f"{exact:.1f} s, default {fast:.2f} s, "
            f"[{colour}]{timed['ratio']:.1f} x[/] >= {SPEED_BAR:g}, share "
            f"{timed['share']:.4f}"
        )
    about = report["machine"]
    console.print(
        f"{about['cpu']}, {about['cores']} cores, {about['system']}, Python "
        f"{about['python']}"
    )


if __name__ == "__main__":
    main()
