"""What a whole train step costs with AdamS, next to keras AdamW.

    python benchmarks/optimizer_step.py
    python benchmarks/optimizer_step.py --backends torch --steps 40 --json FILE

Forward, backward and update of a 30-layer Llama of 107M parameters, through
`train_on_batch`, one process for each backend. The contenders take turns, step
by step and in a rotating order, so that a machine that gets slower or faster
on the way does so for all of them. All decay their weights as AdamW does.

Every 10th step of AdamS sets new masks. The ratio held against the bar counts
it at its share: it is (9 x median of the plain steps + median of the mask
steps) / 10 over the median of AdamW. The first 10 steps are reported apart: the
first compiles, and in all of them l1="auto" measures the gradients.

The times are only good on a machine that does nothing else, above all those of
torch, whose threads wait for each other.
"""

import argparse
import functools
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
RESULTS = ROOT / "benchmarks" / "results" / "optimizer_step.json"

# Whole step over the same step with keras AdamW; torch's is fused (foreach).
BARS = {"jax": 1.10, "tensorflow": 1.10, "torch": 1.15}
# Optimizer state over Adam's and one bit a sparsified weight.
STATE_BAR = 1.02

MASK_EVERY = 10
SHAPES = {
    "num_layers": 30,
    "hidden_dim": 576,
    "intermediate_dim": 1536,
    "num_query_heads": 9,
    "num_key_value_heads": 3,
    "vocabulary_size": 1024,
}


def main():
    args = parse_arguments()
    if args.worker:
        pathlib.Path(args.json).write_text(json.dumps(measure(args)))
        return
    backends = args.backends.split(",")
    unknown = set(backends) - set(BARS)
    if unknown:
        raise SystemExit(f"unknown: {unknown}; there are {list(BARS)}")
    report = {
        "machine": harness.machine(),
        "model": SHAPES,
        "batch": [args.batch, args.length],
        "dtype": "float32",
        "backends": {name: run_worker(args, name) for name in backends},
    }
    harness.write_report(args.json, report)
    print_report(report)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backends", default="jax,tensorflow,torch")
    parser.add_argument(
        "--steps",
        type=int,
        default=2 * MASK_EVERY,
        help=f"after one to warm up; at least {MASK_EVERY + 1}",
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--json", default=str(RESULTS))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps <= MASK_EVERY:
        parser.error(f"--steps must be above {MASK_EVERY}: {args.steps}")
    return args


def run_worker(args, backend):
    """Measures one backend in a process of its own."""
    return harness.run_worker(
        __file__,
        backend,
        f"--worker={backend}",
        f"--steps={args.steps}",
        f"--batch={args.batch}",
        f"--length={args.length}",
    )


def measure(args):
    sys.path.insert(0, str(ROOT))
    import keras
    from rich.progress import track

    # keras_hub imports TensorFlow on every backend, with its own warnings.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = make_models()
    x, y = make_batch(args.batch, args.length)
    names = list(models)
    seconds = {name: [] for name in names}
    for step in track(range(args.steps + 1), description=args.worker):
        first = step % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(timed_step(models[name], x, y))
    adam = state_bytes(models["AdamW"])
    times = {
        name: summary(values, masks=name != "AdamW")
        for name, values in seconds.items()
    }
    rows = [
        {
            "optimizer": name,
            **times[name],
            "ratio": times[name]["per_step"] / times["AdamW"]["per_step"],
            "state_bytes": state_bytes(model),
            "state_ratio": state_bytes(model) / (adam + mask_bytes(model)),
        }
        for name, model in models.items()
    ]
    return {
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("keras", "keras-hub", keras.backend.backend())
        },
        "parameters": models["AdamW"].count_params(),
        "sparsified": int(8 * mask_bytes(models["AdamS relative"])),
        "peak_memory_gb": peak_memory_gb(),
        "rows": rows,
        "seconds": seconds,
    }


def make_models():
    """{name: model}, equal but for the optimizer."""
    import keras

    optimizers = {
        "AdamW": lambda model: keras.optimizers.AdamW(1e-3),
        "AdamS published": functools.partial(make_adam_s, decay="published"),
        "AdamS relative": functools.partial(make_adam_s, decay="relative"),
    }
    models = {}
    for name, make_optimizer in optimizers.items():
        keras.utils.set_random_seed(0)
        models[name] = make_model()
        models[name].compile(
            make_optimizer(models[name]),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
    return models


def make_model():
    from keras_hub.models import LlamaBackbone, LlamaCausalLM

    backbone = LlamaBackbone(
        **SHAPES, tie_word_embeddings=True, dtype="float32"
    )
    return LlamaCausalLM(backbone=backbone, preprocessor=None)


def make_adam_s(model, decay):
    import keras

    import keras_weightmods as kwm

    return kwm.AdamS(
        1e-3,
        total_steps=10_000,
        targets=model,
        decay=decay,
        mask_every=MASK_EVERY,
        weight_decay=keras.optimizers.AdamW().weight_decay,
    )


def make_batch(batch, length):
    import numpy as np

    tokens = np.random.default_rng(0).integers(
        SHAPES["vocabulary_size"], size=(batch, length + 1), dtype="int32"
    )
    x = {
        "token_ids": tokens[:, :-1],
        "padding_mask": np.ones((batch, length), "int32"),
    }
    return x, tokens[:, 1:]


def timed_step(model, x, y):
    began = time.perf_counter()
    model.train_on_batch(x, y)
    wait_for(model)
    return time.perf_counter() - began


def wait_for(model):
    """Waits until the step is done; only JAX returns before that on a CPU."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        model.jax_state_sync()
        jax.block_until_ready([v.value for v in model.optimizer.variables])


def summary(seconds, masks):
    """Medians from step 10 on; masks are set at steps 0, 10, 20, ..."""
    first, steady = seconds[1:MASK_EVERY], seconds[MASK_EVERY:]
    if not masks:
        step = statistics.median(steady)
        return {
            "first_steps": statistics.median(first),
            "plain_step": step,
            "mask_step": None,
            "per_step": step,
        }
    at_masks = statistics.median(steady[::MASK_EVERY])
    plain = statistics.median(s for i, s in enumerate(steady) if i % MASK_EVERY)
    return {
        "first_steps": statistics.median(first),
        "plain_step": plain,
        "mask_step": at_masks,
        "per_step": plain + (at_masks - plain) / MASK_EVERY,
    }


def state_bytes(model):
    import numpy as np

    return sum(
        math.prod(v.shape) * np.dtype(v.dtype).itemsize
        for v in model.optimizer.variables
    )


def mask_bytes(model):
    """One bit for each sparsified weight; none with AdamW."""
    kernels = getattr(model.optimizer, "sparsified", [])
    return sum(math.prod(v.shape) for v in kernels) / 8


def peak_memory_gb():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def print_report(report):
    from rich import box
    from rich.console import Console
    from rich.table import Table

    about = report["machine"]
    batch = " x ".join(map(str, report["batch"]))
    table = Table(
        title=f"Whole train step, {batch} tokens, {report['dtype']}",
        box=box.SIMPLE_HEAD,
    )
    for column in ("backend", "optimizer"):
        table.add_column(column, no_wrap=True)
    for column in ("first", "step", "mask", "ratio", "MB", "excess"):
        table.add_column(column, justify="right", no_wrap=True)
    for backend, result in report["backends"].items():
        for row in result["rows"]:
            cells = [
                backend,
                row["optimizer"],
                f"{row['first_steps']:.2f}",
                f"{row['plain_step']:.2f}",
            ]
            state = f"{row['state_bytes'] / 1e6:.0f}"
            if row["mask_step"] is None:
                table.add_row(*cells, "", "1", state, "")
                continue
            table.add_row(
                *cells,
                f"{row['mask_step']:.2f}",
                verdict(row["ratio"], BARS[backend]),
                state,
                verdict(row["state_ratio"], STATE_BAR),
            )
        table.add_section()
    console = Console()
    console.print(table)
    console.print(
        "first: median seconds of steps 1 to 9; step: later; mask: every "
        "10th, which sets new masks and counts so in the ratio to AdamW; MB: "
        "optimizer state; excess: it over Adam's and one bit a sparsified "
        "weight\n"
        f"{about['cpu']}, {about['cores']} cores, {about['system']}, Python "
        f"{about['python']}\nLlama: {report['model']}"
    )
    for backend, result in report["backends"].items():
        versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
        console.print(
            f"{backend}: {versions}; {result['parameters']:,} parameters, "
            f"{result['sparsified']:,} sparsified; peak "
            f"{result['peak_memory_gb']:.1f} GB"
        )


def verdict(value, bar):
    colour = "green" if value <= bar else "red"
    return f"[{colour}]{value:.3f}[/]\n<= {bar:.2f}"


if __name__ == "__main__":
    main()
