"""How fast a signature goes onto a model of 500 MB, and off it.

    python -m benchmarks.signature_apply
    python -m benchmarks.signature_apply --backends torch --dtype bfloat16

Two signatures: one of an eighth of the weights, the shallowest, as the paper's
is, and one of all of them, the worst case. Side by side, in turns, `np.copyto`
of the whole model between arrays that exist. The measure is the copy's time
over the call's; the bar is a quarter. Applying reads and checks the model,
keeps the clean tensors, computes the new ones, checks them and writes them;
removing compares every bit with what was written first. One process for each
backend.
"""

import functools
import statistics

from benchmarks import harness

BAR = 0.25


def main():
    args = parse_arguments()
    about = {
        "dtype": args.dtype,
        "megabytes": args.megabytes,
        "scale": args.scale,
        "bar": BAR,
    }
    harness.compare_backends(args, measure, about, print_report)


def parse_arguments():
    parser = harness.parser_of_workers(__doc__, "signature_apply.json")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--scale", type=float, default=1.0, help="of the patch")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def measure(args):
    import numpy as np

    model, whole = make_model_and_signature(args)
    signatures = {"eighth": whole.truncate(1), "all": whole}
    source = [np.array(w) for w in model.get_weights()]
    target = [np.empty_like(w) for w in source]
    for a in target:
        a.fill(0)

    def copy():
        for a, b in zip(target, source):
            np.copyto(a, b)

    def apply(name):
        signatures[name].apply(model, args.scale)
        harness.wait_for(model)

    def remove(name):
        signatures[name].remove(model)
        harness.wait_for(model)

    calls = {
        "copyto": copy,
        **{
            f"{call.__name__} {name}": functools.partial(call, name)
            for name in signatures
            for call in (apply, remove)
        },
    }
    seconds = harness.take_turns(
        {k: functools.partial(harness.seconds_of, c) for k, c in calls.items()},
        args.rounds + 1,
        rotate=False,  # what is removed must have been applied
    )
    for a, b in zip(model.get_weights(), source):
        if a.tobytes() != b.tobytes():
            raise SystemExit("the clean model did not come back")
    # The first round touches the memory for the first time.
    steady = {name: values[1:] for name, values in seconds.items()}
    copied = statistics.median(steady["copyto"])
    size = sum(a.nbytes for a in source)
    return {
        "versions": harness.versions("numpy"),
        "shapes": [list(a.shape) for a in source],
        "bytes": size,
        "copy_gigabytes_per_second": size / copied / 1e9,
        "median_seconds": {
            name: statistics.median(values) for name, values in steady.items()
        },
        # Each round's own ratio: neighbours on the machine come and go.
        "ratio": {
            name: statistics.median(
                c / t for c, t in zip(steady["copyto"], steady[name])
            )
            for name in calls
            if name != "copyto"
        },
        "seconds": seconds,
    }


def make_model_and_signature(args):
    """Eight square Dense layers, and a signature that covers all of them."""
    import keras
    import numpy as np

    import keras_weightmods as kwm

    itemsize = 2 if args.dtype != "float32" else 4
    width = int((args.megabytes * 1e6 / itemsize / 8) ** 0.5)
    model = keras.Sequential(
        [
            keras.Input((width,)),
            *(
                keras.layers.Dense(
                    width,
                    dtype=args.dtype,
                    kernel_initializer=keras.initializers.RandomUniform(
                        -0.1, 0.1, seed=seed
                    ),
                )
                for seed in range(8)
            ),
        ]
    )
    rng = np.random.default_rng(0)
    clean = model.get_weights()
    robust = [
        (w.astype("float32") + rng.random(w.shape, "float32") / 100).astype(
            w.dtype
        )
        for w in clean
    ]
    signature = kwm.WeightSignature.extract(
        None, clean, robust, targets="", like=model
    )
    return model, signature


def print_report(report):
    names = list(next(iter(report["backends"].values()))["ratio"])
    table = harness.table(
        f"On a model of {report['megabytes']} MB, {report['dtype']}: "
        f"seconds, and np.copyto's over it; bar: {report['bar']}",
        text=["backend"],
        numbers=("copyto GB/s", *names),
    )
    for backend, result in report["backends"].items():
        ratios = {
            name: harness.verdict(ratio, BAR, ">=", ".2f", show_bar=False)
            for name, ratio in result["ratio"].items()
        }
        table.add_row(
            backend,
            f"{result['copy_gigabytes_per_second']:.1f}",
            *(
                f"{result['median_seconds'][name]:.3f}\n{ratios[name]}"
                for name in names
            ),
        )
    harness.print_all(table, harness.describe(report))


if __name__ == "__main__":
    main()
