"""The commands that make a model smaller, let it write, and export it."""

import os

import keras_weightmods as kwm
from keras_weightmods.cli.command import (
    CARD,
    DATA,
    LOAD,
    MODELS,
    command,
    names,
    reported,
)
from keras_weightmods.cli.files import (
    card_of,
    load_model,
    read_data,
    written,
)
from keras_weightmods.saving import model_card


@command(
    "quantize",
    f"model --bits {DATA} {LOAD} {CARD} --quiet",
    MODELS,
    refine={
        "type": names("blocks", "scales", "none"),
        "default": ("blocks", "scales"),
        "help": "none is several times faster and less exact",
    },
    resume={
        "metavar": "FOLDER",
        "help": "keep each finished block here; after a kill, the same "
        "command continues from it",
    },
    size={"help": "the most bytes that the packed model takes, such as 60MB"},
)
def _quantize(args):
    """Round the weights of a model to few bits, on calibration data.

    Without --data the model writes the text. The result has floats on the
    grid of these bits; `pack` stores it small.

    examples:
      keras-weightmods quantize llm.safetensors --data prose.txt \\
          -o rounded.safetensors
      keras-weightmods pack rounded.safetensors -o packed.safetensors
      keras-weightmods quantize llm.safetensors --size 60MB \\
          -o rounded.safetensors
    """
    # It imports Keras.
    from keras_weightmods.quantization.record import remove_record

    model = load_model(args.model, args.policy, args.tie_weights)
    report = kwm.quantize(
        model,
        read_data(model, args),
        args.bits,
        size=args.size,
        refine=None if "none" in args.refine else args.refine,
        resume=args.resume,
        verbose=not args.quiet,
    )
    result = written(model, report, args)
    if args.resume:
        remove_record(args.resume)
    return result


@command(
    "sparsify",
    "model --pattern --criterion --refine --targets "
    f"{DATA} {LOAD} {CARD} --quiet",
    MODELS,
)
def _sparsify(args):
    """Make a model N:M sparse in one shot, without training.

    examples:
      keras-weightmods sparsify model.keras -o sparse.keras
      keras-weightmods sparsify llm.safetensors --data prose.txt \\
          --criterion sparsegpt --refine swaps,blocks -o sparse.safetensors
    """
    model = load_model(args.model, args.policy, args.tie_weights)
    report = kwm.sparsify(
        model,
        args.pattern,
        read_data(model, args),
        criterion=args.criterion,
        refine=args.refine,
        targets=args.targets,
        verbose=not args.quiet,
    )
    return written(model, report, args)


@command(
    "pack",
    f"model --activations --targets {LOAD} {CARD} --quiet",
    (".safetensors",),
    dtype={
        "choices": (
            *("float32", "bfloat16", "int8"),
            *("int2", "int3", "int4", "int5", "int6"),
        ),
        "help": "the type of the values; default: round nothing",
    },
)
def _pack(args):
    """Pack the weights of a finished model.

    examples:
      keras-weightmods pack rounded.safetensors -o packed.safetensors
      keras-weightmods pack model.keras --dtype int8 -o packed.safetensors
    """
    model = load_model(args.model, args.policy, args.tie_weights)
    report = kwm.pack(
        model,
        args.dtype,
        targets=args.targets,
        activations=args.activations,
        verbose=not args.quiet,
    )
    return written(model, report, args)


@command(
    "merge",
    f"models --method --weights --base --set {CARD} --quiet",
    (".safetensors",),
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
    models, options = args.models, dict(args.set)
    if len(models) == 1 and models[0].endswith((".yaml", ".yml", ".json")):
        models = models[0]
    else:
        for name in ("method", "weights", "base"):
            options[name] = getattr(args, name)
    report = kwm.merge(
        models,
        args.output,
        overwrite=args.overwrite,
        verbose=not args.quiet,
        **options,
    )
    card = card_of(args, report)
    # No model was in memory.
    size = os.path.getsize(args.output)
    model_card.write(card, args.output, size, None, "save_model")
    return reported(report, args.output, model_card.path_of(args.output))


@command("generate", f"model prompt --max-length --sampler --seed {LOAD}")
def _generate(args):
    """Let a language model of KerasHub continue a text.

    examples:
      keras-weightmods generate llm.safetensors "Once upon a time"
    """
    model = load_model(args.model, args.policy, args.tie_weights)
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


@command("export", f"model --format --keep-packed --set {LOAD} {CARD}", ())
def _export(args):
    """Write a model for another runtime.

    examples:
      keras-weightmods export packed.safetensors -o saved
      keras-weightmods export llm.safetensors --set dtype=q8_0 -o llm.gguf
    """
    from keras_weightmods.exporting.export import format_of

    format = format_of(args.output, args.format)
    kwm.export(
        load_model(args.model, args.policy, args.tie_weights),
        args.output,
        format,
        keep_packed=args.keep_packed,
        overwrite=args.overwrite,
        card=card_of(args),
        **dict(args.set),
    )
    card = model_card.path_of(args.output, os.path.isdir(args.output))
    found = {"format": format, "output": args.output, "card": card}
    return f"Wrote {args.output}, {format}\nWrote {card}", found
