"""What a whole train step costs with LIFT, next to keras AdamW and to LoRA.

    python benchmarks/lift_step.py
    python benchmarks/lift_step.py --backends torch --steps 10 --json FILE

Steps: forward, backward and update of a Llama with the shapes of SmolLM2-135M,
through `train_on_batch`, one process for each backend. AdamW trains all
weights; LIFT is `SparseAdamW` under `PrincipalMaskCallback(density=0.05)`. The
two take turns. The ratio is that of the medians. A refresh is timed apart, and
counted at its share of one in 200 steps.

Memory: the peak of a process that does nothing but a few such steps: with
AdamW, with LIFT, and with LoRA (AdamW) of about as many trained numbers.

Times and peaks are only good on a machine that does nothing else.
"""

import argparse
import importlib.metadata
import json
import math
import pathlib
import resource
import statistics
import sys
import time
import warnings

import harness

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "lift_step.json"
BACKENDS = ("jax", "tensorflow", "torch")
METHODS = ("AdamW", "LIFT", "LoRA")
DENSITY, REFRESH_EVERY = 0.05, 200
STEP_BAR, STATE_BAR = 1.10, 0.085
# SmolLM2-135M.
SHAPES = {
    "num_layers": 30,
    "hidden_dim": 576,
    "intermediate_dim": 1536,
    "num_query_heads": 9,
    "num_key_value_heads": 3,
    "vocabulary_size": 49152,
}


def main():
    args = parse_arguments()
    if args.worker:
        measured = measure_steps(args)
        pathlib.Path(args.json).write_text(json.dumps(measured))
        return
    if args.memory:
        measured = measure_memory(args)
        pathlib.Path(args.json).write_text(json.dumps(measured))
        return
    backends = args.backends.split(",")
    unknown = set(backends) - set(BACKENDS)
    if unknown:
        raise SystemExit(f"unknown: {unknown}; there are {BACKENDS}")
    sizes = [f"--batch={args.batch}", f"--length={args.length}"]
    report = {
        "machine": harness.machine(),
        "model": SHAPES,
        "batch": [args.batch, args.length],
        "dtype": "float32",
        "backends": {},
    }
    for name in backends:
        result = {}
        if args.part != "memory":
            result = harness.run_worker(
                __file__,
                name,
                f"--worker={name}",
                f"--steps={args.steps}",
                *sizes,
            )
        if args.part != "steps":
            result["memory"] = {
                method: harness.run_worker(
                    __file__, name, f"--memory={method}", *sizes
                )
                for method in METHODS
            }
        report["backends"][name] = result
    harness.write_report(args.json, report)
    print_report(report)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument(
        "--part", choices=("both", "steps", "memory"), default="both"
    )
    parser.add_argument("--steps", type=int, default=12, help="of each")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--json", default=str(RESULTS))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--memory", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1: {args.steps}")
    return args


def measure_steps(args):
    sys.path.insert(0, str(ROOT))
    import keras
    from rich.progress import track

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = {name: make(name) for name in METHODS[:2]}
    models = {name: model for name, (model, _) in made.items()}
    callback = made["LIFT"][1]
    batch = make_batch(args.batch, args.length)
    seconds = {name: [] for name in models}
    names = list(models)
    # The first step of each compiles.
    for step in track(range(args.steps + 1), description=args.worker):
        for name in names[:: 1 if step % 2 else -1]:
            began = time.perf_counter()
            models[name].train_on_batch(**batch)
            wait_for(models[name])
            seconds[name].append(time.perf_counter() - began)
    medians = {k: statistics.median(v[1:]) for k, v in seconds.items()}
    refreshes = []
    for _ in range(2):
        began = time.perf_counter()
        refresh(callback, models["LIFT"])
        refreshes.append(time.perf_counter() - began)
    per_step = medians["LIFT"] + min(refreshes) / REFRESH_EVERY
    state = {name: state_bytes(model) for name, model in models.items()}
    return {
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("keras", "keras-hub", keras.backend.backend())
        },
        "parameters": models["AdamW"].count_params(),
        "trained": callback.attach(models["LIFT"]).entries,
        "seconds": seconds,
        "medians": medians,
        "refresh": min(refreshes),
        "ratio": medians["LIFT"] / medians["AdamW"],
        "ratio_with_refresh": per_step / medians["AdamW"],
        "state_bytes": state,
        "state_ratio": state["LIFT"] / state["AdamW"],
        "state_ratio_of_kernels": state["LIFT"]
        / (8 * sum(map(size, models["LIFT"].optimizer.masked_variables))),
    }


def refresh(callback, model):
    """A refresh as the callback does it, of a model that it is attached to."""
    callback.set_model(model)
    callback._look()
    callback._refresh()
    wait_for(model)


def measure_memory(args):
    sys.path.insert(0, str(ROOT))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, callback = make(args.memory)
    batch = make_batch(args.batch, args.length)
    for _ in range(3):
        model.train_on_batch(**batch)
        wait_for(model)
    trained = sum(map(size, model.trainable_variables))
    if callback is not None:
        trained = callback.attach(model).entries
    return {
        "peak_bytes": peak_bytes(),
        "state_bytes": state_bytes(model),
        "trained": trained,
    }


def make(method):
    """A compiled model, and LIFT's callback."""
    import keras
    from keras_hub.models import LlamaBackbone, LlamaCausalLM

    import keras_weightmods as kwm

    keras.utils.set_random_seed(0)
    backbone = LlamaBackbone(
        **SHAPES, tie_word_embeddings=True, dtype="float32"
    )
    model = LlamaCausalLM(backbone=backbone, preprocessor=None)
    if method == "LoRA":
        enable_lora(model, DENSITY)
    model.compile(
        optimizer=kwm.SparseAdamW(1e-4)
        if method == "LIFT"
        else keras.optimizers.AdamW(1e-4),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    if method != "LIFT":
        return model, None
    callback = kwm.PrincipalMaskCallback(
        density=DENSITY, refresh_every=REFRESH_EVERY, seed=0
    )
    callback.attach(model)
    return model, callback


def enable_lora(model, density):
    """LoRA on all kernels, of the rank with the nearest count of numbers.

    Returns:
        Int, the rank.
    """
    import keras_weightmods as kwm

    targets = kwm.find_targets(model)
    wanted = density * sum(math.prod(t.shape) for t in targets)
    each = sum(math.prod(t.shape[:-1]) + t.shape[-1] for t in targets)
    rank = max(1, round(wanted / each))
    for target in targets:
        target.layer.enable_lora(rank)
    for variable in model.trainable_variables:
        if not variable.name.startswith("lora_"):
            variable.trainable = False
    return rank


def make_batch(batch, length):
    import numpy as np

    tokens = np.random.default_rng(0).integers(
        SHAPES["vocabulary_size"], size=(batch, length + 1), dtype="int32"
    )
    return {
        "x": {
            "token_ids": tokens[:, :-1],
            "padding_mask": np.ones((batch, length), "int32"),
        },
        "y": tokens[:, 1:],
    }


def wait_for(model):
    """Waits until the step is done; only JAX returns before that on a CPU."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        model.jax_state_sync()
        jax.block_until_ready([v.value for v in model.variables])


def state_bytes(model):
    import numpy as np

    return sum(
        size(v) * np.dtype(v.dtype).itemsize for v in model.optimizer.variables
    )


def size(variable):
    return math.prod(variable.shape)


def peak_bytes():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def print_report(report):
    from rich import box
    from rich.console import Console
    from rich.table import Table

    def verdict(value, bar):
        colour = "green" if value <= bar else "red"
        return f"[{colour}]{value:.3f}[/] <= {bar}"

    console = Console()
    batch = " x ".join(map(str, report["batch"]))
    table = Table(
        title=f"Whole train step, {batch} tokens, {report['dtype']}",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("backend")
    for column in ("AdamW", "LIFT", "ratio", "refresh", "state ratio"):
        table.add_column(column, justify="right")
    for backend, result in report["backends"].items():
        if "medians" in result:
            table.add_row(
                backend,
                f"{result['medians']['AdamW']:.2f} s",
                f"{result['medians']['LIFT']:.2f} s",
                verdict(result["ratio_with_refresh"], STEP_BAR),
                f"{result['refresh']:.1f} s",
                verdict(result["state_ratio"], STATE_BAR),
            )
    if table.row_count:
        console.print(table)
    table = Table(title="Peak memory", box=box.SIMPLE_HEAD)
    table.add_column("backend")
    for column in ("method", "trained", "state MB", "peak MB", "below AdamW"):
        table.add_column(column, justify="right")
    for backend, result in report["backends"].items():
        rows = result.get("memory", {})
        for method, row in rows.items():
            saved = rows["AdamW"]["peak_bytes"] - row["peak_bytes"]
            least = rows["AdamW"]["state_bytes"] - row["state_bytes"]
            colour = "green" if saved >= least else "red"
            table.add_row(
                backend,
                method,
                f"{row['trained']:,}",
                f"{row['state_bytes'] / 1e6:.0f}",
                f"{row['peak_bytes'] / 1e6:.0f}",
                f"[{colour}]{saved / 1e6:.0f}[/] >= {least / 1e6:.0f}"
                if method != "AdamW"
                else "",
            )
    if table.row_count:
        console.print(table)
    about = report["machine"]
    console.print(
        f"{about['cpu']}, {about['cores']} cores, {about['system']}, Python "
        f"{about['python']}"
    )


if __name__ == "__main__":
    main()
