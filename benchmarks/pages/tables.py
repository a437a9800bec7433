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
    return f"No log yet: `{command(name)}` writes it."


# What differs from `python -m benchmarks.NAME`.
COMMANDS = {
    "cast_quality": "benchmarks.quality",
    "cast_step_0.5b": "benchmarks.cast_step --shapes 0.5b --backends torch,jax "
    "--dtypes mixed_bfloat16 --contenders CAST,Keras,LIFT --batch 1 --steps 3 "
    "--json FILE",
    "finetune_sparse": "examples.finetune_sparse --json FILE",
    "packed_llm_compiled": "benchmarks.packed_llm --compiled --json FILE",
    "quality_16_32": "benchmarks.quality --pattern 16:32 --json FILE",
    "quality_16_32_1000": "benchmarks.quality --pattern 16:32 --json FILE",
    "quality_nearest": "benchmarks.quality --model MODEL --backend BACKEND",
    "rounding": "benchmarks.rounding --models smollm2,gemma3",
    "rounding_bfloat16": "benchmarks.rounding --models smollm2,qwen_coder "
    "--methods quantize --dtype bfloat16 --json FILE",
    "rounding_1.5b": "benchmarks.rounding --models 1.5b "
    "--methods quantize_blocks --dtype bfloat16 --json FILE",
    "runtimes_1b": "benchmarks.runtimes --model 1b",
    "runtimes_1.5b": "benchmarks.runtimes --model 1.5b",
    "runtimes_amx": "benchmarks.runtimes --json FILE",
    "runtimes_engines": "benchmarks.runtimes --json FILE",
    "runtimes_gemma3": "benchmarks.runtimes --model gemma3",
    "runtimes_gemma3_budget": "benchmarks.runtimes --model gemma3 --json FILE",
    "runtimes_qwen_coder": "benchmarks.runtimes --model qwen_coder",
    "runtimes_qwen_coder_budget": "benchmarks.runtimes --model qwen_coder "
    "--json FILE",
    "runtimes_qwen_coder_amx": "benchmarks.runtimes --model qwen_coder "
    "--json FILE",
    "runtimes_sizes": "benchmarks.runtimes --json FILE",
    "signature_text": "examples.signature_text --output FILE",
    "sparse_matmul_bfloat16": "benchmarks.sparse_matmul --peers jax "
    "--threads 1 --isas avx512 "
    "--dtypes bfloat16,bfloat16/bfloat16,int8/int8 --json FILE",
}


def command(name):
    """Return the command that writes a log."""
    file = f"benchmarks/results/{name}.json"
    program = COMMANDS.get(name, f"benchmarks.{name}")
    if (steps := name.removeprefix("quality_")).isdigit():
        program = f"benchmarks.quality --steps {steps} --json FILE"
    return f"python -m {program.replace('FILE', file)}"
