"""Train steps of Keras whose weights an error or Ctrl-C does not lose.

Keras takes the values out of a model's variables and hands them to the step,
which overwrites them in place: until it has returned, and Keras has noted what
it returned, nobody holds the weights.
"""

import contextlib
import signal
import threading
from typing import Any


def kept(step, hold, state, iterator):
    """Run a training step, and keep the weights if it ends with an error.

    An error in the data, or in what is compiled, leaves the values of before
    the step. Ctrl-C waits for the end of the step, unless it waits for data,
    or comes again.

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
                # Nothing runs on when the program ends.
                array.block_until_ready()
        raise
    return logs, new


def _data(iterator, waiting):
    """Yield batches, on which an interrupt need not wait."""
    while True:
        with waiting():
            batch = next(iterator, None)
        if batch is None:
            return
        yield batch


@contextlib.contextmanager
def _interrupts_wait():
    """Handle Ctrl-C at the end of a scope; yield one where it need not."""
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
