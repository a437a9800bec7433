"""A language model between dense and 2:4: quality, bytes and speed by share.

    python -m benchmarks.dense_share
    python -m benchmarks.dense_share --speed     (of the files there are)

SmolLM2-135M-Instruct, without training: `sensitivity` says which kernels hurt
most, a share of the weights stays dense in them, SparseGPT with swaps and
trained blocks makes the others 2:4, `quantize` rounds all to four bits,
and `pack` writes them in int4, with an int8 head. All on the same rows: half of
them the dense model wrote, a quarter each are prose and docstrings. Perplexity
is that of the packed model, on the four texts of `benchmarks.quality`.

`--speed` writes 128 tokens, greedy, batch 1, by `compile_generate` on JAX; the
models take turns. Times are only good on a machine that does nothing else.
"""

import functools
import math
import statistics
import time

from benchmarks import harness
from benchmarks.quality import TEXTS, Measure, make_teacher, mixed_rows
from examples.data.prose import load_rows, model_inputs

FOLDER = harness.ROOT / "build" / "dense_share"
LENGTH = 256


def main():
    args = parse_arguments()
    harness.choose_backend("jax" if args.speed else args.backend)
    report = harness.read_json(args.json) or {"rows": []}
    if args.speed:
        report["speed"] = {
            "machine": harness.machine(),
            "versions": harness.versions("keras-hub"),
        }
        speeds = measure_speeds([row["share"] for row in report["rows"]], args)
        for row, speed in zip(report["rows"], speeds):
            row["tokens_per_second"] = speed
    else:
        measure_quality(args, report)
    harness.write_json(args.json, report)
    print_report(report)


def parse_arguments():
    parser = harness.make_parser(__doc__)
    harness.add_backend(parser, "torch")
    parser.add_argument("--shares", default="0,0.25,0.5,1")
    parser.add_argument("--calibration-rows", type=int, default=64)
    parser.add_argument("--rows", type=int, default=16, help="to evaluate on")
    parser.add_argument("--dtype", default="mixed_bfloat16")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    harness.add_json(parser, "dense_share.json")
    return parser.parse_args()


def measure_quality(args, report):
    import keras_weightmods as kwm
    from examples.data.smollm2 import load_smollm2

    model = load_smollm2(dtype=args.dtype)
    tokenizer, model.preprocessor = model.preprocessor.tokenizer, None
    dense = model.get_weights()
    train = mixed_rows(
        tokenizer, LENGTH + 1, args.calibration_rows, 0.5, 0, 0.25
    )
    data = model_inputs(train[:, :-1])
    texts = load_rows(tokenizer, LENGTH + 1, **dict.fromkeys(TEXTS, args.rows))
    texts = dict(zip(TEXTS, texts))
    began = time.monotonic()
    everything = kwm.find_targets(model)
    costs = kwm.sensitivity(model, model_inputs(train[:2, :-1]), verbose=0)
    report |= {
        "model": "SmolLM2-135M-Instruct, 2:4 in int4, int8 head",
        "backend": args.backend,
        "dtype": args.dtype,
        "machine": harness.machine(),
        "versions": harness.versions("keras-hub"),
        "calibration_rows": args.calibration_rows,
        "evaluated_rows": args.rows,
        "sensitivity_seconds": time.monotonic() - began,
        "rows": [],
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    for share in map(float, args.shares.split(",")):
        model.set_weights(dense)
        began = time.monotonic()
        pruned = 0
        if share < 1:
            targets = costs.targets(model, share)
            pruned = weights_in(targets)
            kwm.sparsify(
                model,
                "2:4",
                "sparsegpt",
                data,
                refine=("swaps", "blocks"),
                targets=targets,
                batch_size=4,
                verbose=0,
            )
        options = {"refine": None, "head": False}
        kwm.quantize(model, data, batch_size=4, verbose=0, **options)
        seconds = time.monotonic() - began
        packed = load_smollm2()
        packed.preprocessor = None
        packed.set_weights(model.get_weights())
        kwm.pack(packed, dtype="int4", head="int8", verbose=0)
        kwm.save_model(packed, file_of(share))
        measure = Measure(packed, texts, make_teacher(packed))
        report["rows"].append(
            {
                "share": share,
                "dense_weights": 1 - pruned / weights_in(everything),
                **measure(),
                "file_bytes": file_of(share).stat().st_size,
                "seconds": seconds,
            }
        )
        print(report["rows"][-1], flush=True)
        harness.write_json(args.json, report)


def weights_in(targets):
    return sum(math.prod(target.shape) for target in targets)


def file_of(share):
    return FOLDER / f"{share}.safetensors"


def measure_speeds(shares, args):
    """Return the tokens per second of each share, medians of the rounds."""
    import numpy as np

    import keras_weightmods as kwm
    from examples.data.smollm2 import load_tokenizer

    (prompt,) = load_rows(load_tokenizer(), 8, held_out=1)
    tokens = 128
    padding = (0, 0), (0, tokens)
    inputs = {
        "token_ids": np.pad(prompt, padding),
        "padding_mask": np.pad(np.ones_like(prompt), padding),
    }

    def writer(share):
        model = kwm.load_model(file_of(share))
        model.compile(sampler="greedy")
        kwm.compile_generate(model)
        return functools.partial(
            harness.seconds_of, model.generate, inputs, stop_token_ids=None
        )

    calls = {share: writer(share) for share in shares}
    for call in calls.values():
        call()
    found = harness.take_turns(calls, args.rounds)
    return [tokens / statistics.median(found[share]) for share in shares]


def print_report(report):
    table = harness.table(
        report["model"],
        numbers=("dense", *TEXTS, "x dense", "nats", "MB", "tokens/s"),
    )
    for row in report["rows"]:
        speed = row.get("tokens_per_second")
        nats = row["divergence"].values()
        table.add_row(
            f"{row['dense_weights']:.0%}",
            *(f"{row['perplexity'][text]:.1f}" for text in TEXTS),
            f"{row['x_dense']:.3f}",
            f"{statistics.mean(nats):.2f}",
            f"{row['file_bytes'] / 1e6:.1f}",
            "" if speed is None else f"{speed:.0f}",
        )
    harness.print_all(table, width=100)


if __name__ == "__main__":
    main()
