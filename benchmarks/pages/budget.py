"""Part of the page of results: small models made sparse, by tokens a weight."""

import math

from benchmarks.cast_budget import (
    CONTROL_FROM,
    HELD_OUT,
    LEAST_RATE,
    LENGTH,
    TEXTS,
)
from benchmarks.pages.tables import mean, table

# Tokens a weight and what they are, to say what the law gives there.
ASKED = (
    (512_000 / 106e6, "SmolLM2-135M, 512,000 tokens"),
    (512_000 / 0.97e9, "a 1B, 512,000 tokens"),
    (1.0, "a 1B, 1B tokens"),
    (5.7, "2 % of the pretraining of Llama 2 7B"),
)


def cast_budget(log):
    rows = log["rows"]
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    versions = ", ".join(f"{k} {v}" for k, v in log["versions"].items())
    parts = [
        "Llamas of two layers, trained from scratch on annual messages and "
        f"docstrings: {log['vocabulary']:,} byte pairs, rows of "
        f"{log['length']} tokens, float32, Adam. Perplexity is that of "
        "held-out annual messages, and of news, which nothing was trained on. "
        "*Weights* are those of the kernels. *Bytes* count 16 bits a value "
        "and, for a sparse kernel, half of the values and a bit for each "
        f"place. {versions}; {log['machine']['cpu']}, one core.",
        table(
            "model | kind | weights | tokens a weight | bytes | held-out | "
            "news | minutes",
            [cells for size in sizes for cells in models(rows, size)],
            text_columns=2,
        ),
        "*x dense* is the perplexity over that of the model before CAST. *x "
        "control* is that over the dense model that trained on for the same "
        "rows, without a teacher. Its rate is searched too. Below "
        f"{CONTROL_FROM:g} tokens a weight the control is the dense model "
        "itself, as no rate gained anything there. Both ratios are on held-out "
        "text, and then on news. 16:32 takes the rates of 2:4. "
        "*Tokens a weight* are those of CAST alone. A one-shot start sees "
        f"128 rows, {128 * log['length']:,} tokens, which are not counted.",
    ]
    for size in sizes:
        parts += [
            f"{size}:",
            table(
                "method | tokens a weight | steps | rate | held-out | x dense "
                "| x control | news, x dense | news, x control | seeds",
                list(curve(rows, size)),
            ),
        ]
    parts += [
        "Perplexities on the text that the rates were searched on, by rate:",
        table(
            "model | method | tokens a weight | tried",
            [cells for size in sizes for cells in searches(rows, size)],
            text_columns=2,
        ),
        "The law `L(D) = L_inf + B * D**-beta`, of D tokens a weight, fitted "
        "by `kwm.fit_scaling_law` to the logarithm of *x control*, without "
        f"the budgets {', '.join(f'{b:g}' for b in HELD_OUT)}, beside what "
        "it says of these. Intervals are of 95 %:",
        table(
            "model | method | L_inf | B | beta | "
            + " | ".join(f"at {b:g}: law | run" for b in HELD_OUT),
            [cells for size in sizes for cells in laws(rows, size)],
            text_columns=2,
        ),
        "What the law of all budgets says of *x control* elsewhere:",
        table(
            "model | method | " + " | ".join(what for _, what in ASKED),
            [cells for size in sizes for cells in predictions(rows, size)],
            text_columns=2,
        ),
    ]
    return "\n\n".join(parts)


def models(rows, size):
    """Rows of the table of dense models and one-shot starts."""
    (dense,) = of(rows, size, "dense")
    kinds = [
        ("dense", dense, dense["bytes"]),
        *(("smaller dense", r, r["bytes"]) for r in of(rows, size, "rival")),
        *(
            (f"{row['pattern']}, one shot", row, dense["sparse_bytes"])
            for row in of(rows, size, "start")
        ),
    ]
    for kind, row, size_in_bytes in kinds:
        weights = row.get("weights", dense["weights"])
        yield [
            *(size, kind, f"{weights:,}"),
            f"{row['tokens'] / weights:.0f}" if "tokens" in row else "",
            f"{size_in_bytes:,}",
            *(f"{row['perplexity'][text]:.1f}" for text in TEXTS),
            f"{row['processor_seconds'] / 60:.1f}",
        ]


def curve(rows, size):
    """Rows of the table of budgets."""
    for method, budget in sorted(
        {
            (row["method"], row["budget"])
            for row in of(rows, size, "cast") + of(rows, size, "control")
        }
    ):
        same = runs(rows, size, method, budget)
        yield [
            *(method, f"{same[0]['tokens'] / weights_of(rows, size):.3g}"),
            same[0]["tokens"] // (LENGTH * same[0]["batch"]),
            f"{same[0]['rate']:g}",
            mean([row["perplexity"]["held_out"] for row in same]),
            *(
                mean([ratio(rows, row, base, text) for row in same], ".3f")
                for text in TEXTS
                for base in ("dense", "control")
            ),
            len(same),
        ]


def searches(rows, size):
    """Rows of the table of rates."""
    found = of(rows, size, "search")
    for method, budget in dict.fromkeys(
        (row["method"], row["budget"]) for row in found
    ):
        tried = {
            row["rate"]: f"{row['rate']:g}: {row['perplexity']['valid']:.1f}"
            for row in found
            if (row["method"], row["budget"]) == (method, budget)
            and row["rate"] > LEAST_RATE
        }
        yield size, method, budget, "; ".join(tried[r] for r in sorted(tried))


def laws(rows, size):
    """Rows of the table of laws, and their errors at budgets held out."""
    for method in methods(rows, size):
        points = excess(rows, size, method)
        held_out = [budget for budget in HELD_OUT if budget in points]
        if len(points) - len(held_out) < 4:
            continue
        law = fit(points, without=held_out)
        if law is None:
            yield [size, method, "none: it does not fall", *[""] * 8]
            continue
        cells = [
            f"{getattr(law, name):.3g} ({low:.3g} to {high:.3g})"
            for name, (low, high) in law.intervals.items()
        ]
        for budget in held_out:
            tokens, _ = points[budget][0]
            found = [math.exp(nats) for _, nats in points[budget]]
            cells += [shown(law.predict(tokens)), mean(found, ".3f")]
        yield [size, method, *cells]


def predictions(rows, size):
    """Rows of the table of what the laws say elsewhere."""
    for method in methods(rows, size):
        points = excess(rows, size, method)
        if len(points) >= 4 and (law := fit(points)):
            yield [
                *(size, method),
                *(shown(law.predict(tokens)) for tokens, _ in ASKED),
            ]


def methods(rows, size):
    return dict.fromkeys(row["method"] for row in of(rows, size, "cast"))


def excess(rows, size, method):
    """Return pairs of tokens a weight and log x control, by budget."""
    weights, found = weights_of(rows, size), {}
    for row in of(rows, size, "cast"):
        if row["method"] == method:
            nats = math.log(ratio(rows, row, "control", "held_out"))
            pair = row["tokens"] / weights, nats
            found.setdefault(row["budget"], []).append(pair)
    return found


def fit(points, without=()):
    """Return the law, or None if the losses do not fall."""
    import keras_weightmods as kwm

    pairs = [
        pair
        for budget, pairs in points.items()
        if budget not in without
        for pair in pairs
    ]
    try:
        return kwm.fit_scaling_law(*zip(*pairs))
    except ValueError:
        return None


def shown(prediction):
    loss, low, high = (math.exp(nats) for nats in prediction)
    return f"{loss:.3f} ({low:.3f} to {high:.3f})"


def ratio(rows, row, base, text):
    """Return the perplexity over that of the dense model or the control."""
    (other,) = of(rows, row["size"], "dense")
    if base == "control":
        same = runs(rows, row["size"], "control", row["budget"])
        # None has been trained where that gains nothing.
        other = next((r for r in same if r["seed"] == row["seed"]), other)
    return row["perplexity"][text] / other["perplexity"][text]


def of(rows, size, kind):
    return [r for r in rows if r["size"] == size and r["kind"] == kind]


def runs(rows, size, method, budget):
    key = {"size": size, "method": method, "budget": budget}
    return [
        row
        for row in rows
        if key.items() <= row.items() and row["kind"] != "search"
    ]


def weights_of(rows, size):
    return of(rows, size, "dense")[0]["weights"]
