"""Parts of the page of results: what packed models and steps take."""

import collections

from benchmarks.humaneval import COLUMNS
from benchmarks.humaneval import cells as humaneval_cells
from benchmarks.pages.tables import megabytes, table
from benchmarks.quality import MODELS
from benchmarks.rounding import NUMBERS, table_rows
from benchmarks.runtimes import PLOT, SIZES, SOURCES
from benchmarks.runtimes import cells as runtime_cells

PICTURES = {
    PLOT: "Speed against perplexity",
    SIZES: "Perplexity against the size of the file, for this package and "
    "llama.cpp",
}


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
        given = [
            f"{name} is the file {file}"
            for name, file in log.get("files", {}).items()
        ]
        found = ["What is packed in int4 was rounded to nearest", *given]
        return ", but ".join(found) + "."
    return f"""What is packed in int4 was rounded by `quantize` on {rows}
rows of 256 tokens, of prose, docstrings and text that the dense model wrote."""


def sizes(log):
    """The same for files of few bits, beside those of llama.cpp."""
    return runtimes(log, SIZES)


def engines(log):
    """The same without a picture."""
    return runtimes(log, None)


def runtimes(log, picture=PLOT):
    """Every form of runtimes.py: its speed, memory and quality."""
    prompts, about = log["prompts"], log["machine"]
    together = min(log["together"], len(log["rows"]))
    header = (
        "form | weights | write | write, batch 8 | read | resident, MB | "
        "of the model, MB | file, MB | x dense"
    )
    is_real = log["model"] in MODELS
    parts = [
        f"{MODELS.get(log['model'], 'Random weights')}; "
        f"tokens a second: {log['new_tokens']} new "
        f"ones after a prompt of {prompts['short']}, and a prompt of "
        f"{prompts['long']} read up to the first new token; a process for "
        f"each form, {together} of them in turns, medians of "
        f"{log['rounds']} rounds; {about['cpu']}, {about['threads']} of "
        f"{about['cores']} cores. "
        + (
            "*x dense* is the perplexity over that of the dense model, "
            "geometric mean of the four texts. The dense weights come from a "
            f"file in {SOURCES[log['model']]}, so that these are exact in "
            "llama.cpp, and other formats of 4 bits round a second time.\n\n"
            + _rounding(log)
            if is_real
            else "They say nothing of quality."
        ),
        table(header, [runtime_cells(row) for row in log["rows"]], 2),
    ]
    parts += [f"- left out: {k}: {v}" for k, v in log["left_out"].items()]
    if log["model"] == "smollm2" and picture and picture.exists():
        parts.append(f"![{PICTURES[picture]}]({picture.name})")
    found = dict.fromkeys(row["about"] for row in log["rows"])
    parts.append("Versions: " + "; ".join(found) + ".")
    return "\n\n".join(parts)


def readme(log):
    """What the ten lines of README.md take."""
    about = log["machine"]
    found = ", ".join(f"{k} {v}" for k, v in log["versions"].items())
    return "\n\n".join(
        [
            f"Qwen2.5-Coder-0.5B-Instruct in int8, from the GGUF file to the "
            f"saved file; "
            f"{log['backend']}; {about['cpu']}, {about['cores']} cores, with a "
            f"load of {about['load'][0]:.0f} at the start; {found}.",
            table(
                "processor minutes | minutes | file, MB",
                [
                    [
                        f"{log['processor_seconds'] / 60:.1f}",
                        f"{log['seconds'] / 60:.1f}",
                        f"{log['file_bytes'] / 1e6:.1f}",
                    ]
                ],
                0,
            ),
        ]
    )


def humaneval(log):
    """The forms of humaneval.py: what they solve, speed, size and memory."""
    rows = log["rows"]
    first = rows[0]
    loads = [row["load"] for row in rows]
    machines = [f"{row['cpu']} by {row['cores']} threads" for row in rows]
    return "\n\n".join(
        [
            "Qwen2.5-Coder-0.5B-Instruct, from a GGUF file of Q4_K_M, on the "
            f"first {first['problems']} problems of HumanEval. It writes "
            f"greedily, {first['batch']} answers at once, at most "
            f"{first['new_tokens']} new tokens each, with the prompt of "
            "EvalPlus in the model's chat template. *of 95 %* is Wilson's "
            "interval. *to the first* counts the problems that a row solves "
            "and the first row does not, and the other way round. Tokens a "
            "second are those of `generate`, with reading and compiling, and "
            "*by CPU* those of a second of the processor; "
            f"{', '.join(dict.fromkeys(machines))}, in the order of the rows, "
            f"with a load of {min(loads):.1f} to {max(loads):.1f}. Files "
            "named by their type alone were rounded to nearest.",
            table(
                " | ".join(["form", *COLUMNS]),
                [humaneval_cells(row, first) for row in rows],
            ),
        ]
    )


def rounding(log):
    pruning = ""
    if any("sparsegpt" in methods for methods in log["models"].values()):
        pruning = f", and sparsegpt `kwm.sparsify` to {log['pattern']}"
    return "\n\n".join(
        [
            f"{log['rows']} rows of 256 tokens, {log['backend']}, "
            f"{log['dtype']}. quantize is `kwm.quantize` with its defaults"
            f"{pruning}. The nats are the divergence from the float model on "
            "rows held out; "
            f"{log['machine']['cpu']}, {log['machine']['cores']} cores.",
            table(
                " | ".join(("model | method", *NUMBERS)),
                table_rows(log),
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
            f"A train step of the shapes of {log['model']}, "
            f"{' x '.join(map(str, log['batch']))} tokens. Keras is its own "
            "step with AdamW, whole is `CAST` with the logits of all positions "
            "in memory, and LIFT is `SparseAdamW` on 5 % of the weights; "
            f"{log['machine']['cpu']}, {log['machine']['cores']} cores.",
            table(
                "backend | dtype | step | seconds | x Keras | peak, MB | "
                "x Keras",
                rows,
                text_columns=3,
            ),
        ]
    )
