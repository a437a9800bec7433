"""KerasHub's banks of experts: layers with a kernel for each expert.

A bank computes every expert for every token, by an einsum for each stack of
kernels. The block around it multiplies what the experts give by the weights of
the routing, which are zero but for the few experts that a token goes to.
"""

import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

from keras import ops

from keras_weightmods.core import keras_compat
from keras_weightmods.core.reparameterization import slots


@dataclasses.dataclass(frozen=True)
class Bank:
    """What is known of a class of banks.

    Attributes:
        stacks: Tuple of strings, the attributes that hold kernels of shape
            (experts, in, out).
        router: Tuple of strings, the way from the block to the Dense whose
            `top_k` largest outputs choose a token's experts; empty if the
            weights of the routing are the second argument of the bank.
    """

    stacks: tuple[str, ...]
    router: tuple[str, ...]


_QWEN_STACKS = (
    "_expert_feedforward_gate_dense",
    "_expert_feedforward_output_dense",
)
_QWEN_ROUTER = ("_sparse_feedforward_gate_dense",)

# By name: KerasHub is no dependency, and takes seconds to import.
_BANKS = {
    "MixtralMoeExperts": Bank(
        (*_QWEN_STACKS, "_expert_feedforward_intermediate_dense"), _QWEN_ROUTER
    ),
    "QwenMoeExperts": Bank(_QWEN_STACKS, _QWEN_ROUTER),
    "Qwen3MoeExperts": Bank(_QWEN_STACKS, _QWEN_ROUTER),
    "Qwen3_5MoeExperts": Bank(_QWEN_STACKS, ("_router_gate",)),
    "GptOssExperts": Bank(
        ("gate_up_proj", "down_proj"), ("router", "router_dense")
    ),
    "Gemma4MoEBlock": Bank(("gate_proj", "up_proj", "down_proj"), ()),
}


def bank_of(cls: Any) -> Bank | None:
    """Return what is known of a class itself, not of its bases."""
    is_hub = cls.__module__.startswith("keras_hub.")
    return _BANKS.get(cls.__name__) if is_hub else None


def stacks_of(layer: Any) -> tuple[str, ...]:
    """Return the attributes of a bank that hold stacks; none of other layers.

    A subclass with a `call` of its own may do anything, and is no bank.
    """
    bank = bank_of(_class_with_call(layer))
    return () if bank is None else bank.stacks


def _class_with_call(layer: Any) -> Any:
    return next(
        cls
        for cls in type(layer).__mro__
        if "call" in keras_compat.attributes(cls) and cls is not BankCall
    )


class BankCall:
    """The `call` of a bank with products of its own for some stacks.

    Each is the method `einsum` of the stack's `Reparameterization`.
    """

    def call(self, *args: Any, **kwargs: Any) -> Any:
        return run(self, {}, *args, **kwargs)


def run(layer: Any, products: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a bank as its class does, but for the products with its stacks.

    Args:
        layer: A bank.
        products: {attribute: callable from an equation and a tensor to their
            einsum with that stack}.
        *args: Arguments of the call.
        **kwargs: The same.
    """
    own = {
        name: item.einsum
        for name, item in slots(layer).items()
        if hasattr(item, "einsum")
    }
    stand_in = _StandIn(layer, {**own, **products})
    return _call_of(_class_with_call(layer))(stand_in, *args, **kwargs)


@contextlib.contextmanager
def inputs_seen(
    layer: Any, attribute: str, record: Callable[..., Any]
) -> Iterator[None]:
    """Call `record(x, *args)` before each product with a stack in a scope.

    `x` is what the stack is multiplied by, `args` those of the bank's call.
    """
    before = keras_compat.attributes(layer).get("call")
    records = [*getattr(before, "records", ()), (attribute, record)]

    def call(*args, **kwargs):
        given = [*args, *kwargs.values()]
        products = {
            name: functools.partial(_seen_product, layer, records, name, given)
            for name, _ in records
        }
        return run(layer, products, *args, **kwargs)

    call.records = records  # type: ignore[attr-defined]
    with keras_compat.replaced_attributes(layer, call=call):
        yield


def routers_of(model: Any) -> dict[int, Any]:
    """Return {id of a bank: callable} for the banks of a model.

    The callable takes the arguments of the bank's call, and returns a boolean
    tensor (tokens, experts): which experts a token is routed to.
    """
    routers = {}
    for block in keras_compat.layers_of(model):
        for layer in keras_compat.parts_of(block):
            if stacks_of(layer):
                bank = bank_of(_class_with_call(layer))
                routers[id(layer)] = functools.partial(_routed, block, bank)
    return routers


def _routed(block: Any, bank: Any, tokens: Any, weights: Any = None) -> Any:
    if not bank.router:
        return ops.greater(weights, 0)
    router = block
    for name in bank.router:
        router = getattr(router, name)
    # Not by a call of the layer, which may be watched as well.
    logits = type(router).call(router, tokens)
    _, chosen = ops.top_k(logits, k=block.top_k)
    return ops.any(ops.one_hot(chosen, logits.shape[-1]) > 0, axis=1)


def _seen_product(layer, records, name, args, equation, x):
    for attribute, record in records:
        if attribute == name:
            record(x, *args)
    item = slots(layer).get(name)
    if hasattr(item, "einsum"):
        return item.einsum(equation, x)
    return ops.einsum(equation, x, ops.cast(getattr(layer, name), x.dtype))


class _StandIn:
    """A bank whose stacks are `_Stack`, as the `self` of its call."""

    def __init__(self, layer, products):
        self._layer, self._products = layer, products

    def __getattr__(self, name):
        if name in self._products:
            return _Stack(self._layer, name, self._products[name])
        return getattr(self._layer, name)


class _Stack:
    """A stack that can be multiplied by an einsum, and no more."""

    def __init__(self, layer, name, product):
        self._layer, self._name, self._product = layer, name, product

    def __getattr__(self, name):
        raise TypeError(
            f"The stack `{self._name}` of layer {self._layer.name!r} was "
            "expected to be used by `ops.einsum(equation, x, stack)` alone, as "
            "in KerasHub 0.32. Received: another use, which asked for "
            f"`{name}`. Unpack the model, `kwm.unpack(model)`, or use that "
            "KerasHub."
        )


class _Operations:
    """`keras.ops` whose einsum takes a `_Stack`."""

    def __getattr__(self, name):
        return getattr(ops, name)

    def einsum(self, equation, *operands, **kwargs):
        *others, last = operands
        if isinstance(last, _Stack):
            (x,) = others
            return last._product(equation, x)
        return ops.einsum(equation, *operands, **kwargs)

    def cast(self, x, dtype):
        # A product is of the type of the other operand.
        return x if isinstance(x, _Stack) else ops.cast(x, dtype)


@functools.cache
def _call_of(cls: Any) -> Any:
    """Return the `call` of a class of banks, with `_Operations` as its `ops`.

    Not another copy of what the class computes, which would not follow when
    KerasHub changes it.
    """
    call = cls.call
    names = {**call.__globals__, "ops": _Operations()}
    function = types.FunctionType(
        call.__code__, names, "call", call.__defaults__, call.__closure__
    )
    function.__kwdefaults__ = call.__kwdefaults__
    return function
