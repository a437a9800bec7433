"""Makes docs/results.md from the logs in benchmarks/results/.

    python -m benchmarks.results_page

Nothing is measured here. What the benchmarks have logged is set side by side;
where several runs of one kind differ in their seeds, the mean is given with
the standard deviation. A part whose logs are missing says which program
writes them.
"""

import pathlib
import subprocess

from benchmarks import harness
from benchmarks.pages import budget, packed, sparse_llm, tables, tuning
from benchmarks.pages.findings import FINDINGS

LOGS = harness.RESULTS
PAGE = harness.ROOT / "docs" / "results.md"


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
    parts = [HEAD]
    for title, name, write in PARTS:
        log = read(logs, name)
        parts += [f"## {title}", write(log) if log else tables.missing(name)]
        if log and title in FINDINGS:
            parts.append(FINDINGS[title])
        if log and (date := date_of(logs, name)):
            parts.append(f"By `{tables.command(name)}`, {date}.")
    return "\n\n".join(parts) + "\n"


def date_of(logs, name):
    """Return the day on which a log was committed, or ""."""
    shown = subprocess.run(
        ["git", "log", "-1", "--format=%cs", "--", f"{name}.json", name],
        cwd=logs,
        capture_output=True,
        text=True,
    )
    return shown.stdout.strip()


def read(logs, name):
    """Return a log, or a list of those in a folder of that name."""
    if (logs / name).is_dir():
        return [*map(harness.read_json, sorted((logs / name).glob("*.json")))]
    return harness.read_json(logs / f"{name}.json")


HEAD = """\
<!-- Made by `python -m benchmarks.results_page`: do not edit. -->

# Results

The logs behind these tables are in `benchmarks/results/`. Perplexity (lower \
is better) is measured on held-out text of the kind trained on, and on \
unrelated text. All sparse models are exactly 2:4 unless said otherwise.

The runs of CAST by budget, their scaling law, and the models made from them \
are older than a fix of `AdamS`, and so are the rows that say it: what \
`AdamS` does not sparsify takes the steps of Adam now. All were calibrated on \
all of their rows. `sparsify` and `quantize` hold an eighth of them out now."""

# Title, log, and the function that makes a part of it.
PARTS = (
    ("Four texts, three never trained on", "quality", sparse_llm.texts),
    ("From that start, 25,600 tokens", "quality_100", sparse_llm.texts),
    ("From that start, 51,200 tokens", "quality_200", sparse_llm.texts),
    ("From that start, 512,000 tokens", "quality_1000", sparse_llm.texts),
    ("16:32, one shot and 25,600 tokens", "quality_16_32", sparse_llm.texts),
    ("16:32, 512,000 tokens", "quality_16_32_1000", sparse_llm.texts),
    (
        "At equal tokens, on two texts (an older log)",
        "cast_quality",
        sparse_llm.methods,
    ),
    ("Rounded on 256 rows", "quality_256", sparse_llm.texts),
    ("Rounded on 1,024 rows", "quality_1024", sparse_llm.texts),
    ("Rounded to few bits, and to budgets", "quality_64", sparse_llm.texts),
    ("Rounding and pruning: time and memory", "rounding", packed.rounding),
    ("Rounding in bfloat16", "rounding_bfloat16", packed.rounding),
    ("Rounding at 1.5B", "rounding_1.5b", packed.rounding),
    ("Rounded on TensorFlow", "quality_32", sparse_llm.texts),
    ("Beside rounding to nearest", "quality_nearest", sparse_llm.nearest),
    ("Keras' own int8 and int4", "quality_8", sparse_llm.texts),
    ("One-shot, without training", "one_shot", sparse_llm.one_shot),
    ("CAST by budget", "cast_llm", sparse_llm.budgets),
    ("Scaling law", "cast_llm", sparse_llm.laws),
    ("CAST by tokens a weight", "cast_budget", budget.cast_budget),
    ("A step of CAST", "cast_step", packed.cast_step),
    ("A step of CAST at 0.5B", "cast_step_0.5b", packed.cast_step),
    ("Quantized", "cast_llm", sparse_llm.quantized),
    ("Fine-tuned", "finetune_sparse", sparse_llm.fine_tuned),
    ("Packed: speed and size", "packed_llm", packed.packed),
    (
        "Packed: int8 inputs, with and without compile_generate",
        "packed_llm_compiled",
        packed.packed,
    ),
    ("Runtimes: speed, memory and quality", "runtimes", packed.runtimes),
    ("Engines: SmolLM2-135M", "runtimes_engines", packed.engines),
    ("Engines: Gemma3-270M", "runtimes_gemma3", packed.engines),
    ("A budget for Gemma3-270M", "runtimes_gemma3_budget", packed.engines),
    ("Engines: Qwen2.5-Coder-0.5B", "runtimes_qwen_coder", packed.engines),
    (
        "A budget for Qwen2.5-Coder-0.5B",
        "runtimes_qwen_coder_budget",
        packed.engines,
    ),
    ("Engines on AMX: SmolLM2-135M", "runtimes_amx", packed.engines),
    (
        "Engines on AMX: Qwen2.5-Coder-0.5B",
        "runtimes_qwen_coder_amx",
        packed.engines,
    ),
    ("Perplexity by the size of the file", "runtimes_sizes", packed.sizes),
    ("The example of the README", "readme", packed.readme),
    ("Runtimes at the shape of a 1B Llama", "runtimes_1b", packed.runtimes),
    ("Runtimes at the shape of a 1.5B Qwen", "runtimes_1.5b", packed.runtimes),
    ("HumanEval, by form of the weights", "humaneval", packed.humaneval),
    ("Packed: the product by shape and rows", "sparse_matmul", packed.products),
    (
        "Packed: the product with inputs in bfloat16",
        "sparse_matmul_bfloat16",
        packed.products,
    ),
    ("LIFT: quality", "lift_quality", tuning.lift_quality),
    ("LIFT: step and memory", "lift_step", tuning.lift_step),
    ("LIFT: masks", "principal_mask", tuning.principal_mask),
    ("LIFT: first masks and files of 270M", "lift_large", tuning.lift_large),
    ("Signatures: quality", "rws_quality", tuning.rws_quality),
    ("Signatures: text", "signature_text", tuning.signature_text),
    ("Merging: memory and time", "merge", tuning.merging),
    ("Merging: beside mergekit", "merge_command", tuning.merge_command),
    ("Companders: quality", "compander_quality", tuning.compander_quality),
)


if __name__ == "__main__":
    main()
