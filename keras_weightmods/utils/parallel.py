"""Work on all cores: NumPy, zlib and checksums let other threads run."""

import collections
import concurrent.futures
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

# More threads would wait for memory, and each holds some.
_MOST_THREADS = 8


def threads() -> int:
    """Return how many threads to work with: the cores of this process."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS or Windows
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return min(cores, _MOST_THREADS)


def map_ahead(
    function: Callable[[Any], Any], items: Iterable[Any]
) -> Iterator[Any]:
    """Yield the result of a function for each item, in order.

    The function runs on all cores while the caller uses earlier results. It is
    only a few items ahead, so that results need little memory.

    Args:
        function: Callable of an item, which other threads call.
        items: Iterable.
    """
    count = threads()
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        waiting: collections.deque = collections.deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
