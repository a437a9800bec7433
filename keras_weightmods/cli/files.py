"""Models and data in files, of any kind that the library reads."""

import json
import os
import pathlib

import numpy as np

import keras_weightmods as kwm
from keras_weightmods.saving.atomic_file import replacing
from keras_weightmods.saving.file_kinds import kind_of, other_kind
from keras_weightmods.utils import checks


def load_model(path):
    """Load a model from a file or preset of any kind.

    Args:
        path: String: a `.keras` file, a file of `save_model`, the folder of a
            KerasHub preset, or the name of one.
    """
    kind, reader = kind_of(path) if os.path.exists(path) else ("a preset", "")
    if kind == "a preset":
        return _load_preset(path)
    if reader == "`keras_weightmods.load_model`":
        return kwm.load_model(path)
    if reader and kind not in ("a .keras file", "an HDF5 file"):
        raise ValueError(f"{path} is no model: {kind}, which {reader} reads")
    import keras

    _ = kwm.load_model  # Keras then knows the classes of this package.
    try:
        return keras.saving.load_model(path, compile=False)
    # A damaged file fails in many ways.
    except Exception as error:
        raise ValueError(f"Keras cannot load {path}: {error}") from error


def _load_preset(path):
    try:
        from keras_hub import models
    except ImportError as error:
        raise ImportError(
            f"{path} is no file, and a preset needs KerasHub. Install with: "
            "pip install 'keras-weightmods[hub]'"
        ) from error
    is_known = path in models.Backbone.presets or "://" in path
    if not is_known and not os.path.exists(path):
        raise FileNotFoundError(f"there is no file or preset {path}")
    task = pathlib.Path(path, "task.json")
    name = "CausalLM"
    if task.is_file():
        name = json.loads(task.read_text())["class_name"]
    return getattr(models, name).from_preset(path)


def write_model(model, output):
    """Write a model to a file of the kind that its ending says."""
    if pathlib.Path(output).suffix == ".safetensors":
        kwm.save_model(model, output)
        return
    from keras_weightmods.core.reparameterization import reparameterizations

    items = reparameterizations(model)
    if items:
        raise ValueError(
            f"A .keras file cannot hold the {len(items)} weights that are "
            "packed or reparameterized, as "
            f"{items[0].target.path!r}: let the output end in .safetensors"
        )
    with replacing(os.path.realpath(output)) as path:
        model.save(path)


def read_data(model, args):
    """Return what a model is calibrated on, or None.

    For a language model of KerasHub a text, cut into rows of tokens; for any
    other model the array in a `.npy` file.
    """
    path = args.data
    if path is None:
        return None
    if pathlib.Path(path).suffix == ".npy":
        try:
            return np.load(path, allow_pickle=False)[: args.rows]
        except (ValueError, EOFError) as error:
            raise ValueError(f"NumPy cannot read {path}: {error}") from error
    if getattr(model, "preprocessor", None) is None:
        expected = "a .npy file for a model without a tokenizer"
        raise checks.error("data", expected, path)
    try:
        text = pathlib.Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        kind = other_kind(path) or "no text in UTF-8"
        raise ValueError(f"{path} is {kind}; a text is expected") from error
    rows = _rows_of(model, text, args.length)[: args.rows]
    if not len(rows):
        expected = f"a text of at least {args.length} tokens"
        raise checks.error("data", expected, path)
    mask = np.ones_like(rows, bool)
    return {"token_ids": rows, "padding_mask": mask}


def _rows_of(model, text, length):
    """Return the tokens of a text, in rows that begin as the model's do."""
    from keras_weightmods.evaluation import perplexity

    checks.check_int("length", length, 2)
    tokens = perplexity.tokenize(model, text)
    start = perplexity.start_token(model)
    size = length - (start is not None)
    tokens = tokens[length - size :]
    rows = tokens[: len(tokens) // size * size].reshape(-1, size)
    return rows if start is None else np.insert(rows, 0, start, axis=1)
