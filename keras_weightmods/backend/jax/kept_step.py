"""Train steps of Keras whose weights an error or Ctrl-C does not lose.

Keras takes the values out of a model's variables and passes them to the step,
which overwrites them in place. Nobody holds the weights until the step has
returned and Keras has stored the result.
"""

import contextlib
import signal
import threading
from typing import Any


def kept(step, hold, state, iterator):
    """Run a training step, and keep the weights if it ends with an error.

    After an error in the data or the compiled step, the model has the values
    from before the step. Ctrl-C waits for the end of the step, unless the step
    waits for data or Ctrl-C is pressed again.

    Args:
        step: The `train_function` of a model.
        hold: Callable of a state, has Keras put it into the variables when
            `fit` ends.
        state, iterator: What `step` is called with, the values of the model's
            variables and the batches.

    Returns:
        What `step` returns, logs and the new state.
    """
    left = state
    try:
        with _interrupts_wait() as waiting:
            logs, new = step(state, _data(iterator, waiting))
            hold(new)
            left = new
    except BaseException:
        arrays = [array for group in left for array in group]
        if not any(array.is_deleted() for array in arrays):
            hold(left)
            for array in arrays:
                # Let nothing run when the program ends.
                array.block_until_ready()
        raise
    return logs, new


def _data(iterator, waiting):
    """Yield batches. An interrupt need not wait for them."""
    while True:
        with waiting():
            batch = next(iterator, None)
        if batch is None:
            return
        yield batch


@contextlib.contextmanager
def _interrupts_wait():
    """Delay Ctrl-C to the end of a scope; yield one in which it acts."""
    handler = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not callable(handler):
        yield contextlib.nullcontext
        return
    received: list[Any] = []

    def note(*signal_and_frame):
        if received:
            handler(*signal_and_frame)
        received.append(signal_and_frame)

    @contextlib.contextmanager
    def at_once():
        signal.signal(signal.SIGINT, handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, note)

    signal.signal(signal.SIGINT, note)
    try:
        yield at_once
    finally:
        signal.signal(signal.SIGINT, handler)
    if received:
        handler(*received[0])
