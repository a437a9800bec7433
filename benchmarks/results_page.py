"""Makes docs/results.md from the logs in benchmarks/results/.

    python -m benchmarks.results_page

Nothing is measured here. What the benchmarks have logged is set side by side;
where several runs of one kind differ in their seeds, the mean is given with
the standard deviation. A part whose logs are missing says which program
writes them.
"""

import collections
import json
import math
import pathlib

import numpy as np

from benchmarks import harness
from benchmarks import lift_quality as lift
from benchmarks import rws_quality as rws
from benchmarks.compander_quality import MEASURES, effects_of
from benchmarks.runtimes import cells as runtime_cells

LOGS = harness.RESULTS
PAGE = harness.ROOT / "docs" / "results.md"
# Of the scaling law on the held-out budget, in loss.
ERROR_BAR = 0.03


def main():
    parser = harness.make_parser(__doc__)
    parser.add_argument("--logs", type=pathlib.Path, default=LOGS)
    parser.add_argument("--page", type=pathlib.Path, default=PAGE)
    args = parser.parse_args()
    args.page.parent.mkdir(parents=True, exist_ok=True)
    args.page.write_text(make_page(args.logs))
    print(f"written to {args.page}")


def make_page(logs):
    """The page as a string, from a folder of logs."""
    runs = [
        json.loads(file.read_text())
        for file in sorted((logs / "cast_llm").glob("*.json"))
    ]
    parts = [HEAD]
    for title, name, write in PARTS:
        log = runs if name == "cast_llm" else read(logs, name)
        parts += [f"## {title}", write(log) if log else missing(name)]
    return "\n\n".join(parts) + "\n"


def read(logs, name):
    return harness.read_json(logs / f"{name}.json")


def texts(log):
    """Every method of quality.py, on each of its texts."""
    groups = collections.defaultdict(list)
    for row in log["rows"]:
        groups[row["method"]].append(row)
    names = list(log["rows"][0]["perplexity"])
    rows = [
        [
            name,
            f"{group[0]['tokens']:,}",
            *(mean([r["perplexity"][text] for r in group]) for text in names),
            mean([row["x_dense"] for row in group], ".2f"),
            f"{np.mean([list(r['divergence'].values()) for r in group]):.2f}",
            len({row["seed"] for row in group}),
            f"{np.mean([row['seconds'] for row in group]) / 60:.1f}",
        ]
        for name, group in groups.items()
    ]
    return "\n\n".join(
        [
            f"{log['model']}; {log['steps']} steps of "
            f"{log['tokens_per_step']} tokens, of which a share of "
            f"{log['self_share']} was written by the dense model and one of "
            f"{log.get('documentation_share', 0)} are docstrings; the same "
            f"rows in the same order; {log['dtype']}, {log['backend']}; "
            f"{log['machine']}. "
            + (f"Seeds: {log['seeds']}. " if "seeds" in log else "")
            + "*x dense* is the geometric mean of the four "
            "ratios to the dense model, *nats* the mean divergence from it "
            "per token. Of the texts the held-out one alone is of a kind that "
            "was trained on; the reference is near the docstrings.",
            table(
                " | ".join(
                    ["method", "tokens", *(n.replace("_", " ") for n in names)]
                    + ["x dense", "nats", "seeds", "minutes"]
                ),
                rows,
            ),
        ]
    )


def shares(log):
    """Between dense and 2:4, of dense_share.py."""
    names = list(log["rows"][0]["perplexity"])
    rows = [
        [
            f"{row['dense_weights']:.0%}",
            *(f"{row['perplexity'][text]:.1f}" for text in names),
            f"{row['x_dense']:.3f}",
            f"{np.mean(list(row['divergence'].values())):.2f}",
            f"{row['file_bytes'] / 1e6:.1f}",
            f"{row['tokens_per_second']:.0f}"
            if "tokens_per_second" in row
            else "",
        ]
        for row in log["rows"]
    ]
    speed = log.get("speed")
    about = [
        f"{log['model']}: {log['calibration_rows']} rows to prune and round "
        "on, no training of the whole; the perplexity of the packed model"
    ]
    if speed:
        about.append(
            f"tokens per second, JAX, batch 1, {speed['machine']['cpu']}, "
            f"{speed['machine']['cores_used']} cores"
        )
    return "\n\n".join(
        [
            "; ".join(about) + ".",
            table(
                " | ".join(
                    ["dense weights", *(n.replace("_", " ") for n in names)]
                    + ["x dense", "nats", "file MB", "tokens/s"]
                ),
                rows,
            ),
        ]
    )


def methods(log):
    """Every method of an older form of quality.py, with two texts."""
    groups = collections.defaultdict(list)
    for row in log["rows"]:
        groups[row["method"]].append(row)
    dense = groups["dense"][0] if "dense" in groups else None
    machines = sorted({r.get("machine", log["machine"]) for r in log["rows"]})
    rows = [
        [
            name,
            f"{group[0]['tokens']:,}",
            *quality(group, dense),
            len({row["seed"] for row in group}),
            f"{np.mean([row['seconds'] for row in group]) / 60:.1f}",
        ]
        for name, group in groups.items()
    ]
    return "\n\n".join(
        [
            f"{log['model']}; {log['steps']} steps of "
            f"{log['tokens_per_step']} tokens, the same rows in the same "
            f"order; {log['dtype']}, {log['backend']}; {'; '.join(machines)}.",
            table(
                "method | tokens | held-out | x dense | "
                "unrelated | seeds | minutes",
                rows,
            ),
        ]
    )


def one_shot(log):
    if "quality" not in log:
        return missing("one_shot")
    rows = log["quality"]["rows"]
    dense = next((row for row in rows if row["method"] == "dense"), None)
    return table(
        "method | held-out | x dense | unrelated | seconds",
        [
            [row["method"], *quality([row], dense), f"{row['seconds']:.0f}"]
            for row in rows
        ],
    )


def budgets(runs):
    """Every run of cast_llm.py."""
    parts = []
    for (model, pattern, start, evaluated, recipe), group in grouped(runs):
        rows = []
        for tokens, same in by_tokens(group):
            before, after = (
                [run["perplexity"][name] for run in same]
                for name in ("before_prune", "after_prune")
            )
            rows.append(
                [
                    f"{tokens:,}",
                    mean([each["held_out"] for each in before]),
                    *quality(after, same[0]["perplexity"]["dense"]),
                    len({run["seed"] for run in same}),
                    f"{np.mean([run['seconds'] for run in same]) / 60:.1f}",
                ]
            )
        dense = group[0]["perplexity"]["dense"]
        machines = {
            run["machine"]["accelerator"]
            or f"{run['machine']['cpu']}, {run['machine']['threads']} threads"
            for run in group
        }
        parts.append(
            f"{model}, {pattern}, {start} start, dense "
            f"{dense['held_out']:.1f} / {dense['unrelated']:.1f} on "
            f"{evaluated:,} held-out tokens; {recipe}, "
            f"{group[0]['backend']}; "
            f"{'; '.join(sorted(machines))}."
        )
        parts.append(
            table(
                "tokens | before the prune | after | x dense | "
                "unrelated | seeds | minutes",
                rows,
            )
        )
    return "\n\n".join(parts)


def laws(runs):
    """The law through all budgets but the largest, and its error there."""
    parts = []
    groups = grouped(runs)
    for (*kind, recipe), group in groups:
        model, pattern, start, _ = kind
        points = losses(group)
        # Four to fit, and one to hold out.
        if len({tokens for tokens, _ in points}) < 5:
            continue
        parts.append(f"{model}, {pattern}, {start} start, {recipe}.")
        parts.append(law(points))
        parts += [
            beyond(points, tokens, loss, other)
            for (*other_kind, other), rest in groups
            if other_kind == kind and other != recipe
            for tokens, loss in losses(rest)
            if tokens > max(points)[0]
        ]
    return "\n\n".join(parts) or (
        "Needs runs of `benchmarks/cast_llm.py` at five budgets of one model."
    )


def losses(runs):
    """Pairs of tokens and the loss after the prune, of each run."""
    return [
        (tokens, math.log(run["perplexity"]["after_prune"]["held_out"]))
        for tokens, same in by_tokens(runs)
        for run in same
    ]


def beyond(points, tokens, loss, recipe):
    """What a law says of a run with more tokens and another recipe."""
    import keras_weightmods as kwm

    said = kwm.fit_scaling_law(*zip(*points)).predict(tokens)
    return (
        f"A run of {tokens:,} tokens with another recipe ({recipe}) gave "
        f"{loss:.3f}, where the law of these budgets, at "
        f"{tokens / max(points)[0]:.0f} times the largest of them, says "
        f"{said.loss:.3f} ({said.low:.3f} to {said.high:.3f}): "
        f"{abs(said.loss - loss) / loss:.1%} off."
    )


def law(points):
    import keras_weightmods as kwm

    largest = max(tokens for tokens, _ in points)
    fitted = [point for point in points if point[0] < largest]
    found = np.mean([loss for tokens, loss in points if tokens == largest])
    held_out = kwm.fit_scaling_law(*zip(*fitted))
    prediction = held_out.predict(largest)
    error = abs(prediction.loss - found) / found
    whole = kwm.fit_scaling_law(*zip(*points))
    unknown = (
        " They do not determine `L_inf`, whose interval reaches 0: what "
        "more tokens would bring in the end is open."
        if held_out.intervals["L_inf"][0] == 0
        else ""
    )
    # What one would say without a law.
    last = max(fitted)
    naive = abs(last[1] - found) / found
    verdict = "within" if error <= ERROR_BAR else "above"
    rows = []
    for label, fit in (
        (f"{largest:,} tokens held out", held_out),
        ("all budgets", whole),
    ):
        ends = {
            name: f"{getattr(fit, name):.3g} ({low:.3g} to {high:.3g})"
            for name, (low, high) in fit.intervals.items()
        }
        rows.append([label, ends["L_inf"], ends["B"], ends["beta"]])
    return "\n\n".join(
        [
            "`L(D) = L_inf + B * D**-beta`, loss in nats a token on the "
            "held-out text, after the prune:",
            table("fitted to | L_inf | B | beta", rows),
            f"At {largest:,} tokens the law of the smaller budgets says "
            f"{prediction.loss:.3f} ({prediction.low:.3f} to "
            f"{prediction.high:.3f}); the run gave {found:.3f}: an error of "
            f"{error:.1%} in loss, {verdict} the bar of {ERROR_BAR:.0%}. In "
            f"perplexity, {math.exp(prediction.loss):.1f} for "
            f"{math.exp(found):.1f}. Intervals are of "
            f"{held_out.confidence:.0%}; with few budgets they are wide."
            f"{unknown} To take the loss at {last[0]:,} tokens for that at "
            f"{largest:,} would be an error of {naive:.1%}.",
            table(
                "tokens | loss | law",
                [
                    [
                        f"{tokens:,}",
                        f"{loss:.3f}",
                        f"{held_out.predict(tokens).loss:.3f}",
                    ]
                    for tokens, loss in sorted(points)
                ],
            ),
        ]
    )


def quantized(runs):
    """2:4 models with int8 or int4 values."""
    names = {
        "after_prune": "2:4",
        "packed_int8": "2:4, packed int8",
        "int8": "2:4, Keras int8",
        "int4": "2:4, Keras int4",
    }
    parts = []
    for run in runs:
        found = run["perplexity"]
        if not found.keys() & {"packed_int8", "int8", "int4"}:
            continue
        parts.append(
            table(
                f"{run['model']}, {run['tokens']:,} tokens, seed "
                f"{run['seed']} | held-out | x dense | unrelated",
                [
                    [label, *quality([found[name]], found["dense"])]
                    for name, label in names.items()
                    if name in found
                ],
            )
        )
    return "\n\n".join(parts) or missing("cast_llm")


def fine_tuned(log):
    """Every method of examples/finetune_sparse.py."""
    start = next(r for r in log["rows"] if r["method"] == "2:4, as it was")
    return "\n\n".join(
        [
            f"{log['model']}; {log['tokens']:,} tokens of {log['text']}, which "
            "is the held-out text here; the unrelated text is the prose; "
            f"{log['backend']}. Every model is exactly 2:4 at the end.",
            table(
                "method | held-out | x start | unrelated | minutes",
                [
                    [
                        row["method"],
                        *quality([row], start),
                        f"{row['seconds'] / 60:.1f}",
                    ]
                    for row in log["rows"]
                ],
            ),
        ]
    )


def packed(log):
    rows = [
        [
            backend,
            row["model"],
            megabytes(row["memory_bytes"]),
            megabytes(row["file_bytes"]),
            f"{row['tokens_per_second']:.1f}",
            f"{row['ratio']:.2f}",
        ]
        for backend, found in log["backends"].items()
        for row in found["rows"]
    ]
    return "\n\n".join(
        [
            f"{log['model']}; text written at batch 1, "
            f"{log['new_tokens']} tokens; {log['machine']['cpu']}, "
            f"{log['machine']['cores_used']} cores.",
            table(
                "backend | model | memory, MB | file, MB | tokens/s | x dense",
                rows,
                text_columns=2,
            ),
        ]
    )


def products(log):
    """Speed-ups of sparse_matmul.py, by the first instruction set of each."""
    parts = [
        "Time of the dense float32 product over that of the packed one, above "
        f"1 the packed one is faster; {log['machine']['cpu']}. The log has the "
        "times, and the other instruction sets."
    ]
    for found in log["results"]:
        isa, batches = found["isas"][0], []
        rows = collections.defaultdict(list)
        for row in found["rows"]:
            times = row["milliseconds"]
            if row["batch"] not in batches:
                batches.append(row["batch"])
            for name, milliseconds in times.items():
                if name.startswith(f"{isa} "):
                    key = "x".join(map(str, row["shape"])), name.split()[1]
                    rows[key].append(f"{times['dense'] / milliseconds:.2f}")
        threads = "one core" if found["threads"] == "1" else "all cores"
        parts += [
            f"{found['peer']}, {threads}, {isa}:",
            table(
                " | ".join(
                    ["kernel", "values", *(f"B={batch}" for batch in batches)]
                ),
                [[*key, *cells] for key, cells in rows.items()],
                text_columns=2,
            ),
        ]
    return "\n\n".join(parts)


def _rounding(log):
    later = [
        f"That of {row['form']} is of {row['perplexity_from']}."
        for row in log["rows"]
        if "perplexity_from" in row
    ]
    if later:
        return " ".join(["Not all perplexities are of this run.", *later])
    rows = log.get("rounding_rows")
    if not rows:
        return "What is packed in int4 was rounded to nearest."
    return f"""What is packed in int4 was rounded by `quantize_sparse` on {rows}
rows of 256 tokens, of prose, docstrings and text that the dense model wrote."""


def runtimes(log):
    """Every form of runtimes.py: its speed, memory and quality."""
    prompts, about = log["prompts"], log["machine"]
    header = (
        "form | weights | write | write, batch 8 | read | resident, MB | "
        "of the model, MB | file, MB | x dense"
    )
    is_real = log["shape"] == "135m"
    model = "SmolLM2-135M-Instruct" if is_real else "Random weights"
    parts = [
        f"{model}; tokens a second: {log['new_tokens']} new "
        f"ones after a prompt of {prompts['short']}, and a prompt of "
        f"{prompts['long']} read up to the first new token; a process for "
        f"each form, {log['together']} of them in turns, medians of "
        f"{log['rounds']} rounds; {about['cpu']}, {about['threads']} of "
        f"{about['cores']} cores. "
        + (
            "*x dense* is the perplexity over that of the dense model, "
            "geometric mean of the four texts. The dense weights come from a "
            "file in Q4_1, so that these are exact in llama.cpp, and other "
            "formats of 4 bits round a second time.\n\n" + _rounding(log)
            if is_real
            else "Of quality these tell nothing."
        ),
        table(header, [runtime_cells(row) for row in log["rows"]], 2),
    ]
    parts += [f"- left out: {k}: {v}" for k, v in log["left_out"].items()]
    if is_real and (PAGE.parent / "runtimes.png").exists():
        parts.append("![Speed against perplexity](runtimes.png)")
    found = dict.fromkeys(row["about"] for row in log["rows"])
    parts.append("Versions: " + "; ".join(found) + ".")
    return "\n\n".join(parts)


def lift_quality(log):
    if "kind" not in log["runs"][0]:
        # The form of an older program.
        return missing("lift_quality")
    setting, found = log["setting"], lift.summary(log)
    names = [name for name in found if name != "before"]
    rows = []
    for name, row in found.items():
        cells = [name, f"{row['rate']:.2g}" if row["rate"] else ""]
        for measure, (form, factor) in lift.MEASURES.items():
            cells.append(mean([factor * v for v in row[measure]], form))
        if name != "before":
            cells += [
                f"{row['trained']:,}",
                megabytes(row["optimizer_bytes"]),
                megabytes(row["peak_bytes"]),
                f"{row['step']:.2f}",
                f"{row['file_bytes'] / 1e6:.1f}",
                f"{row['file_bytes'] / (2 * row['stored']):.2f}",
                row["tried"],
            ]
        rows.append(cells + [""] * (14 - len(cells)))
    differences = []
    compared = {
        (base, measure): lift.effects(found, base, measure)
        for base in lift.BASES
        for measure in lift.DIFFERENCES
    }
    for name in names:
        cells = [name]
        for (_, measure), effects in compared.items():
            form, factor = lift.MEASURES[measure]
            if name in effects:
                value, low, high = (factor * v for v in effects[name])
                ends = f"{low:+{form}} to {high:+{form}}"
                cells.append(f"{value:+{form}} ({ends})")
            else:
                cells.append("")
        differences.append(cells)
    header = " | ".join(f"{measure} less {base}" for base, measure in compared)
    parts = [
        "SmolLM2-135M-Instruct on the word problems of `reasoning-gym`: "
        f"{setting['steps']} steps of {setting['batch']} problems of at most "
        f"{setting['length']} tokens from half of the templates. Solved: % of "
        f"{setting['test']} new problems from these, unseen: % of "
        f"{setting['unseen']} from the other half, greedy, by the package's "
        f"scorer; losses on {setting['valid']} of each; forgotten: rise of "
        f"the loss on {' and '.join(lift.TEXTS)}, nats a token. Mean and "
        f"spread over {max(len(r['seeds']) for r in found.values())} seeds, "
        "each with its own problems. The rate of each method is the best of "
        "those tried by the validation loss after "
        f"{setting['search_steps']} steps, with a worse one on both sides. A "
        "step is seconds of the processor; x LoRA is the file over a LoRA in "
        "bfloat16 of as many numbers as were changed. "
        f"{setting['backend']}, {setting['dtype']}, {log['machine']['cpu']}.",
        table(
            "method | rate | solved, % | unseen, % | loss | unseen loss | "
            "forgotten | trained | state, MB | peak, MB | step, s | "
            "file, MB | x LoRA | tried",
            rows,
        ),
        "Differences, paired by seed, with intervals of 95 %: of solved by "
        "the noise of all methods, else by the seeds of the pair (t).",
        table(f"method | {header}", differences),
        "On the front of solved against forgotten: "
        f"{', '.join(lift.front(found))}.",
        "\n".join(f"- {line}" for line in lift.verdicts(found)),
    ]
    if (PAGE.parent / lift.PLOT.name).exists():
        parts.append(f"![Solved against forgotten]({lift.PLOT.name})")
    return "\n\n".join(parts)


def lift_step(log):
    rows = []
    for backend, found in log["backends"].items():
        for method, memory in found.get("memory", {}).items():
            seconds = found.get("medians", {}).get(method)
            ratio = found["ratio_with_refresh"] if method == "LIFT" else 1
            rows.append(
                [
                    backend,
                    method,
                    f"{memory['trained']:,}",
                    "" if seconds is None else f"{seconds:.2f}",
                    "" if seconds is None else f"{ratio:.2f}",
                    megabytes(memory["state_bytes"]),
                    megabytes(memory["peak_bytes"]),
                ]
            )
    return "\n\n".join(
        [
            "A whole train step of SmolLM2-135M's shapes, "
            f"{' x '.join(map(str, log['batch']))} tokens, {log['dtype']}; a "
            "refresh of the masks every 200 steps is counted in the ratio; "
            f"{log['machine']['cpu']}, {log['machine']['cores']} cores.",
            table(
                "backend | method | trained | seconds | x AdamW | "
                "state, MB | peak, MB",
                rows,
                text_columns=2,
            ),
        ]
    )


def lift_large(log):
    rows = [
        [
            *(backend, row["kernels"]),
            *(f"{row[k]:.1f}" for k in ("first_masks", "refresh")),
            f"{row['file_bytes'] / 1e6:.1f}",
            f"{row['x_lora']:.3f}",
            *(f"{row[k]:.2f}" for k in ("write", "apply")),
            f"{row['read_mb_s']:.0f}",
        ]
        for backend, row in log["backends"].items()
    ]
    return "\n\n".join(
        [
            f"A Gemma 3 of the shapes of its 270M, {log['density']:.0%} of "
            "its kernels. First masks: in a process that has compiled nothing. "
            "The file holds normal changes in the masks of weights at random, "
            "of which nothing can be told; x LoRA is its size over that of a "
            "bfloat16 LoRA of as many numbers. Of trained changes see above. "
            f"{log['machine']['cpu']}, {log['machine']['cores']} cores.",
            table(
                "backend | kernels | first masks, s | refresh, s | file, MB | "
                "x LoRA | written in, s | applied in, s | read, MB/s",
                rows,
            ),
        ]
    )


def merging(log):
    rows = [
        [
            *(backend, method),
            f"{each['seconds']:.1f}",
            f"{each['of_copy']:.2f}",
            megabytes(each["peak_bytes"]),
            megabytes(found["imported_bytes"]),
        ]
        for backend, found in log["backends"].items()
        for method, each in found["methods"].items()
    ]
    return "\n\n".join(
        [
            f"Two files of {log['megabytes']} MB into one, where a method has "
            "a base with that file too, on NumPy in one process. *x copy*: "
            "bytes read and written a second, over those of a copy of one "
            "file that waits for the disk. Beside the peak of the process, "
            "that of one that has imported Keras and the library alone; "
            f"{log['machine']['cpu']}, {log['machine']['cores_used']} of "
            f"{log['machine']['cores']} cores.",
            table(
                "backend | method | seconds | x copy | peak, MB | imports, MB",
                rows,
                text_columns=2,
            ),
        ]
    )


def cast_step(log):
    rows = []
    for backend, found in log["backends"].items():
        for dtype, steps in found["rows"].items():
            plain = steps["Keras"]
            for name, step in steps.items():
                peak = step["peak_bytes"]
                rows.append(
                    [
                        *(backend, dtype, name),
                        f"{step['median']:.2f}",
                        f"{step['median'] / plain['median']:.2f}",
                        megabytes(peak),
                        f"{peak / plain['peak_bytes']:.2f}",
                    ]
                )
    return "\n\n".join(
        [
            "A train step of SmolLM2-135M's shapes, "
            f"{' x '.join(map(str, log['batch']))} tokens: `CAST`, the same "
            "with the logits of all positions in memory (whole), and Keras' "
            f"own step with AdamS; {log['machine']['cpu']}, "
            f"{log['machine']['cores']} cores.",
            table(
                "backend | dtype | step | seconds | x Keras | peak, MB | "
                "x Keras",
                rows,
                text_columns=3,
            ),
        ]
    )


def principal_mask(log):
    parts = []
    rows = [
        [
            backend,
            rank,
            len(same),
            f"{min(row['default'] for row in same):.4f}",
            *(
                f"{np.median([row[name] for row in same]):.4f}"
                for name in ("default", "randomized", "magnitude")
            ),
        ]
        for backend, found in log["backends"].items()
        for rank in sorted({r["rank"] for r in found.get("agreement", [])})
        for same in [[r for r in found["agreement"] if r["rank"] == rank]]
    ]
    if rows:
        parts.append(
            f"Share of the exact rule's {log['density']:.0%} that others find "
            "in SmolLM2-135M's matrices; medians beside the least."
        )
        header = "backend | rank | matrices | least | median"
        parts.append(table(f"{header} | randomized SVD | magnitude", rows))
    rows = [
        [
            backend,
            f"{exact:.1f}",
            f"{fast:.2f}",
            f"{found['time']['ratio']:.1f}",
            f"{found['time']['share']:.4f}",
        ]
        for backend, found in log["backends"].items()
        if "time" in found
        for exact, fast in [
            [
                np.median(found["time"]["seconds"][name])
                for name in ("exact", "auto")
            ]
        ]
    ]
    if rows:
        parts.append(
            "One selection in a random matrix of 4096 x 4096 at rank 128, "
            f"seconds; {log['machine']['cpu']}, {log['machine']['cores']} "
            "cores."
        )
        header = "backend | exact SVD | default | ratio | share"
        parts.append(table(header, rows))
    return "\n\n".join(parts)


def compander_quality(log):
    if "settings" not in log:
        return missing("compander_quality")
    parts = [
        "Conv nets with dropout on Fashion-MNIST, with BatchNormalization "
        "(norm) and without (plain); accuracy on the test images in %, mean "
        "and spread of the seeds. Each method has the same search of rate, "
        "decay and a, on "
        f"{log['held_out']:,} training images held out, in which each has "
        "worse neighbours on both sides; differences are paired by seed, "
        f"with an interval of 95 % (t). {log['optimizer']}; "
        f"{log['backend']}, {log['machine']['cpu']}. 4 bits: the trained "
        "kernels in 15 levels, of one scale a kernel, or one a channel; 2:4: "
        "pruned by magnitude, with no training after it. Peak: the largest "
        "weight over the root mean square.",
    ]
    for name, setting in log["settings"].items():
        rows = [row for row in log["rows"] if row["setting"] == name]
        if not rows:
            continue
        seeds = sorted({len(row["runs"]) for row in rows})
        parts += [
            f"{name}: {setting['images']:,} images, {setting['epochs']} "
            f"epochs in batches of {setting['batch']}, "
            f"{' or '.join(map(str, seeds))} seeds:",
            table(
                "net | method | chosen | accuracy | less plain | less L2 | "
                "4 bits | less L2 | 4 bits a channel | less L2 | 2:4 | "
                "less L2 | peak | tried",
                [_companded(row, rows) for row in rows],
                3,
            ),
        ]
    return "\n\n".join(parts)


def _companded(row, rows):
    cells = [
        row["net"],
        row["method"],
        ", ".join(f"{k} {v:.3g}" for k, v in row["chosen"].items()),
    ]
    for measure in MEASURES:
        cells.append(mean([100 * run[measure] for run in row["runs"]], ".2f"))
        found = {
            base: f"{value:+.2f} ({low:+.2f} to {high:+.2f})"
            for base, (value, low, high) in effects_of(
                row, rows, measure
            ).items()
        }
        if measure == "accuracy":
            cells.append(found.get("plain", ""))
        cells.append(found.get("L2", ""))
    peak = np.mean([run["peak"] for run in row["runs"]])
    return [*cells, f"{peak:.1f}", len(row["tried"])]


def rws_quality(log):
    if "cosines" not in log:
        return missing("rws_quality")
    found = rws.by_seed(log["rows"])
    corruptions = dict.fromkeys(row["corruption"] for row in log["rows"])
    parts = [
        f"MNIST and Fashion-MNIST at 16 x 16; {', '.join(corruptions)}, each "
        f"at five severities on {log['test_images']} test images. Share of "
        "the gap between the clean model and the one trained on corrupted "
        "images that is closed, accuracy on corrupted images, and on clean "
        "ones less that of the model patched; means over data sets and "
        "corruptions, with the interval of 95 % "
        f"over seeds (t). {log['epochs']} epochs; {log['backend']}, "
        f"{log['machine']}."
    ]
    for net, sizes in log["bytes"].items():
        rows = [
            [
                claim,
                name,
                rws.cell(each["share"]),
                rws.cell(each["corrupted"]),
                rws.cell(each["on_clean"]),
                f"{sizes['model'] / sizes[name]:.1f}" if name in sizes else "",
            ]
            for claim, names in (
                ("ends", ("clean", "robust", "continued")),
                *rws.CLAIMS,
            )
            for name in names
            if (each := found.get((net, name)))
        ]
        seeds = len(found[net, "clean"]["share"])
        parts += [
            f"{net}, {seeds} seed{'s' * (seeds > 1)}:",
            table(
                "claim | model | of the gap | corrupted | on clean | "
                "times smaller",
                rows,
                2,
            ),
        ]
        cosines = rws.cosine_rows(log["cosines"])[net]
        parts.append(
            "Discriminative: cosine of the signatures from the two data sets, "
            f"of the same corruption {rws.cell(cosines['own'])}, of different "
            f"ones {rws.cell(cosines['other'])}; the nearest is that of the "
            f"same corruption in {rws.cell(cosines['found'])}."
        )
    if (PAGE.parent / rws.PICTURE.name).exists():
        parts.append(f"![Cosines of signatures]({rws.PICTURE.name})")
    return "\n\n".join(parts)


def grouped(runs):
    """Runs of one kind: they differ in their tokens and seeds alone."""
    groups = collections.defaultdict(list)
    for run in runs:
        init = run.get("init", "dense")
        evaluated = run["evaluated_tokens"]
        recipe = (
            f"{run['dtype']}, batches of {run['batch_size']} x "
            f"{run['length']}, learning rate {run['recipe']['learning_rate']:g}"
        )
        key = run["model"], run["pattern"], init, evaluated, recipe
        groups[key].append(run)
    return sorted(groups.items())


def by_tokens(runs):
    groups = collections.defaultdict(list)
    for run in runs:
        groups[run["tokens"]].append(run)
    return sorted(groups.items())


def quality(rows, dense):
    """Cells: held-out, times that of the dense model, unrelated."""
    held_out = [row["held_out"] for row in rows]
    ratio = np.mean(held_out) / dense["held_out"] if dense else math.nan
    return [
        mean(held_out),
        f"{ratio:.2f}",
        mean([row["unrelated"] for row in rows]),
    ]


def megabytes(count):
    return "" if count is None else f"{count / 1e6:.0f}"


def mean(values, form=".1f"):
    spread = f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{spread}"


def table(header, rows, text_columns=1):
    """Return a table; `header` has bars between the columns' names."""
    header = header.split(" | ")
    right = len(header) - text_columns
    lines = [header, ["---"] * text_columns + ["---:"] * right, *rows]
    return "\n".join(
        "| " + " | ".join(map(str, cells)) + " |" for cells in lines
    )


def missing(name):
    program = f"python -m benchmarks.{name}"
    file = f"benchmarks/results/{name}.json"
    if name == "finetune_sparse":
        program = f"python -m examples.{name} --json {file}"
    elif name.startswith("quality_"):
        steps = name.removeprefix("quality_")
        program = f"python -m benchmarks.quality --steps {steps} --json {file}"
    elif name == "packed_llm_compiled":
        program = f"python -m benchmarks.packed_llm --compiled --json {file}"
    return f"No log yet: `{program}` writes it."


HEAD = """\
# Results

Written by `python -m benchmarks.results_page` from the logs in \
`benchmarks/results/`; do not edit. Perplexity (lower is better) on held-out \
text of the kind trained on, and on unrelated text: English prose, and the \
reference of the Python language, in SmolLM2's own runs. All sparse models are \
exactly 2:4 unless said otherwise.

The runs of CAST by budget, their scaling law, and the quantized and \
fine-tuned models made from them are older than a fix of `AdamS` (what it \
does not sparsify now takes Adam's steps) and were not repeated; so are the \
rows that say it."""

# Title, log, and the function that makes a part of it.
PARTS = (
    ("Four texts, three never trained on", "quality", texts),
    ("From that start, 25,600 tokens", "quality_100", texts),
    ("From that start, 51,200 tokens", "quality_200", texts),
    ("From that start, 512,000 tokens", "quality_1000", texts),
    ("Between dense and 2:4, all in 4 bits", "dense_share", shares),
    ("At equal tokens, on two texts (an older log)", "cast_quality", methods),
    ("One-shot, without training", "one_shot", one_shot),
    ("CAST by budget", "cast_llm", budgets),
    ("Scaling law", "cast_llm", laws),
    ("A step of CAST", "cast_step", cast_step),
    ("Quantized", "cast_llm", quantized),
    ("Fine-tuned", "finetune_sparse", fine_tuned),
    ("Packed: speed and size", "packed_llm", packed),
    (
        "Packed: int8 inputs, with and without compile_generate",
        "packed_llm_compiled",
        packed,
    ),
    ("Runtimes: speed, memory and quality", "runtimes", runtimes),
    ("Runtimes at the shape of a 1B Llama", "runtimes_1b", runtimes),
    ("Packed: the product by shape and rows", "sparse_matmul", products),
    (
        "Packed: the product with inputs in bfloat16",
        "sparse_matmul_bfloat16",
        products,
    ),
    ("LIFT: quality", "lift_quality", lift_quality),
    ("LIFT: step and memory", "lift_step", lift_step),
    ("LIFT: masks", "principal_mask", principal_mask),
    ("LIFT: first masks and files of 270M", "lift_large", lift_large),
    ("Signatures: quality", "rws_quality", rws_quality),
    ("Merging: memory and time", "merge", merging),
    ("Companders: quality", "compander_quality", compander_quality),
)


if __name__ == "__main__":
    main()
