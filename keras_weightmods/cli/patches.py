"""The commands `patch ...`: what a training changed, as a file."""

import keras_weightmods as kwm
from keras_weightmods.cli.command import (
    CARD,
    MODELS,
    PATCHES,
    command,
    reported,
)
from keras_weightmods.cli.files import load_model, written


@command(
    "patch extract",
    "model base --dtype --whole --signature --init --depth",
    PATCHES,
)
def _extract(args):
    """Write the difference between a model and its base.

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


@command("patch apply", f"model patch --scale --force {CARD}", MODELS)
def _apply(args):
    """Put a patch on a model.

    examples:
      keras-weightmods patch apply base.keras task.safetensors -o tuned.keras
    """
    patch, model = kwm.Patch.load(args.patch), load_model(args.model)
    report = patch.apply(model, args.scale, force=args.force)
    return written(model, report, args)


@command("patch remove", f"model patch --scale {CARD}", MODELS)
def _remove(args):
    """Subtract a patch from a model that was saved with it.

    Subtracting rounds: to have the base bit for bit, keep its file.

    examples:
      keras-weightmods patch remove tuned.keras task.safetensors -o base.keras
    """
    patch, model = kwm.Patch.load(args.patch), load_model(args.model)
    report = patch.subtract(model, args.scale)
    return written(model, report, args)


@command("patch info", "patch")
def _info(args):
    """Say what a patch changes, weight by weight.

    examples:
      keras-weightmods patch info task.safetensors
    """
    return reported(kwm.Patch.load(args.patch).report())


@command("patch to-lora", "model patch --rank --force", ())
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


@command("patch from-lora", "model lora --dtype", PATCHES)
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
