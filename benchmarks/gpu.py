"""Tests on an NVIDIA GPU, then cuSPARSELt's product over the dense one.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --frameworks torch --dry-run

`make gpu` runs it. Under JAX and torch it runs tests/gpu/test_on_gpu.py. Then
it runs the trial of `pack` on the card for each shape and type, at 1 to 4096
rows. The type float16 comes last, because cuSPARSELt has ended the process with
it on some cards. Each part is a process with a time limit. Results are written
at once: the same command continues.

Not yet run on a GPU. `--dry-run` goes all the way without one, with tiny
products of NumPy in the place of both.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np

from benchmarks import harness

ROOT = harness.ROOT
# (K, N): attention and feed-forward kernels of models of 1B and 8B.
SHAPES = ((2048, 2048), (2048, 8192), (8192, 2048), (4096, 4096))
SHAPES += ((4096, 14336), (14336, 4096))
PASSES = ("bfloat16", "float16")  # types of activations
SECONDS = 300  # of one part


def main():
    args = parse_arguments()
    if args.worker:
        return measure(args)
    failed = []
    for types in PASSES:
        for framework in args.frameworks.split(","):
            test = "-m", "pytest", "tests/gpu/test_on_gpu.py", "-q", "-rs"
            options = ["--dry-run"] if args.dry_run else []
            worker = "-m", "benchmarks.gpu", "--worker", "--types", types
            worker += ("--json", args.json, *options)
            for name, command in (("tests", test), ("times", worker)):
                status = run(framework, types, command)
                # pytest: 5 is for no test, as where there is no GPU.
                if status not in (0, 5):
                    failed.append(f"{name} of {framework}, {types}: {status}")
    report = harness.read_json(args.json) or {}
    page = args.json.with_suffix(".md")
    page.write_text(table(report))
    print(page.read_text())
    sys.exit("\n".join(failed) or 0)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--frameworks", default="jax,torch")
    parser.add_argument("--types", default=PASSES[0], help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument(
        "--json", type=pathlib.Path, default=harness.RESULTS / "gpu.json"
    )
    return parser.parse_args()


def environment(framework, types):
    """Return the variables of a part; PYTHONPATH keeps what it holds."""
    paths = [os.fspath(ROOT), os.environ.get("PYTHONPATH")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "KERAS_BACKEND": framework,
        "KERAS_WEIGHTMODS_GPU_TYPES": types,
        # The tests on a CPU set it for their speed.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def run(framework, types, command):
    """Run this Python; return the status, or what became of it."""
    print(f"== {framework}, {types}: {' '.join(map(str, command))}", flush=True)
    try:
        return subprocess.run(
            [sys.executable, *map(os.fspath, command)],
            cwd=ROOT,
            env=environment(framework, types),
            timeout=SECONDS,
        ).returncode
    except subprocess.TimeoutExpired:
        return f"not done in {SECONDS} s"


def measure(args):
    """Try each shape and type that the report lacks; write after each."""
    framework = os.environ["KERAS_BACKEND"]
    plan = dry_plan if args.dry_run else plan_of(framework)
    shapes = ((64, 32),) if args.dry_run else SHAPES
    for kind in args.types.split(","):
        for shape in shapes:
            report = harness.read_json(args.json) or {}
            case = f"{framework}, {kind}, {shape[0]} x {shape[1]}"
            if case in report.get("times", {}):
                continue
            found = plan(shape, kind)
            report["machine"] = machine()
            report.setdefault("times", {})[case] = [
                dataclasses.asdict(tried) for tried in found.tried
            ] or found.reason
            part = args.json.with_suffix(".part")
            harness.write_json(part, report)
            part.replace(args.json)
            print(case, *map(found.why, (1, 64, 4096)), sep="\n  ", flush=True)


def plan_of(framework):
    """Return the function that tries on the card."""
    import importlib

    name = f"keras_weightmods.backend.{framework}.sparse_matmul_gpu"
    products = importlib.import_module(name)
    if not products.has_gpu():
        raise SystemExit(f"{framework} finds no NVIDIA GPU.")

    return products.plan


def dry_plan(shape, kind):
    from keras_weightmods.native.gpu import trial

    x, kernel = trial.sample(16, shape)
    product = np.matmul, kernel
    return trial.trial(x, product, product, lambda y: None)


@functools.cache
def machine():
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total"]
    try:
        answer = subprocess.run(
            [*query, "--format=csv,noheader"], capture_output=True, text=True
        )
        name = answer.stdout.strip()
    except OSError:
        name = "no GPU, a dry run"
    return {"gpu": name, "versions": harness.versions()}


def table(report):
    """Return dense over cuSPARSELt's time as Markdown, by shape and rows."""
    lines = ["# cuSPARSELt over the dense product", ""]
    lines += [json.dumps(report.get("machine", {})), ""]
    rows = sorted(
        {
            tried["rows"]
            for case in report.get("times", {}).values()
            if not isinstance(case, str)
            for tried in case
        }
    )
    lines.append(f"| | {' | '.join(map(str, rows))} |")
    lines.append("|---" * (len(rows) + 1) + "|")
    for name, case in report.get("times", {}).items():
        if isinstance(case, str):
            lines.append(f"| {name} | {case} |")
            continue
        gains = [f"{tried['dense'] / tried['sparse']:.2f}x" for tried in case]
        lines.append(f"| {name} | {' | '.join(gains)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
