"""The commands `delta ...`."""

import keras_weightmods as kwm
from keras_weightmods.cli.command import (
    MODEL,
    OUTPUT,
    SCALE,
    argument,
    command,
    reported,
)
from keras_weightmods.cli.files import (
    check_output,
    load_model,
    write_changed,
)

_DELTA = argument("delta", help="a .safetensors file of `delta save`")
_FORCE = argument(
    "--force", action="store_true", help="also on a model that is another one"
)

_DTYPE = argument(
    "--dtype",
    default="bfloat16",
    choices=("bfloat16", "float16", "float32", "exact"),
    help="of the differences; exact keeps the new values instead, and "
    "gives the model bit for bit; default: bfloat16",
)


@command(
    "delta save",
    MODEL,
    argument("base", help="the model that it was trained from"),
    _DTYPE,
    argument(
        "--whole",
        nargs="+",
        metavar="REGEX",
        help="weights that others' base lacks, as a new head, whole and exact",
    ),
    *OUTPUT,
)
def _save(args):
    """Store what is different in a model from the one it was trained from.

    examples:
      keras-weightmods delta save tuned.keras base.keras -o task.safetensors
    """
    check_output(args, ".safetensors")
    model, base = load_model(args.model), load_model(args.base)
    patch = kwm.Patch.from_models(model, base, _dtype(args), whole=args.whole)
    return reported(patch.save(args.output, args.overwrite), args.output)


@command("delta apply", _DELTA, MODEL, SCALE, _FORCE, *OUTPUT)
def _apply(args):
    """Put a delta on the model that it was made for.

    examples:
      keras-weightmods delta apply task.safetensors base.keras -o tuned.keras
    """
    check_output(args)
    patch = kwm.Patch.load(args.delta)
    model = load_model(args.model)
    report = patch.apply(model, args.scale, force=args.force)
    return write_changed(model, args, len(report.changed), None)


@command("delta remove", _DELTA, MODEL, SCALE, *OUTPUT)
def _remove(args):
    """Subtract a delta from a model.

    Subtracts, which rounds: to have the base bit for bit, keep its file. It
    is said where they are equal.

    examples:
      keras-weightmods delta remove task.safetensors tuned.keras -o base.keras
    """
    check_output(args)
    patch = kwm.Patch.load(args.delta)
    model = load_model(args.model)
    report = patch.subtract(model, args.scale)
    return write_changed(
        model, args, len(report.subtracted), patch.fingerprints.get("base")
    )


@command(
    "delta to-lora",
    _DELTA,
    argument("model", help="the KerasHub model that the delta was made for"),
    argument("--rank", type=int, default=16, help="default: 16"),
    _FORCE,
    *OUTPUT,
)
def _to_lora(args):
    """Write a delta as the nearest LoRA adapter of peft of a rank.

    examples:
      keras-weightmods delta to-lora task.safetensors base.safetensors \\
          --rank 32 -o adapter
    """
    patch = kwm.Patch.load(args.delta)
    report = patch.to_lora(
        load_model(args.model),
        args.output,
        args.rank,
        force=args.force,
        overwrite=args.overwrite,
    )
    return reported(report, args.output)


@command(
    "delta from-lora",
    argument("lora", help="a folder of peft"),
    argument("model", help="the KerasHub model that the adapter is for"),
    _DTYPE,
    *OUTPUT,
)
def _from_lora(args):
    """Write a LoRA adapter as a delta.

    examples:
      keras-weightmods delta from-lora adapter base.safetensors \\
          -o task.safetensors
    """
    check_output(args, ".safetensors")
    model, dtype = load_model(args.model), _dtype(args)
    patch = kwm.Patch.from_lora(model, args.lora, dtype)
    return reported(patch.save(args.output, args.overwrite), args.output)


def _dtype(args):
    return None if args.dtype == "exact" else args.dtype
