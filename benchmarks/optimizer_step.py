"""What a whole train step costs with AdamS, next to keras AdamW.

    python -m benchmarks.optimizer_step
    python -m benchmarks.optimizer_step --backends torch --steps 40 --json FILE

Forward, backward and update of a 30-layer Llama of 107M parameters, through
`train_on_batch`, one process for each backend. The contenders take turns, step
by step and in a rotating order, so that a machine that gets slower or faster
on the way does so for all of them. All decay their weights as AdamW does.

Every 10th step of AdamS sets new masks. The ratio held against the bar counts
it at its share. It is (9 x median of the plain steps + median of the mask
steps) / 10 over the median of AdamW. The first 10 steps are reported apart: the
first compiles, and in all of them l1="auto" measures the gradients.

The times are only good on a machine that does nothing else, above all those of
torch, whose threads wait for each other.
"""

import functools
import math
import statistics

from benchmarks import harness

# Whole step over the same step with keras AdamW; torch's is fused (foreach).
BARS = {"jax": 1.10, "tensorflow": 1.10, "torch": 1.15}
# Optimizer state over Adam's and one bit a sparsified weight.
STATE_BAR = 1.02

MASK_EVERY = 10
SHAPES = {**harness.SMOLLM2_135M, "vocabulary_size": 1024}


def main():
    args = parse_arguments()
    about = {
        "model": SHAPES,
        "batch": [args.batch, args.length],
        "dtype": "float32",
    }
    harness.compare_backends(args, measure, about, print_report)


def parse_arguments():
    parser = harness.parser_of_workers(__doc__, "optimizer_step.json")
    parser.add_argument(
        "--steps",
        type=int,
        default=2 * MASK_EVERY,
        help=f"after one to warm up; at least {MASK_EVERY + 1}",
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    args = parser.parse_args()
    if args.steps <= MASK_EVERY:
        parser.error(f"--steps must be above {MASK_EVERY}: {args.steps}")
    return args


def measure(args):
    models = make_models()
    x, y = harness.token_batch(
        SHAPES["vocabulary_size"], args.batch, args.length
    )
    seconds = harness.take_turns(
        {
            name: functools.partial(harness.timed_step, model, x, y)
            for name, model in models.items()
        },
        args.steps + 1,
        args.worker,
    )
    times = {
        name: summary(values, masks=name != "AdamW")
        for name, values in seconds.items()
    }
    state = {
        name: harness.nbytes(model.optimizer.variables)
        for name, model in models.items()
    }
    rows = [
        {
            "optimizer": name,
            **times[name],
            "ratio": times[name]["per_step"] / times["AdamW"]["per_step"],
            "state_bytes": state[name],
            "state_ratio": state[name] / (state["AdamW"] + mask_bytes(model)),
        }
        for name, model in models.items()
    ]
    return {
        "versions": harness.versions("keras-hub"),
        "parameters": models["AdamW"].count_params(),
        "sparsified": int(8 * mask_bytes(models["AdamS relative"])),
        "peak_memory_gb": harness.peak_bytes() / 1e9,
        "rows": rows,
        "seconds": seconds,
    }


def make_models():
    """Return {name: model}, equal but for the optimizer."""
    import keras

    optimizers = {
        "AdamW": lambda model: keras.optimizers.AdamW(1e-3),
        "AdamS published": functools.partial(make_adam_s, decay="published"),
        "AdamS relative": functools.partial(make_adam_s, decay="relative"),
    }
    models = {}
    for name, make_optimizer in optimizers.items():
        keras.utils.set_random_seed(0)
        models[name] = harness.make_llm(**SHAPES)
        models[name].compile(
            make_optimizer(models[name]),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
    return models


def make_adam_s(model, decay):
    import keras

    import keras_weightmods as kwm

    return kwm.AdamS(
        1e-3,
        total_steps=10_000,
        targets=model,
        decay=decay,
        mask_every=MASK_EVERY,
        weight_decay=keras.optimizers.AdamW().weight_decay,
    )


def summary(seconds, masks):
    """Return medians from step 10 on; masks are set at steps 0, 10, 20, ..."""
    first, steady = seconds[1:MASK_EVERY], seconds[MASK_EVERY:]
    at_masks = None
    plain = step = statistics.median(steady)
    if masks:
        at_masks = statistics.median(steady[::MASK_EVERY])
        plain = statistics.median(
            s for i, s in enumerate(steady) if i % MASK_EVERY
        )
        step = plain + (at_masks - plain) / MASK_EVERY
    return {
        "first_steps": statistics.median(first),
        "plain_step": plain,
        "mask_step": at_masks,
        "per_step": step,
    }


def mask_bytes(model):
    """One bit for each sparsified weight; none with AdamW."""
    kernels = getattr(model.optimizer, "sparsified", [])
    return sum(math.prod(v.shape) for v in kernels) / 8


def print_report(report):
    batch = " x ".join(map(str, report["batch"]))
    table = harness.table(
        f"Whole train step, {batch} tokens, {report['dtype']}",
        text=("backend", "optimizer"),
        numbers=("first", "step", "mask", "ratio", "MB", "excess"),
    )
    lines = []
    for backend, result in report["backends"].items():
        for row in result["rows"]:
            mask, ratio, excess = "", "1", ""
            if row["mask_step"] is not None:
                mask = f"{row['mask_step']:.2f}"
                ratio = harness.verdict(row["ratio"], BARS[backend])
                excess = harness.verdict(row["state_ratio"], STATE_BAR)
            table.add_row(
                backend,
                row["optimizer"],
                f"{row['first_steps']:.2f}",
                f"{row['plain_step']:.2f}",
                mask,
                ratio,
                f"{row['state_bytes'] / 1e6:.0f}",
                excess,
            )
        table.add_section()
        lines.append(
            f"{backend}: {result['parameters']:,} parameters, "
            f"{result['sparsified']:,} sparsified; peak "
            f"{result['peak_memory_gb']:.1f} GB"
        )
    harness.print_all(
        table,
        "first: median seconds of steps 1 to 9; step: later; mask: every "
        "10th, which sets new masks and counts so in the ratio to AdamW; MB: "
        "optimizer state; excess: it over Adam's and one bit a sparsified "
        "weight",
        harness.describe(report),
        f"Llama: {report['model']}",
        *lines,
        width=100,
    )


if __name__ == "__main__":
    main()
