"""Changes of models, made completely or not at all."""

import functools
import math
import os
import tempfile
import weakref
from collections.abc import Iterable
from typing import Any, Self

import numpy as np

from keras_weightmods import backend
from keras_weightmods.backend import whole
from keras_weightmods.core import keras_compat


class RestoredOnError:
    """Restore the state of objects if a scope ends with an error or Ctrl-C.

    This includes Keras' open scopes: of names, of a device, without values.

    Ctrl-C may come between any two bytecodes. Before the scope nothing has
    changed, within it everything is restored, and once it ends everything has
    changed. (So this is no `contextlib.contextmanager`: a generator that is
    interrupted at its end would restore the state when it is collected.)

    New attributes are dropped. The others are the same objects again.

    Args:
        *objects: Layers, optimizers and variables, of which all is given back
            but values, as `keras_compat.Structure` says.
        values: Iterable of the variables that get other values. Copies of
            these are held meanwhile.
        released: As in `keras_compat.Structure`.
        on_disk: Bool, whether the copies are in a temporary file, not in
            memory.
    """

    def __init__(
        self,
        *objects: Any,
        values: Iterable[Any] = (),
        released: Iterable[Any] = (),
        on_disk: bool = False,
    ) -> None:
        self.structure = keras_compat.Structure(objects, released)
        once = {id(variable): variable for variable in values}.values()
        # Copy: on torch an array shares the memory of the variable.
        copy: Any = np.array
        if on_disk:
            file = tempfile.TemporaryFile()  # noqa: SIM115
            weakref.finalize(self, file.close)
            copy = functools.partial(_Stored, file)
        self._values = [(each, copy(whole(each))) for each in once]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        while kind is not None:
            try:
                self.structure.restore()
                self.give_values_back()
                return
            except KeyboardInterrupt:
                # A second Ctrl-C. The first is raised once all is restored.
                pass

    def give_values_back(self) -> None:
        """Restore the values of the variables, also within the scope."""
        for variable, _ in self._values:
            variable.assign(self.value_of(variable))

    def value_of(self, variable: Any) -> Any:
        """Return the value that a variable had before the scope."""
        for each, value in self._values:
            if each is variable:
                return value.read() if isinstance(value, _Stored) else value
        return variable.value


class _Stored:
    """An array at the end of a file."""

    def __init__(self, file: Any, array: np.ndarray) -> None:
        self._file, self._place = file, file.seek(0, os.SEEK_END)
        self._dtype, self._shape = array.dtype, array.shape
        try:
            # `tofile` says nothing on a full disk.
            file.write(np.ascontiguousarray(array).reshape(-1).view("uint8"))
            file.flush()
        except OSError as error:
            raise OSError(
                "The original weights must fit into the folder of temporary "
                f"files. Received: {error}. Free disk space there, or set "
                "TMPDIR to another folder before Python starts."
            ) from error

    def read(self) -> Any:
        """Return it as a tensor."""
        self._file.seek(self._place)
        size = math.prod(self._shape)
        array = np.fromfile(self._file, self._dtype, size)
        # `assign` would copy an array twice, through float32 for bfloat16.
        return backend.current().tensor_of(array.reshape(self._shape))
