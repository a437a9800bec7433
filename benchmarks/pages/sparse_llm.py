"""Parts of the page of results: language models made sparse."""

import collections
import math

import numpy as np

from benchmarks.pages.tables import mean, missing, table

# The largest error of the scaling law on the held-out budget, in loss.
ERROR_BAR = 0.03
# Title, key, factor and format of a column.
MEASURES = (
    ("nats, 99.9 %", "divergence_999", 1, ".1f"),
    ("same first token", "same_token", 1, ".1%"),
    ("bits", "bits", 1, ".2f"),
    ("MB", "bytes", 1e-6, ".1f"),
    ("processor minutes", "processor_seconds", 1 / 60, ".1f"),
)


def texts(log):
    """Every method of quality.py, on each of its texts."""
    groups = collections.defaultdict(list)
    for row in log["rows"]:
        groups[row["method"]].append(row)
    names = list(log["rows"][0]["perplexity"])
    # What older logs have not.
    more = [
        (title, key, scale, form)
        for title, key, scale, form in MEASURES
        if any(key in row for row in log["rows"])
    ]
    rows = [
        [
            name,
            f"{group[0]['tokens']:,}",
            *(mean([r["perplexity"][text] for r in group]) for text in names),
            mean([row["x_dense"] for row in group], ".2f"),
            f"{np.mean([list(r['divergence'].values()) for r in group]):.2f}",
            *(
                format(scale * np.mean([row[key] for row in group]), form)
                if key in group[0]
                else ""
                for _, key, scale, form in more
            ),
            len({row["seed"] for row in group}),
            f"{np.mean([row['seconds'] for row in group]) / 60:.1f}",
        ]
        for name, group in groups.items()
    ]
    return "\n\n".join(
        [
            f"{log['model']}. What trains has {log['steps']} steps of "
            f"{log['tokens_per_step']} tokens, the same rows in the same "
            f"order. The dense model wrote {log['self_share']:.1%} of these, "
            f"{log.get('documentation_share', 0):.1%} are docstrings, "
            f"{log.get('source_share', 0):.1%} source code, and the others "
            f"prose. {log['dtype']}, {log['backend']}; "
            f"{log['machine']}. "
            + (f"Seeds: {log['seeds']}. " if "seeds" in log else "")
            + "The texts' columns are perplexities. *x dense* is the "
            "geometric mean of the four over those of the dense model, *nats* "
            "the mean divergence from it per token. Only *held out* is of a "
            "kind that was trained on; *reference* is near the docstrings.",
            table(
                " | ".join(
                    ["method", "tokens", *(n.replace("_", " ") for n in names)]
                    + ["x dense", "nats", *(title for title, *_ in more)]
                    + ["seeds", "minutes"]
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


def nearest(logs):
    """How quantize compares with rounding to nearest, by model and backend."""
    rows = []
    for log in logs:
        found = {row["method"]: row for row in log["rows"]}
        other = found.pop("int4 to nearest")
        for row in found.values():
            ratios = [
                row["perplexity"][text] / value
                for text, value in other["perplexity"].items()
            ]
            rows.append(
                [
                    log["model"].split(",")[0],
                    *(log["backend"], log["dtype"], log["steps"]),
                    *(f"{each['x_dense']:.3f}" for each in (other, row)),
                    f"{max(ratios):.3f}",
                    f"{row['processor_seconds'] / 60:.1f}",
                ]
            )
    columns = "model | backend | policy | rows | to nearest | `quantize`"
    columns += " | worst text | processor minutes"
    return table(columns, rows, text_columns=3)


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
            f"{log['backend']}. Every model is exactly 2:4 at the end. Each "
            "method has one rate, which was not searched, and for LoRA (5e-4) "
            "and LIFT (1e-4) is far below what was best for them in "
            "lift_quality: this does not say which is better.",
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
