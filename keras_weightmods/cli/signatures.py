"""The commands `signature ...`."""

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

_SIGNATURE = argument("signature", help="a .safetensors file")
_STATISTICS = ("keep", "average", "replace")
_METHODS = ("sum", "mean", "ties", "dare")


@command(
    "signature extract",
    argument("--init", help="where both trainings started"),
    argument("--clean", required=True),
    argument("--robust", required=True),
    argument("--depth", type=int, help="shallow layers; default: 7 or all"),
    argument("--targets", nargs="+", help="regexes for paths instead"),
    argument(
        "--statistics",
        choices=_STATISTICS,
        default="average",
        help="of batch normalizations; default: average",
    ),
    argument("--name", help="what to call it in tables"),
    *OUTPUT,
)
def _extract(args):
    """Make a signature of checkpoints.

    examples:
      keras-weightmods signature extract --init start.keras \\
          --clean clean.keras --robust noise.keras -o noise.safetensors
      keras-weightmods signature extract --clean clean.keras \\
          --robust noise.keras --targets 'block[12]_' -o noise.safetensors
    """
    check_output(args, ".safetensors")
    signature = kwm.WeightSignature.extract(
        args.init and load_model(args.init),
        load_model(args.clean),
        load_model(args.robust),
        args.depth,
        targets=args.targets,
        statistics=args.statistics,
        name=args.name,
    )
    return _save(signature, args)


@command("signature apply", _SIGNATURE, MODEL, SCALE, *OUTPUT)
def _apply(args):
    """Add a signature to a model.

    examples:
      keras-weightmods signature apply noise.safetensors clean.keras \\
          -o new.keras
      keras-weightmods signature apply noise.safetensors clean.keras \\
          --scale 0.5 -o clean.keras --overwrite
    """
    return _change_model(args, kwm.WeightSignature.apply)


@command("signature remove", _SIGNATURE, MODEL, SCALE, *OUTPUT)
def _remove(args):
    """Subtract a signature from a model.

    Subtracts, which rounds: to have the clean model bit for bit, keep its
    file.

    examples:
      keras-weightmods signature remove noise.safetensors new.keras \\
          -o old.keras
    """
    return _change_model(args, kwm.WeightSignature.subtract)


@command(
    "signature add",
    argument("signatures", nargs="+"),
    argument("--method", default="sum", choices=_METHODS),
    argument("--weights", type=float, nargs="+"),
    argument("--density", type=float, help="of ties; default: 0.2"),
    argument("--drop-rate", type=float, help="of dare; default: 0.9"),
    argument("--seed", type=int, default=0, help="of dare"),
    *OUTPUT,
)
def _add(args):
    """Make one signature of several.

    examples:
      keras-weightmods signature add noise.safetensors blur.safetensors \\
          -o both.safetensors
      keras-weightmods signature add noise.safetensors blur.safetensors \\
          --method ties --density 0.3 --weights 1 0.5 -o both.safetensors
    """
    check_output(args, ".safetensors")
    signature = kwm.WeightSignature.sum(
        [kwm.WeightSignature.load(path) for path in args.signatures],
        args.method,
        args.weights,
        density=args.density,
        drop_rate=args.drop_rate,
        seed=args.seed,
    )
    return _save(signature, args)


@command(
    "signature quantize",
    _SIGNATURE,
    argument("--bits", type=int, default=8, choices=(8, 4, 2)),
    argument("--per-channel", action="store_true"),
    *OUTPUT,
)
def _quantize(args):
    """Round a signature to few bits.

    examples:
      keras-weightmods signature quantize noise.safetensors \\
          -o noise8.safetensors
      keras-weightmods signature quantize noise.safetensors --bits 4 \\
          --per-channel -o noise4.safetensors
    """
    check_output(args, ".safetensors")
    signature = kwm.WeightSignature.load(args.signature)
    return _save(signature.quantize(args.bits, args.per_channel), args)


@command("signature info", _SIGNATURE)
def _info(args):
    """Say what a signature holds.

    examples:
      keras-weightmods signature info noise.safetensors
    """
    signature = kwm.WeightSignature.load(args.signature)
    return _described(signature)


def _described(signature, output=None):
    """Return the result of a command on a signature."""
    text, found = reported(signature.report(), output)
    prints = signature.fingerprints
    lines = [f"{key}: SHA-256 {value}" for key, value in prints.items()]
    text = "\n".join([text, *(lines if output is None else [])])
    return text, {**found, "fingerprints": prints}


def _save(signature, args):
    signature.save(args.output, args.overwrite)
    return _described(signature, args.output)


def _change_model(args, change):
    """Write a model with other weights."""
    check_output(args)
    signature = kwm.WeightSignature.load(args.signature)
    model = load_model(args.model)
    change(signature, model, args.scale)
    clean = signature.fingerprints.get("clean")
    return write_changed(model, args, len(signature), clean)
