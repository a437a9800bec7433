"""One file for a whole model, with what was done to its weights in place."""

import contextlib
import json
import os
import tempfile
import types
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_weightmods.core import keras_compat
from keras_weightmods.core.restored import RestoredOnError
from keras_weightmods.saving import (
    atomic_file,
    bounded_json,
    container,
    description,
    model_card,
    shared,
    states,
)
from keras_weightmods.utils import checks
from keras_weightmods.utils.progress import Progress

FORMAT = "keras_weightmods.model"
VERSION = 1
_MODEL = "model.json"


def save_model(
    model: keras.Model,
    filepath: Any,
    overwrite: bool = True,
    verbose: int = 1,
    card: model_card.ModelCard | None = None,
) -> None:
    """Save a model to one file, with all in-place changes of its weights.

    The file holds what `load_model` needs to bring back the model. This is its
    config, scales, packed kernels and other changes, all variables bit for bit
    in their own dtypes, and other data of its layers, such as a tokenizer's
    vocabulary. So the file of a packed model has the packed size.

    A model is first built from the config, without values, and compared. So
    `load_model` can read any file that was written. (Some classes, such as
    T5Gemma 2, make variables from values. For these the model is built with
    values, which takes the memory of the model once more, in `load_model` too.)
    Where several processes train the model, all of them call this function, and
    the first one writes.

    Some configs lack an argument of the constructor that the layer keeps under
    the same name. `keras_hub.models.LlamaBackbone` lacks `tie_word_embeddings`,
    for example. The file has such arguments too.

    A KerasHub model is saved with its preprocessor and tokenizer. If these
    cannot be built from their config and assets, a warning says why, and the
    file holds the model alone. `load_model` then gives a model whose
    `preprocessor` is `None`; set it yourself. Changes made to a tokenizer after
    its construction are lost, as in any file of Keras. Only the rule by which
    one of `load_gguf` splits text is saved.

    What `compile` and `fit` add is not saved: optimizer, loss, metrics, the
    sampler of `generate`. Constraints of variables that no layer's config has,
    such as those of `SemiStructuredSparse.attach`, are not saved either, with a
    warning. LoRA is kept on layers whose weights were changed in place, and
    comes last in the `weights` of the loaded layer. On other layers it is
    merged into the kernel, as Keras does.

    The layout is that of safetensors: other tools can read the arrays. The file
    holds no code. It is written beside `filepath` and renamed when it is
    complete. Arrays are written one after another, so no second copy of the
    model is in memory.

    Args:
        model: A built Keras model. Register its own classes with
            `keras.saving.register_keras_serializable`, or pass them to
            `load_model`.
        filepath: String or path of the file, for instance
            `"model.safetensors"`.
        overwrite: Bool, whether to replace an existing file. Defaults to
            `True`.
        verbose: 0 or 1. 0 shows no progress bar; 1 shows one once it has
            taken two seconds. Defaults to `1`.
        card: `kwm.ModelCard`, what to say of the model in Markdown beside the
            file, in `model.safetensors.md`. Defaults to `None`, for no card; a
            warning says if that of an earlier model is there.

    Raises:
        ValueError: If `model` is not a built model, no file can be written at
            `filepath`, or the model cannot be built again from its config. The
            message says what differs. No file is written then.
        FileExistsError: If the file or its card exists and `overwrite` is
            `False`, or the card would replace a file that is no card.

    Example:

    ```python
    import os
    import tempfile
    import keras
    import numpy as np
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(4)])
    kwm.attach_scaling(model)
    x = np.ones((1, 16), "float32")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "scaled.safetensors")
        kwm.save_model(model, path)
        again = kwm.load_model(path)
    same = keras.ops.all(model(x) == again(x))
    assert bool(same)
    ```
    """
    if not isinstance(model, keras.Model) or not model.built:
        expected = (
            "a built Keras model. Call it on data once, or "
            "`model.build(input_shape)`"
        )
        raise checks.error("model", expected, model)
    checks.check_verbose(verbose)
    filepath = checks.check_path("filepath", filepath)
    ending = os.path.splitext(filepath)[1].lower()
    if ending in (".keras", ".h5", ".hdf5"):
        expected = (
            f"a file of this package, as model.safetensors. {ending!r} is for "
            "files of Keras, which `model.save` writes"
        )
        raise checks.error("filepath", expected, filepath)
    model_card.check_card(card)
    if shared.is_first():
        atomic_file.check_filepath(filepath, overwrite)
        card_path = model_card.path_of(filepath)
        if card is None:
            model_card.warn_of_old(card_path)
        else:
            model_card.check_path(card_path, overwrite)
    with (
        RestoredOnError(),
        Progress(1, "weight", verbose) as progress,
        tempfile.TemporaryDirectory() as folder,
    ):
        left_out = _preprocessor_to_leave_out(model)
        parts = states.walk(model, left_out)
        described = description.describe(model, parts, left_out)
        assets = states.save_assets(parts, folder)
        weights = states.weight_entries(parts)
        progress.total = len(weights)
        text = bounded_json.json_array(described)
        described = description.rehearsed(
            json.loads(text.tobytes()), parts, weights
        )
        text = bounded_json.json_array(described)
        entries = {_MODEL: container.Entry(text.shape, "uint8"), **weights}
        for name, file in assets.items():
            entries[name] = container.Entry((file.stat().st_size,), "uint8")

        def arrays() -> Iterator[tuple[str, Any]]:
            yield _MODEL, text
            for name, file in assets.items():
                yield name, np.fromfile(file, "uint8")
            for name, array in states.weights(parts):
                yield name, array
                progress.add(name)

        form = FORMAT, VERSION
        shared.write(filepath, *form, entries, arrays(), overwrite)
        if card is not None and shared.is_first():
            size = os.path.getsize(filepath)
            model_card.write(card, filepath, size, model, "save_model")
    shared.wait("save_model")


def _preprocessor_to_leave_out(model: Any) -> list[Any]:
    """Return [preprocessor] where that of the model cannot be saved, or []."""
    preprocessor = getattr(model, "preprocessor", None)
    if preprocessor is None:
        return []
    try:
        with (
            keras_compat.without_traces(),
            tempfile.TemporaryDirectory() as folder,
        ):
            parts = states.walk(preprocessor)
            config = keras.saving.serialize_keras_object(preprocessor)
            built = description.made(
                json.loads(json.dumps(config)), description.classes_of(parts)
            )
            states.save_assets(parts, folder)
            states.load_assets(states.walk(built), folder)
    # What the code of its class raises is not known.
    except Exception as error:
        warnings.warn(
            f"The preprocessor of model {model.name!r} is not saved, as it "
            "cannot be brought back from its config and assets "
            f"({type(error).__name__}: {description.message(error)}). Keep it "
            "elsewhere, and set `model.preprocessor` after `load_model`.",
            stacklevel=3,
        )
        return [preprocessor]
    return []


def load_model(
    filepath: Any,
    custom_objects: dict[str, Any] | None = None,
    verbose: int = 1,
) -> keras.Model:
    """Load a model that `save_model` saved.

    The whole file is checked first: sizes, names, dtypes, shapes, offsets and
    the SHA-256 of every entry and of the header. Then the model is built
    without values, its in-place changes are made again, and its entries are
    compared with those of the file. Only then are the values read, one layer
    after another. So there is never a second copy of the model in memory, nor
    the dense kernels of a packed one.

    A file holds no code. It can name only classes that Keras, KerasHub,
    `custom_objects` or a registration know. Layers that carry code, such as a
    `Lambda` of a Python lambda, are refused. Still, do not load a file from a
    source that you do not trust: a config can ask for a model too large for
    your machine.

    Args:
        filepath: String or path of the file.
        custom_objects: Dict from name to class or function: objects of the
            model that are not registered. Defaults to none.
        verbose: As in `save_model`.

    Returns:
        The model. It is not compiled, unless its class compiles it when it is
        made and does not need a missing preprocessor for that.

    Raises:
        ValueError: If `save_model` did not write the file, it is truncated or
            altered, or the model cannot be built. The message names the entry
            or the layer.
        OSError: If the file cannot be read.

    Example:

    ```python
    import os
    import tempfile
    import keras
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(4)])
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.safetensors")
        kwm.save_model(model, path)
        assert kwm.load_model(path).count_params() == 68
    ```
    """
    checks.check_verbose(verbose)
    with RestoredOnError(), Progress(1, "read", verbose) as progress:

        def see(name: str, count: int) -> None:
            # Each is checked first, and loaded later.
            progress.total = 2 * count
            progress.add()

        with (
            container.Reader(filepath, FORMAT, (VERSION,), see) as reader,
            tempfile.TemporaryDirectory() as folder,
        ):
            described = read_description(reader)
            states.extract_assets(reader, folder)
            model, parts, pending = build_model(
                reader, described, custom_objects
            )
            states.load(
                parts, reader, folder, description.give_values, progress.add
            )
            with _as_described(reader):
                description.finish(described, model, pending)
    return model


def load_keras_file(
    filepath: Any, custom_objects: dict[str, Any] | None = None
) -> Any:
    """Load a model from a file of Keras, without its compilation.

    Raises:
        ValueError: If it cannot be loaded; the message names the file.
    """
    try:
        return keras.saving.load_model(filepath, custom_objects, compile=False)
    # A damaged file fails in many ways.
    except Exception as error:
        path = checks.cut(os.fspath(filepath))
        raise ValueError(
            f"Keras cannot load {path}: {checks.cut(error, 1200)}"
        ) from error


def copied(model: keras.Model) -> keras.Model:
    """Return another model that is as `model` is, and not compiled.

    The two share the preprocessor, if there is one.

    Raises:
        ValueError: If it cannot be built again from its config.
    """
    # A property of KerasHub's tasks. What others call so may be a layer of
    # their graph.
    is_apart = hasattr(type(model), "preprocessor")
    preprocessor = model.preprocessor if is_apart else None
    shared_parts = [] if preprocessor is None else [preprocessor]
    parts = states.walk(model, shared_parts)
    weights = states.weight_entries(parts)
    described = description.describe(model, parts, shared_parts)
    described = json.loads(json.dumps(described | {"compiles": False}))
    described = description.rehearsed(described, parts, weights)
    copy, own_parts, pending = description.build(
        described, weights, description.classes_of(parts)
    )
    arrays = dict(states.weights(parts))
    source = types.SimpleNamespace(
        entries=arrays,
        read=arrays.get,
        error=lambda name, reason: ValueError(f"Weight {name!r} {reason}"),
    )
    with tempfile.TemporaryDirectory() as folder:
        states.save_assets(parts, folder)
        states.load(
            own_parts, source, folder, description.give_values, lambda name: 0
        )
    description.finish(described, copy, pending)
    if preprocessor is not None:
        copy.preprocessor = preprocessor
    keras_compat.count_as_called(copy, model)
    return copy


def open_model(filepath: Any) -> Any:
    """Return the `Reader` of a file, with the data of its weights unchecked."""
    return container.Reader(filepath, FORMAT, (VERSION,), checked=(_MODEL,))


def build_model(
    reader: Any, described: Any, custom_objects: dict[str, Any] | None
) -> Any:
    """Build the model in a file, mostly without values.

    Args:
        reader: `Reader` of the file.
        described: What `read_description` returned of it.
        custom_objects: As in `load_model`.

    Returns:
        As `description.build`.

    Raises:
        ValueError: If it cannot be built, or has other weights than the file.
    """
    weights = {
        name: entry
        for name, entry in reader.entries.items()
        if states.is_weight(name)
    }
    with _as_described(reader):
        return description.build(described, weights, custom_objects)


@contextlib.contextmanager
def _as_described(reader: Any) -> Iterator[None]:
    try:
        yield
    # What the code of a model's classes raises is not known.
    except Exception as error:
        raise ValueError(
            f"The model cannot be built as entry `{_MODEL}` describes it. "
            f"{description.message(error)}. Received: "
            f"filepath={checks.shown(reader.filepath)}"
        ) from error


def read_description(reader: Any) -> Any:
    """Return how the model in a file is built; checked."""
    for name in reader.entries.keys() - {_MODEL}:
        if not name.startswith(states.GROUPS):
            raise reader.error(name, "is not one of a model")
    described = reader.read_json(_MODEL)
    try:
        description.check(described)
    except ValueError as error:
        raise reader.error(_MODEL, str(error)) from error
    return described
