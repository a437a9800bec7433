"""The commands `patch ...`: what a training changed, as a file."""

import keras_weightmods as kwm
from keras_weightmods.cli.command import (
    BASE,
    FORCE,
    MODEL,
    MODEL_OUTPUT,
    SCALE,
    argument,
    command,
    file,
    output,
    reported,
)
from keras_weightmods.cli.files import load_model, write_model

_PATCH = argument("patch", type=file, help="a file of `patch extract`")
_DTYPE = argument(
    "--dtype",
    default="bfloat16",
    choices=("bfloat16", "float16", "float32", "exact"),
    help="of the differences; exact keeps the new values instead, and "
    "gives the model bit for bit; default: bfloat16",
)
_OUTPUT = output(".safetensors")


@command(
    "patch extract",
    MODEL,
    BASE,
    _DTYPE,
    argument(
        "--whole",
        nargs="+",
        metavar="REGEX",
        help="weights that the base lacks, as a new head: whole and exact",
    ),
    argument(
        "--signature",
        action="store_true",
        help="a robust weight signature: MODEL is trained on corrupted data, "
        "BASE on clean data; it goes onto any model of the architecture",
    ),
    argument("--init", type=file, help="of a signature: their common start"),
    argument("--depth", type=int, help="of a signature: default 7, or all"),
    *_OUTPUT,
)
def _extract(args):
    """Write what is different in a model from its base.

    examples:
      keras-weightmods patch extract tuned.keras base.keras \\
          -o task.safetensors
      keras-weightmods patch extract noise.keras clean.keras --signature \\
          --init start.keras -o noise.safetensors
    """
    if not args.signature and (args.init or args.depth):
        raise ValueError("--init and --depth are for a --signature")
    model, base = load_model(args.model), load_model(args.base)
    patch: kwm.Patch
    if args.signature:
        init = args.init and load_model(args.init)
        patch = kwm.WeightSignature.extract(init, base, model, args.depth)
    else:
        patch = kwm.Patch.from_models(
            model, base, _dtype(args), whole=args.whole
        )
    return reported(patch.save(args.output, args.overwrite), args.output)


@command("patch apply", MODEL, _PATCH, SCALE, FORCE, *MODEL_OUTPUT)
def _apply(args):
    """Put a patch on a model.

    examples:
      keras-weightmods patch apply base.keras task.safetensors -o tuned.keras
    """
    patch, model = kwm.Patch.load(args.patch), load_model(args.model)
    report = patch.apply(model, args.scale, force=args.force)
    write_model(model, args.output)
    return reported(report, args.output)


@command("patch remove", MODEL, _PATCH, SCALE, *MODEL_OUTPUT)
def _remove(args):
    """Subtract a patch from a model that was saved with it.

    Subtracting rounds: to have the base bit for bit, keep its file.

    examples:
      keras-weightmods patch remove tuned.keras task.safetensors -o base.keras
    """
    patch, model = kwm.Patch.load(args.patch), load_model(args.model)
    report = patch.subtract(model, args.scale)
    write_model(model, args.output)
    return reported(report, args.output)


@command("patch info", _PATCH)
def _info(args):
    """Say what a patch changes, weight by weight.

    examples:
      keras-weightmods patch info task.safetensors
    """
    return reported(kwm.Patch.load(args.patch).report())


@command(
    "patch to-lora",
    MODEL,
    _PATCH,
    argument("--rank", type=int, default=16, help="default: 16"),
    FORCE,
    *output(),
)
def _to_lora(args):
    """Write a patch as the nearest LoRA adapter of a rank, for peft.

    examples:
      keras-weightmods patch to-lora base.safetensors task.safetensors \\
          --rank 32 -o adapter
    """
    report = kwm.Patch.load(args.patch).to_lora(
        load_model(args.model),
        args.output,
        args.rank,
        force=args.force,
        overwrite=args.overwrite,
    )
    return reported(report, args.output)


@command(
    "patch from-lora",
    MODEL,
    argument("lora", type=file, help="a folder of peft"),
    _DTYPE,
    *_OUTPUT,
)
def _from_lora(args):
    """Write a LoRA adapter of peft as a patch.

    examples:
      keras-weightmods patch from-lora base.safetensors adapter \\
          -o task.safetensors
    """
    model = load_model(args.model)
    patch = kwm.Patch.from_lora(model, args.lora, _dtype(args))
    return reported(patch.save(args.output, args.overwrite), args.output)


def _dtype(args):
    return None if args.dtype == "exact" else args.dtype
