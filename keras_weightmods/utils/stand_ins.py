"""Other attributes for an object, for a while."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def stand_ins(owner: Any, **values: Any) -> Iterator[None]:
    """Give an object other attributes in a scope, past Keras' tracking."""
    own = vars(owner)
    before = {name: own[name] for name in values if name in own}
    own.update(values)
    try:
        yield
    finally:
        for name in values:
            own.pop(name)
        own.update(before)
