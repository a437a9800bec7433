"""One-shot 2:4 of a real LLM by method, and the time of SparseGPT.

    python benchmarks/one_shot.py
    python benchmarks/one_shot.py --parts layer --size 4096

Quality: perplexity of SmolLM2-135M-Instruct on held-out prose and on unrelated
text, dense and made 2:4 by magnitude, Wanda and SparseGPT, all calibrated on
the same rows of prose. Time: SparseGPT of one square layer, from its inputs to
its weights, without the model around it, in float32; the median of the runs.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

import harness

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "one_shot.json"

METHODS = ("dense", "magnitude", "wanda", "sparsegpt")
# Seconds for a layer of 4096 x 4096.
TIME_BAR = 60


def main():
    args = parse_arguments()
    os.environ["KERAS_BACKEND"] = args.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.path[:0] = [str(ROOT / "examples"), str(ROOT)]
    file = pathlib.Path(args.json)
    report = json.loads(file.read_text()) if file.exists() else {}
    for part in args.parts.split(","):
        measure = {"quality": quality, "layer": layer}[part]
        report[part] = {
            "backend": args.backend,
            "machine": harness.machine(),
            **measure(args),
        }
        harness.write_report(file, report)
    check(report)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--parts", default="quality,layer")
    parser.add_argument("--calibration-rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=32, help="to evaluate on")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=32768, help="of a layer")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", default=str(RESULTS))
    return parser.parse_args()


def quality(args):
    import numpy as np
    from evaluation import Perplexity
    from prose import load_prose, load_unrelated, token_blocks
    from rich.console import Console
    from rich.table import Table
    from smollm2 import load_smollm2

    import keras_weightmods as kwm

    model = load_smollm2(dtype="float32")
    model.preprocessor, tokenizer = None, model.preprocessor.tokenizer
    dense = model.get_weights()
    held_out, unrelated, calibration = (
        token_blocks(sections, tokenizer, args.length + 1, count, seed)
        for sections, count, seed in (
            (load_prose("held_out"), args.rows, 0),
            (load_unrelated(), args.rows // 2, 0),
            (load_prose("train"), args.calibration_rows, 1),
        )
    )
    inputs = calibration[:, :-1]
    data = {"token_ids": inputs, "padding_mask": np.ones_like(inputs)}
    measure = Perplexity(model)
    table = Table(title="SmolLM2-135M-Instruct, all 210 in-block kernels, 2:4")
    table.add_column("method")
    for name in ("held-out", "unrelated", "output error", "time"):
        table.add_column(name, justify="right")
    rows = []
    for method in METHODS:
        model.set_weights(dense)
        error, began = None, time.monotonic()
        if method != "dense":
            needs = None if method == "magnitude" else data
            report = kwm.sparsify(model, "2:4", method, needs)
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
    Console().print(table)
    return {
        "model": "SmolLM2-135M-Instruct, all 210 in-block kernels, 2:4",
        "calibration_tokens": int(inputs.size),
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
        kwm.sparsify(model, "2:4", "sparsegpt", x, batch_size=2048, verbose=0)
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
