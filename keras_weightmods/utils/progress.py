"""Progress of work that may or may not take long."""

import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Self

# Nothing is shown for so many seconds.
DELAY = 2.0
# Seconds between drawings that replace each other, and between lines that stay.
_EVERY = {True: 1.0, False: 10.0}


class _Late:
    """Draw from a thread, once the work has taken two seconds.

    In a terminal or a notebook it draws again each second, in a file each ten.
    """

    def __init__(self, verbose: Any, since: float | None) -> None:
        self._verbose = verbose
        self._since = since

    def __enter__(self) -> Self:
        self._start = time.perf_counter()
        since = self._start if self._since is None else self._since
        self._first = since + DELAY
        is_terminal = getattr(sys.stdout, "isatty", bool)()
        self._is_rewritten = is_terminal or "ipykernel" in sys.modules
        self._is_over = threading.Event()
        # The thread holds this object only while it draws. So it ends with the
        # object if Ctrl-C comes before `__exit__`.
        weakref.finalize(self, self._is_over.set)
        self._thread = threading.Thread(
            target=_draw_until,
            args=(self._is_over, self._first, weakref.ref(self)),
            daemon=True,
        )
        if self._verbose:
            self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._is_over.set()
        if self._verbose:
            self._thread.join()
            if time.perf_counter() >= self._first:
                self._draw(True)

    def _draw(self, is_last: bool) -> None:
        raise NotImplementedError

    def _write_seconds(self, label: str, is_last: bool = False) -> None:
        line = f"{label}: {time.perf_counter() - self._start:.0f} s"
        if self._is_rewritten:
            line = f"\r{line}"
        if is_last or not self._is_rewritten:
            line += "\n"
        sys.stdout.write(line)
        sys.stdout.flush()


def _draw_until(
    is_over: threading.Event, first: float, drawn: weakref.ref[_Late]
) -> None:
    pause = max(0.0, first - time.perf_counter())
    while not is_over.wait(pause) and (late := drawn()):
        late._draw(False)
        pause = _EVERY[late._is_rewritten]
        del late


class Progress(_Late):
    """Keras' progress bar, shown once the work has taken two seconds.

    A context manager. The first step that takes long shows its seconds, and
    the bar appears even within a later one. Shorter work shows nothing. In a
    terminal or a notebook this is redrawn every second, in a file every ten.

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
        super().__init__(verbose, since)
        self.total = total
        self._unit = unit
        self._done = 0

    def __enter__(self) -> Self:
        import keras

        self._bar = keras.utils.Progbar(
            self.total, unit_name=self._unit, interval=0
        )
        return super().__enter__()

    def add(self, *_: Any) -> None:
        """Count one more step. Arguments are ignored."""
        self._done += 1

    def each(self, steps: Iterable[Any]) -> Iterator[Any]:
        """Yield the steps, and count each when it is done."""
        for step in steps:
            yield step
            self.add()

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is None:
            self._done = self.total
        super().__exit__(kind, *error)

    def _draw(self, is_last: bool) -> None:
        # Keras' bar would say that no time is left, until a step is done.
        if not self._done and not is_last:
            self._write_seconds(f"first {self._unit}")
            return
        self._bar.target = self.total
        self._bar.update(self._done, finalize=is_last)


class Waiting(_Late):
    """A line that names the work in progress, and the seconds it has taken.

    A context manager for work whose steps cannot be counted. Like `Progress`,
    it shows nothing for two seconds. In a terminal or a notebook the line is
    rewritten every second. In a file, a new line appears every ten.

    Args:
        label: String, what is waited for.
        verbose: As in `Progress`.
        since: As of `Progress`. The seconds shown are those of the waiting.
    """

    def __init__(
        self, label: str, verbose: Any = 1, since: float | None = None
    ) -> None:
        super().__init__(verbose, since)
        self._label = label

    def __enter__(self) -> Self:
        import keras

        if not keras.config.is_interactive_logging_enabled():
            self._verbose = 0
        return super().__enter__()

    def _draw(self, is_last: bool) -> None:
        self._write_seconds(self._label, is_last)
