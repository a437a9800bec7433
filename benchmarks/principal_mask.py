"""How near the fast selections of LIFT come to the exact rule, and how fast.

    python -m benchmarks.principal_mask
    python -m benchmarks.principal_mask --backends torch --part agreement

Agreement is the share of the exact rule's entries (the whole SVD, 5 % of the
matrix) that the default of `principal_mask` finds. It is measured on every
matrix of SmolLM2-135M, at filter ranks 32 and 128. Beside it are the shares of
the usual randomized SVD (2 power iterations, 10 more vectors than the rank) and
of plain magnitudes.

Time is that of one selection in a 4096 x 4096 matrix at filter rank 128. Its
entries are independent and normal, so its spectrum is flatter than that of any
trained matrix. The default takes turns with the exact SVD, after a first fast
one that compiles.
"""

import statistics

from benchmarks import harness

RANKS = (32, 128)
DENSITY = 0.05
SIDE, TIMED_RANK = 4096, 128

AGREEMENT_BAR = 0.98
SPEED_BAR = 10.0


def main():
    args = parse_arguments()
    harness.compare_backends(args, measure, {"density": DENSITY}, print_report)


def parse_arguments():
    parser = harness.parser_of_workers(__doc__, "principal_mask.json")
    parser.add_argument(
        "--part", choices=("both", "agreement", "time"), default="both"
    )
    parser.add_argument("--matrices", type=int, help="only the first so many")
    parser.add_argument("--repeats", type=int, default=1, help="of the timing")
    return parser.parse_args()


def measure(args):
    result = {"versions": harness.versions()}
    if args.part != "time":
        result["agreement"] = measure_agreement(args)
    if args.part != "agreement":
        result["time"] = measure_time(args.repeats)
    return result


def measure_agreement(args):
    from keras import ops
    from rich.progress import track

    import keras_weightmods as kwm
    from examples.data.smollm2 import load_smollm2
    from keras_weightmods.utils.matrix import to_matrix

    targets = kwm.find_targets(load_smollm2(dtype="float32"))
    rows = []
    for target in track(targets[: args.matrices], description=args.worker):
        axes = target.contraction_axes
        matrix = ops.convert_to_numpy(to_matrix(target.variable, axes))
        magnitudes = select(matrix, criterion="magnitude")
        for rank in RANKS:
            exact = select(matrix, filter_rank=rank, method="exact")
            shares = {
                "default": select(matrix, filter_rank=rank),
                "randomized": randomized(matrix, rank),
                "magnitude": magnitudes,
            }
            rows.append(
                {
                    "path": target.path,
                    "shape": matrix.shape,
                    "rank": rank,
                    **{
                        name: float((mask & exact).sum() / exact.sum())
                        for name, mask in shares.items()
                    },
                }
            )
    return rows


def select(matrix, **arguments):
    from keras import ops

    from keras_weightmods.ops import principal_mask

    mask = principal_mask(matrix, density=DENSITY, **arguments)
    return ops.convert_to_numpy(mask)


def randomized(matrix, rank, iterations=2, oversampling=10):
    """The mask by a randomized SVD with a library's usual settings."""
    import numpy as np

    random = np.random.default_rng(0)
    size = (matrix.shape[1], rank + oversampling)
    y = matrix @ random.normal(size=size).astype("float32")
    for _ in range(iterations):
        y = matrix @ (matrix.T @ np.linalg.qr(y)[0])
    basis = np.linalg.qr(y)[0]
    u, s, vh = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    near = np.abs(basis @ (u[:, :rank] * s[:rank]) @ vh[:rank])
    count = round(DENSITY * matrix.size)
    return near >= np.partition(near.reshape(-1), -count)[-count]


def measure_time(repeats):
    import numpy as np
    from keras import ops

    matrix = ops.convert_to_tensor(
        np.random.default_rng(0).normal(size=(SIDE, SIDE)).astype("float32")
    )
    select(matrix, filter_rank=TIMED_RANK)
    masks = {}

    def timed(method):
        def call():
            masks[method] = select(
                matrix, filter_rank=TIMED_RANK, method=method
            )

        return lambda: harness.seconds_of(call)

    methods = ("auto", "exact")
    seconds = harness.take_turns({m: timed(m) for m in methods}, repeats)
    both = (masks["auto"] & masks["exact"]).sum()
    return {
        "seconds": seconds,
        "ratio": statistics.median(seconds["exact"])
        / statistics.median(seconds["auto"]),
        "share": float(both / masks["exact"].sum()),
    }


def print_report(report):
    table = harness.table(
        f"Share of the exact {DENSITY:.0%} mask, SmolLM2-135M",
        text=("backend", "rank"),
        numbers=("matrices", "least", "median", "randomized", "magnitude"),
    )
    lines = []
    for backend, result in report["backends"].items():
        for rank in RANKS:
            rows = [r for r in result.get("agreement", []) if r["rank"] == rank]
            if not rows:
                continue
            least = min(row["default"] for row in rows)
            medians = [
                statistics.median(row[name] for row in rows)
                for name in ("default", "randomized", "magnitude")
            ]
            table.add_row(
                backend,
                str(rank),
                str(len(rows)),
                harness.verdict(least, AGREEMENT_BAR, ">=", ".4f"),
                *(f"{value:.4f}" for value in medians),
            )
        if timed := result.get("time"):
            exact, fast = (
                statistics.median(timed["seconds"][name])
                for name in ("exact", "auto")
            )
            ratio = harness.verdict(timed["ratio"], SPEED_BAR, ">=", ".1f")
            lines.append(
                f"{backend}, {SIDE} x {SIDE}, rank {TIMED_RANK}: exact "
                f"{exact:.1f} s, default {fast:.2f} s, ratio {ratio}, share "
                f"{timed['share']:.4f}"
            )
    harness.print_all(table, *lines, harness.describe(report))


if __name__ == "__main__":
    main()
