"""How fast a packed 2:4 kernel is multiplied on a GPU, next to the dense one.

    python -m benchmarks.sparse_matmul_gpu
    python -m benchmarks.sparse_matmul_gpu --seconds 120 --frameworks torch
    python -m benchmarks.sparse_matmul_gpu --page
    python -m benchmarks.sparse_matmul_gpu --dry-run

x (rows, K) times a square kernel (K, K), under JAX and under torch:

  dense       what the framework does: XLA with its autotuning, or cuBLAS
  decode      the decode kernel on the packed arrays, for each type of values
  cusparselt  cuSPARSELt with its best algorithm: by this library under JAX,
              by torch's own functions under torch

For int8 x is bfloat16: rounded to int8 within the products, but the dense one.

A product is timed in a chain of 24, one compiled program or CUDA graph,
through copies of the kernel that together do not fit into a cache. Methods take
turns, and the median counts. Before that the product of each is compared with
a float64 one; a method that fails or is wrong is recorded as failed, with its
message, and does not stop the rest.

Each case writes benchmarks/results/sparse_matmul_gpu.json and, as the table of
the dispatcher, keras_weightmods/native/gpu/dispatch.json when it is done. What
is not done when the time is up is left out; the same command goes on with it.
`--page` makes a page of the results and measures nothing.

It has not yet run on a GPU. --dry-run is for machines without one: tiny
products on the CPU, by which the script itself can be tried; it writes only
what it is told to.
"""

import argparse
import datetime
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import gpu_products, harness
from benchmarks.gpu_products import (
    TYPES,
    activations,
    relative_error,
    type_of,
    versions,
)

TABLE = harness.ROOT / "keras_weightmods" / "native" / "gpu" / "dispatch.json"

SIZES = (4096, 8192)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# Of the time: JAX compiles.
SHARES = {"jax": 0.7, "torch": 0.3}
TOLERANCES = {"float32": 1e-3, "bfloat16": 1e-2, "float16": 5e-3, "int8": 2e-2}
ROUNDS = 7
ROUND_SECONDS = 4e-3
TUNE_SECONDS = 6.0  # of one case


def main():
    args = parse_arguments()
    if args.worker:
        work(args)
        return
    if not args.page:
        deadline = time.time() + args.seconds
        for i, framework in enumerate(args.frameworks):
            left = [SHARES[name] for name in args.frameworks[i:]]
            seconds = (deadline - time.time()) * left[0] / sum(left)
            run_worker(args, framework, time.time() + seconds)
    report = harness.read_json(args.json) or {}
    text = page(report)
    if args.page:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(text)
    print(text)


def parse_arguments():
    parser = harness.make_parser(__doc__)
    parser.add_argument(
        "--frameworks", type=harness.subset(list(SHARES)), default=list(SHARES)
    )
    parser.add_argument(
        "--types", type=harness.subset(list(TYPES)), default=list(TYPES)
    )
    parser.add_argument("--seconds", type=float, default=330, help="in all")
    harness.add_json(parser, "sparse_matmul_gpu.json")
    parser.add_argument(
        "--markdown",
        type=pathlib.Path,
        default=harness.RESULTS / "sparse_matmul_gpu.md",
    )
    parser.add_argument("--table", type=pathlib.Path, default=TABLE)
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dry_run:
        folder = pathlib.Path(tempfile.mkdtemp())
        if args.json == parser.get_default("json"):
            args.json = folder / args.json.name
        if args.table == TABLE:
            args.table = folder / args.table.name
    return args


def run_worker(args, framework, deadline):
    """Measure one framework, in a process of its own.

    An error of the GPU, such as a bad address, ends all work of a process. It
    is started again then, where it stopped, without the method that failed.
    """
    for _ in range(3):
        command = [sys.executable, "-m", "benchmarks.sparse_matmul_gpu"]
        command += ["--worker", framework, "--types", ",".join(args.types)]
        command += ["--json", os.fspath(args.json)]
        command += ["--table", os.fspath(args.table)]
        command += ["--seconds", str(max(deadline - time.time(), 1))]
        command += ["--dry-run"] if args.dry_run else []
        environment = {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            **os.environ,
            "KERAS_BACKEND": framework,
        }
        subprocess.run(command, env=environment, cwd=harness.ROOT)
        if not give_up(args.json, framework):
            break
        print(f"{framework}: again, without what failed", flush=True)


def give_up(path, framework):
    """Note the method in which a process ended; False if it was none."""
    report = harness.read_json(path)
    section = (report or {}).get("frameworks", {}).get(framework)
    running = section and section["running"]
    if not running:
        return False
    section["ended_in"].append(running)
    section["running"] = None
    harness.write_json(path, report)
    # Without dense there is nothing to compare with.
    return running[0] != "dense"


def work(args):
    """Measure case by case; the file always holds what is done."""
    deadline = time.time() + args.seconds
    make = {"jax": gpu_products.Jax, "torch": gpu_products.Torch}[args.worker]
    bench = make(args.dry_run)
    log = Log(args, bench.describe())
    for method, reason in log.section["not_available"].items():
        print(f"{args.worker}: {method} is not available: {reason}")
    for case in all_cases(args.types, args.dry_run):
        if time.time() > deadline:
            break
        if log.has(case):
            continue
        result = measure(bench, case, log.without(case), log.running)
        log.add(result)
        print(line(args.worker, result), flush=True)
        if "dense" in result["failures"]:
            break


class Log:
    """The results of one framework, within the report; written at once."""

    def __init__(self, args, about):
        self.args = args
        report = harness.read_json(args.json)
        self.report = {"frameworks": {}, **(report or {})}
        # Times of another card or version are no part of this.
        section = self.report["frameworks"].get(args.worker, {})
        if any(section.get(key) != about[key] for key in about):
            section = {**about, "cases": [], "ended_in": []}
        section["running"] = None
        self.section = section
        self.report["frameworks"][args.worker] = section
        self.report["machine"] = machine()
        self.write()

    def has(self, case):
        return any(case_of(result) == case for result in self.section["cases"])

    def without(self, case):
        """The methods that ended a process at this type of activations."""
        return [
            m for m, x_dtype in self.section["ended_in"] if x_dtype == case[2]
        ]

    def running(self, method, case):
        self.section["running"] = method and [method, case[2]]
        self.write()

    def add(self, result):
        self.section["cases"].append(result)
        self.section["running"] = None
        self.write()
        write_table(self.args.table, self.args.worker, self.section)

    def write(self):
        part = self.args.json.with_suffix(".part")
        harness.write_json(part, self.report)
        part.replace(self.args.json)


def all_cases(types, dry_run):
    """(size, rows, type of x), the first ones being of most interest."""
    sizes, rows = ((64,), (1, 8)) if dry_run else (SIZES, ROWS)
    chosen = types[:1] if dry_run else [t for t in TYPES if t in types]
    return [(s, r, x_dtype) for x_dtype in chosen for s in sizes for r in rows]


def case_of(result):
    return result["k"], result["rows"], result["x_dtype"]


def measure(bench, case, without, running):
    """Times and failures of all methods for one case, by method and values."""
    size, rows, x_dtype = case
    x = activations(rows, size)
    failures, errors, programs = {}, {}, {}
    algorithm, tried = -1, {}

    def attempt(method, algorithm):
        product = bench.product(case, method, algorithm)
        error = relative_error(bench, product, x, size, method[1])
        errors[key(method)] = error
        if not error <= TOLERANCES[x_dtype]:
            raise ArithmeticError(f"wrong: relative error {error:.2e}")
        programs[key(method)] = bench.program(case, method, x, algorithm)

    for method in bench.methods(case):
        name = method[0]
        if name in without:
            failures[key(method)] = "left out after an error of the GPU"
            continue
        running(name, case)
        try:
            attempt(method, -1)
            if name == "cusparselt":
                algorithm, tried = tune(bench, case, method, x)
                if algorithm != -1:
                    attempt(method, algorithm)
        except Exception as failure:
            text = " ".join(str(failure).split())
            failures[key(method)] = f"{type(failure).__name__}: {text[:200]}"
            programs.pop(key(method), None)
            if not bench.is_alive():
                failures.setdefault("dense", "the GPU failed")
                break
    times = interleaved(bench, programs) if "dense" in programs else {}
    return {
        "k": size,
        "n": size,
        "rows": rows,
        "x_dtype": x_dtype,
        "microseconds": times,
        "errors": errors,
        "failures": failures,
        "algorithm": algorithm if "cusparselt" in times else -1,
        "algorithms": tried,
    }


def tune(bench, case, method, x):
    """Return cuSPARSELt's fastest algorithm, and the times of all tried.

    Those that won before come first, as there may not be time for all.
    """
    deadline = time.monotonic() + TUNE_SECONDS
    candidates = [*bench.algorithms(case, x)]
    won = [a for a in bench.won if a in candidates]
    times = {}
    for algorithm in [-1, *won, *(a for a in candidates if a not in won)]:
        if times and time.monotonic() > deadline:
            break
        try:
            program = bench.program(case, method, x, algorithm)
            times[algorithm] = min(bench.seconds(program, 3) for _ in range(2))
        except Exception:
            # Not every algorithm takes every product.
            if not bench.is_alive():
                raise
    best = min(times, key=times.__getitem__)
    if best != -1 and best not in bench.won:
        bench.won.append(best)
    microseconds = 1e6 / (3 * bench.chain)
    return best, {str(a): t * microseconds for a, t in times.items()}


def key(method):
    """`decode/int8`, say; the other methods do not depend on the values."""
    name, value_dtype = method
    return f"{name}/{value_dtype}" if name == "decode" else name


def interleaved(bench, programs):
    """Median microseconds of one product, the methods taking turns."""
    repeats = {}
    for name, program in programs.items():
        once = bench.seconds(program, 1)
        repeats[name] = max(1, math.ceil(ROUND_SECONDS / max(once, 1e-6)))
    samples = {name: [] for name in programs}
    for _ in range(ROUNDS):
        for name, program in programs.items():
            seconds = bench.seconds(program, repeats[name])
            samples[name].append(1e6 * seconds / repeats[name] / bench.chain)
    return {name: statistics.median(s) for name, s in samples.items()}


def machine():
    found = {
        "date": datetime.date.today().isoformat(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions("keras-weightmods", "numpy"),
    }
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total"]
    try:
        answer = subprocess.run(
            [*query, "--format=csv,noheader"], capture_output=True, text=True
        )
        found["gpu"] = answer.stdout.strip()
    except OSError:
        found["gpu"] = None
    return found


def write_table(path, framework, section):
    """Put the entries of a framework in the place of older ones."""
    devices = (harness.read_json(path) or {"devices": {}})["devices"]
    entries = devices.setdefault(section["device"], [])
    entries[:] = [e for e in entries if e["framework"] != framework]
    for case in section["cases"]:
        entries += table_entries(framework, case)
    harness.write_json(path, {"devices": devices})


def table_entries(framework, case):
    times = case["microseconds"]
    if "dense" not in times:
        return []
    entries = []
    for value_dtype in TYPES[case["x_dtype"]]:
        measured = {
            "dense": times["dense"],
            "decode": times.get(f"decode/{value_dtype}"),
            "cusparselt": times.get("cusparselt"),
        }
        entries.append(
            {
                "framework": framework,
                **{name: case[name] for name in ("k", "n", "rows", "x_dtype")},
                "value_dtype": value_dtype,
                "algorithm": case["algorithm"],
                "microseconds": {
                    name: round(t, 3) for name, t in measured.items() if t
                },
            }
        )
    return entries


def line(framework, case):
    times = case["microseconds"]
    dense = times.get("dense")
    text = f"{framework} {case['x_dtype']:>8} {case['k']:5} x {case['rows']:<5}"
    if dense:
        text += f" dense {dense:8.1f} us"
        for name, t in times.items():
            if name != "dense":
                text += f"  {name} {dense / t:.2f}x"
    for name, message in case["failures"].items():
        text += f"\n    {name}: {message}"
    return text


def page(report):
    """The results as Markdown: speed-ups over dense, by rows."""
    parts = ["# 2:4 products on a GPU", json.dumps(report.get("machine", {}))]
    for name, outcome in report.get("tests", {}).items():
        parts.append(f"Tests, {name}: {outcome}.")
    for framework, section in report.get("frameworks", {}).items():
        versions = ", ".join(f"{n} {v}" for n, v in section["versions"].items())
        parts.append(f"## {framework} on {section['device']}\n\n{versions}")
        kinds = dict.fromkeys((c["x_dtype"], c["k"]) for c in section["cases"])
        for x_dtype, size in kinds:
            cases = [
                case
                for case in section["cases"]
                if (case["x_dtype"], case["k"]) == (x_dtype, size)
            ]
            parts.append(
                f"{x_dtype}, {size} x {size}: over dense {type_of(x_dtype)}\n\n"
                + table_of(cases)
            )
    return "\n\n".join(parts) + "\n"


def table_of(cases):
    names = dict.fromkeys(n for c in cases for n in c["microseconds"])
    names.pop("dense", None)
    rows = [["rows", "dense, us", *names], ["---"] * (2 + len(names))]
    for case in cases:
        times = case["microseconds"]
        row = [str(case["rows"]), f"{times.get('dense', math.nan):.1f}"]
        for name in names:
            gain = times["dense"] / times[name] if name in times else None
            row.append(f"{gain:.2f}x" if gain else "failed or not taken")
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
