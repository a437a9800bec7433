"""A progress bar for work that may take long, and may not."""

import threading
from typing import Any

# Seconds in which nothing is shown.
DELAY = 2.0


class Progress:
    """Keras' progress bar, shown once the work has taken two seconds.

    A context manager. A step that takes long shows it too, not only the end of
    one. Work that is done before shows nothing.

    Args:
        total: Int, the steps of the work. It may be set later.
        unit: String, what a step is of, as `"kernel"`.
        verbose: 0 or 1. 0 shows nothing.
    """

    def __init__(self, total: int, unit: str, verbose: Any = 1) -> None:
        self.total = total
        self._unit = unit
        self._verbose = verbose
        self._done = 0
        self._is_shown = False
        self._lock = threading.Lock()

    def __enter__(self) -> "Progress":
        import keras

        # Where it is written to a file, each update is a line.
        self._bar = keras.utils.Progbar(
            self.total, unit_name=self._unit, interval=0.5
        )
        self._timer = threading.Timer(DELAY, self._show)
        self._timer.daemon = True
        if self._verbose:
            self._timer.start()
        return self

    def add(self, *_: Any) -> None:
        """Count one step more. Arguments are passed over."""
        with self._lock:
            self._done += 1
            self._draw()

    def __exit__(self, kind: Any, *error: Any) -> None:
        self._timer.cancel()
        with self._lock:
            if kind is None:
                self._done = self.total
                self._draw(finalize=True)
            # A timer that has just fired shows nothing now.
            self._verbose = 0

    def _show(self) -> None:
        with self._lock:
            self._is_shown = bool(self._verbose)
            self._draw()

    def _draw(self, finalize: bool = False) -> None:
        if self._is_shown and self._verbose:
            self._bar.target = self.total
            self._bar.update(self._done, finalize=finalize)
