"""One interface to a model, or a list of its weights."""

import hashlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import keras
import numpy as np

from keras_weightmods import backend
from keras_weightmods.core import keras_compat
from keras_weightmods.core.execution_order import execution_order
from keras_weightmods.core.reparameterization import reparameterizations
from keras_weightmods.core.weight_keys import same_path
from keras_weightmods.patches.entry import FLOATS, WeightInfo
from keras_weightmods.patches.tensors import empty_aligned
from keras_weightmods.saving.container import DTYPES
from keras_weightmods.utils import checks

_COPY_ON_WRITE = ("jax", "tensorflow")
# The state of Normalization, which `adapt` fills. It is never touched.
_ADAPTED = ("mean", "variance", "count")
# Training changes these, and "recurrent_kernel", whatever is frozen now.
_TRAINED = ("kernel", "bias", "gamma", "beta", "embeddings")


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
                expected = "built and hold weights: call it on data once"
                raise checks.error(argument, expected, source)
            self.model, self.variables = source, source.weights
            stored = _stored(source)
            rows = [
                (
                    v.path.removeprefix(f"{source.name}/"),
                    tuple(v.shape),
                    keras.backend.standardize_dtype(v.dtype),
                    stored.get(id(v), ""),
                )
                for v in self.variables
            ]
        elif isinstance(source, (list, tuple)) and source:
            self.arrays = [np.asarray(array) for array in source]
            rows = [("", x.shape, x.dtype.name, None) for x in self.arrays]
            if wrong := {dtype for _, _, dtype, _ in rows} - set(DTYPES):
                raise checks.error(argument, "a list of numbers", wrong)
        else:
            expected = "a built Keras model, or a list as of `get_weights()`"
            raise checks.error(argument, expected, source)
        self.infos = tuple(WeightInfo(i, *row) for i, row in enumerate(rows))

    def read(self, position):
        """Return the values at `position`, an array not to be written to.

        It may be a view of the variable's memory.
        """
        if self.model is None:
            return self.arrays[position]
        view = _view(self._tensor(position))
        if view is not None:
            return view
        return backend.current().array_of(self.variables[position].value)

    def memory(self, position):
        """Return a view of the variable's own memory to write to, or None.

        None on JAX and TensorFlow, which never change a tensor that something
        else can see, and on torch where NumPy cannot see it in one piece.
        """
        if keras.backend.backend() in _COPY_ON_WRITE:
            return None
        view = _view(self._tensor(position))
        return None if view is None or not view.flags.c_contiguous else view

    def snapshot(self, position, places=None):
        """Return values, or those at some places, that nothing will change."""
        values = self.read(position)
        if places is not None:
            return values.reshape(-1)[places]
        # Other backends make a new tensor for each change, and keep this one.
        is_shared = keras.backend.backend() not in _COPY_ON_WRITE
        return values.copy() if is_shared else values

    def assign(self, position, values, places=None):
        """Put an array into the variable at `position`.

        At `places` of it, flattened, if these are given. If not, the array's
        memory may be the variable's from then on.
        """
        if places is not None:
            memory = whole = self.memory(position)
            if memory is None:
                present = self.read(position)
                whole = empty_aligned(present.shape, present.dtype)
                whole[...] = present
            whole.reshape(-1)[places] = values
            if memory is not None:
                return
            values = whole
        self.variables[position].assign(backend.current().tensor_of(values))

    def _tensor(self, position):
        value = self.variables[position].value
        # On TensorFlow that is a variable in turn.
        is_variable = callable(getattr(value, "value", None))
        return value.value() if is_variable else value

    def fingerprint(
        self,
        read: Any = None,
        without: Any = (),
        see: Callable[[str], Any] = lambda key: None,
    ) -> str:
        """Return the SHA-256 of all values, shapes and dtypes.

        Args:
            read: Callable from a position to the values there, an array.
                Defaults to `self.read`.
            without: Positions of weights that do not count. Defaults to none.
            see: Callable, called with the key of each weight that is read.
        """
        digest = hashlib.sha256()
        for info in self.infos:
            if info.position not in without:
                digest.update(f"{info.shape} {info.dtype};".encode())
                digest.update(bytes_of((read or self.read)(info.position)))
                see(info.key)
        return digest.hexdigest()

    def roles(self, frozen=False):
        """Return for each weight `"weight"`, `"statistic"` or `"other"`.

        Statistics are those of batch normalization. Others are not trained:
        values other than floats, the state of Normalization, and weights that a
        trainable layer does not train. With `frozen`, kernels and the like are
        never among the others, because training changes them when they are not
        frozen.
        """
        layers = self._owners()
        found = []
        for info, variable in zip(self.infos, self.variables):
            role = "weight"
            if info.is_statistic:
                role = "statistic"
            elif info.dtype not in FLOATS or info.name in _ADAPTED:
                role = "other"
            elif not (frozen and info.name.endswith(_TRAINED)):
                layer = layers.get(id(variable))
                if getattr(layer, "trainable", True) and not variable.trainable:
                    role = "other"
            found.append(role)
        return found

    def depths(self, roles):
        """Return the depth of each weight: the place of its layer, from 0.

        This counts layers with a kernel, a weight of two or more axes, in the
        order of execution. A layer without one, such as a normalization, has
        the depth of the last layer with a kernel before it.
        """
        holders = self._owners()
        groups: dict[Any, list[int]] = {}
        for position, variable in enumerate(self.variables):
            groups.setdefault(holders[id(variable)], []).append(position)
        order = execution_order(self.model, list(groups))
        found, depth = [0] * len(roles), -1
        # Sorting is stable: layers that never run come last, as declared.
        for layer in sorted(groups, key=lambda x: order.get(id(x), len(order))):
            depth += any(
                roles[i] == "weight" and len(self.infos[i].shape) > 1
                for i in groups[layer]
            )
            for i in groups[layer]:
                found[i] = max(depth, 0)
        return found

    def _owners(self):
        """Return {id of variable: layer that holds it}, the first if shared."""
        found: dict[int, Any] = {}
        for layer in keras_compat.layers_of(self.model):
            # Avoid `layer.weights`, which includes those of inner layers.
            for variable in keras_compat.own_variables(layer):
                found.setdefault(id(variable), layer)
        return found


def mismatches(
    expected: Sequence[WeightInfo],
    infos: Sequence[WeightInfo],
    argument: str,
    changed: Collection[int] = (),
    dtypes: bool = False,
) -> list[str]:
    """Return how weights differ from an expected architecture.

    It compares count, order, names and numbers of axes. Sizes may differ, for
    example of heads, except in weights that are changed.

    Args:
        expected, infos: The weights.
        argument: String, what `infos` are in messages.
        changed: Positions of weights that must have the shape expected, be
            floats, and be stored in the same way.
        dtypes: Bool, whether they must have the very dtype expected instead.
    """
    if len(expected) != len(infos):
        return [
            f"{argument} has {len(infos)} weights, and {len(expected)} are "
            "expected: another architecture"
        ]
    named = all(info.path for info in (*expected, *infos))
    plain = "a plain weight"
    found = []
    for a, b in zip(expected, infos):
        wrong = []
        if named and not same_path(a.path, b.path):
            wrong.append(f"path {b.path!r}, and {a.path!r} is expected")
        if a.position not in changed:
            if len(a.shape) != len(b.shape):
                axes = f"{len(a.shape)} axes"
                wrong.append(f"shape {b.shape}, and {axes} are expected")
        else:
            if a.shape != b.shape:
                wrong.append(f"shape {b.shape}, and {a.shape} is expected")
            allowed = (a.dtype,) if dtypes else FLOATS
            if b.dtype not in allowed:
                listed = " or ".join(allowed)
                wrong.append(f"dtype {b.dtype}, and {listed} is expected")
            if None not in (a.stored, b.stored) and a.stored != b.stored:
                wrong.append(
                    f"{b.stored or plain}, and {a.stored or plain} is "
                    "expected. Fold both, or store both in one way"
                )
        found += [f"{argument}, {a.key}: {each}" for each in wrong]
    return found


def bytes_of(array: np.ndarray) -> Any:
    """Return the bytes of an array; dtypes of ml_dtypes offer no buffer."""
    return np.ascontiguousarray(array).reshape(-1).view("uint8").data


def _stored(model):
    """Return {id of variable: how a fixed reparameterization stores it}.

    One with parameters shows in the list of weights itself.
    """
    found = {}
    for item in reparameterizations(model):
        if not item.parameters:
            fixed = ", ".join(
                f"{key} = {np.ravel(value).tolist()}"
                for key, value in item.saved().items()
            )
            name = item.name or type(item).__name__
            found[id(item.target.variable)] = f"{name} ({fixed})"
    return found


def _view(tensor):
    return backend.current().view_of(tensor)
