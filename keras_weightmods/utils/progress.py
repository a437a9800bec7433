"""Signs of progress for work that may take long, and may not."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

# Seconds in which nothing is shown.
DELAY = 2.0
# Seconds between two lines of `Waiting`, where one takes the place of another
# and where each is kept.
_EVERY = {True: 1.0, False: 10.0}


class Progress:
    """Keras' progress bar, shown once the work has taken two seconds.

    A context manager. A step that takes long shows it too, not only the end of
    one. Work that is done before shows nothing.

    Args:
        total: Int, the steps of the work. It may be set later.
        unit: String, what a step is of, as `"kernel"`.
        verbose: 0 or 1, or that of `fit`. 0 shows nothing.
        since: Float, of `time.perf_counter`: when the work began, if not now.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        verbose: Any = 1,
        since: float | None = None,
    ) -> None:
        self.total = total
        self._unit = unit
        self._verbose = verbose
        self._since = since
        self._done = 0
        self._is_shown = False
        self._lock = threading.Lock()

    def __enter__(self) -> "Progress":
        import keras

        # Where it is written to a file, each update is a line.
        self._bar = keras.utils.Progbar(
            self.total, unit_name=self._unit, interval=0.5
        )
        self._timer = threading.Timer(_rest(self._since), self._show)
        self._timer.daemon = True
        if self._verbose:
            self._timer.start()
        return self

    def add(self, *_: Any) -> None:
        """Count one step more. Arguments are passed over."""
        with self._lock:
            self._done += 1
            self._draw()

    def each(self, steps: Iterable[Any]) -> Iterator[Any]:
        """Yield the steps, each of which is counted when it is done."""
        for step in steps:
            yield step
            self.add()

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


class Waiting:
    """A line that says what is waited for, and the seconds that it has taken.

    A context manager, for work whose steps cannot be counted. As `Progress` it
    shows nothing for two seconds. In a terminal or a notebook the line is
    written again each second; in a file each ten, as a line of its own.

    Args:
        label: String, what is waited for.
        verbose: As in `Progress`.
        since: As of `Progress`. The seconds shown are those of the waiting.
    """

    def __init__(
        self, label: str, verbose: Any = 1, since: float | None = None
    ) -> None:
        self._label = label
        self._verbose = verbose
        self._since = since

    def __enter__(self) -> "Waiting":
        import keras

        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        if self._verbose and keras.config.is_interactive_logging_enabled():
            self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._is_over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        start, pause, end = time.perf_counter(), _rest(self._since), ""
        is_rewritten = sys.stdout.isatty() or "ipykernel" in sys.modules
        line = "\r{}: {:.0f} s" if is_rewritten else "{}: {:.0f} s\n"
        while not self._is_over.wait(pause):
            seconds = time.perf_counter() - start
            sys.stdout.write(line.format(self._label, seconds))
            sys.stdout.flush()
            pause, end = _EVERY[is_rewritten], "\n" * is_rewritten
        sys.stdout.write(end)


def _rest(since: float | None) -> float:
    """Return the seconds that are left in which nothing is shown."""
    if since is None:
        return DELAY
    return max(0.0, DELAY - (time.perf_counter() - since))
