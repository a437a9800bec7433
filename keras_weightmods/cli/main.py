"""The command line `keras-weightmods`."""

import argparse
import os
import pathlib
import sys

_EXAMPLES = {
    None: """\
examples:
  keras-weightmods inspect model.keras
  keras-weightmods signature extract --init start.keras --clean clean.keras \\
      --robust noise.keras -o noise.safetensors
  keras-weightmods signature apply noise.safetensors clean.keras -o new.keras
  keras-weightmods report model.keras --pattern 2:4

exit codes: 0 done, 1 an error in the files or values given, 2 wrong usage
""",
    "inspect": """\
examples:
  keras-weightmods inspect model.keras
  keras-weightmods inspect noise.safetensors
""",
    "report": """\
examples:
  keras-weightmods report model.keras
  keras-weightmods report model.keras --pattern 1:4
""",
    "extract": """\
examples:
  keras-weightmods signature extract --init start.keras --clean clean.keras \\
      --robust noise.keras -o noise.safetensors --name noise
  keras-weightmods signature extract --clean clean.keras \\
      --robust noise.keras --targets 'block[12]_' -o noise.safetensors
""",
    "apply": """\
examples:
  keras-weightmods signature apply noise.safetensors clean.keras -o new.keras
  keras-weightmods signature apply noise.safetensors clean.keras \\
      --scale 0.5 -o clean.keras --overwrite
""",
    "remove": """\
Subtracts, which rounds: to have the clean model bit for bit, keep its file.

examples:
  keras-weightmods signature remove noise.safetensors new.keras -o old.keras
""",
    "add": """\
examples:
  keras-weightmods signature add noise.safetensors blur.safetensors \\
      -o both.safetensors
  keras-weightmods signature add noise.safetensors blur.safetensors \\
      --method ties --density 0.3 --weights 1 0.5 -o both.safetensors
""",
    "quantize": """\
examples:
  keras-weightmods signature quantize noise.safetensors -o noise8.safetensors
  keras-weightmods signature quantize noise.safetensors --bits 4 \\
      --per-channel -o noise4.safetensors
""",
    "info": """\
examples:
  keras-weightmods signature info noise.safetensors
""",
}


class _UserError(Exception):
    """Something in what the user gave; told without a traceback."""


def main(argv=None):
    """Runs the command line.

    Args:
        argv: List of strings, the arguments. Defaults to those of the
            process.

    Returns:
        Int, the exit code: 0 if it is done, 1 for an error in the files or
        values given. Wrong usage exits with 2.
    """
    args = _parser().parse_args(argv)
    # What backends log on standard error would hide the message.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        args.run(args)
    except (_UserError, ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"keras-weightmods: {error}\n")
        return 1
    return 0


def _parser():
    parser = _new_parser(
        argparse.ArgumentParser,
        None,
        "Looks at and changes the weights of Keras models.",
        prog="keras-weightmods",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = _new_parser(
        commands.add_parser, "inspect", "Say what a file holds."
    )
    command.add_argument("file", help="a .keras model or a signature")
    command.set_defaults(run=_inspect)

    command = _new_parser(
        commands.add_parser, "report", "Report the sparsity of a model."
    )
    command.add_argument("model", help="a .keras file")
    command.add_argument("--pattern", default="2:4", help="default: 2:4")
    command.set_defaults(run=_report)

    signature = commands.add_parser(
        "signature", help="Extract, apply and combine signatures."
    )
    commands = signature.add_subparsers(required=True, metavar="COMMAND")

    command = _new_parser(
        commands.add_parser, "extract", "Make a signature of checkpoints."
    )
    command.add_argument("--init", help="where both trainings started")
    command.add_argument("--clean", required=True)
    command.add_argument("--robust", required=True)
    which = command.add_mutually_exclusive_group()
    which.add_argument("--depth", type=int, help="shallow layers; default: 7")
    which.add_argument(
        "--targets", nargs="+", help="regular expressions for paths instead"
    )
    command.add_argument(
        "--statistics", default="keep", choices=("keep", "average", "replace")
    )
    command.add_argument("--name", help="what to call it in tables")
    _add_output(command)
    command.set_defaults(run=_extract)

    for name, run, help in (
        ("apply", _apply, "Add a signature to a model."),
        ("remove", _remove, "Subtract a signature from a model."),
    ):
        command = _new_parser(commands.add_parser, name, help)
        command.add_argument("signature")
        command.add_argument("model", help="a .keras file")
        command.add_argument(
            "--scale", type=float, default=1.0, help="default: 1"
        )
        _add_output(command)
        command.set_defaults(run=run)

    command = _new_parser(
        commands.add_parser, "add", "Make one signature of several."
    )
    command.add_argument("signatures", nargs="+")
    command.add_argument(
        "--method", default="sum", choices=("sum", "mean", "ties", "dare")
    )
    command.add_argument("--weights", type=float, nargs="+")
    command.add_argument("--density", type=float, default=0.2, help="of ties")
    command.add_argument("--drop-rate", type=float, default=0.9, help="of dare")
    command.add_argument("--seed", type=int, default=0, help="of dare")
    _add_output(command)
    command.set_defaults(run=_add)

    command = _new_parser(
        commands.add_parser, "quantize", "Round a signature to few bits."
    )
    command.add_argument("signature")
    command.add_argument("--bits", type=int, default=8, choices=(8, 4, 2))
    command.add_argument("--per-channel", action="store_true")
    _add_output(command)
    command.set_defaults(run=_quantize)

    command = _new_parser(
        commands.add_parser, "info", "Say what a signature holds."
    )
    command.add_argument("signature")
    command.set_defaults(run=_info)
    return parser


def _new_parser(make, name, help, **kwargs):
    if name is not None:
        kwargs.update(name=name, help=help)
    return make(
        description=help,
        epilog=_EXAMPLES[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **kwargs,
    )


def _add_output(command):
    command.add_argument(
        "-o", "--output", required=True, help="the new file to write"
    )
    command.add_argument(
        "--overwrite", action="store_true", help="even if it exists"
    )


def _inspect(args):
    if pathlib.Path(args.file).suffix == ".safetensors":
        _info(argparse.Namespace(signature=args.file))
        return
    from rich.table import Table

    from keras_weightmods.patches import checkpoint as checkpoints

    model = _load_model(args.file)
    checkpoint = checkpoints.Checkpoint("model", model)
    roles = checkpoints.roles(checkpoint, checkpoint.infos)
    depths = checkpoints.depths(checkpoint, checkpoint.infos, roles)
    total = sum(info.nbytes for info in checkpoint.infos)
    table = Table(
        title=f"{type(model).__name__} {model.name}",
        caption=f"{model.count_params():,} weights, {total:,} bytes",
    )
    table.add_column("place", justify="right")
    table.add_column("path", overflow="fold")
    for name in ("depth", "shape", "dtype", "role"):
        table.add_column(name, justify="right")
    for info, role, depth in zip(checkpoint.infos, roles, depths):
        table.add_row(
            str(info.position),
            info.path,
            str(depth + 1),
            "x".join(map(str, info.shape)),
            info.dtype,
            role,
        )
    _console().print(table)


def _report(args):
    from keras_weightmods import sparsity_report

    report = sparsity_report(_load_model(args.model), args.pattern)
    _console().print(report.table(), markup=False, soft_wrap=True)


def _extract(args):
    from keras_weightmods import WeightSignature

    _check_output(args, ".safetensors")
    init, clean, robust = (
        None if path is None else _load_model(path)
        for path in (args.init, args.clean, args.robust)
    )
    signature = WeightSignature.extract(
        init,
        clean,
        robust,
        depth=args.depth,
        targets=args.targets,
        statistics=args.statistics,
        name=args.name,
    )
    _save_signature(signature, args)


def _apply(args):
    _change_model(args, lambda signature, w: signature.apply(w, args.scale))


def _remove(args):
    def remove(signature, weights):
        return signature.remove(weights, force=True, scale=args.scale)

    model, signature = _change_model(args, remove)
    from keras_weightmods.patches.checkpoint import Checkpoint

    clean = signature.fingerprints.get("clean")
    if clean == Checkpoint("model", model).fingerprint():
        _console().print("This is the clean checkpoint, bit for bit.")


def _change_model(args, change):
    _check_output(args, ".keras")
    signature = _load_signature(args.signature)
    model = _load_model(args.model)
    model.set_weights(change(signature, model.get_weights()))
    _write(args.output, model.save)
    _console().print(
        f"{len(signature)} of {len(model.weights)} weights changed; wrote "
        f"{args.output}"
    )
    return model, signature


def _add(args):
    from keras_weightmods import sum_signatures

    _check_output(args, ".safetensors")
    signature = sum_signatures(
        [_load_signature(path) for path in args.signatures],
        args.method,
        args.weights,
        density=args.density,
        drop_rate=args.drop_rate,
        seed=args.seed,
    )
    _save_signature(signature, args)


def _quantize(args):
    _check_output(args, ".safetensors")
    signature = _load_signature(args.signature)
    _save_signature(signature.quantize(args.bits, args.per_channel), args)


def _info(args):
    signature = _load_signature(args.signature)
    console = _console()
    console.print(signature.report())
    for key, value in signature.fingerprints.items():
        console.print(f"{key}: SHA-256 {value}")


def _save_signature(signature, args):
    signature.save(args.output)
    console = _console()
    console.print(signature.report())
    console.print(f"Wrote {args.output}")


def _load_signature(path):
    from keras_weightmods import WeightSignature

    return WeightSignature.load(path)


def _load_model(path):
    import keras

    if not pathlib.Path(path).is_file():
        raise _UserError(f"there is no file {path}")
    try:
        return keras.saving.load_model(path, compile=False)
    # A file that is none fails in many ways, and each kind of model in its
    # own; the message is Keras'.
    except Exception as error:
        raise _UserError(f"Keras cannot load {path}: {error}") from error


def _check_output(args, suffix):
    """Before any work: the output may be written, and is no input."""
    output = pathlib.Path(args.output)
    if output.suffix != suffix:
        raise _UserError(f"the output must end in {suffix}: {output}")
    if output.exists() and not args.overwrite:
        raise _UserError(f"{output} exists; --overwrite replaces it")
    if not output.parent.is_dir():
        raise _UserError(f"there is no folder {output.parent}")


def _write(path, save):
    """Saves beside `path` and moves it there when it is complete."""
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        save(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _console():
    try:
        from rich.console import Console
    except ImportError as error:
        raise _UserError(
            "tables need the package rich: `pip install rich`"
        ) from error
    # Paths and numbers are not to be coloured, nor long paths cut in a pipe.
    return Console(highlight=False, soft_wrap=False)
