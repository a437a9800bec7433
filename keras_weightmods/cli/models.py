"""The commands that make a model smaller, let it write, and export it."""

import keras_weightmods as kwm
from keras_weightmods.cli.command import (
    DATA,
    MODEL,
    MODEL_OUTPUT,
    OPTIONS,
    PATTERN,
    QUIET,
    TARGETS,
    argument,
    command,
    file,
    output,
    reported,
)
from keras_weightmods.cli.files import load_model, read_data, write_model


@command(
    "quantize",
    MODEL,
    argument("--bits", type=int, default=4, help="default: 4"),
    argument(
        "--refine",
        choices=("blocks", "none"),
        default="blocks",
        help="none is several times faster and less exact; default: blocks",
    ),
    *DATA,
    QUIET,
    *MODEL_OUTPUT,
)
def _quantize(args):
    """Round the weights of a model to few bits, by text that it reads.

    Without --data the model writes the text. The result has floats on the
    grid of these bits; `pack` stores it small.

    examples:
      keras-weightmods quantize llm.safetensors --data prose.txt \\
          -o rounded.safetensors
      keras-weightmods pack rounded.safetensors -o packed.safetensors
    """
    model = load_model(args.model)
    report = kwm.quantize(
        model,
        read_data(model, args),
        args.bits,
        refine=None if args.refine == "none" else args.refine,
        verbose=int(not args.quiet),
    )
    write_model(model, args.output)
    return reported(report, args.output)


@command(
    "sparsify",
    MODEL,
    PATTERN,
    argument(
        "--criterion",
        default="magnitude",
        choices=("magnitude", "wanda", "sparsegpt"),
        help="default: magnitude; the others need --data",
    ),
    argument("--refine", nargs="+", choices=("swaps", "blocks")),
    TARGETS,
    *DATA,
    QUIET,
    *MODEL_OUTPUT,
)
def _sparsify(args):
    """Make a model N:M sparse in one shot, without training.

    examples:
      keras-weightmods sparsify model.keras -o sparse.keras
      keras-weightmods sparsify llm.safetensors --data prose.txt \\
          --criterion sparsegpt --refine swaps blocks -o sparse.safetensors
    """
    model = load_model(args.model)
    report = kwm.sparsify(
        model,
        args.pattern,
        read_data(model, args),
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
        help="of the values; default: as `quantize` or `sparsify` left them",
    ),
    argument("--activations", choices=("int8", "float32")),
    TARGETS,
    QUIET,
    *output(".safetensors"),
)
def _pack(args):
    """Pack the weights of a finished model.

    examples:
      keras-weightmods pack rounded.safetensors -o packed.safetensors
      keras-weightmods pack model.keras --dtype int8 -o packed.safetensors
    """
    model = load_model(args.model)
    report = kwm.pack(
        model,
        args.dtype,
        targets=args.targets,
        activations=args.activations,
        verbose=int(not args.quiet),
    )
    write_model(model, args.output)
    return reported(report, args.output)


@command(
    "merge",
    argument(
        "models",
        type=file,
        nargs="+",
        help="models of one architecture, as .keras files or of `save_model`; "
        "or one .yaml or .json file, a configuration of mergekit",
    ),
    argument("--method", default="linear", help="default: linear"),
    argument("--weights", type=float, nargs="+", help="one for each model"),
    argument("--base", type=file, help="what the models were trained from"),
    OPTIONS,
    QUIET,
    *output(".safetensors"),
)
def _merge(args):
    """Merge models of one architecture into one.

    Files of `save_model` are merged out of core: no model is in memory.

    examples:
      keras-weightmods merge a.safetensors b.safetensors --weights 1 3 \\
          -o merged.safetensors
      keras-weightmods merge a.keras b.keras --base base.keras \\
          --method ties --set density=0.3 -o merged.safetensors
      keras-weightmods merge config.yaml -o merged.safetensors
    """
    models = args.models
    options = dict(args.set)
    if len(models) == 1 and models[0].endswith((".yaml", ".yml", ".json")):
        models = models[0]
    else:
        options |= {
            "method": args.method,
            "weights": args.weights,
            "base": args.base,
        }
    report = kwm.merge(
        models,
        args.output,
        overwrite=args.overwrite,
        verbose=int(not args.quiet),
        **options,
    )
    return reported(report, args.output)


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
    """Let a language model of KerasHub continue a text.

    examples:
      keras-weightmods generate llm.safetensors "Once upon a time"
    """
    model = load_model(args.model)
    if getattr(model, "preprocessor", None) is None:
        raise ValueError(
            "`generate` needs a CausalLM of KerasHub with a preprocessor. "
            f"Received: {args.model}, a {type(model).__name__}"
        )
    import keras

    from keras_weightmods.evaluation.token_scorer import longest_input

    keras.utils.set_random_seed(args.seed)
    model.compile(sampler=args.sampler)
    most = longest_input(model, args.max_length)
    texts = model.generate(args.prompt, max_length=most)
    return "\n".join(texts), {"texts": list(texts)}


@command(
    "export",
    MODEL,
    argument("--format", default="tf_saved_model", help="one of `kwm.export`"),
    argument("--keep-packed", action="store_true"),
    OPTIONS,
    *output(),
)
def _export(args):
    """Write a model for another runtime.

    examples:
      keras-weightmods export packed.safetensors -o saved
      keras-weightmods export llm.safetensors --format gguf \\
          --set dtype=q8_0 -o llm.gguf
    """
    kwm.export(
        load_model(args.model),
        args.output,
        args.format,
        keep_packed=args.keep_packed,
        overwrite=args.overwrite,
        **dict(args.set),
    )
    found = {"format": args.format, "output": args.output}
    return f"Wrote {args.output}, {args.format}", found
