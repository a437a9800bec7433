"""What a train step costs with companders, next to the plain layers.

    python benchmarks/compander_step.py
    python benchmarks/compander_step.py --backends torch --steps 60

Forward, backward and the update by Adam through `train_on_batch`, one process
for each backend. The contenders take turns, step by step and in a rotating
order, so that a machine that gets slower or faster on the way does so for all
of them. "folded" is a companded model after `fold`, and should cost what the
plain one does. The ratios are of CPU time, that of all threads of the process,
which other processes on the machine disturb less than the time of the wall;
the results hold both. The workers keep freed memory: by default glibc gives
blocks of 32 MB and more back to the system at each step, and a model that is
just above that pays for page faults that one just below does not.
"""

import argparse
import importlib.metadata
import json
import pathlib
import statistics
import sys
import time
import warnings

import harness

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "compander_step.json"
BAR = 1.10
BACKENDS = ("jax", "tensorflow", "torch")

# {name: (batch, what it is)}
MODELS = {
    "convnet": (64, "32x32x3, Conv2D 32-64-128 with batch norm, Dense 10"),
    "mlp": (256, "784-1024-1024-10"),
    "transformer": (8, "64 tokens, width 256, 4 heads, 2 blocks"),
}
# See above; the names are glibc's.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
}
CONTENDERS = (
    "plain",
    "fixed",
    "learnable",
    "weight_norm",
    "folded",
    "adam rule",
)


def main():
    args = parse_arguments()
    if args.worker:
        pathlib.Path(args.json).write_text(json.dumps(measure(args)))
        return
    backends = args.backends.split(",")
    unknown = set(backends) - set(BACKENDS)
    if unknown:
        raise SystemExit(f"unknown: {unknown}; there are {BACKENDS}")
    report = {
        "machine": harness.machine(),
        "models": MODELS,
        "dtype": "float32",
        "optimizer": "Adam",
        "steps": args.steps,
        "environment": KEEP_MEMORY,
        "backends": {name: run_worker(args, name) for name in backends},
    }
    harness.write_report(args.json, report)
    print_report(report)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--steps", type=int, default=40, help="after 3 more")
    parser.add_argument("--json", default=str(RESULTS))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_worker(args, backend):
    """Measures one backend in a process of its own."""
    return harness.run_worker(
        __file__,
        backend,
        f"--worker={backend}",
        f"--models={args.models}",
        f"--contenders={args.contenders}",
        f"--steps={args.steps}",
        environment=KEEP_MEMORY,
    )


def measure(args):
    sys.path.insert(0, str(ROOT))
    import keras

    rows = [
        row
        for name in args.models.split(",")
        for row in measure_model(name, args)
    ]
    return {
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("keras", keras.backend.backend())
        },
        "rows": rows,
    }


def measure_model(name, args):
    from rich.progress import track

    models, x, y = {}, *batch_for(name)
    for contender in args.contenders.split(","):
        models[contender] = make(name, contender)
    names = list(models)
    seconds = {contender: [] for contender in names}
    for step in track(
        range(args.steps + 3), description=f"{args.worker} {name}"
    ):
        first = step % len(names)
        for contender in names[first:] + names[:first]:
            seconds[contender].append(timed_step(models[contender], x, y))
    rows = []
    for contender, values in seconds.items():
        wall, cpu = (statistics.median(column) for column in zip(*values[3:]))
        rows.append(
            {"model": name, "contender": contender, "wall": wall, "cpu": cpu}
        )
    return [{**row, "ratio": row["cpu"] / rows[0]["cpu"]} for row in rows]


def timed_step(model, x, y):
    """(wall, CPU) seconds of a train step."""
    began = time.perf_counter(), time.process_time()
    model.train_on_batch(x, y)
    wait_for(model)
    return time.perf_counter() - began[0], time.process_time() - began[1]


def make(name, contender):
    import keras

    import keras_weightmods as kwm

    keras.utils.set_random_seed(0)
    model = BUILDERS[name]()
    optimizer = keras.optimizers.Adam(1e-3)
    if contender == "weight_norm":
        kwm.attach_weight_norm(model)
    elif contender != "plain":
        kwm.attach_compander(model, learnable=contender != "fixed")
    if contender == "folded":
        kwm.fold(model)
    if contender == "adam rule":
        optimizer = kwm.CompanderOptimizer(optimizer)
    # A stateless loss of the logits, the same for all.
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    return model


def make_convnet():
    import keras

    layers = [keras.Input((32, 32, 3))]
    for filters in (32, 64, 128):
        layers += [
            keras.layers.Conv2D(filters, 3, padding="same", use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.MaxPooling2D(),
        ]
    layers += [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)]
    return keras.Sequential(layers)


def make_mlp():
    import keras

    return keras.Sequential(
        [
            keras.Input((784,)),
            keras.layers.Dense(1024, activation="relu"),
            keras.layers.Dense(1024, activation="relu"),
            keras.layers.Dense(10),
        ]
    )


def make_transformer():
    import keras

    x = inputs = keras.Input((64, 256))
    for _ in range(2):
        h = keras.layers.LayerNormalization()(x)
        x = x + keras.layers.MultiHeadAttention(4, 64)(h, h)
        h = keras.layers.LayerNormalization()(x)
        h = keras.layers.Dense(1024, activation="relu")(h)
        x = x + keras.layers.Dense(256)(h)
    return keras.Model(inputs, keras.layers.Dense(10)(x))


BUILDERS = {
    "convnet": make_convnet,
    "mlp": make_mlp,
    "transformer": make_transformer,
}


def batch_for(name):
    import numpy as np

    rng = np.random.default_rng(0)
    batch = MODELS[name][0]
    shape = {
        "convnet": (batch, 32, 32, 3),
        "mlp": (batch, 784),
        "transformer": (batch, 64, 256),
    }[name]
    x = rng.normal(size=shape).astype("float32")
    labels = shape[:2] if name == "transformer" else shape[:1]
    return x, rng.integers(10, size=labels)


def wait_for(model):
    """Waits until the step is done; only JAX returns before that on a CPU."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        model.jax_state_sync()
        jax.block_until_ready([v.value for v in model.trainable_variables])


def print_report(report):
    from rich.console import Console
    from rich.table import Table

    about = report["machine"]
    table = Table(
        title="Train step over the plain layers'",
        caption=f"{about['cpu']}, {about['cores_used']} cores, "
        f"{about['threads']} threads, {report['dtype']}",
    )
    contenders = list(
        dict.fromkeys(
            row["contender"]
            for result in report["backends"].values()
            for row in result["rows"]
        )
    )
    for column in ("backend", "model", *contenders):
        table.add_column(column, justify="right")
    for backend, result in report["backends"].items():
        models = dict.fromkeys(row["model"] for row in result["rows"])
        for name in models:
            rows = [row for row in result["rows"] if row["model"] == name]
            table.add_row(
                backend,
                name,
                f"{1000 * rows[0]['cpu']:.1f} ms",
                *(verdict(row["ratio"]) for row in rows[1:]),
            )
    Console(width=100).print(table)


def verdict(ratio):
    return f"[{'green' if ratio <= BAR else 'red'}]{ratio:.3f}[/]"


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
