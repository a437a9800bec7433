"""How fast a convolution with a packed 2:4 kernel is, next to the dense one.

    python -m benchmarks.packed_conv
    python -m benchmarks.packed_conv --backends torch --shapes 28x28x128x3x128

A Conv2D layer alone, of padding "same", on a batch of images, dense by the
backend's own convolution and packed, which multiplies the patches of the input.
Each backend has a process of its own, in which they take turns; on JAX and
TensorFlow the layer is compiled. Shown is the median time of the dense layer
over that of the packed one: above 1 the packed one is faster.

Only good on a machine that does nothing else.
"""

import statistics

from benchmarks import harness

# Height, width, channels, taps, filters: of a ResNet-50 and a MobileNet.
SHAPES = [
    (56, 56, 64, 3, 64),
    (28, 28, 128, 3, 128),
    (14, 14, 256, 3, 256),
    (7, 7, 512, 3, 512),
    (56, 56, 64, 1, 256),
    (14, 14, 512, 1, 512),
]
KINDS = {
    "float32": {},
    "int8": {"dtype": "int8"},
    "int4": {"dtype": "int4"},
}


def main():
    args = parse_arguments()
    harness.compare_backends(args, measure, {"batch": args.batch}, print_report)


def parse_arguments():
    def shapes(text):
        return [[int(n) for n in part.split("x")] for part in text.split(",")]

    parser = harness.parser_of_workers(__doc__, "packed_conv.json")
    parser.add_argument("--shapes", type=shapes, default=SHAPES)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args()


def measure(args):
    rows = []
    for shape in args.shapes:
        calls = {name: call_of(shape, args.batch, name) for name in KINDS}
        calls["dense"] = call_of(shape, args.batch, None)
        for call in calls.values():
            call()
        times = harness.take_turns(
            {
                name: lambda call=call: harness.seconds_of(call)
                for name, call in calls.items()
            },
            args.rounds,
        )
        found = {name: 1e3 * statistics.median(t) for name, t in times.items()}
        rows.append({"shape": list(shape), "milliseconds": found})
    return {"rows": rows, "versions": harness.versions()}


def call_of(shape, batch, kind):
    """Return a function that runs a layer and waits for it."""
    import keras
    import numpy as np

    import keras_weightmods as kwm

    height, width, channels, taps, filters = shape
    keras.utils.set_random_seed(0)
    layer = keras.layers.Conv2D(filters, taps, padding="same")
    model = keras.Sequential([keras.Input((height, width, channels)), layer])
    kwm.sparsify(model, "2:4", verbose=0)
    if kind is not None:
        kwm.pack(model, **KINDS[kind])
    size = batch, height, width, channels
    x = np.random.default_rng(0).normal(size=size).astype("float32")
    x = keras.ops.convert_to_tensor(x)
    backend = keras.backend.backend()
    if backend == "torch":
        import torch

        def call():
            with torch.inference_mode():
                model(x)

    elif backend == "jax":
        import jax

        weights = [v.value for v in model.trainable_variables]
        frozen = [v.value for v in model.non_trainable_variables]
        run = jax.jit(lambda *a: model.stateless_call(*a)[0])

        def call():
            run(weights, frozen, x).block_until_ready()

    else:
        import tensorflow as tf

        run = tf.function(model)

        def call():
            run(x).numpy()

    return call


def print_report(report):
    tables = []
    for backend, result in report["backends"].items():
        table = harness.table(
            f"{backend}: speed over the dense layer, batch {report['batch']}",
            text=("height x width x channels, taps, filters",),
            numbers=("dense, ms", *KINDS),
        )
        for row in result["rows"]:
            height, width, channels, taps, filters = row["shape"]
            times = row["milliseconds"]
            table.add_row(
                f"{height} x {width} x {channels}, {taps} x {taps}, {filters}",
                f"{times['dense']:.2f}",
                *(f"{times['dense'] / times[kind]:.2f}" for kind in KINDS),
            )
        tables.append(table)
    harness.print_all(*tables, harness.describe(report), width=100)


if __name__ == "__main__":
    main()
