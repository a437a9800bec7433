"""A model, or a list of its weights, read in one way."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_weightmods import backend
from keras_weightmods.patches import tensors
from keras_weightmods.patches.entry import FLOATS as FLOATS
from keras_weightmods.patches.entry import WeightInfo as WeightInfo
from keras_weightmods.saving.container import DTYPES
from keras_weightmods.utils import checks

_COPY_ON_WRITE = ("jax", "tensorflow")


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """Values of a weight that nothing changes any more.

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
                expected = "built and hold weights: call it on data once"
                raise checks.error(argument, expected, source)
            self.model = source
            self.variables = source.weights
            self.infos = tuple(
                WeightInfo(
                    position,
                    v.path.removeprefix(f"{source.name}/"),
                    tuple(v.shape),
                    keras.backend.standardize_dtype(v.dtype),
                )
                for position, v in enumerate(self.variables)
            )
            return
        if not isinstance(source, (list, tuple)) or not source:
            expected = "a built Keras model, or a list as of `get_weights()`"
            raise checks.error(argument, expected, source)
        self.arrays = [np.asarray(array) for array in source]
        self.infos = tuple(
            WeightInfo(position, "", array.shape, array.dtype.name)
            for position, array in enumerate(self.arrays)
        )
        wrong = {info.dtype for info in self.infos} - set(DTYPES)
        if wrong:
            raise checks.error(argument, "a list of arrays of numbers", wrong)

    def read(self, position):
        """Return the values at `position`, an array not to be written to.

        It may be a view of the variable's memory.
        """
        if self.model is None:
            return self.arrays[position]
        view = _view(self._tensor(position))
        if view is not None:
            return view
        value = self.variables[position].value
        return backend.current().array_of(value)

    def memory(self, position):
        """Return a view of the variable's own memory to write to, or None.

        None on JAX and TensorFlow, which never change a tensor that something
        else can see, and on torch where NumPy cannot see it in one piece.
        """
        if keras.backend.backend() in _COPY_ON_WRITE:
            return None
        view = _view(self._tensor(position))
        return None if view is None or not view.flags.c_contiguous else view

    def snapshots(self, positions):
        """Return a dict from positions to `Snapshot`s of their values."""
        found, views = {}, {}
        for position in positions:
            tensor = self._tensor(position)
            view = _view(tensor)
            if view is None:
                found[position] = Snapshot(self.read(position))
            elif keras.backend.backend() in _COPY_ON_WRITE:
                found[position] = Snapshot(view, tensor)
            else:
                found[position] = Snapshot(np.empty(view.shape, view.dtype))
                views[position] = view.reshape(-1)

        def copy(position, part):
            found[position].array.reshape(-1)[part] = views[position][part]

        tensors.over_parts(copy, views)
        return found

    def assign(self, position, values, places=None):
        """Put the values of a `Snapshot` into the variable at `position`.

        At `places` of it, flattened, if these are given. If not, the
        snapshot's memory may be the variable's from then on.
        """
        if places is not None:
            memory = self.memory(position)
            if memory is not None:
                memory.reshape(-1)[places] = values.array
                return
            present = self.read(position)
            memory = tensors.empty_aligned(present.shape, present.dtype)
            memory[...] = present
            memory.reshape(-1)[places] = values.array
            values = Snapshot(memory)
        tensor = values.tensor
        if tensor is None:
            tensor = backend.current().tensor_of(values.array)
        self.variables[position].assign(tensor)

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
            if info.position in without:
                continue
            digest.update(f"{info.shape} {info.dtype};".encode())
            _update(digest, (read or self.read)(info.position))
            see(info.key)
        return digest.hexdigest()


def _view(tensor):
    return backend.current().view_of(tensor)


def _update(digest, array):
    # Dtypes of ml_dtypes offer no buffer; bytes do.
    digest.update(np.ascontiguousarray(array).reshape(-1).view("uint8"))
