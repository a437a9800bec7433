"""Attention in which several queries share a key, without copies of the key."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def shared_heads(
    functions_by: Any, attend: Callable[..., Any], plain_shares: bool
) -> Iterator[None]:
    """Run attention in a scope with keys and values as they were not repeated.

    KerasHub repeats them for each group of heads before it asks `keras.ops`
    for the attention.

    Args:
        functions_by: Of `core.keras_private`.
        attend: Takes the arguments of the backend's `dot_product_attention`
            and returns its result, or None where it cannot.
        plain_shares: Bool, whether the backend's own takes them so too.
    """
    repeated = {}

    def repeat_by(plain):
        def repeat(x, repeats, axis=None):
            y = plain(x, repeats, axis=axis)
            if axis == 2 and len(x.shape) == 4:
                # Held, so that no other gets the id.
                repeated[id(y)] = y, x
            return y

        return repeat

    def attention_by(plain):
        def attention(query, key, value, *args, **kwargs):
            own = key, value
            if id(key) in repeated and id(value) in repeated:
                own = repeated[id(key)][1], repeated[id(value)][1]
            result = attend(query, *own, *args, **kwargs)
            if result is not None:
                return result
            given = own if plain_shares else (key, value)
            return plain(query, *given, *args, **kwargs)

        return attention

    with functions_by(
        numpy_repeat=repeat_by, nn_dot_product_attention=attention_by
    ):
        yield
