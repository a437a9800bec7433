"""Functions around the training step of a model, in one fixed order.

Keras calls `model.train_function` for each step, and lets anyone set it. This
module holds everything that the package puts around it. So nothing is applied
twice, or lost when Keras makes a new function.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import keras

from keras_weightmods.core import keras_compat
from keras_weightmods.utils.progress import Waiting

# From the inside out.
_ORDER = ("weights kept", "frozen weights", "first step")

# {model: {name: callable of the model, the inner step and its arguments}}. The
# callables do not hold the model, so that it can be collected.
_AROUND: Any = weakref.WeakKeyDictionary()
# Train functions of Keras whose first call is over or shown.
_SHOWN: Any = weakref.WeakSet()


class _Step:
    """A train function of Keras, and the functions around it."""

    def __init__(self, model: Any, plain: Callable[..., Any]) -> None:
        self.model = model
        self.plain = plain

    def __call__(self, *args: Any) -> Any:
        step, around = self.plain, _AROUND.get(self.model, {})
        for name in _ORDER:
            if name in around:
                step = functools.partial(around[name], self.model, step)
        return step(*args)


def put_around(model: Any, name: str, around: Callable[..., Any]) -> None:
    """Run a function around each training step of a model.

    It stays until `take_off`. When Keras makes a new train function, the next
    call wraps it again.

    Args:
        model: A `keras.Model`. One without a train function waits for it.
        name: String, one of `_ORDER`. Another function of this name is
            replaced.
        around: Callable of the model, the step and its arguments. It calls the
            step and returns what it returned. It holds no model itself.
    """
    _AROUND.setdefault(model, {})[name] = around
    step = model.train_function
    if step is not None and not isinstance(step, _Step):
        model.train_function = _Step(model, step)


def take_off(model: Any, name: str) -> None:
    """Undo `put_around`; after the last, the step is Keras' own."""
    around = _AROUND.get(model, {})
    around.pop(name, None)
    if not around and isinstance(getattr(model, "train_function", None), _Step):
        model.train_function = model.train_function.plain


def keep_weights(model: Any) -> None:
    """Let `fit` on JAX keep the weights when a step ends with an error.

    Its step takes them out of the variables. The other backends change them in
    place, and need nothing. This stays on the model for later calls of `fit`.
    """
    if keras.backend.backend() != "jax":
        return
    from keras_weightmods.backend.jax.kept_step import kept

    def around(model: Any, step: Any, *args: Any) -> Any:
        return kept(
            step, functools.partial(keras_compat.hold_state, model), *args
        )

    put_around(model, "weights kept", around)


def show_first(model: Any, verbose: Any, since: float | None = None) -> None:
    """Show progress if the first step of a train function takes long.

    This is for compiled steps. Each train function is shown once.

    Args:
        model: A compiled `keras.Model` with a train function.
        verbose: As of `fit`. 0 shows nothing.
        since: As of `Waiting`.
    """
    step = model.train_function
    plain = step.plain if isinstance(step, _Step) else step
    is_compiled = keras.backend.backend() != "torch" or model.jit_compile
    if plain is None or plain in _SHOWN or model.run_eagerly or not is_compiled:
        return
    _SHOWN.add(plain)

    def first(model: Any, step: Any, *args: Any) -> Any:
        take_off(model, "first step")
        with Waiting("Compiling the training step", verbose, since):
            return step(*args)

    put_around(model, "first step", first)
