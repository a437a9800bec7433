"""What fine-tuning by LIFT gives, and what it forgets, next to its rivals.

    python -m benchmarks.lift_quality
    python -m benchmarks.lift_quality --backend torch --steps 100 --seeds 5

SmolLM2-135M-Instruct on the problems of examples/data/word_problems.py. Each
method trains with each learning rate of one grid and seed 0; the rate with the
least loss on validation problems is then used with the other seeds (which draw
other training problems, orders and random masks). The problems of the test are
the same for all, and choose nothing.

- full: AdamW on all weights;
- LoRA: KerasHub's, on all seven projections, at the rank whose count of numbers
  is nearest to the masks';
- random, magnitude, LIFT: `SparseAdamW` on 5 % of each projection, chosen at
  random once, by |W|, and as principal weights.

Every run has a process of its own, and is written to the JSON file when it is
done; started again, the benchmark goes on where it was stopped. The default
takes one to two hours on two cores.
"""

import argparse
import itertools
import math
import statistics
import sys
import time

from benchmarks import harness

METHODS = ("full", "LoRA", "random", "magnitude", "LIFT")
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
DENSITY = 0.05
# What the runs of a file have in common.
SETTING = ("backend", "steps", "batch", "length", "held_out", "filter_rank")


def main():
    args = parse_arguments()
    if args.worker:
        method, rate, seed = args.worker.split(",")
        measured = train(args, method, float(rate), int(seed))
        harness.write_json(args.json, measured)
        return
    report = resume(args)
    for method in METHODS:
        for rate in RATES:
            run(args, report, method, rate, 0)
        rate = best_rate(report, method)
        for seed in range(1, args.seeds):
            run(args, report, method, rate, seed)
    report["summary"] = summary(report)
    harness.write_json(args.json, report)
    print_report(report)


def parse_arguments():
    parser = harness.make_parser(__doc__)
    harness.add_backend(parser, "torch")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=80)
    parser.add_argument("--held-out", type=int, default=64, help="problems")
    parser.add_argument("--filter-rank", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    harness.add_json(parser, "lift_quality.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def resume(args):
    setting = {name: getattr(args, name) for name in SETTING}
    report = harness.read_json(args.json)
    if report is not None:
        if report["setting"] != setting:
            raise SystemExit(
                f"{args.json} holds runs of another setting, "
                f"{report['setting']}: remove it, or name another file"
            )
        return report
    return {
        "machine": harness.machine(),
        "density": DENSITY,
        "setting": setting,
        "runs": [],
    }


def run(args, report, method, rate, seed):
    key = {"method": method, "rate": rate, "seed": seed}
    if any(key.items() <= each.items() for each in report["runs"]):
        return
    print(f"{method}, learning rate {rate:g}, seed {seed}", file=sys.stderr)
    worker = f"--worker={method},{rate},{seed}"
    measured = harness.run_worker(args.backend, worker)
    report["runs"].append({**key, **measured})
    harness.write_json(args.json, report)


def train(args, method, rate, seed):
    """One run; returns what was measured."""
    import keras

    import keras_weightmods as kwm
    from benchmarks.lift_step import enable_lora
    from examples.data.prose import load_rows
    from examples.data.word_problems import encode, make_problems
    from examples.finetune_lift import (
        Measure,
        fit_arguments,
        learning_rate_schedule,
        load_model,
    )

    keras.utils.set_random_seed(seed)
    model = load_model()
    tokenizer = model.tokenizer
    rows = {
        split: encode(
            make_problems(split, count, seed if split == "train" else 0),
            tokenizer,
            args.length + 1,
        )
        for split, count in (
            ("train", args.steps * args.batch),
            ("valid", args.held_out),
            ("test", args.held_out),
        )
    }
    (unrelated,) = load_rows(tokenizer, 257, reference=8)
    result = {}
    if method == "full" and seed == 0:
        result["before"] = Measure(model, rows["test"], unrelated)()
    base = model.get_weights()
    schedule = learning_rate_schedule(rate, args.steps)
    callbacks = []
    if method == "LoRA":
        result["lora_rank"] = enable_lora(model, DENSITY)
    if method in ("full", "LoRA"):
        optimizer = keras.optimizers.AdamW(schedule, weight_decay=0.0)
    else:
        optimizer = kwm.SparseAdamW(schedule)
        masks = kwm.PrincipalMaskCallback(
            density=DENSITY,
            filter_rank=args.filter_rank,
            criterion="principal" if method == "LIFT" else method,
            refresh_every=None
            if method == "random"
            else max(1, args.steps // 3),
            seed=seed,
        )
        callbacks.append(masks)
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    clock = make_clock()
    model.fit(
        **fit_arguments(rows["train"]),
        batch_size=args.batch,
        shuffle=False,
        verbose=0,
        callbacks=[*callbacks, clock],
    )
    result["optimizer_bytes"] = harness.nbytes(model.optimizer.variables)
    result["peak_bytes"] = harness.peak_bytes()
    result["seconds_a_step"] = statistics.median(clock.seconds[1:])
    if callbacks:
        file = args.json.with_suffix(".safetensors")
        report = kwm.save_delta(model, base, file)
        result["trained"] = masks.attach(model).totals["trained"]
        result["file_bytes"] = report.nbytes
        result["index_bits"] = report.index_bits
        result["changed"] = report.totals["trained"]
        file.unlink()
    else:
        trained = sum(math.prod(v.shape) for v in model.trainable_variables)
        result["trained"] = trained
        result["file_bytes"] = 2 * trained  # in bfloat16
    del base
    result["valid"] = Measure(model, rows["valid"])()
    result["test"] = Measure(model, rows["test"], unrelated)()
    return result


def make_clock():
    import keras

    class Clock(keras.callbacks.Callback):
        """The seconds from one batch to the next."""

        def on_train_begin(self, logs=None):
            self.seconds, self.began = [], time.perf_counter()

        def on_train_batch_end(self, batch, logs=None):
            now = time.perf_counter()
            self.seconds.append(now - self.began)
            self.began = now

    return Clock()


def best_rate(report, method):
    runs = [
        r for r in report["runs"] if r["method"] == method and r["seed"] == 0
    ]
    return min(runs, key=lambda r: r["valid"]["loss"])["rate"]


def summary(report):
    """For each method the mean and the deviation over seeds, and what differs.

    A difference to LIFT exceeds the spread where it is more than twice its
    standard error.
    """
    found = {}
    for method in METHODS:
        rate = best_rate(report, method)
        runs = [
            r
            for r in report["runs"]
            if r["method"] == method and r["rate"] == rate
        ]
        found[method] = {"rate": rate, "seeds": len(runs)}
        for name in ("solved", "tokens", "loss", "unrelated"):
            values = [r["test"][name] for r in runs]
            found[method][name] = [
                statistics.mean(values),
                statistics.stdev(values) if len(values) > 1 else None,
            ]
        for name in (
            "trained",
            "optimizer_bytes",
            "peak_bytes",
            "seconds_a_step",
            "file_bytes",
        ):
            found[method][name] = statistics.median(r[name] for r in runs)
    for method, name in itertools.product(
        METHODS[:-1], ("solved", "tokens", "loss", "unrelated")
    ):
        (a, s), (b, t) = found["LIFT"][name], found[method][name]
        if s is None or t is None:
            continue
        error = math.sqrt(
            s**2 / found["LIFT"]["seeds"] + t**2 / found[method]["seeds"]
        )
        found[method].setdefault("lift_differs", {})[name] = {
            "difference": a - b,
            "exceeds_spread": abs(a - b) > 2 * error,
        }
    return found


def print_report(report):
    setting, found = report["setting"], report["summary"]
    table = harness.table(
        f"SmolLM2-135M, {setting['steps']} steps of {setting['batch']} "
        f"problems, {setting['backend']}",
        text=["method"],
        numbers=(
            "rate",
            "solved",
            "tokens",
            "unrelated",
            "trained",
            "state MB",
            "peak GB",
            "s/step",
            "file MB",
        ),
    )
    before = next(r["before"] for r in report["runs"] if "before" in r)
    table.add_row(
        "before",
        "",
        f"{before['solved']:.1%}",
        f"{before['tokens']:.1%}",
        f"{before['unrelated']:.2f}",
    )
    for method, row in found.items():
        cells = []
        for name, form in (
            ("solved", ".1%"),
            ("tokens", ".1%"),
            ("unrelated", ".2f"),
        ):
            mean, spread = row[name]
            text = format(mean, form)
            if spread is not None:
                text += f" ± {format(spread, form)}"
            cells.append(text)
        table.add_row(
            method,
            f"{row['rate']:g}",
            *cells,
            f"{row['trained']:,}",
            f"{row['optimizer_bytes'] / 1e6:.0f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['seconds_a_step']:.2f}",
            f"{row['file_bytes'] / 1e6:.1f}",
        )
    lines = []
    for method, row in found.items():
        for name, about in row.get("lift_differs", {}).items():
            verb = "exceeds" if about["exceeds_spread"] else "is within"
            lines.append(
                f"LIFT - {method}, {name}: {about['difference']:+.4f}, which "
                f"{verb} the seeds' spread (twice the standard error)"
            )
    harness.print_all(
        table,
        *lines,
        f"± standard deviation over {found['LIFT']['seeds']} seeds",
        harness.describe(report),
    )


if __name__ == "__main__":
    main()
