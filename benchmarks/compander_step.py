"""What a train step costs with companders, next to the plain layers.

    python -m benchmarks.compander_step
    python -m benchmarks.compander_step --backends torch --steps 60

A step is the forward pass, backward pass and Adam's update through
`train_on_batch`, in one process for each backend. The contenders take turns,
step by step and in a rotating order, so that changes of the machine's speed
affect all of them. The one named "folded" is a companded model after `fold`,
and should cost as much as the plain one. The ratios are of CPU time over all
threads, which other processes disturb less than wall time. The results have
both. The workers keep freed memory. By default glibc gives blocks of 32 MB and
more back to the system at each step, and then only larger models pay for page
faults.
"""

import functools
import statistics
import time
import warnings

from benchmarks import harness

BAR = 1.10

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
    about = {
        "models": MODELS,
        "dtype": "float32",
        "optimizer": "Adam",
        "steps": args.steps,
        "environment": KEEP_MEMORY,
    }
    harness.compare_backends(args, measure, about, print_report, KEEP_MEMORY)


def parse_arguments():
    parser = harness.parser_of_workers(__doc__, "compander_step.json")
    parser.add_argument("--models", type=harness.subset(MODELS), default=MODELS)
    parser.add_argument(
        "--contenders", type=harness.subset(CONTENDERS), default=CONTENDERS
    )
    parser.add_argument("--steps", type=int, default=40, help="after 3 more")
    return parser.parse_args()


def measure(args):
    rows = [row for name in args.models for row in measure_model(name, args)]
    return {"versions": harness.versions(), "rows": rows}


def measure_model(name, args):
    x, y = batch_for(name)
    calls = {
        contender: functools.partial(timed_step, make(name, contender), x, y)
        for contender in args.contenders
    }
    seconds = harness.take_turns(
        calls,
        args.steps + 3,
        f"{args.worker} {name}",
    )
    rows = []
    for contender, values in seconds.items():
        wall, cpu = (statistics.median(column) for column in zip(*values[3:]))
        rows.append(
            {"model": name, "contender": contender, "wall": wall, "cpu": cpu}
        )
    return [{**row, "ratio": row["cpu"] / rows[0]["cpu"]} for row in rows]


def timed_step(model, x, y):
    """Return (wall, CPU) seconds of a train step."""
    began = time.process_time()
    wall = harness.timed_step(model, x, y)
    return wall, time.process_time() - began


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


def print_report(report):
    contenders = list(
        dict.fromkeys(
            row["contender"]
            for result in report["backends"].values()
            for row in result["rows"]
        )
    )
    table = harness.table(
        f"Train step over the plain layers', {report['dtype']}",
        text=("backend", "model"),
        numbers=contenders,
    )
    for backend, result in report["backends"].items():
        for name in dict.fromkeys(row["model"] for row in result["rows"]):
            first, *rest = (r for r in result["rows"] if r["model"] == name)
            table.add_row(
                backend,
                name,
                f"{1000 * first['cpu']:.1f} ms",
                *(
                    harness.verdict(row["ratio"], BAR, show_bar=False)
                    for row in rest
                ),
            )
    harness.print_all(table, harness.describe(report), width=100)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
