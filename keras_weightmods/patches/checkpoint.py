"""A model or a list of its weights, read in one way, and what is in it."""

import dataclasses
import hashlib
import importlib
import math
import re
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.core import keras_private
from keras_weightmods.core.targets import execution_order
from keras_weightmods.patches import tensors

FLOATS = ("float16", "bfloat16", "float32", "float64")
DTYPES = (
    *FLOATS,
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
    "bool",
    "float8_e4m3fn",
    "float8_e5m2",
)
_COPY_ON_WRITE = ("jax", "tensorflow")
# Of BatchNormalization. They are estimates from data, not trained.
STATISTICS = ("moving_mean", "moving_variance")
# Of Normalization, which `adapt` fills. Never touched.
_ADAPTED = ("mean", "variance", "count")


@dataclasses.dataclass(frozen=True)
class WeightInfo:
    """One weight of a model, without its values.

    Attributes:
        position: Int, place in `model.get_weights()`.
        path: String, the variable's path less the model's own name, or `""`
            where it is not known. Not unique.
        shape: Tuple of ints.
        dtype: String.
    """

    position: int
    path: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def key(self):
        """String `"{position}:{path}"`, unique in the model."""
        return f"{self.position}:{self.path}"

    @property
    def nbytes(self):
        """Int, the bytes of the values."""
        # Keras has registered bfloat16 with NumPy.
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
    """Values that nothing changes any more.

    Attributes:
        array: NumPy array.
        tensor: The backend's tensor that `array` is a view of, or `None`.
    """

    array: np.ndarray
    tensor: Any = None


class Checkpoint:
    """The weights of a model, or a list as from `model.get_weights()`.

    Args:
        argument: String, the argument's name in messages.
        source: A built Keras model or layer, or a list of arrays.

    Raises:
        ValueError: If `source` is something else or not built.
    """

    def __init__(self, argument, source):
        self.argument = argument
        self.model = None
        if isinstance(source, keras.layers.Layer):
            if not source.built or not source.weights:
                raise ValueError(
                    f"`{argument}` must be built and hold weights: call it on "
                    "data once, or `build(input_shape)`. Received: "
                    f"{argument}={source.name!r}, built={source.built}, with "
                    f"{len(source.weights)} weights"
                )
            self.model = source
            self.variables = source.weights
            self.infos = tuple(
                WeightInfo(
                    position,
                    variable.path.removeprefix(f"{source.name}/"),
                    tuple(variable.shape),
                    keras.backend.standardize_dtype(variable.dtype),
                )
                for position, variable in enumerate(self.variables)
            )
        elif isinstance(source, (list, tuple)) and source:
            self.arrays = [np.asarray(array) for array in source]
            self.infos = tuple(
                WeightInfo(position, "", array.shape, array.dtype.name)
                for position, array in enumerate(self.arrays)
            )
            strange = [i.dtype for i in self.infos if i.dtype not in DTYPES]
            if strange:
                raise ValueError(
                    f"`{argument}` must be a list of arrays of numbers. "
                    f"Received: {argument} with an array of {strange[0]}"
                )
        else:
            raise ValueError(
                f"`{argument}` must be a built Keras model, or the list that "
                "`model.get_weights()` returns. Received: "
                f"{argument}={type(source).__name__}"
                + (" of length 0" if isinstance(source, (list, tuple)) else "")
            )

    def read(self, position):
        """The values at `position`, as a NumPy array. Not to be written to.

        It may be a view of the variable's memory.
        """
        if self.model is None:
            return self.arrays[position]
        view = _host_memory().view_of(self._tensor(position))
        if view is None:
            return ops.convert_to_numpy(self.variables[position].value)
        return view

    def memory(self, position):
        """A view of the variable's own memory, to write to, or None.

        None on JAX and TensorFlow, which never change a tensor that something
        else can see, and on torch where NumPy cannot see it in one piece.
        """
        if keras.backend.backend() in _COPY_ON_WRITE:
            return None
        view = _host_memory().view_of(self._tensor(position))
        return None if view is None or not view.flags.c_contiguous else view

    def kept(self, positions):
        """The values at `positions`, which later changes do not reach.

        Args:
            positions: List of ints.

        Returns:
            Dict from them to `Kept`.
        """
        found, views = {}, {}
        for position in positions:
            tensor = self._tensor(position)
            view = _host_memory().view_of(tensor)
            if view is None:
                found[position] = Kept(self.read(position))
            elif keras.backend.backend() in _COPY_ON_WRITE:
                found[position] = Kept(view, tensor)
            else:
                found[position] = Kept(np.empty(view.shape, view.dtype))
                views[position] = view.reshape(-1)

        def copy(position, part):
            found[position].array.reshape(-1)[part] = views[position][part]

        tensors.over_parts(copy, views)
        return found

    def assign(self, position, values):
        """Puts values into the variable at `position` of a model.

        Args:
            position: Int.
            values: `Kept`. Its memory may be the variable's from then on.
        """
        tensor = values.tensor
        if tensor is None:
            tensor = _host_memory().tensor_of(values.array)
        self.variables[position].assign(tensor)

    def _tensor(self, position):
        value = self.variables[position].value
        # On TensorFlow that is a variable in turn.
        is_variable = callable(getattr(value, "value", None))
        return value.value() if is_variable else value

    def fingerprint(self):
        """SHA-256 of all values, shapes and dtypes, as a hex string."""
        digest = hashlib.sha256()
        for info in self.infos:
            digest.update(f"{info.shape} {info.dtype};".encode())
            update_digest(digest, self.read(info.position))
        return digest.hexdigest()


def update_digest(digest, array):
    """Feeds the bytes of an array to a hash."""
    # Dtypes of ml_dtypes offer no buffer; bytes do.
    digest.update(np.ascontiguousarray(array).reshape(-1).view("uint8"))


def owners(model):
    """{id of variable: layer that holds it itself}, the first one if shared."""
    found: dict[int, keras.layers.Layer] = {}
    for layer in keras_private.layers_of(model):
        # Not `layer.weights`, which counts those of inner layers in.
        for variable in keras_private.own_variables(layer):
            found.setdefault(id(variable), layer)
    return found


def roles(checkpoint, infos):
    """For each weight `"weight"`, `"statistic"` or `"other"`.

    Statistics are those of batch normalization. Other is what is not trained:
    no floats, the state of Normalization, and with a model at hand whatever
    is not trainable in a layer that is.
    """
    layers = {} if checkpoint.model is None else owners(checkpoint.model)
    found = []
    for info in infos:
        name = info.path.rpartition("/")[2]
        role = "weight"
        if name in STATISTICS:
            role = "statistic"
        elif info.dtype not in FLOATS or name in _ADAPTED:
            role = "other"
        elif layers:
            variable = checkpoint.variables[info.position]
            layer = layers.get(id(variable))
            if not variable.trainable and (layer is None or layer.trainable):
                role = "other"
        found.append(role)
    return found


def depths(checkpoint, infos, roles):
    """For each weight its depth: the place of its layer, from 0.

    What counts are the layers with a kernel: a weight of two axes or more. A
    layer without one, such as a normalization, has the depth of the layer with
    a kernel that runs before it. The order is that of execution with a model,
    and that of the list without.
    """
    groups = _layer_groups(checkpoint, infos)
    found = [0] * len(infos)
    depth = -1
    for group in groups:
        if any(roles[i] == "weight" and len(infos[i].shape) > 1 for i in group):
            depth += 1
        for i in group:
            found[i] = max(depth, 0)
    return found


def layer_groups(infos):
    """Lists of positions, one for each layer, told from paths alone.

    Neighbours with the same path up to the last slash are of one layer, until
    a name comes again: paths are not unique.
    """
    groups: list[list[int]] = []
    names: set[str] = set()
    previous = None
    for place, info in enumerate(infos):
        layer, _, name = info.path.rpartition("/")
        if layer != previous or name in names:
            groups.append([])
            names = set()
        groups[-1].append(place)
        names.add(name)
        previous = layer
    return groups


def _layer_groups(checkpoint, infos):
    if checkpoint.model is None:
        return layer_groups(infos)
    holders = owners(checkpoint.model)
    groups: dict[int, list[int]] = {}
    layers = {}
    for info, variable in zip(infos, checkpoint.variables):
        layer = holders[id(variable)]
        layers[id(layer)] = layer
        groups.setdefault(id(layer), []).append(info.position)
    order = execution_order(checkpoint.model, list(layers.values()))
    # Sorting is stable: what never runs comes last, as declared.
    return [
        groups[key]
        for key in sorted(groups, key=lambda key: order.get(key, len(order)))
    ]


def same_path(a, b):
    """Whether two paths name the same weight of one architecture.

    Keras numbers layers through a process ("dense_7"), and the paths of some
    models begin with the model's own name; both are passed over.
    """
    a, b = (re.sub(r"_\d+(?=/|$)", "", path) for path in (a, b))
    return a == b or a.endswith(f"/{b}") or b.endswith(f"/{a}")


def architecture_problems(expected, infos, argument):
    """What keeps `infos` from being of the architecture `expected`.

    Compares count, order, names and numbers of axes. Sizes may differ, as
    those of heads do: they are compared where weights are combined.

    Args:
        expected, infos: Sequences of `WeightInfo`.
        argument: String, what `infos` are in messages.

    Returns:
        List of strings, empty if nothing is wrong.
    """
    problems = []
    if all(info.path for info in (*expected, *infos)):
        problems += _name_problems(expected, infos, argument)
    if len(expected) != len(infos):
        problems.append(
            f"{argument} has {len(infos)} weights, and {len(expected)} are "
            "expected: another architecture"
        )
        return problems
    problems += [
        f"{argument}, {a.key}: shape {b.shape}, and {len(a.shape)} axes are "
        "expected"
        for a, b in zip(expected, infos)
        if len(a.shape) != len(b.shape)
    ]
    return problems


def _name_problems(expected, infos, argument):
    if len(expected) == len(infos):
        return [
            f"{argument}, weight {a.position}: {b.path!r}, and {a.path!r} is "
            "expected"
            for a, b in zip(expected, infos)
            if not same_path(a.path, b.path)
        ]
    return [
        f"{argument} has no weight {a.path!r}"
        for a in expected
        if not any(same_path(a.path, b.path) for b in infos)
    ]


def raise_all(summary, problems):
    """Raises a ValueError that lists all of `problems`, if there are any."""
    if problems:
        raise ValueError(
            f"{summary} {len(problems)} problem"
            f"{'s' if len(problems) > 1 else ''}:\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )


def _host_memory():
    name = keras.backend.backend()
    return importlib.import_module(
        f"keras_weightmods.backend.{name}.host_memory"
    )
