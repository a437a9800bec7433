"""What the parts of the page of results are made of."""

import numpy as np


def table(header, rows, text_columns=1):
    """Return a table; `header` has bars between the columns' names."""
    header = header.split(" | ")
    right = len(header) - text_columns
    lines = [header, ["---"] * text_columns + ["---:"] * right, *rows]
    return "\n".join(
        "| " + " | ".join(map(str, cells)) + " |" for cells in lines
    )


def mean(values, form=".1f"):
    spread = f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{spread}"


def megabytes(count):
    return "" if count is None else f"{count / 1e6:.0f}"


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
