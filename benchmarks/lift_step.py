"""What a whole train step costs with LIFT, next to keras AdamW and to LoRA.

    python -m benchmarks.lift_step
    python -m benchmarks.lift_step --backends torch --steps 10 --json FILE

Steps: forward, backward and update of a Llama with the shapes of SmolLM2-135M,
through `train_on_batch`, one process for each backend. AdamW trains all
weights; LIFT is `SparseAdamW` under `PrincipalMaskCallback(density=0.05)`. The
two take turns. The ratio is that of the medians. A refresh is timed apart, and
counted at its share of one in 200 steps.

Memory: the peak of a process that does nothing but a few such steps: with
AdamW, with LIFT, and with LoRA (AdamW) of about as many trained numbers.

Times and peaks are only good on a machine that does nothing else.
"""

import argparse
import functools
import math
import statistics

from benchmarks import harness

METHODS = ("AdamW", "LIFT", "LoRA")
DENSITY, REFRESH_EVERY = 0.05, 200
STEP_BAR, STATE_BAR = 1.10, 0.085
SHAPES = harness.SMOLLM2_135M


def main():
    args = parse_arguments()
    about = {
        "model": SHAPES,
        "batch": [args.batch, args.length],
        "dtype": "float32",
    }
    harness.compare_backends(args, measure, about, print_report)


def parse_arguments():
    parser = harness.parser_of_workers(__doc__, "lift_step.json")
    parser.add_argument(
        "--part", choices=("both", "steps", "memory"), default="both"
    )
    parser.add_argument("--steps", type=int, default=12, help="of each")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--memory", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1: {args.steps}")
    return args


def measure(args):
    if args.memory:
        return measure_memory(args)
    result = {}
    if args.part != "steps":
        # The peak of a process that does nothing else.
        result["memory"] = {
            method: harness.run_worker(args.worker, f"--memory={method}")
            for method in METHODS
        }
    if args.part != "memory":
        result |= measure_steps(args)
    return result


def measure_steps(args):
    made = {name: make(name) for name in METHODS[:2]}
    models = {name: model for name, (model, _) in made.items()}
    callback = made["LIFT"][1]
    batch = harness.token_batch(
        SHAPES["vocabulary_size"], args.batch, args.length
    )
    seconds = harness.take_turns(
        {
            name: functools.partial(harness.timed_step, model, *batch)
            for name, model in models.items()
        },
        args.steps + 1,
        args.worker,
    )
    # The first step of each compiles.
    medians = {k: statistics.median(v[1:]) for k, v in seconds.items()}
    seconds_of_refresh = min(
        harness.seconds_of(refresh, callback, models["LIFT"]) for _ in range(2)
    )
    per_step = medians["LIFT"] + seconds_of_refresh / REFRESH_EVERY
    state = {
        name: harness.nbytes(model.optimizer.variables)
        for name, model in models.items()
    }
    masked = models["LIFT"].optimizer.masked_variables
    return {
        "versions": harness.versions("keras-hub"),
        "parameters": models["AdamW"].count_params(),
        "trained": callback.attach(models["LIFT"]).totals["trained"],
        "seconds": seconds,
        "medians": medians,
        "refresh": seconds_of_refresh,
        "ratio": medians["LIFT"] / medians["AdamW"],
        "ratio_with_refresh": per_step / medians["AdamW"],
        "state_bytes": state,
        "state_ratio": state["LIFT"] / state["AdamW"],
        "state_ratio_of_kernels": state["LIFT"]
        / (8 * sum(math.prod(v.shape) for v in masked)),
    }


def refresh(callback, model):
    """A refresh as the callback does it, of a model that it is attached to."""
    callback.set_model(model)
    callback._look()
    callback._refresh()
    harness.wait_for(model)


def measure_memory(args):
    model, callback = make(args.memory)
    batch = harness.token_batch(
        SHAPES["vocabulary_size"], args.batch, args.length
    )
    for _ in range(3):
        harness.timed_step(model, *batch)
    trained = sum(math.prod(v.shape) for v in model.trainable_variables)
    if callback is not None:
        trained = callback.attach(model).totals["trained"]
    return {
        "peak_bytes": harness.peak_bytes(),
        "state_bytes": harness.nbytes(model.optimizer.variables),
        "trained": trained,
    }


def make(method):
    """Return a compiled model, and LIFT's callback."""
    import keras

    import keras_weightmods as kwm

    keras.utils.set_random_seed(0)
    model = harness.make_llm(**SHAPES)
    if method == "LoRA":
        enable_lora(model, DENSITY)
    model.compile(
        optimizer=kwm.SparseAdamW(1e-4)
        if method == "LIFT"
        else keras.optimizers.AdamW(1e-4),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    if method != "LIFT":
        return model, None
    callback = kwm.PrincipalMaskCallback(
        density=DENSITY, refresh_every=REFRESH_EVERY, seed=0
    )
    callback.attach(model)
    return model, callback


def enable_lora(model, density, rank_stabilized=False):
    """LoRA on all kernels, of the rank with the nearest count of numbers.

    Args:
        model: A built model.
        density: Float, the numbers as a share of the entries of the kernels.
        rank_stabilized: Bool, whether the product is scaled by alpha over the
            root of the rank (rsLoRA, arXiv 2312.03732), and not by alpha over
            the rank; alpha is the rank.

    Returns:
        Int, the rank.
    """
    import keras_weightmods as kwm

    targets = kwm.find_targets(model)
    wanted = density * sum(math.prod(t.shape) for t in targets)
    each = sum(math.prod(t.shape[:-1]) + t.shape[-1] for t in targets)
    rank = max(1, round(wanted / each))
    for target in targets:
        # Keras divides by the rank.
        alpha = rank * math.sqrt(rank) if rank_stabilized else rank
        target.layer.enable_lora(rank, lora_alpha=alpha)
    for variable in model.trainable_variables:
        if not variable.name.startswith("lora_"):
            variable.trainable = False
    return rank


def print_report(report):
    batch = " x ".join(map(str, report["batch"]))
    steps = harness.table(
        f"Whole train step, {batch} tokens, {report['dtype']}",
        text=["backend"],
        numbers=("AdamW", "LIFT", "ratio", "refresh", "state ratio"),
    )
    memory = harness.table(
        "Peak memory",
        text=("backend", "method"),
        numbers=("trained", "state MB", "peak MB", "below AdamW"),
    )
    for backend, result in report["backends"].items():
        if "medians" in result:
            steps.add_row(
                backend,
                f"{result['medians']['AdamW']:.2f} s",
                f"{result['medians']['LIFT']:.2f} s",
                harness.verdict(result["ratio_with_refresh"], STEP_BAR),
                f"{result['refresh']:.1f} s",
                harness.verdict(result["state_ratio"], STATE_BAR),
            )
        rows = result.get("memory", {})
        for method, row in rows.items():
            saved, least = (
                (rows["AdamW"][name] - row[name]) / 1e6
                for name in ("peak_bytes", "state_bytes")
            )
            memory.add_row(
                backend,
                method,
                f"{row['trained']:,}",
                f"{row['state_bytes'] / 1e6:.0f}",
                f"{row['peak_bytes'] / 1e6:.0f}",
                harness.verdict(saved, round(least), ">=", ".0f")
                if method != "AdamW"
                else "",
            )
    harness.print_all(steps, memory, harness.describe(report))


if __name__ == "__main__":
    main()
