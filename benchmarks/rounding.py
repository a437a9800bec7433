"""How long it takes to round and to prune a model, and in how much memory.

    python -m benchmarks.rounding
    python -m benchmarks.rounding --models gemma3 --methods sparsegpt
    python -m benchmarks.rounding --models qwen_coder,1.5b --dtype bfloat16

Each method has a process of its own, for its peak of memory, and the same rows
of 256 tokens, half of them docstrings. `1.5b` has the shape of Qwen2.5 1.5B,
and weights and tokens at random. `quantize` is `kwm.quantize` with its
defaults: four bits, blocks and scales, the head included. `quantize_blocks`
leaves the scales out. `sparsegpt` prunes to `--pattern`, and `blocks` adds
swaps and blocks to that. The time is that of the call alone. The memory before
it has the imports and the model. The nats are the divergence from the float
model on a few rows held out: after rounding to nearest, and by `quantize`.
`benchmarks.quality` measures more.

Times and peaks are only good on a machine that does nothing else.
"""

import argparse
import time

from benchmarks import harness
from benchmarks.quality import MODELS
from benchmarks.runtimes import SHAPES

NAMES = {**MODELS, "1.5b": "Qwen2.5 1.5B, random weights"}
METHODS = ("quantize", "sparsegpt", "blocks", "quantize_blocks")


def main():
    args = parse_arguments()
    if args.one:
        harness.write_json(args.json, measure(args, *args.one))
        return
    report = {
        "machine": harness.machine(),
        "backend": args.backend,
        "dtype": args.dtype,
        "rows": args.rows,
        "pattern": args.pattern,
        "models": {model: {} for model in args.models},
    }
    for model, found in report["models"].items():
        for method in args.methods:
            found[method] = harness.run_worker(
                args.backend, "--one", model, method
            )
            harness.write_json(args.json, report)
    print_report(report)


def parse_arguments():
    parser = harness.make_parser(__doc__)
    harness.add_backend(parser, "torch")
    parser.add_argument("--models", type=harness.subset(NAMES), default=MODELS)
    parser.add_argument(
        "--methods", type=harness.subset(METHODS), default=METHODS[:2]
    )
    parser.add_argument("--dtype", default="mixed_bfloat16", help="policy")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--pattern", default="16:32")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    harness.add_json(parser, "rounding.json")
    args = parser.parse_args()
    if args.rows < 2:
        parser.error("--rows must be at least 2")
    return args


def measure(args, name, method):
    """Return the seconds and the memory of a method, in this process."""
    harness.choose_backend(args.backend)
    import keras
    import numpy as np

    import keras_weightmods as kwm
    from benchmarks.quality import load
    from examples.data.prose import load_rows, model_inputs

    random = np.random.default_rng(0)
    if name in SHAPES:
        keras.utils.set_random_seed(0)
        model = harness.make_llm(args.dtype, **SHAPES[name])
        rows = random.integers(
            SHAPES[name]["vocabulary_size"], size=(args.rows, 257)
        )
    else:
        model = load(name, args.dtype)
        tokenizer, model.preprocessor = model.preprocessor.tokenizer, None
        half = args.rows // 2
        rows = load_rows(
            tokenizer, 257, documentation=half, train=args.rows - half
        )
        rows = random.permutation(np.concatenate(rows))
    data = model_inputs(rows[:, :-1])
    loaded = harness.resident_bytes()
    began, processor = time.monotonic(), time.process_time()
    if method == "quantize_blocks":
        report = kwm.quantize(model, data, refine="blocks")
    elif method == "quantize":
        report = kwm.quantize(model, data)
    else:
        refine = ("swaps", "blocks") if method == "blocks" else None
        report = kwm.sparsify(
            model, args.pattern, data, criterion="sparsegpt", refine=refine
        )
    return {
        "versions": harness.versions("keras-hub"),
        "seconds": time.monotonic() - began,
        "processor_seconds": time.process_time() - processor,
        "loaded_bytes": loaded,
        "peak_bytes": harness.peak_bytes(),
        # KL in nats on rows held out: to nearest, and as it is now.
        "held_out": getattr(report, "held_out", None),
    }


def table_rows(report):
    """Return a row of strings for each model and method."""
    return [
        [
            NAMES[model],
            method,
            f"{row['seconds'] / 60:.1f}",
            f"{row['processor_seconds'] / 60:.1f}",
            f"{row['loaded_bytes'] / 1e9:.2f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
            *(f"{x:.3f}" if x else "" for x in row["held_out"] or (0, 0)),
        ]
        for model, methods in report["models"].items()
        for method, row in methods.items()
    ]


NUMBERS = (
    "minutes",
    "of a core",
    "GB before",
    "peak GB",
    "nats, nearest",
    "nats",
)


def print_report(report):
    table = harness.table(
        f"{report['rows']} rows, {report['backend']}, {report['dtype']}",
        text=("model", "method"),
        numbers=NUMBERS,
    )
    for row in table_rows(report):
        table.add_row(*row)
    harness.print_all(table, harness.describe(report), width=130)


if __name__ == "__main__":
    main()
