"""The commands on models: how they are changed, measured and exported."""

import pathlib

import keras_weightmods as kwm
from keras_weightmods.cli.command import (
    DATA,
    MODEL,
    OUTPUT,
    PATTERN,
    QUIET,
    TARGETS,
    argument,
    command,
    reported,
)
from keras_weightmods.cli.files import (
    check_new,
    check_output,
    inputs_of,
    is_language_model,
    load_model,
    read_data,
    read_text,
    write_model,
)

_FORMATS = (
    *("tf_saved_model", "onnx", "openvino", "litert", "torch"),
    *("transformers", "gguf"),
)


@command("report", MODEL, PATTERN)
def _report(args):
    """Report the sparsity of a model.

    examples:
      keras-weightmods report model.keras
      keras-weightmods report model.keras --pattern 1:4
    """
    return reported(kwm.sparsity_report(load_model(args.model), args.pattern))


@command(
    "sparsify",
    MODEL,
    PATTERN,
    argument(
        "--criterion",
        default="magnitude",
        choices=("magnitude", "wanda", "sparsegpt"),
        help="default: magnitude",
    ),
    argument("--refine", nargs="+", choices=("swaps", "blocks")),
    TARGETS,
    *DATA,
    QUIET,
    *OUTPUT,
)
def _sparsify(args):
    """Make a model N:M sparse in one shot, without training.

    examples:
      keras-weightmods sparsify model.keras -o sparse.keras
      keras-weightmods sparsify llm.safetensors --data prose.txt \\
          --criterion sparsegpt --refine swaps blocks -o sparse.safetensors
    """
    check_output(args)
    model = load_model(args.model)
    data = None
    if args.data:
        found = read_data(model, args.data, args.rows, args.length)
        data = inputs_of(model, found)
    report = kwm.sparsify(
        model,
        args.pattern,
        data,
        criterion=args.criterion,
        refine=args.refine,
        targets=args.targets,
        verbose=int(not args.quiet),
    )
    write_model(model, args.output)
    return reported(report, args.output)


@command(
    "pack",
    MODEL,
    argument(
        "--dtype",
        choices=("float32", "bfloat16", "int8", "int4"),
        help="of the kept values; default: as they are",
    ),
    argument(
        "--head",
        choices=("auto", "none", "int8", "int4"),
        default="auto",
        help="the tied embedding; as the kernels by default",
    ),
    argument("--activations", choices=("int8", "float32")),
    TARGETS,
    *OUTPUT,
)
def _pack(args):
    """Pack the weights of a finished model.

    examples:
      keras-weightmods pack sparse.keras --dtype int8 -o packed.safetensors
    """
    check_output(args, ".safetensors")
    model = load_model(args.model)
    report = kwm.pack(
        model,
        args.dtype,
        targets=args.targets,
        head=None if args.head == "none" else args.head,
        activations=args.activations,
    )
    write_model(model, args.output)
    return reported(report, args.output)


@command("unpack", MODEL, *OUTPUT)
def _unpack(args):
    """Give a packed model its dense weights back.

    examples:
      keras-weightmods unpack packed.safetensors -o dense.keras
    """
    check_output(args)
    model = load_model(args.model)
    report = kwm.unpack(model)
    write_model(model, args.output)
    return reported(report, args.output)


@command(
    "merge",
    MODEL,
    argument(
        "--lora",
        help="a .lora.h5 file of KerasHub's `save_lora_weights`, made for the "
        "model; default: the LoRA that is in the model",
    ),
    argument("--pattern", help="as 2:4, the one to end in; default: none"),
    argument(
        "--keep",
        default="mask",
        choices=("mask", "magnitude"),
        help="which weights stay under a pattern; default: mask",
    ),
    *OUTPUT,
)
def _merge(args):
    """Add LoRA to the weights of a model.

    Packed weights are unpacked before.

    examples:
      keras-weightmods merge base.safetensors --lora task.lora.h5 \\
          --pattern 2:4 -o tuned.safetensors
    """
    check_output(args)
    if args.lora and not pathlib.Path(args.lora).is_file():
        raise FileNotFoundError(f"there is no file {args.lora}")
    model = load_model(args.model)
    kwm.unpack(model)
    if args.lora:
        backbone = getattr(model, "backbone", model)
        if not hasattr(backbone, "load_lora_weights"):
            raise ValueError(
                f"--lora is for a model of KerasHub, and {args.model} is a "
                f"{type(model).__name__}"
            )
        try:
            backbone.load_lora_weights(args.lora)
        # What is missing in a file of another model, or of another kind.
        except (KeyError, OSError, ValueError) as error:
            raise ValueError(
                f"{args.lora} has no LoRA for this model: {error}"
            ) from error
    report = kwm.merge_lora(model, args.pattern, keep=args.keep)
    write_model(model, args.output)
    return reported(report, args.output)


@command(
    "evaluate",
    MODEL,
    argument("--data", help="a text, or rows of tokens in a .npy file"),
    argument(
        "--tasks",
        nargs="+",
        help="those of lm-eval instead, as hellaswag; it fetches their data",
    ),
    argument("--limit", type=int, help="questions of a task; default: all"),
    argument(
        "--length", type=int, default=1024, help="of a window; default: 1024"
    ),
    argument("--batch-size", type=int, default=1, help="default: 1"),
    QUIET,
)
def _evaluate(args):
    """Measure the perplexity of a language model, or tasks of lm-eval.

    examples:
      keras-weightmods evaluate llm.safetensors --data held_out.txt
      keras-weightmods evaluate llm.safetensors --tasks arc_easy --limit 200
    """
    if (args.data is None) == (args.tasks is None):
        raise ValueError("`evaluate` takes --data, or --tasks of lm-eval")
    model = load_model(args.model)
    if args.tasks is not None:
        return _tasks(model, args)
    value = perplexity_of(
        model, args.data, args.length, args.batch_size, not args.quiet
    )
    return f"perplexity {value:.4f}", {"perplexity": value, "data": args.data}


def _tasks(model, args):
    """Return the results of tasks of lm-eval."""
    wrapped = kwm.lm_eval_model(model, args.length, args.batch_size)
    import lm_eval

    try:
        found = lm_eval.simple_evaluate(
            model=wrapped, tasks=args.tasks, limit=args.limit
        )["results"]
    except KeyError as error:
        # So it refuses a name.
        raise ValueError(
            "`--tasks` takes names of lm-eval's tasks, and YAML files of tasks "
            f"where lm-eval does. Received: {args.tasks}; it says: {error}"
        ) from error
    lines = [
        f"{task}: {name.removesuffix(',none')} {value:.4f}"
        for task, values in found.items()
        for name, value in values.items()
        if isinstance(value, float) and "stderr" not in name
    ]
    plain = {
        task: {k: v for k, v in values.items() if isinstance(v, (float, str))}
        for task, values in found.items()
    }
    return "\n".join(lines), {"results": plain}


def perplexity_of(model, path, length, batch_size, verbose):
    """Return the perplexity of a model on a file."""
    if pathlib.Path(path).suffix == ".npy":
        texts = read_data(model, path)
        texts = texts if is_language_model(model) else texts[0]
    else:
        texts = [read_text(path)]
    return kwm.perplexity(
        model, texts, length, batch_size=batch_size, verbose=int(verbose)
    )


@command(
    "generate",
    MODEL,
    argument("prompt", nargs="+", help="the beginnings of texts"),
    argument(
        "--max-length",
        type=int,
        default=64,
        help="tokens of a text, the prompt included; default: 64",
    ),
    argument(
        "--sampler",
        default="greedy",
        choices=("greedy", "top_k", "top_p", "random"),
        help="default: greedy",
    ),
    argument("--seed", type=int, default=0, help="default: 0"),
)
def _generate(args):
    """Let a language model of KerasHub go on with a text.

    examples:
      keras-weightmods generate llm.safetensors "Once upon a time"
    """
    model = load_model(args.model)
    if getattr(model, "preprocessor", None) is None:
        raise ValueError(
            f"`generate` needs a CausalLM of KerasHub with a preprocessor. "
            f"Received: {args.model}, a {type(model).__name__}"
        )
    import keras

    keras.utils.set_random_seed(args.seed)
    model.compile(sampler=args.sampler)
    texts = model.generate(args.prompt, max_length=args.max_length)
    return "\n".join(texts), {"texts": list(texts)}


@command(
    "export",
    MODEL,
    argument("--format", default="tf_saved_model", choices=_FORMATS),
    argument("--keep-packed", action="store_true"),
    argument("--dtype", help="of a GGUF file, as q8_0; default: f16"),
    argument("--tokenizer-from", help="for a GGUF file: another one"),
    argument("--context-length", type=int, help="of a GGUF file"),
    *OUTPUT,
)
def _export(args):
    """Write a model for another runtime.

    examples:
      keras-weightmods export packed.safetensors -o saved
      keras-weightmods export llm.safetensors --format gguf --dtype q8_0 \\
          -o llm.gguf
    """
    check_new(args)
    names = "dtype", "tokenizer_from", "context_length"
    given = {name: getattr(args, name) for name in names}
    kwm.export(
        load_model(args.model),
        args.output,
        args.format,
        keep_packed=args.keep_packed,
        overwrite=args.overwrite,
        **{name: value for name, value in given.items() if value is not None},
    )
    found = {"format": args.format, "output": args.output}
    return f"Wrote {args.output}, {args.format}", found
