"""Data as `keras.Model.fit` takes them, strings included, in batches."""

import itertools

import keras
import numpy as np
from keras import ops


def preprocessed(model, x, y=None, sample_weight=None):
    """Turns raw strings into what the model takes; leaves all else alone.

    Args:
        model: A model; for strings, a KerasHub task with a preprocessor.
        x, y, sample_weight: As in `keras.Model.fit`.

    Returns:
        Triple of the inputs, the labels and the sample weights; for a
        `tf.data.Dataset` the mapped dataset, `y` and `sample_weight`.

    Raises:
        ValueError: If there are strings and the model has no preprocessor.
    """
    if not holds_strings(x):
        return x, y, sample_weight
    if getattr(model, "preprocessor", None) is None:
        raise ValueError(
            "Raw strings need a KerasHub task with a `preprocessor`. "
            f"Received: strings, for the model {model.name}"
        )
    if hasattr(x, "map"):
        return x.map(model.preprocess_samples), y, sample_weight
    outputs = model.preprocess_samples(
        keras.tree.map_structure(_to_python_strings, x), y, sample_weight
    )
    outputs = keras.tree.map_structure(to_numpy, outputs)
    return keras.utils.unpack_x_y_sample_weight(outputs)


def batches(x, batch_size=None, sample_weight=None):
    """Yields pairs (inputs, sample weights) of one pass over `x`.

    Args:
        x: Arrays, a `keras.utils.PyDataset`, a `tf.data.Dataset`, a
            generator or another iterable of batches.
        batch_size: Int, for arrays. Defaults to 32.
        sample_weight: Array or None, for arrays.
    """
    leaves = keras.tree.flatten(x)
    if leaves and all(hasattr(leaf, "shape") for leaf in leaves):
        size = batch_size or 32
        for start in range(0, leaves[0].shape[0], size):
            yield keras.tree.map_structure(
                lambda a, start=start: (
                    None if a is None else a[start : start + size]
                ),
                (x, sample_weight),
            )
        return
    if isinstance(x, keras.utils.PyDataset):
        count = x.num_batches
        order = itertools.count() if count is None else range(count)
        items = (x[i] for i in order)
    else:
        items = iter(x)
    for item in items:
        inputs, _, weights = keras.utils.unpack_x_y_sample_weight(item)
        yield keras.tree.map_structure(to_numpy, (inputs, weights))


def holds_strings(x):
    spec = getattr(x, "element_spec", x)
    for leaf in keras.tree.flatten(spec):
        if isinstance(leaf, (str, bytes)):
            return True
        dtype = getattr(leaf, "dtype", None)
        if dtype is not None and (
            getattr(dtype, "kind", "") in ("U", "S", "O")
            or "string" in str(dtype)
        ):
            return True
    return False


def to_numpy(x):
    # Also of a TensorFlow tensor, on every backend.
    if x is None or not ops.is_tensor(x):
        return None if x is None else np.asarray(x)
    return ops.convert_to_numpy(x)


def _to_python_strings(x):
    # KerasHub's tokenizers take lists, not arrays, of strings.
    return x.tolist() if isinstance(x, np.ndarray) else x
