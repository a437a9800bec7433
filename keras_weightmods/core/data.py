"""Data as `keras.Model.fit` takes them, strings included, in batches."""

import inspect
import itertools
import math
import sys

import keras
import numpy as np
from keras import ops

from keras_weightmods.backend import processes
from keras_weightmods.utils import checks


def preprocess(model, x, y=None, sample_weight=None):
    """Turn raw strings into what the model takes; leave all else alone.

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
    # KerasHub's tokenizers take lists, not arrays, of strings.
    strings = keras.tree.map_structure(
        lambda a: a.tolist() if isinstance(a, np.ndarray) else a, x
    )
    labels = map(_array_of_numbers, (y, sample_weight))
    outputs = model.preprocess_samples(strings, *labels)
    outputs = keras.tree.map_structure(_to_numpy, outputs)
    return keras.utils.unpack_x_y_sample_weight(outputs)


def _array_of_numbers(x):
    """A list of numbers as an array; one of arrays is several outputs."""
    if isinstance(x, list) and all(map(np.isscalar, x)):
        return np.asarray(x)
    return x


def check(x, y=None, name="x"):
    """Raise ValueError for what is no data to train or measure on.

    Args:
        x, y: As in `keras.Model.fit`, strings preprocessed.
        name: String, the argument that `x` was given as.
    """
    if not _are_arrays(x):
        if isinstance(x, (list, tuple, dict, set)) or not (
            isinstance(x, keras.utils.PyDataset)
            or hasattr(x, "__iter__")
            or hasattr(x, "__next__")
        ):
            expected = "arrays of rows, a dataset or an iterator of batches"
            raise checks.error(name, expected, x)
        return
    counts = set()
    for each, value in ((name, x), ("y", y)):
        for leaf in keras.tree.flatten(value):
            if leaf is None and each == "y" and value is not None:
                raise checks.error(each, "arrays of rows of numbers", value)
            if not hasattr(leaf, "shape"):
                continue
            kind = getattr(getattr(leaf, "dtype", None), "kind", "f")
            if not leaf.shape or not leaf.shape[0] or kind in "OUSc":
                raise checks.error(each, "arrays of rows of numbers", value)
            counts.add(int(leaf.shape[0]))
    if len(counts) > 1:
        expected = "arrays with a row for each of `x`"
        raise checks.error("y", expected, f"{sorted(counts)} rows")


def preprocess_pairs(model, data):
    """Do the same with `validation_data`: a tuple, a dataset or inputs."""
    if isinstance(data, tuple):
        # Not a list, which may be one of strings or of several inputs.
        data = keras.utils.unpack_x_y_sample_weight(data)
        return keras.utils.pack_x_y_sample_weight(*preprocess(model, *data))
    data, y, sample_weight = preprocess(model, data)
    return data if y is None else (data, y, sample_weight)


def batches(x, batch_size=None, sample_weight=None):
    """Yield pairs (inputs, sample weights) of one pass over `x`.

    Args:
        x: Arrays, a `keras.utils.PyDataset`, a `tf.data.Dataset`, a
            generator or another iterable of batches.
        batch_size: Int, for arrays. Defaults to 32.
        sample_weight: Array or None, for arrays.
    """
    if _are_arrays(x):
        size = batch_size or 32
        for start in range(0, _row_count(x), size):
            part = slice(start, start + size)
            yield keras.tree.map_structure(
                lambda a, part=part: None if a is None else a[part],
                (x, sample_weight),
            )
        return
    items = iter(x)
    if isinstance(x, keras.utils.PyDataset):
        count = x.num_batches
        order = itertools.count() if count is None else range(count)
        items = (x[i] for i in order)
    for item in items:
        inputs, _, weights = keras.utils.unpack_x_y_sample_weight(item)
        yield keras.tree.map_structure(_to_numpy, (inputs, weights))


def batch_count(x, batch_size=None, validation_split=0.0):
    """Return the batches of one pass: `inf` if endless, None if unknown.

    Args:
        x, batch_size: As in `batches`.
        validation_split: Float, the share of arrays that is left out.
    """
    if _are_arrays(x):
        samples = math.floor(_row_count(x) * (1 - validation_split))
        return math.ceil(samples / (batch_size or 32))
    if isinstance(x, keras.utils.PyDataset):
        return math.inf if x.num_batches is None else x.num_batches
    if hasattr(x, "cardinality"):
        # Of tf.data: -1 if endless, -2 if unknown.
        count = int(x.cardinality())
        return count if count >= 0 else math.inf if count == -1 else None
    if hasattr(x, "__len__"):
        # Endless data of grain have the largest int.
        return len(x) if len(x) < sys.maxsize else math.inf
    return None


def first_batches(x, least, rows=0, batch_size=None, sample_weight=None):
    """Read the first batches of `x`, without losing those of a generator.

    Args:
        x, batch_size, sample_weight: As in `batches`.
        least: Int, batches to read at least.
        rows: Int, rows to read at least.

    Returns:
        Triple of the list of pairs (inputs, sample weights), the number of
        them that it takes for `rows`, and what to use in place of `x`. Where
        several processes train, a batch has the rows of all of them.
    """
    group = processes()
    source = x
    if inspect.isgenerator(x):
        source, copy = itertools.tee(x)
        # The trainers of Keras want a generator.
        x = (item for item in copy)
    first = []
    held = enough = 0
    for batch in batches(source, batch_size, sample_weight):
        if group is not None:
            batch = keras.tree.map_structure(
                lambda a: None if a is None else group.rows_of_all(a), batch
            )
        first.append(batch)
        if held < rows:
            held += _row_count(batch[0])
            enough = len(first)
        if held >= rows and len(first) >= least:
            break
    return first, enough, x


def holds_strings(x):
    """Whether data, or the elements of a dataset, are strings."""
    return any(
        isinstance(leaf, (str, bytes))
        or getattr(getattr(leaf, "dtype", None), "kind", "") in ("U", "S", "O")
        or "string" in str(getattr(leaf, "dtype", ""))
        for leaf in keras.tree.flatten(getattr(x, "element_spec", x))
    )


def _are_arrays(x):
    leaves = keras.tree.flatten(x)
    return bool(leaves) and all(hasattr(leaf, "shape") for leaf in leaves)


def _row_count(x):
    return int(keras.tree.flatten(x)[0].shape[0])


def _to_numpy(x):
    if x is None:
        return None
    # Also of a TensorFlow tensor, on every backend.
    array = ops.convert_to_numpy(x)
    if array.dtype.kind in "OUS":
        raise checks.error("data", "batches of arrays of numbers", x)
    return array
