"""One-shot 2:4 of a real LLM by method, and the time of SparseGPT.

    python -m benchmarks.one_shot
    python -m benchmarks.one_shot --parts layer --size 4096

Quality: perplexity of SmolLM2-135M-Instruct on held-out prose and on unrelated
text, dense and made 2:4 by magnitude, Wanda and SparseGPT, all calibrated on
the same rows of prose. Time: SparseGPT of one square layer, from its inputs to
its weights, without the model around it, in float32; the median of the runs.
"""

import statistics
import time

from benchmarks import harness

METHODS = ("dense", "magnitude", "wanda", "sparsegpt")
# Seconds for a layer of 4096 x 4096.
TIME_BAR = 60


def main():
    args = parse_arguments()
    harness.choose_backend(args.backend)
    report = harness.read_json(args.json) or {}
    for part in args.parts:
        measure = {"quality": quality, "layer": layer}[part]
        report[part] = {
            "backend": args.backend,
            "machine": harness.machine(),
            **measure(args),
        }
        harness.write_json(args.json, report)
    check(report)


def parse_arguments():
    parser = harness.make_parser(__doc__)
    harness.add_backend(parser, "torch")
    parts = ["quality", "layer"]
    parser.add_argument("--parts", type=harness.subset(parts), default=parts)
    parser.add_argument("--calibration-rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=32, help="to evaluate on")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=32768, help="of a layer")
    parser.add_argument("--runs", type=int, default=3)
    harness.add_json(parser, "one_shot.json")
    return parser.parse_args()


def quality(args):
    import numpy as np

    import keras_weightmods as kwm
    from examples.data.prose import load_rows, model_inputs
    from examples.data.smollm2 import load_smollm2

    model = load_smollm2(dtype="float32")
    model.preprocessor, tokenizer = None, model.preprocessor.tokenizer
    dense = model.get_weights()
    length = args.length + 1
    held_out, unrelated = load_rows(
        tokenizer, length, held_out=args.rows, reference=args.rows // 2
    )
    (calibration,) = load_rows(
        tokenizer, length, seed=1, train=args.calibration_rows
    )
    data = model_inputs(calibration[:, :-1])
    measure = kwm.Perplexity(model)
    table = harness.table(
        "SmolLM2-135M-Instruct, all 210 in-block kernels, 2:4",
        text=["method"],
        numbers=("held-out", "unrelated", "output error", "time"),
    )
    rows = []
    for method in METHODS:
        model.set_weights(dense)
        error, began = None, time.monotonic()
        if method != "dense":
            needs = None if method == "magnitude" else data
            report = kwm.sparsify(model, "2:4", needs, criterion=method)
            kwm.assert_sparse(model, "2:4")
            if needs is not None:
                error = float(np.mean([k.error for k in report.kernels]))
        rows.append(
            {
                "method": method,
                "held_out": measure(held_out, verbose=0),
                "unrelated": measure(unrelated, verbose=0),
                "mean_output_error": error,
                "seconds": round(time.monotonic() - began, 1),
            }
        )
        table.add_row(
            method,
            f"{rows[-1]['held_out']:.1f}",
            f"{rows[-1]['unrelated']:.1f}",
            "" if error is None else f"{error:.1%}",
            f"{rows[-1]['seconds']:.0f} s",
        )
        print(rows[-1], flush=True)
    harness.print_all(table)
    return {
        "model": "SmolLM2-135M-Instruct, all 210 in-block kernels, 2:4",
        "calibration_tokens": data["token_ids"].size,
        "evaluated_rows": args.rows,
        "tokens_per_row": args.length,
        "note": "`seconds` includes the evaluation.",
        "rows": rows,
    }


def layer(args):
    import keras
    import numpy as np

    import keras_weightmods as kwm

    rng = np.random.default_rng(0)
    size = args.size
    x = rng.normal(size=(args.tokens, size)).astype("float32")
    # Inputs of very different sizes, as in a language model.
    x *= rng.lognormal(sigma=1, size=size).astype("float32")
    model = keras.Sequential(
        [keras.Input((size,)), keras.layers.Dense(size, use_bias=False)]
    )
    dense = model.get_weights()
    seconds = []
    for _ in range(args.runs):
        model.set_weights(dense)
        began = time.monotonic()
        kwm.sparsify(
            model, "2:4", x, criterion="sparsegpt", batch_size=2048, verbose=0
        )
        seconds.append(time.monotonic() - began)
        kwm.assert_sparse(model, "2:4")
        print(f"{size} x {size}: {seconds[-1]:.1f} s", flush=True)
    return {
        "shape": [size, size],
        "tokens": args.tokens,
        "seconds": seconds,
        "median": statistics.median(seconds),
    }


def check(report):
    """Prints whether the bars are met."""
    lines = []
    if "quality" in report:
        by_name = {r["method"]: r for r in report["quality"]["rows"]}
        for better, worse in (("wanda", "magnitude"), ("sparsegpt", "wanda")):
            for text in ("held_out", "unrelated"):
                a, b = by_name[better][text], by_name[worse][text]
                lines.append((f"{better} {a:.1f} < {worse} {b:.1f}", a < b))
    if "layer" in report and report["layer"]["shape"] == [4096, 4096]:
        median = report["layer"]["median"]
        met = median <= TIME_BAR
        lines.append((f"SparseGPT {median:.1f} s <= {TIME_BAR} s", met))
    for line, met in lines:
        print("met:" if met else "NOT MET:", line)


if __name__ == "__main__":
    main()
