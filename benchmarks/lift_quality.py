"""What fine-tuning by LIFT solves, and what it forgets, beside its rivals.

    python -m benchmarks.lift_quality
    python -m benchmarks.lift_quality --report

SmolLM2-135M-Instruct learns word problems from half of the templates of
`reasoning-gym` (examples/data/gsm_symbolic.py), worked answers of several
lines. *Solved* is the share of new problems from these templates whose result,
as the model writes it by greedy decoding, gets all points of the package's own
scorer; *unseen* is that of the other half of the templates, which a model of
this size next to never solves after a short training: solved and the losses
are what has power here. Problems and answers above `--length` tokens are left
out. *Forgotten* is the rise of the loss on two unrelated texts, in nats a
token, mean of the two.

- full: AdamW on all weights;
- LoRA, rsLoRA: KerasHub's, on all seven projections, at the rank whose count
  of numbers is nearest to 5 % of them, the product scaled by alpha / rank and
  by alpha / sqrt(rank), with alpha = rank;
- random, largest (Super-Tuning, arXiv 2607.09287), smallest: `SparseAdamW` on
  a share of each projection, chosen once;
- LIFT: principal weights, chosen again in the middle. MLP: in its kernels
  alone, as many in all.

The learning rate of each method is searched on a grid of factor 2, by the loss
on validation problems after short runs, from a start to where both neighbors
are worse. Then each is trained from every seed, for as many steps on the same
problems in the same order; each seed has its own problems, for training and
for the test. Every run has a process of its own and is in the JSON file when
it is done: started again, the benchmark goes on where it was stopped. Times
are of the processor, so that other processes do not count.
"""

import argparse
import dataclasses
import itertools
import math
import statistics
import sys
import time

from benchmarks import harness
from benchmarks.compander_quality import search


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to fine-tune, and the rate that its search begins at."""

    rate: float
    criterion: str | None = None
    density: float = 0.05
    lora: str | None = None
    targets: str | None = None


METHODS = {
    "full": Method(3.2e-5),
    "LoRA": Method(8e-4, lora="LoRA"),
    "rsLoRA": Method(4e-4, lora="rsLoRA"),
    "random 5 %": Method(8e-4, "random"),
    "largest 1 %": Method(8e-4, "magnitude", 0.01),
    "largest 5 %": Method(8e-4, "magnitude"),
    "smallest 5 %": Method(8e-4, "smallest"),
    "LIFT 1 %": Method(8e-4, "principal", 0.01),
    "LIFT 5 %": Method(8e-4, "principal"),
    "LIFT 5 % MLP": Method(8e-4, "principal", targets="feedforward"),
}
BASES = ("full", "LoRA")
TEXTS = ("reference", "news")
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
COSTS = ("trained", "optimizer_bytes", "peak_bytes", "step", "file_bytes")
# What the runs of a file have in common.
SETTING = (
    *("backend", "dtype", "steps", "search_steps", "batch", "length"),
    *("valid", "test", "unseen", "text_rows"),
)
# Of the search, which no other run draws problems with.
SEARCH_SEED = 100
PLOT = harness.ROOT / "docs" / "lift_quality.png"


def main():
    args = parse_arguments()
    if args.worker:
        name, rate, seed, kind = args.worker.split(",")
        worker = Worker(args, int(seed))
        harness.write_json(args.json, worker(name, float(rate), kind))
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
    parser.add_argument("--search-steps", type=int, default=32)
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
        for seed in range(args.seeds):
            measured(args, report, name, rate, seed, "final")
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
    report["runs"].append({**key, **harness.run_worker(args.backend, worker)})
    harness.write_json(args.json, report)
    return report["runs"][-1]


class Worker:
    """One run, in a process of its own."""

    def __init__(self, args, seed):
        import keras

        from examples.finetune_lift import load_model

        keras.utils.set_random_seed(seed)
        self.args, self.seed = args, seed
        self.model = load_model(dtype=args.dtype)

    def __call__(self, name, rate, kind):
        """Return what was measured."""
        began, result = time.process_time(), {}
        if name != "before":
            result = self.train(METHODS[name], rate, kind == "search")
        if kind == "search":
            # Of another seed, as all methods are searched with one.
            result["valid"] = self.loss(self.problems("valid", self.args.valid))
        else:
            result |= self.test()
        return {**result, "seconds": time.process_time() - began}

    def problems(self, split, count):
        from examples.data.gsm_symbolic import make_problems

        return make_problems(split, count, self.seed, self.is_short)

    def is_short(self, problem):
        from examples.data.word_problems import prompt_of

        text = f"{prompt_of(problem.question)} {problem.answer}"
        # One more for the end; a row has one token more than it has inputs.
        return len(self.model.tokenizer(text)) <= self.args.length

    def rows(self, problems):
        from examples.data.word_problems import encode

        pairs = [(each.question, each.answer) for each in problems]
        return encode(pairs, self.model.tokenizer, self.args.length + 1)

    def train(self, method, rate, is_search):
        import keras

        import keras_weightmods as kwm
        from benchmarks.lift_step import enable_lora
        from examples.finetune_lift import (
            fit_arguments,
            learning_rate_schedule,
        )

        args, model = self.args, self.model
        steps = args.search_steps if is_search else args.steps
        rows = self.rows(self.problems("train", steps * args.batch))
        # As LIFT's authors have them, for all.
        adam = {
            "learning_rate": learning_rate_schedule(rate, steps),
            "weight_decay": 0.0,
            "beta_2": 0.95,
            "epsilon": 1e-6,
        }
        callbacks, result = [make_clock()], {}
        if method.lora:
            rank = enable_lora(model, method.density, method.lora == "rsLoRA")
            result["lora_rank"] = rank
        optimizer = keras.optimizers.AdamW
        if method.criterion:
            optimizer = kwm.SparseAdamW
        model.compile(
            optimizer=optimizer(**adam),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        if method.criterion:
            callbacks.append(make_masks(model, method, steps, self.seed))
        model.fit(
            **fit_arguments(rows),
            batch_size=args.batch,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
        )
        if is_search:
            return result
        result["optimizer_bytes"] = harness.nbytes(model.optimizer.variables)
        result["peak_bytes"] = harness.peak_bytes()
        result["step"] = statistics.median(callbacks[0].seconds[1:])
        return result | self.store(method)

    def store(self, method):
        """Return the bytes of a file of the change; LoRA is merged then."""
        import keras
        from safetensors.numpy import save

        import keras_weightmods as kwm
        from examples.finetune_lift import load_model

        model = self.model
        trained = model.trainable_variables
        if method.lora:
            factors = {
                str(place): keras.ops.convert_to_numpy(v).astype("float16")
                for place, v in enumerate(trained)
            }
            kwm.merge_lora(model)
            count = sum(factor.size for factor in factors.values())
            return {"trained": count, "file_bytes": len(save(factors))}
        count = sum(math.prod(v.shape) for v in trained)
        if method.criterion:
            optimizer = model.optimizer
            count = sum(
                len(optimizer.indices_of(v)) for v in optimizer.masked_variables
            )
        file = self.args.json.with_suffix(".safetensors")
        base = load_model(dtype=self.args.dtype)
        report = kwm.save_delta(model, base, file, verbose=0)
        file.unlink()
        return {"trained": count, "file_bytes": report.nbytes}

    def test(self):
        """Return all that is measured on a model that is trained."""
        import keras_weightmods as kwm
        from examples.data.prose import load_rows

        args, model, found = self.args, self.model, {}
        for name, split in (("", "test"), ("unseen_", "unseen")):
            problems = self.problems(split, getattr(args, split))
            found[f"{name}loss"] = self.loss(problems[: args.valid])
            found[name.strip("_") or "solved"] = self.solved(problems)
        perplexity = kwm.Perplexity(model, batch_size=4)
        texts = load_rows(
            model.tokenizer, 257, **dict.fromkeys(TEXTS, args.text_rows)
        )
        for name, rows in zip(TEXTS, texts):
            found[name] = math.log(perplexity(rows, name, verbose=0))
        return found

    def loss(self, problems):
        from examples.finetune_lift import Measure

        return Measure(self.model, self.rows(problems))()["loss"]

    def solved(self, problems, size=64):
        """Return the share of problems that the model solves by itself."""
        import numpy as np

        import keras_weightmods as kwm
        from examples.data.gsm_symbolic import is_solved
        from examples.data.word_problems import prompt_of

        model = self.model
        tokenizer, end = model.tokenizer, model.tokenizer.end_token_id
        model.compile(sampler="greedy")
        kwm.compile_generate(model)
        prompts = [tokenizer(prompt_of(each.question)) for each in problems]
        # Prompts of like lengths together: less is done one token a time.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        solved = 0
        for start in range(0, len(order), size):
            part = order[start : start + size]
            tokens = np.full((len(part), self.args.length), end, "int32")
            mask = np.zeros(tokens.shape, bool)
            for row, place in enumerate(part):
                tokens[row, : len(prompts[place])] = prompts[place]
                mask[row, : len(prompts[place])] = True
            out = model.generate(
                {"token_ids": tokens, "padding_mask": mask},
                stop_token_ids=[end],
            )
            written = np.array(out["token_ids"])
            for row, place in enumerate(part):
                text = written[row, len(prompts[place]) :]
                ends = np.flatnonzero(text == end)
                text = text[: ends[0]] if len(ends) else text
                text = tokenizer.detokenize([int(i) for i in text])
                solved += is_solved(str(text), problems[place])
        kwm.uncompile_generate(model)
        return solved / len(problems)


def make_masks(model, method, steps, seed):
    """Return the callback, attached to the model."""
    import keras

    import keras_weightmods as kwm

    targets = all_targets = kwm.find_targets(model)
    density = method.density
    if method.targets:
        targets = kwm.find_targets(model, include=method.targets)
        # As many in all as in all kernels.
        density *= entries(all_targets) / entries(targets)
    smallest = method.criterion == "smallest"
    masks = kwm.PrincipalMaskCallback(
        density=density,
        criterion="magnitude" if smallest else method.criterion,
        refresh_every=-(-steps // 2)
        if method.criterion == "principal"
        else None,
        targets=targets,
        seed=seed,
    )
    masks.attach(model)
    if smallest:
        optimizer = model.optimizer
        optimizer.set_masks(
            (
                smallest_entries(
                    keras.ops.convert_to_numpy(variable),
                    len(optimizer.indices_of(variable)),
                )
                for variable in optimizer.masked_variables
            ),
            0,
        )
    return masks


def entries(targets):
    return sum(math.prod(target.shape) for target in targets)


def smallest_entries(kernel, count):
    """Return the places of the smallest |w| in a flattened kernel, rising."""
    import numpy as np

    places = np.argpartition(np.abs(kernel).ravel(), count - 1)[:count]
    return np.sort(places).astype("int32")


def make_clock():
    import keras

    class Clock(keras.callbacks.Callback):
        """The processor's seconds from one batch to the next."""

        def on_train_begin(self, logs=None):
            self.seconds, self.began = [], time.process_time()

        def on_train_batch_end(self, batch, logs=None):
            now = time.process_time()
            self.seconds.append(now - self.began)
            self.began = now

    return Clock()


def summary(report):
    """Return of each method its runs' measures and costs.

    Returns:
        Dict from names to dicts: `rate`, `tried` (the number of rates), a list
        of each measure, one number a seed, and medians of what it costs.
    """
    runs = report["runs"]
    before = {r["seed"]: r for r in runs if r["method"] == "before"}
    found: dict = {}
    for name in ("before", *METHODS):
        final = sorted(
            (r for r in runs if r["method"] == name and r["kind"] == "final"),
            key=lambda r: r["seed"],
        )
        if not final:
            continue
        tried = [r for r in runs if r["method"] == name and r not in final]
        row = found[name] = {"rate": final[0]["rate"], "tried": len(tried)}
        for each in final:
            each["forgotten"] = statistics.mean(
                each[text] - before[each["seed"]][text] for text in TEXTS
            )
        row["seeds"] = [r["seed"] for r in final]
        row |= {m: [r[m] for r in final] for m in MEASURES}
        if name != "before":
            row |= {c: statistics.median(r[c] for r in final) for c in COSTS}
    return found


def effects(found, base, measure):
    """Return the differences to a base, paired by seed, with 95 % intervals.

    Where the noise is about the same for all methods (`POOLED`) it is taken
    from all of them: what is left without the means of methods and of seeds.
    Elsewhere from the seeds of the pair alone.

    Returns:
        Dict from names of methods to triples: mean, low, high.
    """
    import numpy as np
    from scipy import stats

    names = [name for name in found if name != "before"]
    most = max(len(found[name][measure]) for name in names)
    names = [name for name in names if len(found[name][measure]) == most]
    if base not in names or most < 2:
        return {}
    table = np.array([found[name][measure] for name in names])
    less = table - table[names.index(base)]
    if measure not in POOLED or len(names) < 3:
        differences = [harness.interval(row) for row in less]
    else:
        rest = table - table.mean(0) - table.mean(1, keepdims=True)
        free = (len(names) - 1) * (most - 1)
        variance = np.sum((rest + table.mean()) ** 2) / free
        half = stats.t.ppf(0.975, free) * math.sqrt(2 * variance / most)
        differences = [
            (float(mean), float(mean - half), float(mean + half))
            for mean in less.mean(1)
        ]
    return {n: d for n, d in zip(names, differences) if n != base}


def front(found):
    """Return the methods that none other beats in solved and forgotten."""
    points = {
        name: (
            -statistics.mean(row["solved"]),
            statistics.mean(row["forgotten"]),
        )
        for name, row in found.items()
        if name != "before"
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
    """Return the axes of solved against forgotten, the front as a line."""
    from keras_weightmods.plot import style

    found = summary(report)
    ax = style.new_axes(ax, width=6.4, height=4.2)
    points = {}
    for name, row in found.items():
        if name == "before":
            continue
        solved = [100 * value for value in row["solved"]]
        x, y = statistics.mean(row["forgotten"]), statistics.mean(solved)
        points[name] = x, y
        spread = [
            statistics.stdev(values) if len(values) > 1 else 0
            for values in (row["forgotten"], solved)
        ]
        color = style.COLORS[1 if name.startswith("LIFT") else 0]
        ax.errorbar(x, y, spread[1], spread[0], "o", color=color, lw=0.8)
        ax.annotate(
            name, (x, y), (4, 4), textcoords="offset points", fontsize=8
        )
    line = sorted(points[name] for name in front(found))
    ax.plot(*zip(*line), "--", color=style.GRAY, lw=0.8, zorder=0)
    ax.set(xlabel="forgotten, nats a token", ylabel="solved, %")
    style.grid(ax)
    return ax


def print_report(report):
    # Not above: the page takes from here what it shows.
    from benchmarks import results_page

    harness.print_all(results_page.lift_quality(report), width=250)


if __name__ == "__main__":
    main()
