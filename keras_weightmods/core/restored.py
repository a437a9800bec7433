"""Calls that change models: as a whole, or not at all."""

from collections.abc import Iterable
from typing import Any, Self

import numpy as np

from keras_weightmods.backend import whole
from keras_weightmods.core import keras_compat


class RestoredOnError:
    """Give objects their state back where a scope ends by an error or Ctrl-C.

    And Keras the scopes that were open: of names, of a device, without values.

    Ctrl-C may come between any two bytecodes. Before the scope nothing has
    changed, within it all is given back, and once it ends all has changed. (A
    generator would not do: interrupted when it ends, it would give the state
    back when it is collected.)

    What is new in the objects is dropped. The rest is the same objects again.

    Args:
        *objects: Layers, optimizers and variables, of which all is given back
            but values, as `keras_compat.Structure` says.
        values: Iterable of the variables that get other values. Copies of
            these are held meanwhile.
        released: As in `keras_compat.Structure`.
    """

    def __init__(
        self,
        *objects: Any,
        values: Iterable[Any] = (),
        released: Iterable[Any] = (),
    ) -> None:
        self.structure = keras_compat.Structure(objects, released)
        once = {id(variable): variable for variable in values}.values()
        # Copies: on torch an array shares the memory of the variable.
        self._values = [(each, np.array(whole(each))) for each in once]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        while kind is not None:
            try:
                self.structure.restore()
                self.give_values_back()
                return
            except KeyboardInterrupt:
                # Another one. The first is raised once all is given back.
                pass

    def give_values_back(self) -> None:
        """Give the variables their values back, within the scope too."""
        for variable, value in self._values:
            variable.assign(value)
