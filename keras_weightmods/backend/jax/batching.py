"""How a product with a packed kernel is batched."""

from collections.abc import Callable
from typing import Any

import jax


def batches_as_rows(product: Callable[..., Any]) -> Callable[..., Any]:
    """Give a product of an activation and weights its rule for `vmap`.

    A batch of activations is only more rows; where weights are batched too,
    the products are made one after the other.
    """
    call = jax.custom_batching.custom_vmap(product)

    @call.def_vmap
    def batched(axis_size, in_batched, *arguments):
        if not any(jax.tree.leaves(in_batched[1:])):
            return call(*arguments), True
        leaves, structure = jax.tree.flatten(arguments)
        is_mapped = jax.tree.leaves(in_batched)

        def one(mapped):
            mapped = iter(mapped)
            pairs = zip(leaves, is_mapped)
            each = [next(mapped) if maps else leaf for leaf, maps in pairs]
            return call(*jax.tree.unflatten(structure, each))

        mapped = [leaf for leaf, maps in zip(leaves, is_mapped) if maps]
        return jax.lax.map(one, mapped), True

    return call
