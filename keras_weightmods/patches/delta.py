"""Deltas: what a fine-tuning changed, as a small file; put on and taken off."""

import dataclasses
import hashlib
import json
import math
import os
import weakref

import numpy as np

from keras_weightmods.patches import checkpoint as checkpoints
from keras_weightmods.patches.checkpoint import Checkpoint
from keras_weightmods.patches.places import pack_places, unpack_places
from keras_weightmods.saving.container import (
    Entry,
    Reader,
    Writer,
    numpy_dtype,
)

FORMAT = "keras_weightmods.delta"
VERSION = 1
DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class DeltaReport:
    """What a call stored or changed.

    Attributes:
        name: String, the delta's name on the model; the path of the file in
            `save_delta`.
        weights: Tuple of strings, the keys of the weights with changes.
        entries: Int, the number of entries changed in them.
        index_bits: Float, the bits that the place of an entry takes.
        nbytes: Int, the size of the file.
        active: Dict from the names of the deltas on the model to their scales.
    """

    name: str
    weights: tuple[str, ...]
    entries: int
    index_bits: float
    nbytes: int
    active: dict[str, float]

    def __str__(self):
        active = ", ".join(f"{k} x {v:g}" for k, v in self.active.items())
        return (
            f"{self.name}: {self.entries:,} entries of {len(self.weights)} "
            f"weights, {self.index_bits:.2f} bits a place, {self.nbytes:,} "
            f"bytes; on the model: {active or 'nothing'}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Change:
    """What a delta holds for one weight."""

    position: int
    path: str
    shape: tuple[int, ...]
    places: np.ndarray
    values: np.ndarray

    @property
    def key(self):
        return f"{self.position}:{self.path}"


@dataclasses.dataclass(frozen=True, eq=False)
class _Delta:
    """A delta as read from a file, and its scale on a model."""

    changes: dict[int, _Change]
    count: int  # of the model's weights
    fingerprint: str
    digest: str
    index_bits: float
    nbytes: int
    scale: float = 1.0


@dataclasses.dataclass(eq=False)
class _State:
    """The deltas on a model, and what was there before at their places."""

    deltas: dict[str, _Delta] = dataclasses.field(default_factory=dict)
    # {position: (places, values)}
    clean: dict[int, tuple[np.ndarray, np.ndarray]] = dataclasses.field(
        default_factory=dict
    )


# Not in the model, which would save and copy it.
_STATES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def save_delta(model, base, path, dtype="bfloat16"):
    """Stores what is different in a model from the one it was trained from.

    The file holds for each weight the places of the entries that differ, in
    about 6 bits each at a density of 5 %, and the differences. It is bound to
    the base by a hash of all its weights.

    Args:
        model: A built Keras model.
        base: What it was before: a model, or the list that
            `model.get_weights()` returned then.
        path: String or path, of the file to write.
        dtype: `"bfloat16"`, `"float16"` or `"float32"`, of the differences.
            Defaults to `"bfloat16"`: 2 bytes each, with an error of at most
            2^-9 of the difference.

    Returns:
        A `DeltaReport`.

    Raises:
        ValueError: If the two have other weights, differ in nothing, in
            weights that are no floats or by what is not finite; all problems
            are listed. No file is written then.

    Example:

    ```python
    import os
    import tempfile
    import keras
    import numpy as np
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8)])
    model.compile(kwm.SparseAdamW(1e-3), "mse")
    base = model.get_weights()
    x = np.random.normal(size=(32, 16))
    model.fit(
        x, x[:, :8], verbose=0, callbacks=[kwm.PrincipalMaskCallback(0.25)]
    )
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "task.safetensors")
        kwm.save_delta(model, base, path)
        model.set_weights(base)
        kwm.apply_delta(model, path)
        kwm.remove_delta(model)
    assert np.array_equal(model.get_weights()[0], base[0])
    ```
    """
    if dtype not in DTYPES:
        raise ValueError(
            f"`dtype` must be one of {DTYPES}. Received: dtype={dtype!r}"
        )
    new, old = Checkpoint("model", model), Checkpoint("base", base)
    problems = checkpoints.architecture_problems(new.infos, old.infos, "`base`")
    problems += [
        f"`base`, {a.key}: {b.dtype} of shape {b.shape}, and {a.dtype} of "
        f"{a.shape} is expected"
        for a, b in zip(new.infos, old.infos)
        if (a.shape, a.dtype) != (b.shape, b.dtype)
    ]
    checkpoints.raise_all("The models do not have the same weights:", problems)
    about, places, values = [], [], []
    for info in new.infos:
        before, after = old.read(info.position), new.read(info.position)
        where = np.flatnonzero(_bits(before) != _bits(after))
        if not where.size:
            continue
        if info.dtype not in checkpoints.FLOATS:
            problems.append(f"{info.key}: {info.dtype}, which has changed")
            continue
        wide = _wide(info.dtype)
        change = (
            after.reshape(-1)[where].astype(wide)
            - before.reshape(-1)[where].astype(wide)
        ).astype(numpy_dtype(dtype))
        if not np.all(np.isfinite(change.astype("float32"))):
            problems.append(f"{info.key}: a change that is not finite")
        bits, packed = pack_places(where)
        about.append(
            [
                info.position,
                info.path,
                list(info.shape),
                int(where.size),
                bits,
                int(packed.size),
            ]
        )
        places.append(packed)
        values.append(change)
    checkpoints.raise_all("The change cannot be stored:", problems)
    if not about:
        raise ValueError(
            "`model` must differ from `base`. Received: two models with equal "
            "weights. Pass the list that `model.get_weights()` returned "
            "before the training."
        )
    description = json.dumps(
        {
            "weights": about,
            "count": len(new.infos),
            "fingerprint": old.fingerprint(),
        }
    ).encode()
    arrays = {
        "description": np.frombuffer(description, "uint8"),
        "places": np.concatenate(places),
        "values": np.concatenate(values),
    }
    entries = {
        name: Entry(array.shape, dtype if name == "values" else "uint8")
        for name, array in arrays.items()
    }
    with Writer(path, FORMAT, VERSION, entries) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    count = arrays["values"].size
    return DeltaReport(
        name=os.fspath(path),
        weights=tuple(f"{each[0]}:{each[1]}" for each in about),
        entries=count,
        index_bits=8 * arrays["places"].size / count,
        nbytes=os.path.getsize(path),
        active={},
    )


def apply_delta(model, path, scale=1.0, name=None, force=False):
    """Puts a delta on the model that it was made for.

    Several can be on a model at once. A weight is computed anew from what it
    is without any of them, `base + sum of scale * change`, rounded once, so
    the order leaves no trace; what was at the places is kept in memory, and
    `remove_delta` puts it back bit for bit.

    Args:
        model: A built Keras model.
        path: String or path, of a file of `save_delta`.
        scale: Float. Defaults to 1.
        name: String, under which to remove it. Defaults to the name of the
            file without its ending.
        force: Bool, whether to put it on another base model with weights of
            the same shapes. Defaults to `False`.

    Returns:
        A `DeltaReport`.

    Raises:
        ValueError: If the file is not whole, the model is not the base or has
            other weights, weights were changed since a delta was put on them,
            the name is taken, or the result is not finite. The model is
            unchanged then.

    Example:

    ```python
    import os
    import tempfile
    import keras
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8)])
    base = model.get_weights()
    model.set_weights([base[0] + 0.5, base[1]])
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "task.safetensors")
        kwm.save_delta(model, base, path)
        model.set_weights(base)
        report = kwm.apply_delta(model, path, scale=0.5)
    assert report.active == {"task": 0.5}
    ```
    """
    checkpoint = Checkpoint("model", model)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ValueError(f"`scale` must be a float. Received: scale={scale!r}")
    if not math.isfinite(scale):
        raise ValueError(f"`scale` must be finite. Received: scale={scale!r}")
    delta = dataclasses.replace(_read(path), scale=float(scale))
    state = _STATES.setdefault(model, _State())
    if name is None:
        name = os.path.splitext(os.path.basename(os.fspath(path)))[0]
    if not isinstance(name, str) or name in state.deltas:
        raise ValueError(
            "`name` must be a string that no delta on the model has. "
            f"Received: name={name!r}, and there are {list(state.deltas)}. "
            "`remove_delta` takes one off."
        )
    checkpoints.raise_all(
        "The delta does not fit the model:",
        _model_problems(delta, checkpoint),
    )
    _check_unchanged(state, checkpoint)
    if not force and _clean_fingerprint(state, checkpoint) != delta.fingerprint:
        raise ValueError(
            "The model must be the one that the delta was made for, and its "
            "weights are others. Load the base model, or pass `force=True` to "
            f"put the changes on this one. Received: model={model.name!r}, "
            f"path={os.fspath(path)!r}"
        )
    after = {**state.deltas, name: delta}
    _update(state, checkpoint, after, delta)
    return _report(name, delta, state)


def remove_delta(model, name=None, force=False):
    """Takes a delta off a model, bit for bit.

    Args:
        model: The Keras model.
        name: String, the delta's name. May be left out if there is one.
        force: Bool, whether to put back what was at the delta's places also if
            they were changed since, by training for instance. Defaults to
            `False`.

    Returns:
        A `DeltaReport`.

    Raises:
        ValueError: If there is no such delta, or weights were changed since
            and `force` is not set. The model is unchanged then.

    Example:

    ```python
    import os
    import tempfile
    import keras
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8)])
    base = model.get_weights()
    model.set_weights([base[0] + 0.5, base[1]])
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "task.safetensors")
        kwm.save_delta(model, base, path)
        model.set_weights(base)
        kwm.apply_delta(model, path, name="half", scale=0.5)
    kwm.remove_delta(model, "half")
    assert (model.get_weights()[0] == base[0]).all()
    ```
    """
    state = _STATES.get(model, _State())
    if name is None and len(state.deltas) == 1:
        (name,) = state.deltas
    if name not in state.deltas:
        raise ValueError(
            "`name` must be that of a delta on this model object. Received: "
            f"name={name!r}, and there are {list(state.deltas)}"
        )
    checkpoint = Checkpoint("model", model)
    if not force:
        _check_unchanged(state, checkpoint)
    after = dict(state.deltas)
    delta = after.pop(name)
    _update(state, checkpoint, after, delta)
    return _report(name, delta, state)


def _report(name, delta, state):
    return DeltaReport(
        name=name,
        weights=tuple(change.key for change in delta.changes.values()),
        entries=sum(c.places.size for c in delta.changes.values()),
        index_bits=delta.index_bits,
        nbytes=delta.nbytes,
        active={key: each.scale for key, each in state.deltas.items()},
    )


def _read(path):
    """The `_Delta` in a file, all of it checked."""
    with Reader(path, FORMAT, (VERSION,)) as reader:
        expected = {"description": "uint8", "places": "uint8"}
        received = {k: e.dtype for k, e in reader.entries.items()}
        value_dtype = received.pop("values", None)
        if received != expected or value_dtype not in DTYPES:
            raise reader.error(
                "values", f"must stand beside {sorted(expected)} alone"
            )
        about = reader.read_json("description")
        packed, values = reader.read("places"), reader.read("values")
        try:
            changes = _parse(about, packed, values)
        except ValueError as error:
            raise reader.error("description", str(error)) from error
    digest = hashlib.sha256(json.dumps(about).encode())
    for array in (packed, values):
        checkpoints.update_digest(digest, array)
    return _Delta(
        changes=changes,
        count=about["count"],
        fingerprint=about["fingerprint"],
        digest=digest.hexdigest(),
        index_bits=8 * packed.size / max(1, values.size),
        nbytes=os.path.getsize(path),
    )


def _parse(about, packed, values):
    """{position: `_Change`}; raises ValueError for what is not sound."""
    keys = {"weights", "count", "fingerprint"}
    if (
        not isinstance(about, dict)
        or set(about) != keys
        or type(about["count"]) is not int
        or not isinstance(about["fingerprint"], str)
        or not isinstance(about["weights"], list)
    ):
        raise ValueError(f"must tell {sorted(keys)}")
    changes: dict[int, _Change] = {}
    first_byte = first_value = 0
    previous = -1
    for each in about["weights"]:
        if not (
            isinstance(each, list)
            and [type(x) for x in each] == [int, str, list, int, int, int]
            and all(type(size) is int and size >= 0 for size in each[2])
            and min(each[3:]) >= 0
            and math.prod(each[2]) < 2**48
            and previous < each[0] < about["count"]
        ):
            raise ValueError(f"has an unsound weight: {str(each)[:200]}")
        position, name, shape, count, bits, nbytes = each
        previous = position
        piece = packed[first_byte : first_byte + nbytes]
        change = values[first_value : first_value + count]
        if piece.size != nbytes or change.size != count:
            raise ValueError(f"tells more of {name!r} than the file holds")
        places = unpack_places(piece, count, bits, math.prod(shape))
        if not np.all(np.isfinite(change.astype("float32"))):
            raise ValueError(f"has changes of {name!r} that are not finite")
        changes[position] = _Change(
            position, name, tuple(shape), places, change
        )
        first_byte += nbytes
        first_value += count
    if first_byte != packed.size or first_value != values.size:
        raise ValueError("tells less than the file holds")
    return changes


def _model_problems(delta, model):
    problems = []
    if delta.count != len(model.infos):
        return [f"{len(model.infos)} weights, and {delta.count} are expected"]
    for change in delta.changes.values():
        info = model.infos[change.position]
        if info.shape != change.shape or info.dtype not in checkpoints.FLOATS:
            problems.append(
                f"{info.key}: {info.dtype} of shape {info.shape}, and floats "
                f"of {change.shape} are expected"
            )
        elif info.path and not checkpoints.same_path(change.path, info.path):
            problems.append(
                f"weight {info.position}: {info.path!r}, and "
                f"{change.path!r} is expected"
            )
    return problems


def _check_unchanged(state, model):
    changed = []
    for position, (places, clean) in state.clean.items():
        present = model.read(position).reshape(-1)[places]
        written = _rebuilt(position, places, clean, state.deltas)
        if not np.array_equal(_bits(present), _bits(written)):
            changed.append(model.infos[position].key)
    checkpoints.raise_all(
        "Weights were changed since a delta was put on them, by training for "
        "instance; `remove_delta(..., force=True)` puts back what was there.",
        changed,
    )


def _clean_fingerprint(state, model):
    """That of the model without its deltas."""
    digest = hashlib.sha256()
    for info in model.infos:
        array = model.read(info.position)
        if info.position in state.clean:
            places, clean = state.clean[info.position]
            array = array.copy()
            array.reshape(-1)[places] = clean
        digest.update(f"{info.shape} {info.dtype};".encode())
        checkpoints.update_digest(digest, array)
    return digest.hexdigest()


def _update(state, model, after, delta):
    """Brings the model to the deltas `after`, which differ in `delta`."""
    new_clean, arrays, before, problems = {}, {}, {}, []
    for position, kept in model.kept(delta.changes).items():
        present = kept.array
        base = np.array(present, order="C")
        flat = base.reshape(-1)
        if position in state.clean:
            old_places, old_values = state.clean[position]
            flat[old_places] = old_values
        holders = [d for d in after.values() if position in d.changes]
        if holders:
            places = holders[0].changes[position].places
            for each in holders[1:]:
                places = np.union1d(places, each.changes[position].places)
            clean = flat[places]
            flat[places] = _rebuilt(position, places, clean, after)
            new_clean[position] = (places, clean)
            if not np.all(np.isfinite(flat[places].astype("float32"))):
                problems.append(
                    f"{model.infos[position].key}: the result is not finite"
                )
        arrays[position], before[position] = base, present
    checkpoints.raise_all("The delta cannot be applied:", problems)
    started = []
    try:
        for position, array in arrays.items():
            started.append(position)
            model.variables[position].assign(array)
    except BaseException:
        for position in started:
            model.variables[position].assign(before[position])
        raise
    for position in delta.changes:
        state.clean.pop(position, None)
    state.clean.update(new_clean)
    state.deltas = after


def _rebuilt(position, places, clean, deltas):
    """What the deltas make of the clean values at these places."""
    total = np.zeros(places.size, _wide(clean.dtype.name))
    # In an order of its own: a sum of floats depends on it.
    for delta in sorted(deltas.values(), key=lambda each: each.digest):
        change = delta.changes.get(position)
        if change is not None:
            at = np.searchsorted(places, change.places)
            total[at] += delta.scale * change.values.astype(total.dtype)
    # What overflows is found by the caller.
    with np.errstate(over="ignore", invalid="ignore"):
        return (clean.astype(total.dtype) + total).astype(clean.dtype)


def _wide(dtype):
    return "float64" if dtype == "float64" else "float32"


def _bits(array):
    return np.ascontiguousarray(array).reshape(-1).view(f"u{array.itemsize}")
