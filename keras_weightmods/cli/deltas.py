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
    changed_model,
    check_output,
    load_model,
    write_model,
)

_DELTA = argument("delta", help="a .safetensors file of `delta save`")
_FORCE = argument(
    "--force", action="store_true", help="also on a model that is another one"
)


@command(
    "delta save",
    MODEL,
    argument("base", help="the model that it was trained from"),
    argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float16", "float32"),
        help="of the differences; default: bfloat16",
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
    report = kwm.save_delta(model, base, args.output, args.dtype)
    return reported(report, args.output)


@command("delta apply", _DELTA, MODEL, SCALE, _FORCE, *OUTPUT)
def _apply(args):
    """Put a delta on the model that it was made for.

    examples:
      keras-weightmods delta apply task.safetensors base.keras -o tuned.keras
    """
    check_output(args)
    model = load_model(args.model)
    report = kwm.apply_delta(model, args.delta, args.scale, force=args.force)
    write_model(model, args.output)
    return changed_model(model, len(report.changed), None, args.output)


@command("delta remove", _DELTA, MODEL, SCALE, *OUTPUT)
def _remove(args):
    """Subtract a delta from a model.

    Subtracts, which rounds: to have the base bit for bit, keep its file. It
    is said where they are equal.

    examples:
      keras-weightmods delta remove task.safetensors tuned.keras -o base.keras
    """
    from keras_weightmods.patches.delta_file import read_delta

    check_output(args)
    base = read_delta(args.delta).fingerprint
    model = load_model(args.model)
    # On a model that is not the base, as it has the delta.
    report = kwm.apply_delta(model, args.delta, -args.scale, force=True)
    write_model(model, args.output)
    return changed_model(model, len(report.changed), base, args.output)
