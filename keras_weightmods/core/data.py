"""Data in every form that the library accepts, as batches for a model.

Accepted are strings, rows of token ids as a list or an array, arrays and
structures of arrays, such as the dict of a preprocessor, and tuples `(x, y,
sample_weight)`. Batches of these may come from a `keras.utils.PyDataset`, a
`tf.data.Dataset`, a torch `DataLoader` or a generator.
"""

import contextlib
import inspect
import itertools
import math
import sys

import keras
import numpy as np
from keras import ops

from keras_weightmods.backend import processes
from keras_weightmods.core.head import input_of
from keras_weightmods.utils import checks

# One row in so many is held out.
_SHARE_HELD = 8

FORMS = (
    "strings, rows of token ids, arrays of rows, a tuple (x, y, "
    "sample_weight), or a dataset or generator of batches of these"
)


def calibration_batches(model, data, batch_size):
    """Return `data` as a list of pairs (inputs, sample weights or None).

    Args:
        model: The model that takes the inputs.
        data: In any form.
        batch_size: Int, the rows of a batch where `data` are no batches.

    Raises:
        ValueError: If `data` are empty, endless, or in none of the forms.
    """
    # A list may hold rows, strings or several inputs.
    is_triple = isinstance(data, tuple) and _is_triple(data)
    triple = data if is_triple else (data,)
    x, _, weights = keras.utils.unpack_x_y_sample_weight(triple)
    x, _, weights = preprocess(model, x, None, weights)
    check(x, name="data")
    if batch_count(x, batch_size) == math.inf:
        expected = "finite, not endless: take a part, with `.take(batches)`"
        raise checks.error("data", expected, type(x))
    all_batches = batches(x, batch_size, weights, model)
    found = [batch for batch in all_batches if _row_count(batch[0])]
    if not found:
        raise checks.error("data", "one batch with rows at least", type(x))
    return found


def held_out(batches):
    """Split batches into rows to fit to, and rows to measure on: an eighth.

    Args:
        batches: List of pairs (inputs, sample weights or None).

    Returns:
        Pair of such lists. The last of each eight rows is held out, or of all
        rows if they are fewer; rows whose weights are all 0 do not count. A
        single row stays in the first list.
    """
    used = []
    for x, weights in batches:
        rows = np.ones(_row_count(x), bool)
        if weights is not None and not keras.tree.is_nested(weights):
            weights = _to_numpy(weights)
            rows = weights.any(axis=tuple(range(1, weights.ndim)))
        used.append(rows)
    all_used = np.concatenate(used)
    step = min(_SHARE_HELD, int(all_used.sum()))
    if step < 2:
        return batches, []
    all_held = all_used & (np.cumsum(all_used) % step == 0)
    ends = np.cumsum([len(rows) for rows in used])
    fit: list[tuple] = []
    held: list[tuple] = []
    for batch, is_held in zip(batches, np.split(all_held, ends)):
        batch = keras.tree.map_structure(_to_numpy, batch)
        for part, own in ((fit, ~is_held), (held, is_held)):
            if own.any():
                part.append(
                    keras.tree.map_structure(
                        lambda a, own=own: None if a is None else a[own], batch
                    )
                )
    return fit, _joined(held, _row_count(batches[0][0]))


def _joined(batches, size):
    """Return batches of up to `size` rows, where their shapes allow it."""
    joined: list[tuple] = []
    for batch in batches:
        if joined and _row_count(joined[-1][0]) < size:
            last = joined[-1]
            pairs = list(zip(*map(keras.tree.flatten, (last, batch))))
            if all(np.shape(x)[1:] == np.shape(y)[1:] for x, y in pairs):
                flat = [
                    x if x is None else np.append(x, y, 0) for x, y in pairs
                ]
                joined[-1] = keras.tree.pack_sequence_as(last, flat)
                continue
        joined.append(batch)
    return joined


def rows(data):
    """Yield each row of text in `data`: a string or a vector of token ids.

    Args:
        data: In any form that holds text.

    Raises:
        ValueError: If it holds something else.
    """
    if isinstance(data, str):
        yield data
    elif hasattr(data, "numpy") and holds_strings(data):
        # A tensor of TensorFlow.
        for text in np.ravel(data.numpy()).tolist():
            yield text.decode()
    elif isinstance(data, dict) and "token_ids" in data:
        tokens = _to_numpy(data["token_ids"])
        used = data.get("padding_mask")
        used = np.ones(tokens.shape) if used is None else _to_numpy(used)
        yield from (row[kept != 0] for row, kept in zip(tokens, used))
    elif is_row(data):
        is_list = isinstance(data, (list, tuple))
        array = np.asarray(data) if is_list else _to_numpy(data)
        yield array.astype("int32")
    elif isinstance(data, tuple) and _is_triple(data):
        yield from rows(data[0])
    elif isinstance(data, keras.utils.PyDataset) or (
        hasattr(data, "__iter__")
        and len(getattr(data, "shape", (0,))) in (1, 2)
        and not isinstance(data, (bytes, dict, keras.KerasTensor))
    ):
        for item in _items(data):
            # A `DataLoader` gives pairs as lists.
            is_list = isinstance(item, list) and not is_row(item)
            yield from rows(item[0] if is_list and _is_triple(item) else item)
    else:
        raise checks.error("texts", FORMS, data)


def preprocess(model, x, y=None, sample_weight=None):
    """Turn strings and rows of token ids into inputs of the model.

    Other data stay as they are.

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
        x, padding = _token_inputs(model, x)
        if sample_weight is None and y is None:
            sample_weight = padding
        return x, y, sample_weight
    if getattr(model, "preprocessor", None) is None:
        raise ValueError(
            "Raw strings need a KerasHub task with a `preprocessor`. "
            f"Received: strings, for the model {model.name}"
        )
    if hasattr(x, "map"):
        return _mapped(model, x), y, sample_weight
    # KerasHub's tokenizers take lists, not arrays, of strings.
    strings = keras.tree.map_structure(
        lambda a: a.tolist() if isinstance(a, np.ndarray) else a,
        [x] if isinstance(x, str) else x,
    )
    if not isinstance(strings, dict) and _takes_prompts(model):
        strings = {"prompts": [""] * len(strings), "responses": strings}
    # A list of numbers is an array; a list of arrays is several outputs.
    labels = (
        np.asarray(a) if isinstance(a, list) and all(map(np.isscalar, a)) else a
        for a in (y, sample_weight)
    )
    try:
        outputs = model.preprocess_samples(strings, *labels)
    except Exception as error:
        # Its own message may hold all of the texts.
        raise ValueError(
            f"The preprocessor of {model.name!r} does not take these strings. "
            "Pass what it takes, or what it gives. Received: "
            f"{type(error).__name__}: {str(error)[:500]}"
        ) from None
    outputs = keras.tree.map_structure(_to_numpy, outputs)
    return keras.utils.unpack_x_y_sample_weight(outputs)


def _mapped(model, dataset):
    """Preprocess the strings of a `tf.data.Dataset`."""
    spec = dataset.element_spec
    strings = spec[0] if isinstance(spec, tuple) else spec
    if isinstance(strings, dict) or not _takes_prompts(model):
        return dataset.map(model.preprocess_samples)
    import tensorflow as tf

    def as_responses(x, *labels):
        x = {"prompts": tf.zeros_like(x), "responses": x}
        return model.preprocess_samples(x, *labels)

    return dataset.map(as_responses)


def _takes_prompts(model):
    """Return whether a preprocessor takes only prompts with responses.

    The preprocessor of Gemma 3 does. Others may raise anything on a string.
    """
    for strings in ([""], {"prompts": [""], "responses": [""]}):
        with contextlib.suppress(Exception):
            model.preprocess_samples(strings)
            return isinstance(strings, dict)
    return False


def _token_inputs(model, x):
    """Return rows of token ids as the model takes them, and their padding.

    The padding is an array of 1 and 0, or `None` where no row has any. Other
    data are returned unchanged.
    """
    structure = input_of(model)
    if structure is None and hasattr(model, "backbone"):
        structure = dict.fromkeys(("token_ids", "padding_mask"))
    if isinstance(structure, (list, tuple)):
        return x, None
    padding = None
    if isinstance(x, (list, tuple)) and x and all(map(is_row, x)):
        lengths = np.array([len(row) for row in x])
        places = np.arange(max(1, lengths.max()))
        if lengths.min() < len(places):
            padding = (places < lengths[:, None]).astype("int32")
        x = np.stack([np.pad(row, (0, len(places) - len(row))) for row in x])
    if not isinstance(structure, dict) or "token_ids" not in structure:
        return x, padding
    if not isinstance(x, dict):
        if len(getattr(x, "shape", ())) != 2 or not _is_int(x):
            return x, padding
        x = {"token_ids": x}
        if padding is not None:
            x["padding_mask"] = padding
    if "padding_mask" in structure and "padding_mask" not in x:
        x = {**x, "padding_mask": np.ones(np.shape(x["token_ids"]), "int32")}
    if missing := structure.keys() - x.keys():
        raise ValueError(
            f"Expected data with {checks.shown(sorted(structure))}, which the "
            f"model {model.name!r} takes. Received: data without "
            f"{checks.shown(sorted(missing))}. Pass a dict with all of them."
        )
    return {
        name: np.asarray(a) if isinstance(a, list) else a
        for name, a in x.items()
    }, padding


def with_next_tokens(model, x, y, sample_weight):
    """Give rows of token ids without labels the next tokens as labels.

    This is for KerasHub's language models. Other data are returned unchanged.

    Args:
        model, x, y, sample_weight: As in `preprocess`.
    """
    is_list = isinstance(x, (list, tuple)) and x and all(map(is_row, x))
    is_array = len(getattr(x, "shape", ())) == 2 and _is_int(x)
    if y is not None or not (is_list or is_array):
        return x, y, sample_weight
    inputs, padding = _token_inputs(model, x)
    if not isinstance(inputs, dict):
        return x, y, sample_weight
    if sample_weight is None and padding is not None:
        sample_weight = padding[:, 1:]
    y = inputs["token_ids"][:, 1:]
    return {k: a[:, :-1] for k, a in inputs.items()}, y, sample_weight


def check(x, y=None, name="x"):
    """Raise ValueError for values that are no data to train or measure on.

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
    """Preprocess `validation_data`: a tuple, a dataset or inputs."""
    if isinstance(data, tuple):
        # Not a list, which may hold strings or several inputs.
        data = keras.utils.unpack_x_y_sample_weight(data)
        return keras.utils.pack_x_y_sample_weight(*preprocess(model, *data))
    data, y, sample_weight = preprocess(model, data)
    return data if y is None else (data, y, sample_weight)


def batches(x, batch_size=None, sample_weight=None, model=None):
    """Yield pairs (inputs, sample weights) of one pass over `x`.

    Args:
        x: Arrays, or a dataset or another iterable of batches.
        batch_size: Int, for arrays. Defaults to 32.
        sample_weight: Array or None, for arrays.
        model: A model; batches of strings or of rows of token ids become what
            it takes. Defaults to `None`, for none of these.
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
    for item in _items(x):
        if _is_triple(item):
            inputs, _, weights = keras.utils.unpack_x_y_sample_weight(item)
        else:
            inputs, weights = item, None
        if model is not None:
            inputs, _, weights = preprocess(model, inputs, None, weights)
        yield keras.tree.map_structure(_to_numpy, (inputs, weights))


def _items(x):
    """Iterate over a dataset, once."""
    if not isinstance(x, keras.utils.PyDataset):
        return iter(x)
    count = x.num_batches
    order = itertools.count() if count is None else range(count)
    return (x[i] for i in order)


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
        # In tf.data -1 is endless, and -2 unknown.
        count = int(x.cardinality())
        return count if count >= 0 else math.inf if count == -1 else None
    try:
        # Endless data of grain have the largest int.
        return len(x) if len(x) < sys.maxsize else math.inf
    except TypeError:
        return None


def first_batches(x, least, rows=0, batch_size=None, sample_weight=None):
    """Read the first batches of `x`, and put them back if it is a generator.

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


def _is_triple(item):
    """Whether a list or tuple is (x, y, sample_weight), or the start of it."""
    return (
        isinstance(item, (list, tuple))
        and 0 < len(item) <= 3
        and not all(
            isinstance(each, str)
            or (isinstance(each, (list, tuple)) and is_row(each))
            for each in item
        )
    )


def is_row(x):
    """Whether `x` is a vector of token ids, which may be empty."""
    if isinstance(x, (list, tuple)):
        return all(
            isinstance(i, (int, np.integer)) and not isinstance(i, bool)
            for i in x
        )
    shape = getattr(x, "shape", ())
    return len(shape) == 1 and (_is_int(x) or not shape[0])


def _is_int(x):
    return "int" in str(getattr(x, "dtype", ""))


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
    if array.dtype.kind in "OUS" or not array.ndim:
        raise checks.error("data", "batches of arrays of numbers", x)
    return array
