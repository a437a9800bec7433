"""Products of one input by several kernels, in one call.

A language model multiplies what comes into a layer by the kernels of query, key
and value, and later by those of gate and up. With int8 activations one call for
them all rounds the input once, and wakes the threads once.
"""

import collections
import contextlib
import contextvars
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax

# What sees the products that are traced; None for nothing.
_watcher: contextvars.ContextVar[Any] = contextvars.ContextVar(
    "products", default=None
)


def watched_product(x: Any, packed: Any, multiply: Callable[..., Any]) -> Any:
    """Return the product, alone or out of a call with others.

    Args:
        x: Array of shape (..., K).
        packed: `Packed`, with int8 activations.
        multiply: Callable from `x` and a list of `Packed` to their products.
    """
    watcher = _watcher.get()
    if watcher is None:
        return multiply(x, [packed])[0]
    return watcher(x, packed, multiply)


def in_one_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have a function share calls: it is traced twice, to see which can.

    Args:
        function: Callable that is run under a trace, without gradients, and
            does the same each time.
    """

    def call(*args: Any) -> Any:
        seen = _Seen()
        with _watching(seen):
            jax.eval_shape(lambda: function(*args))
        with _watching(_Shared(seen.groups())):
            return function(*args)

    return call


@contextlib.contextmanager
def _watching(watcher: Any) -> Iterator[None]:
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


class _Seen:
    """Sees which products have one input."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any]] = []

    def __call__(self, x, packed, multiply):
        self.calls.append((x, packed))
        return multiply(x, [packed])[0]

    def groups(self):
        """Return {first number: {number: kernel}} of calls with one input."""
        found = collections.defaultdict(list)
        for number, (x, packed) in enumerate(self.calls):
            # One call takes matrices of one type.
            found[id(x), packed.dtype, packed.is_dense].append(number)
        return {
            numbers[0]: {n: self.calls[n][1] for n in numbers}
            for numbers in found.values()
            if len(numbers) > 1
        }


class _Shared:
    """Makes the products of a group at its first."""

    def __init__(self, groups):
        self.groups = groups
        self.numbers = itertools.count()
        self.ready: dict[int, Any] = {}

    def __call__(self, x, packed, multiply):
        number = next(self.numbers)
        group = self.groups.get(number)
        # The others fit where this one does.
        if group is not None and group[number] is packed:
            products = multiply(x, list(group.values()))
            for other, product in zip(group, products):
                self.ready[other] = x, group[other], product
        of, by, product = self.ready.pop(number, (None, None, None))
        if of is x and by is packed:
            return product
        return multiply(x, [packed])[0]
