"""What a step of CAST costs, with and without the logits in chunks.

    python -m benchmarks.cast_step
    python -m benchmarks.cast_step --backends torch --steps 4 --json FILE
    python -m benchmarks.cast_step --shapes 0.5b --contenders CAST,Keras

A step is the forward pass, backward pass and update of a Llama with the shapes
of SmolLM2-135M or Qwen2.5-0.5B, through `train_on_batch`. `CAST` computes its
losses from chunks of logits. "whole" is `CAST` with the logits of all positions
in memory, which other losses need. Keras' own step of the same model has AdamW.
LIFT is `SparseAdamW` under `PrincipalMaskCallback(density=0.05)`. Each runs in
a process of its own, for its peak of memory. The ratios are of medians, without
the first step, which compiles.

Times and peaks are only good on a machine that does nothing else.
"""

import argparse
import statistics

from benchmarks import harness

CONTENDERS = ("CAST", "whole", "Keras", "LIFT")
DTYPES = ("float32", "mixed_bfloat16")
MODELS = {"135m": "SmolLM2-135M", "0.5b": "Qwen2.5-0.5B"}
SHAPES = {
    "135m": harness.SMOLLM2_135M,
    "0.5b": {
        "num_layers": 24,
        "hidden_dim": 896,
        "intermediate_dim": 4864,
        "num_query_heads": 14,
        "num_key_value_heads": 2,
        "vocabulary_size": 151936,
    },
}


def main():
    args = parse_arguments()
    about = {"model": MODELS[args.shapes], "batch": [args.batch, args.length]}
    harness.compare_backends(args, measure, about, print_report)


def parse_arguments():
    parser = harness.parser_of_workers(__doc__, "cast_step.json")
    parser.add_argument("--dtypes", type=harness.subset(DTYPES), default=DTYPES)
    parser.add_argument("--shapes", choices=SHAPES, default="135m")
    parser.add_argument(
        "--contenders",
        type=harness.subset(CONTENDERS),
        default=CONTENDERS[:3],
        help="default: all but LIFT",
    )
    parser.add_argument("--steps", type=int, default=4, help="of each")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1: {args.steps}")
    if "Keras" not in args.contenders:
        parser.error("--contenders must have Keras, which the ratios are over")
    return args


def measure(args):
    if args.one:
        return measure_one(args, *args.one)
    return {
        "versions": harness.versions("keras-hub"),
        "rows": {
            dtype: {
                name: harness.run_worker(args.worker, "--one", name, dtype)
                for name in args.contenders
            }
            for dtype in args.dtypes
        },
    }


def measure_one(args, name, dtype):
    """Return the seconds of steps, and the peak of the process."""
    shapes = SHAPES[args.shapes]
    model = make(name, dtype, shapes)
    batch = harness.token_batch(
        shapes["vocabulary_size"], args.batch, args.length
    )
    seconds = [harness.timed_step(model, *batch) for _ in range(args.steps + 1)]
    return {
        # The first compiles.
        "seconds": seconds,
        "median": statistics.median(seconds[1:]),
        "peak_bytes": harness.peak_bytes(),
    }


def make(name, dtype, shapes):
    """Return a compiled model, or `CAST` of one."""
    import keras

    import keras_weightmods as kwm

    keras.utils.set_random_seed(0)
    model = harness.make_llm(**shapes, dtype=dtype)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if name == "Keras":
        model.compile(keras.optimizers.AdamW(1e-4), loss, weighted_metrics=None)
        return model
    if name == "LIFT":
        model.compile(kwm.SparseAdamW(1e-4), loss, weighted_metrics=None)
        kwm.PrincipalMaskCallback(density=0.05).attach(model)
        return model
    cast = kwm.CAST(model)
    cast.compile(kwm.AdamS(1e-4, total_steps=1000), loss)
    if name == "whole":
        # Losses that cannot be computed in chunks do this.
        cast._heads = None
    return cast


def print_report(report):
    batch = " x ".join(map(str, report["batch"]))
    table = harness.table(
        f"A step of CAST, {batch} tokens",
        text=("backend", "dtype", "step"),
        numbers=("seconds", "x Keras", "peak MB", "x Keras"),
    )
    for backend, result in report["backends"].items():
        for dtype, rows in result["rows"].items():
            for name, row in rows.items():
                ratios = [
                    f"{row[key] / rows['Keras'][key]:.2f}"
                    for key in ("median", "peak_bytes")
                ]
                table.add_row(
                    backend,
                    dtype,
                    name,
                    f"{row['median']:.2f}",
                    ratios[0],
                    f"{row['peak_bytes'] / 1e6:.0f}",
                    ratios[1],
                )
    harness.print_all(table, harness.describe(report))


if __name__ == "__main__":
    main()
