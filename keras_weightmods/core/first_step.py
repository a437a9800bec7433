"""Shows that a training step is being compiled, which may take a minute."""

import functools
from typing import Any

import keras

from keras_weightmods.utils.progress import Waiting


def show_first_step(
    model: Any, verbose: Any, since: float | None = None
) -> None:
    """Show that the first step of a train function takes long, if it does.

    Where it is compiled, that is. Each train function of Keras is shown once,
    also if it is handed in again.

    Args:
        model: A compiled `keras.Model` with a train function.
        verbose: As of `fit`. 0 shows nothing.
        since: As of `Waiting`.
    """
    step = model.train_function
    is_compiled = keras.backend.backend() != "torch" or model.jit_compile
    is_shown = step is None or hasattr(step, "is_shown")
    if is_shown or model.run_eagerly or not is_compiled:
        return
    is_first = True

    @functools.wraps(step)
    def train_function(*args: Any) -> Any:
        nonlocal is_first
        shown, is_first = verbose if is_first else 0, False
        if not shown:
            return step(*args)
        with Waiting("Compiling the training step", shown, since):
            return step(*args)

    marked: Any = train_function
    marked.is_shown = True
    model.train_function = marked
