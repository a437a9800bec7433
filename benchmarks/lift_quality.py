"""What fine-tuning by LIFT solves, and what it forgets, beside its rivals.

    python -m benchmarks.lift_quality
    python -m benchmarks.lift_quality --report

SmolLM2-135M-Instruct learns word problems from half of the templates of
`reasoning-gym` (examples/data/gsm_symbolic.py), worked answers of several
lines. *Solved* is the share of new problems from these templates that the model
solves by greedy decoding, with all points from the package's own scorer.
*Unseen* is the same for the other half of the templates, for which this
training is too short. In a first run the loss on new problems went from 1.50 to
0.15 in the first half, and from 1.34 to 1.40 in the other. So solved and loss
have the power here. Problems of more than `--length` tokens with their answers
are left out, to save time. *Forgotten* is the rise of the loss on two unrelated
texts, in nats a token, mean of the two.

- full: AdamW on all weights;
- LoRA, rsLoRA: KerasHub's, on all seven projections, at the rank whose count of
  numbers is nearest to 5 % of them. The product is scaled by alpha / rank or
  alpha / sqrt(rank), with alpha = rank;
- random, largest (Super-Tuning, arXiv 2607.09287), smallest, gradient (the
  largest of the loss on the first 16 problems): `SparseAdamW` on a share of
  each projection, chosen once;
- LIFT: principal weights, chosen again in the middle. MLP: in its kernels
  alone, as many in all. LIFT + LoRA: both, of half as many numbers each.

The learning rate of each method is searched on a grid of factor 2, by the loss
on validation problems after full runs, until both neighbors are worse. (Runs of
a third of the steps chose twice the rates, at which all weights solved 17 % and
not 26.) Then each method trains from every seed, for the same number of steps
on the same problems in the same order. Each seed has its own problems, for
training and for the test. If two rates have about the same loss, the lower one
solves more. So half of the rate is tried too, on the first seed, and on all if
it solves more there, and so on. The rate of a method is the one that solved
most, of those with all seeds. Every run has a process of its own and goes into
the JSON file when it is done: a restarted benchmark continues. All takes about
ten hours of one core with bfloat16 instructions. Times are processor times, so
that other processes do not count.
"""

import argparse
import itertools
import math
import statistics
import sys
from collections import defaultdict

from benchmarks import harness
from benchmarks.compander_quality import search
from benchmarks.lift_tuning import METHODS, TEXTS, Worker

BASES = ("full", "LoRA", "random 5 %")
# Name and, for the table, form and factor. Noise of the first two is that of
# the problems drawn, and so about the same for all methods.
MEASURES = {
    "solved": (".1f", 100),
    "unseen": (".1f", 100),
    "loss": (".3f", 1),
    "unseen_loss": (".3f", 1),
    "forgotten": (".3f", 1),
}
POOLED = ("solved", "unseen")
DIFFERENCES = ("solved", "loss", "forgotten")
COSTS = (
    *("trained", "optimizer_bytes", "peak_bytes"),
    *("stored", "file_bytes"),
)
# What the runs of a file have in common.
SETTING = (
    *("backend", "dtype", "steps", "search_steps", "batch", "length"),
    *("valid", "test", "unseen", "text_rows"),
)
# The seed of the search. No other run draws problems with it.
SEARCH_SEED = 100
PLOT = harness.ROOT / "docs" / "lift_quality.png"


def main():
    args = parse_arguments()
    if args.worker:
        name, rate, seed, kind = args.worker.split(",")
        worker = Worker(args, int(seed))
        found = worker(
            METHODS.get(name),
            float(rate),
            kind == "search",
        )
        harness.write_json(args.json, found)
        return
    report = harness.read_json(args.json) if args.report else run(args)
    if report is None:
        raise SystemExit(f"there is no {args.json}: run without --report")
    if args.report:
        draw(report).figure.savefig(args.plot, dpi=150)
    print_report(report)


def parse_arguments():
    parser = harness.make_parser(__doc__)
    harness.add_backend(parser, "torch")
    parser.add_argument("--dtype", default="mixed_bfloat16")
    parser.add_argument(
        "--methods", type=harness.subset(METHODS), default=list(METHODS)
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--search-steps", type=int, default=96)
    parser.add_argument("--batch", type=int, default=4, help="problems")
    parser.add_argument("--length", type=int, default=128, help="tokens")
    parser.add_argument(
        "--valid", type=int, default=64, help="problems to take a loss on"
    )
    parser.add_argument(
        "--test", type=int, default=500, help="problems of each seed"
    )
    parser.add_argument(
        "--unseen", type=int, default=100, help="of other templates"
    )
    parser.add_argument(
        "--text-rows", type=int, default=8, help="of 256 tokens, of each text"
    )
    harness.add_json(parser, "lift_quality.json")
    parser.add_argument(
        "--report", action="store_true", help="only print and draw the JSON"
    )
    parser.add_argument("--plot", default=PLOT)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def run(args):
    """Search and train what is not in the file yet; return the report."""
    report = resume(args)
    for seed in range(args.seeds):
        measured(args, report, "before", 0.0, seed, "final")
    for name in args.methods:
        rate = best_rate(args, report, name)

        def solved(rate, count=args.seeds, name=name):
            runs = [
                measured(args, report, name, rate, seed, "final")
                for seed in range(count)
            ]
            return [run["solved"] for run in runs]

        best = solved(rate)
        while solved(rate := rate / 2, count=1)[0] > best[0]:
            lower = solved(rate)
            if sum(lower) <= sum(best):
                break
            best = lower
    return report


def best_rate(args, report, name):
    def value(rate):
        run = measured(args, report, name, rate, SEARCH_SEED, "search")
        return -run["valid"]

    chosen, _ = search(value, [("rate", METHODS[name].rate, 2)])
    return chosen["rate"]


def resume(args):
    setting = {name: getattr(args, name) for name in SETTING}
    report = harness.read_json(args.json)
    if report is None:
        return {"machine": harness.machine(), "setting": setting, "runs": []}
    if report["setting"] != setting:
        raise SystemExit(
            f"{args.json} holds runs of another setting, {report['setting']}: "
            "remove it, or name another file"
        )
    return report


def measured(args, report, name, rate, seed, kind):
    """Return a run of the report, which is made if it is not there."""
    key = {"method": name, "rate": rate, "seed": seed, "kind": kind}
    for each in report["runs"]:
        if key.items() <= each.items():
            return each
    print(", ".join(map(str, key.values())), file=sys.stderr, flush=True)
    worker = f"--worker={name},{rate},{seed},{kind}"
    found = harness.run_worker(args.backend, worker)
    # A file may be gone on with on another machine.
    report["runs"].append({**key, **found, "cpu": harness.cpu()})
    harness.write_json(args.json, report)
    return report["runs"][-1]


def summary(report):
    """Return of each method its runs' measures and costs.

    Returns:
        Dict from names, with the rate where it is not the method's own (see
        above), to dicts: `rate`, `tried` (the number of rates of the search),
        `seeds`, a list of each measure, one number a seed, and medians of
        what it costs.
    """
    runs = report["runs"]
    before = {r["seed"]: r for r in runs if r["method"] == "before"}
    found: dict = {}
    for name in ("before", *METHODS):
        own = [r for r in runs if r["method"] == name]
        tried = [r for r in own if r["kind"] == "search"]
        finals = defaultdict(list)
        for each in own:
            if each["kind"] == "final":
                finals[each["rate"]].append(each)
        # Without a search nothing says that the rate is a good one.
        best = min(tried, key=lambda r: r["valid"], default={"rate": 0.0})
        if best["rate"] not in finals:
            continue
        # Others only with three seeds, or as many.
        least = min(3, len(finals[best["rate"]]))
        finals = {
            r: found for r, found in finals.items() if len(found) >= least
        }
        chosen = max(
            finals,
            key=lambda r: statistics.mean(each["solved"] for each in finals[r]),
        )
        for rate in sorted(finals, key=lambda rate: (rate != chosen, rate)):
            final = sorted(finals[rate], key=lambda r: r["seed"])
            for each in final:
                each["forgotten"] = statistics.mean(
                    each[text] - before[each["seed"]][text] for text in TEXTS
                )
            row = {"rate": rate, "tried": len(tried)}
            row["seeds"] = [r["seed"] for r in final]
            row |= {m: [r[m] for r in final] for m in MEASURES}
            if name != "before":
                row |= {
                    c: statistics.median(r[c] for r in final) for c in COSTS
                }
                row["step"] = step_of(report, final)
            found[f"{name}, at {rate:.2g}" if rate != chosen else name] = row
    return found


def step_of(report, runs):
    """Return the median of a step on the report's machine; None elsewhere."""
    machine = report["machine"]["cpu"]
    steps = [r["step"] for r in runs if r.get("cpu", machine) == machine]
    return statistics.median(steps) if steps else None


def tried_once(report, found):
    """Return what was solved at rates that some seeds alone were trained with.

    Returns:
        List of tuples: a name, a rate, and the shares solved with the first
        seed at this rate and at the method's own.
    """
    rows = {
        (row["rate"], name.split(", at ")[0]) for name, row in found.items()
    }
    return [
        (run["method"], run["rate"], run["solved"], own["solved"][0])
        for run in report["runs"]
        if run["kind"] == "final"
        and (own := found.get(run["method"]))
        and run["seed"] == own["seeds"][0]
        and (run["rate"], run["method"]) not in rows
    ]


def effects(found, base, measure):
    """Return the differences to a base, paired by seed, with 95 % intervals.

    If the noise is about the same for all methods (`POOLED`), it is the
    residual of a linear model of methods and seeds, which may lack seeds of a
    method. Otherwise it comes from the seeds of the pair alone, at least two.

    Returns:
        Dict from names of methods to triples: mean, low, high.
    """
    values = {
        name: dict(zip(row["seeds"], row[measure]))
        for name, row in found.items()
        if name != "before"
    }
    if base not in values:
        return {}
    if measure in POOLED and len(values) > 2:
        return pooled_effects(values, base)
    differences = {}
    for name, own in values.items():
        shared = own.keys() & values[base].keys()
        if name != base and len(shared) > 1:
            less = [own[seed] - values[base][seed] for seed in shared]
            differences[name] = harness.interval(less)
    return differences


def pooled_effects(values, base):
    """Do the same as `effects` by least squares, for dicts from seeds to
    values."""
    import numpy as np
    from scipy import stats

    names, seeds = list(values), sorted(set().union(*values.values()))
    design, observed = [], []
    for name, own in values.items():
        for seed, value in own.items():
            row = [float(name == each) for each in names]
            design.append(row + [float(seed == each) for each in seeds[1:]])
            observed.append(value)
    matrix = np.array(design)
    found, _, rank, _ = np.linalg.lstsq(matrix, np.array(observed))
    free = len(observed) - rank
    if free < 1:
        return {}
    rest = observed - matrix @ found
    covariance = rest @ rest / free * np.linalg.pinv(matrix.T @ matrix)
    differences = {}
    for place, name in enumerate(names):
        if name != base:
            less = np.zeros(matrix.shape[1])
            less[place], less[names.index(base)] = 1, -1
            mean = less @ found
            error = math.sqrt(less @ covariance @ less)
            half = stats.t.ppf(0.975, free) * error
            differences[name] = tuple(
                float(value) for value in (mean, mean - half, mean + half)
            )
    return differences


def own_rates(found):
    """Return the rows of the methods at their own rates."""
    return {name: row for name, row in found.items() if name in METHODS}


def front(found):
    """Return the methods that none other beats in solved and forgotten."""
    points = {
        name: (
            -statistics.mean(row["solved"]),
            statistics.mean(row["forgotten"]),
        )
        for name, row in own_rates(found).items()
    }
    return [
        name
        for name, point in points.items()
        if not any(
            other != point and all(a <= b for a, b in zip(other, point))
            for other in points.values()
        )
    ]


def verdicts(found):
    """Return for each base and measure what is beyond the spread."""
    lines = []
    for base, (measure, more, less) in itertools.product(
        BASES,
        (
            ("solved", "solve more", "solve less"),
            ("loss", "have a higher loss", "have a lower loss"),
            ("forgotten", "forget more", "forget less"),
        ),
    ):
        compared = effects(found, base, measure)
        if not compared:
            continue
        above = [name for name, (_, low, _) in compared.items() if low > 0]
        below = [name for name, (*_, high) in compared.items() if high < 0]
        parts = [
            f"{', '.join(names)} {verb}"
            for names, verb in ((above, more), (below, less))
            if names
        ]
        said = "; ".join(parts) or f"no method differs in {measure}"
        lines.append(f"Beside {base}, beyond the spread: {said}.")
    return lines


def draw(report, ax=None):
    """Return the axes of solved against forgotten, at the methods' own rates.

    The front is a line.
    """
    from keras_weightmods.plot import style

    found = summary(report)
    ax = style.new_axes(ax, width=6.4, height=4.2)
    points = {}
    for name, row in own_rates(found).items():
        solved = [100 * value for value in row["solved"]]
        x, y = statistics.mean(row["forgotten"]), statistics.mean(solved)
        points[name] = x, y
        spread = [
            statistics.stdev(values) if len(values) > 1 else 0
            for values in (row["forgotten"], solved)
        ]
        color = color_of(name)
        ax.errorbar(x, y, spread[1], spread[0], "o", color=color, lw=0.8)
    line = sorted(points[name] for name in front(found))
    ax.plot(*zip(*line), "--", color=style.GRAY, lw=0.8, zorder=0)
    ax.set(xlabel="forgotten, nats a token", ylabel="solved, %")
    ax.margins(x=0.2)  # for the names at both ends
    label(ax, points)
    return ax


def color_of(name):
    from keras_weightmods.plot import style

    return style.COLORS[1 if name.startswith("LIFT") else 0]


def label(ax, points):
    """Write names beside their points, where no name or point is."""
    from matplotlib.transforms import Bbox

    ax.figure.canvas.draw()  # settles where the points are
    pixels = ax.transData.transform([*points.values()])
    # The circles are as wide as the font is high.
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in pixels]
    for name, point in sorted(points.items(), key=lambda each: each[1][1]):
        for y, (x, side) in itertools.product(
            (3, -10, 14, -21), ((4, "left"), (-4, "right"))
        ):
            text = ax.annotate(
                name,
                point,
                (x, y),
                textcoords="offset points",
                fontsize=8,
                ha=side,
                color=color_of(name),
            )
            box = text.get_window_extent()
            # The last place is taken in any case: no point is without a name.
            is_last = (y, side) == (-21, "right")
            if is_last or not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def print_report(report):
    # Not above: the page takes from here what it shows.
    from benchmarks.pages import tuning

    harness.print_all(tuning.lift_quality(report), width=250)


if __name__ == "__main__":
    main()
