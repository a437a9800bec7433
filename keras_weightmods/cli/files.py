"""Models and data in files, of any kind that the library reads."""

import json
import os
import pathlib
import zipfile

import numpy as np

from keras_weightmods.saving.atomic_file import check_filepath, replacing
from keras_weightmods.saving.file_kinds import kind_of, other_kind
from keras_weightmods.utils import checks


def load_model(path):
    """Load a model from a file or preset of any kind.

    Args:
        path: String: a `.keras` file, a file of `save_model`, the folder of a
            KerasHub preset, or the name of one.
    """
    if not os.path.exists(path):
        return _load_preset(path)
    kind, reader = kind_of(path)
    if kind == "a preset":
        return _load_preset(path)
    if reader == "`keras_weightmods.load_model`":
        import keras_weightmods as kwm

        return kwm.load_model(path)
    if reader and kind not in ("a .keras file", "an HDF5 file"):
        raise ValueError(f"{path} is no model: {kind}, which {reader} reads")
    import keras

    try:
        return keras.saving.load_model(path, compile=False)
    # A file that is none fails in many ways, and each kind of model in its
    # own; the message is Keras'.
    except Exception as error:
        raise ValueError(f"Keras cannot load {path}: {error}") from error


def is_model(path):
    """Return whether there is a file, folder or preset of that name."""
    if os.path.exists(path) or "://" in path:
        return True
    models = _hub_models()
    return models is not None and path in models.Backbone.presets


def _hub_models():
    try:
        from keras_hub import models
    except ImportError:
        return None
    return models


def _load_preset(path):
    if not is_model(path):
        raise FileNotFoundError(f"there is no file {path}")
    models = _hub_models()
    if models is None:
        raise ImportError(
            f"{path} is a preset, and KerasHub is not installed. Install "
            "with: pip install 'keras-weightmods[hub]'"
        )
    task = pathlib.Path(path, "task.json")
    name = "CausalLM"
    if task.is_file():
        name = json.loads(task.read_text())["class_name"]
    return getattr(models, name).from_preset(path)


def write_model(model, output):
    """Write a model to a file of the kind that its ending says."""
    import keras_weightmods as kwm
    from keras_weightmods.core.reparameterization import reparameterizations

    if pathlib.Path(output).suffix == ".safetensors":
        kwm.save_model(model, output)
        return
    items = reparameterizations(model)
    if items:
        raise ValueError(
            f"A .keras file cannot hold the {len(items)} weights that are "
            "packed or reparameterized, as "
            f"{items[0].target.path!r}: let the output end in .safetensors"
        )
    with replacing(os.path.realpath(output)) as path:
        model.save(path)


def write_changed(model, args, count, clean):
    """Write a model with other weights; return the result of the command.

    Args:
        model: The model.
        args: The arguments, with the file of the model and the output.
        count: Int, the weights that were changed.
        clean: String, the fingerprint that the clean model has, or None.
    """
    from keras_weightmods.patches.checkpoint import Checkpoint

    # The output may be the same file.
    was_compiled = _is_compiled(args.model)
    write_model(model, args.output)
    is_clean = clean == Checkpoint("model", model).fingerprint()
    changed = f"{count} of {len(model.weights)} weights changed"
    text = f"{changed}; wrote {args.output}"
    if is_clean:
        text += "\nThis is the clean checkpoint, bit for bit."
    if was_compiled:
        text += (
            f"\nWhat {args.model} had of `compile` and `fit`, as an optimizer, "
            "is not in it: compile it again."
        )
    return text, {
        "changed": count,
        "is_clean": is_clean,
        "was_compiled": was_compiled,
        "output": args.output,
    }


def _is_compiled(path):
    """Return whether a `.keras` file holds what `compile` has set."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
    return bool(config.get("compile_config"))


def check_output(args, *suffixes):
    """Raise an error before any work if the output cannot be written."""
    suffixes = suffixes or (".keras", ".safetensors")
    if pathlib.Path(args.output).suffix not in suffixes:
        expected = " or ".join(suffixes)
        raise ValueError(f"the output must end in {expected}: {args.output}")
    check_new(args)
    check_filepath(args.output)


def check_new(args):
    """Raise FileExistsError if the output exists and may not be replaced."""
    if os.path.exists(args.output) and not args.overwrite:
        raise FileExistsError(f"{args.output} exists; --overwrite replaces it")


def is_language_model(model):
    """Return whether a model is a task of KerasHub on tokens alone."""
    inputs = getattr(model, "input", None)
    return (
        hasattr(model, "backbone")
        and isinstance(inputs, dict)
        and {*inputs} == {"token_ids", "padding_mask"}
    )


def read_data(model, path, rows=None, length=256):
    """Return what a model is calibrated, trained or measured on.

    Args:
        model: The model.
        path: String. For a language model a text, cut into rows of tokens, or
            a `.npy` file of rows of tokens; for any other a `.npy` file of
            inputs or a `.npz` file of `x` and `y`.
        rows: Int, the most to take; None for all.
        length: Int, tokens in a row, where they are cut from a text.

    Returns:
        For a language model an int32 array (rows, tokens); for any other the
        pair of inputs and labels, None where there are none.
    """
    suffix = pathlib.Path(path).suffix
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    if is_language_model(model):
        if suffix != ".npy":
            return rows_of_text(model, path, length)[:rows]
        tokens = _load_numpy(path)
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
            expected = "an array of ints, (rows, tokens)"
            received = f"{path}: {tokens.dtype} of shape {tokens.shape}"
            raise checks.error("data", expected, received)
        return tokens[:rows].astype("int32")
    if suffix not in (".npy", ".npz"):
        expected = "a .npy or .npz file for a model that is no language model"
        raise checks.error("data", expected, path)
    loaded = _load_numpy(path)
    if suffix == ".npy":
        return loaded[:rows], None
    if not {"x"} <= {*loaded} <= {"x", "y"}:
        expected = "arrays called x and, for labels, y"
        raise checks.error("data", expected, f"{path}: {sorted(loaded)}")
    return loaded["x"][:rows], loaded["y"][:rows] if "y" in loaded else None


def _load_numpy(path):
    try:
        loaded = np.load(path, allow_pickle=False)
        return loaded if isinstance(loaded, np.ndarray) else {**loaded}
    except (ValueError, EOFError) as error:
        kind = other_kind(path) or "a file that NumPy cannot read"
        raise ValueError(f"{path} is {kind} ({error})") from error


def rows_of_text(model, path, length):
    """Return the tokens of a text, in rows that begin as the model's do."""
    from keras_weightmods.evaluation import perplexity

    checks.check_int("length", length, 2)
    tokens = perplexity.tokenize(model, read_text(path))
    start = perplexity.start_token(model)
    if start is None:
        body = tokens[: len(tokens) // length * length].reshape(-1, length)
    else:
        size = length - 1
        tokens = tokens[1:]
        body = tokens[: len(tokens) // size * size].reshape(-1, size)
        body = np.insert(body, 0, start, axis=1)
    if not len(body):
        expected = f"of one row of {length} tokens at least"
        raise checks.error("data", expected, f"{path}: {len(tokens)} tokens")
    return body


def read_text(path):
    """Return a text; say what the file is where it is none."""
    try:
        return pathlib.Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        kind = other_kind(path) or "no text in UTF-8"
        raise ValueError(f"{path} is {kind}; a text is expected") from error


def inputs_of(model, data):
    """Return what `read_data` read as inputs of the model."""
    if is_language_model(model):
        return {"token_ids": data, "padding_mask": np.ones_like(data, bool)}
    return data[0]
