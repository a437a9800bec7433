"""What the benchmarks share: arguments, workers, turns, machine, reports."""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

from examples.command_line import BACKENDS as BACKENDS
from examples.command_line import add_backend as add_backend
from examples.command_line import choose_backend as choose_backend
from examples.command_line import make_parser as make_parser
from examples.sizes import nbytes as nbytes
from examples.sizes import peak_bytes as peak_bytes
from examples.sizes import resident_bytes as resident_bytes

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

SMOLLM2_135M = {
    "num_layers": 30,
    "hidden_dim": 576,
    "intermediate_dim": 1536,
    "num_query_heads": 9,
    "num_key_value_heads": 3,
    "vocabulary_size": 49152,
}


def parser_of_workers(doc, results):
    """Return a parser for a benchmark that `compare_backends` runs.

    Args:
        doc: The docstring of the benchmark.
        results: Name of its file in benchmarks/results.
    """
    parser = make_parser(doc)
    parser.add_argument(
        "--backends",
        type=subset(BACKENDS),
        default=BACKENDS,
        help=f"default: {','.join(BACKENDS)}",
    )
    add_json(parser, results)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def add_json(parser, results):
    """Add `--json`, the file of the report."""
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS / results)


def subset(names):
    """Return the type of an argument: some of `names`, with commas between."""

    def parse(text):
        chosen = text.split(",")
        if unknown := set(chosen) - set(names):
            raise argparse.ArgumentTypeError(
                f"unknown: {sorted(unknown)}; there are {list(names)}"
            )
        return chosen

    return parse


def compare_backends(args, measure, about, print_report, environment=None):
    """Measure each backend in a process of its own, and report.

    Args:
        args: What a parser of `parser_of_workers` gives.
        measure: Function from `args` to the results of one backend.
        about: Dict. What the report holds beside the results.
        print_report: Function that prints a report.
        environment: Dict of variables to set in the processes.
    """
    if args.worker:
        write_json(args.json, measure(args))
        return
    report = {
        "machine": machine(),
        **about,
        "backends": {
            name: run_worker(name, f"--worker={name}", environment=environment)
            for name in args.backends
        },
    }
    write_json(args.json, report)
    print_report(report)


def run_worker(backend, *arguments, environment=None):
    """Run this benchmark for one backend, in a process of its own.

    Args:
        backend: String, a backend of Keras.
        *arguments: Strings, to add to the command line.
        environment: Dict of variables to set in the process, if any.

    Returns:
        What it writes to `--json`.
    """
    # Start it as `python -m` did.
    module = sys.modules["__main__"].__spec__.name
    command = [sys.executable, "-m", module, *sys.argv[1:], *arguments]
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "result.json"
        subprocess.run(
            [*command, f"--json={file}"],
            cwd=ROOT,
            env={
                "TF_CPP_MIN_LOG_LEVEL": "3",
                **os.environ,
                "KERAS_BACKEND": backend,
                **(environment or {}),
            },
            check=True,
        )
        return json.loads(file.read_text())


def write_json(path, report):
    """Write a report to a file, and make its folder."""
    file = pathlib.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n")


def read_json(path):
    """Return the report in a file, or None."""
    file = pathlib.Path(path)
    return json.loads(file.read_text()) if file.exists() else None


def load_weights(model, path):
    """Give a model the arrays of an npz file, in order of get_weights()."""
    import numpy as np

    with np.load(path) as arrays:
        names = arrays.files
        if len(names) != len(model.weights):
            raise SystemExit(
                f"{path} must hold {len(model.weights)} arrays, in the order "
                f"of get_weights(). Received: {len(names)}"
            )
        for variable, key in zip(model.weights, names):
            variable.assign(arrays[key])


def machine():
    """Return what the times depend on, as a dict."""
    return {
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "cores_used": len(os.sched_getaffinity(0)),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "load": os.getloadavg(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def cpu():
    """Return the name of the processor."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions(*packages):
    """Return the versions of Keras, its backend and these packages."""
    import keras

    names = ("keras", *packages, keras.backend.backend())
    return {name: importlib.metadata.version(name) for name in names}


def interval(values):
    """Return the mean and the ends of its interval of 95 % (Student's t)."""
    import numpy as np
    from scipy import stats

    mean, count = np.mean(values), len(values)
    error = np.std(values, ddof=1) / np.sqrt(count)
    half = stats.t.ppf(0.975, count - 1) * error
    return float(mean), float(mean - half), float(mean + half)


def take_turns(calls, rounds, description=None, rotate=True):
    """Call functions in turn, so that a change of the machine meets all.

    Args:
        calls: Dict from names to functions without arguments.
        rounds: Int. How often each is called.
        description: String for a progress bar, if there is to be one.
        rotate: Whether each round begins with the next of them.

    Returns:
        Dict from the names to lists of what the calls returned.
    """
    from rich.progress import track

    names = list(calls)
    found = {name: [] for name in names}
    steps = range(rounds)
    for step in track(steps, description) if description else steps:
        first = step % len(names) if rotate else 0
        for name in names[first:] + names[:first]:
            found[name].append(calls[name]())
    return found


def seconds_of(call, *args, **kwargs):
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    call(*args, **kwargs)
    return time.perf_counter() - began


def timed_step(model, *batch, **named_batch):
    """Return the seconds of a train step."""

    def step():
        model.train_on_batch(*batch, **named_batch)
        wait_for(model)

    return seconds_of(step)


def wait_for(model):
    """Wait until a step is done; only JAX returns before that on a CPU."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        model.jax_state_sync()
        optimizer = getattr(model, "optimizer", None)
        state = optimizer.variables if optimizer else []
        jax.block_until_ready([v.value for v in [*model.variables, *state]])


def token_batch(vocabulary, batch, length):
    """Return random tokens as inputs and labels of a language model."""
    import numpy as np

    # Not before a worker has chosen its cores: NumPy starts threads.
    from examples.data.prose import model_inputs

    tokens = np.random.default_rng(0).integers(
        vocabulary, size=(batch, length + 1), dtype="int32"
    )
    return model_inputs(tokens[:, :-1]), tokens[:, 1:]


def make_llm(dtype="float32", family="Llama", **sizes):
    """Return a model of these sizes, embeddings tied, that takes tokens."""
    import warnings

    # keras_hub imports TensorFlow on every backend, with its own warnings.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from keras_hub import models

        backbone = getattr(models, f"{family}Backbone")(
            **sizes, tie_word_embeddings=True, dtype=dtype
        )
        causal_lm = getattr(models, f"{family}CausalLM")
        return causal_lm(backbone=backbone, preprocessor=None)


def table(title, text=(), numbers=(), **kwargs):
    """Return a rich table with columns of text, then of numbers."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, box=box.SIMPLE_HEAD, **kwargs)
    for name in text:
        made.add_column(name, no_wrap=True)
    for name in numbers:
        made.add_column(name, justify="right", no_wrap=True)
    return made


def print_all(*parts, width=None):
    """Print tables and strings; tables without rows are left out."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=width)
    for part in parts:
        if not isinstance(part, Table) or part.row_count:
            console.print(part)


def describe(report):
    """Return the machine of a report as a line, and a backend's versions."""
    about = report["machine"]
    lines = [
        f"{about['cpu']}, {about['cores_used']} of {about['cores']} cores, "
        f"{about['system']}, Python {about['python']}"
    ]
    for backend, result in report.get("backends", {}).items():
        if "versions" in result:
            found = result["versions"].items()
            lines.append(
                f"{backend}: " + ", ".join(f"{k} {v}" for k, v in found)
            )
    return "\n".join(lines)


def verdict(value, bar, sign="<=", form=".3f", show_bar=True):
    """Return a number in green where it meets the bar, in red where not."""
    if bar is None:
        return f"{value:{form}}"
    met = value <= bar if sign == "<=" else value >= bar
    text = f"[{'green' if met else 'red'}]{value:{form}}[/]"
    return f"{text} {sign} {bar:g}" if show_bar else text
