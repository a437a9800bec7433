"""A merge by the command line, and by mergekit's.

    python -m benchmarks.merge_command --mergekit FOLDER/bin/mergekit-pytorch

Both get the same arrays in files of 500 MB, and the same method, weights and
densities, in float32. Whole commands are measured, so their seconds and peaks
of memory include imports. mergekit has its own environment, because it needs
other versions of packages. The commands take turns, and the medians are shown.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import harness, merge

# Both use these names; mergekit has no Iso-C.
METHODS = tuple(method for method in merge.METHODS if method != "iso_c")
_MERGEKIT_NAMES = {"dare": "dare_linear"}
OPTIONS = {
    "ties": {"density": 0.2},
    "dare": {"density": 0.1},
    "dare_ties": {"density": 0.1},
    "della": {"density": 0.3, "epsilon": 0.1},
    "breadcrumbs": {"density": 0.15, "gamma": 0.01},
}
HEADER = (
    *("method", "ours, s", "mergekit, s", "ratio"),
    *("ours, MB", "mergekit, MB", "ratio of MB"),
)
_MODELS = ("0.safetensors", "1.safetensors")
_BASE = "2.safetensors"
_OUTPUT = ("-o", "out.safetensors", "--overwrite")


def main():
    args = parse_arguments()
    if args.worker:
        harness.write_json(args.json, write(args))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = pathlib.Path(name)
        # In a process of its own: the peak of a command begins at this one's.
        versions = harness.run_worker(args.backend, f"--worker={folder}")
        methods = {
            method: compare(args, folder, method) for method in args.methods
        }
        report = {
            "machine": harness.machine(),
            "backend": args.backend,
            "versions": {
                **versions,
                "mergekit": mergekit_version(args.mergekit),
            },
            "megabytes": args.megabytes,
            "rounds": args.rounds,
            "file_bytes": os.path.getsize(folder / _BASE),
            "methods": methods,
        }
    harness.write_json(args.json, report)
    print_report(report)


def parse_arguments():
    parser = harness.make_parser(__doc__)
    harness.add_backend(parser, "torch")
    parser.add_argument("--mergekit", required=True, help="its command")
    parser.add_argument(
        "--methods", type=harness.subset(METHODS), default=METHODS
    )
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="for the files; default: the system's")
    harness.add_json(parser, "merge_command.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def write(args):
    """Write our files, and with nothing but weights what mergekit reads."""
    import safetensors.numpy

    folder = pathlib.Path(args.worker)
    merge.write_files(folder, args.megabytes)
    (folder / "bare").mkdir()
    for name in (*_MODELS, _BASE):
        arrays = safetensors.numpy.load_file(folder / name)
        bare = {k: v for k, v in arrays.items() if v.dtype == "float32"}
        safetensors.numpy.save_file(bare, folder / "bare" / name)
    return harness.versions("numpy")


def compare(args, folder, method):
    """Return seconds and peaks of both commands, a list of each."""
    has_base = method not in ("linear", "slerp")
    options = OPTIONS.get(method, {})
    parameters = {"weight": 1.0, **options}
    theirs = {
        "merge_method": _MERGEKIT_NAMES.get(method, method),
        "models": [{"model": m, "parameters": parameters} for m in _MODELS],
        "dtype": "float32",
        "parameters": {},
    }
    if has_base:
        theirs["base_model"] = _BASE
    if method == "slerp":
        theirs |= {"base_model": _MODELS[0], "parameters": {"t": 0.5}}
    if method == "dare_ties":
        theirs["parameters"]["normalize"] = True
    ours, config = folder / "config.json", folder / "bare" / "config.yml"
    for path in (ours, config):
        path.write_text(json.dumps(theirs))
    program = pathlib.Path(sys.executable).with_name("keras-weightmods")
    found = harness.take_turns(
        {
            "ours": lambda: timed(
                args, folder, program, "merge", ours.name, *_OUTPUT
            ),
            "mergekit": lambda: timed(
                args, config.parent, args.mergekit, config.name, "out"
            ),
        },
        args.rounds,
    )
    return {
        name: {
            "seconds": [seconds for seconds, _ in runs],
            "peak_bytes": [peak for _, peak in runs],
        }
        for name, runs in found.items()
    }


def timed(args, folder, *command):
    """Run a command that writes to `out`; return its seconds and peak."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "KERAS_BACKEND": args.backend},
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            text = said.read().decode(errors="replace")[-2000:]
            raise SystemExit(f"{command} failed: {text}")
    # In kilobytes on Linux.
    return seconds, usage.ru_maxrss * 1024


def mergekit_version(program):
    """Return the version of mergekit, by the Python of its environment."""
    code = "from importlib import metadata as m; print(m.version('mergekit'))"
    python = pathlib.Path(program).with_name("python")
    found = subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True
    )
    return found.stdout.strip()


def rows_of(report):
    """Return rows of texts: a method, seconds and peaks in MB, with ratios."""
    rows = []
    for method, both in report["methods"].items():
        seconds, peaks = (
            [statistics.median(both[who][key]) for who in ("ours", "mergekit")]
            for key in ("seconds", "peak_bytes")
        )
        rows.append(
            [
                method,
                *(f"{value:.1f}" for value in seconds),
                f"{seconds[0] / seconds[1]:.2f}",
                *(f"{value / 1e6:.0f}" for value in peaks),
                f"{peaks[0] / peaks[1]:.2f}",
            ]
        )
    return rows


def print_report(report):
    table = harness.table(
        f"Two files of {report['megabytes']} MB into one, whole commands",
        text=HEADER[:1],
        numbers=HEADER[1:],
    )
    for row in rows_of(report):
        table.add_row(*row)
    about = f"{report['machine']}, {report['versions']}"
    harness.print_all(table, about, width=100)


if __name__ == "__main__":
    main()
