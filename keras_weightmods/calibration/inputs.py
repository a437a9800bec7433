"""Statistics of the inputs of each target, over calibration data."""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.backend import whole
from keras_weightmods.core import keras_compat
from keras_weightmods.core.head import find_head
from keras_weightmods.core.layer_kinds import kind_with_call, reason_unread
from keras_weightmods.core.products import Products
from keras_weightmods.core.watched import called_by
from keras_weightmods.utils.matrix import contraction_size
from keras_weightmods.utils.progress import Progress
from keras_weightmods.utils.report import Skipped, skipped_text

UNREACHED = "the data do not reach it"


def unreached(left, way_out):
    """Return the error for data that did not reach the kernels `left`."""
    return ValueError(
        "The kernels are fitted to data, but these data reach none. "
        f"Received: {skipped_text(left)}. Pass other `data` or `targets`, so "
        "that a call of the model on them runs their layers; "
        f"`kwm.register_layer_kind` makes layers known. {way_out}"
    )


def input_norms(model, targets, batches):
    """Measure the norm of every input that a target contracts.

    The input factor of Wanda's score `|W_ij| * ||x_j||_2`
    (arXiv 2306.11695), as the root of the mean square over all positions.
    The model is run as it is, without training, and is not changed.

    Args:
        model: A built `keras.Model`.
        targets: `Targets` of it, or a list of `Target`.
        batches: Iterable of pairs of inputs for `model` and sample weights,
            or `None`. Positions of weight 0 (padding) are left out where a
            target's input has the axes of the weights; the others count
            alike.

    Returns:
        A list with one float32 NumPy vector for each target, of shape
        `(K,)`, K being the size of the flattened contraction axes, a mean
        over the kernels where the target is a stack of them; `None` for a
        target whose layer's inputs cannot be told apart (a layer of the user's
        own) or that no batch reached.

    Example:

    ```python
    import keras
    import numpy as np
    from keras_weightmods import find_targets
    from keras_weightmods.calibration.inputs import input_norms

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    x = np.array([[3.0, 0.0, 1.0, 0.0], [4.0, 0.0, 1.0, 0.0]])
    (norms,) = input_norms(model, find_targets(model), [(x, None)])
    assert np.allclose(norms, [np.sqrt(12.5), 0.0, 1.0, 0.0])
    ```
    """
    sums: list[Any] = [0.0] * len(targets)
    counts = [0] * len(targets)

    def see(place: int, rows: Rows, used: Any) -> None:
        squares, count = rows.squares(used)
        sums[place] += whole(squares).astype("float64")
        counts[place] += count

    calls = (
        (
            used_positions(weights),
            (keras.tree.map_structure(ops.convert_to_tensor, batch),),
            {"training": False},
        )
        for batch, weights in batches
    )
    # Stop before the head, which takes as long as many layers: nobody needs
    # logits.
    head, body = find_head(model), model
    if head and not any(t.layer in head.layers for t in targets):
        body = head.body
    with eager_forward():
        see_calls(model, targets, body, calls, see)
    return [
        np.sqrt(total / count).astype("float32") if count else None
        for total, count in zip(sums, counts)
    ]


def measure_importance(optimizer, model, targets, batches, verbose, since=None):
    """Give an `AdamS(criterion="wanda")` the norms of the inputs.

    Args:
        optimizer: A built `AdamS`.
        model, targets, batches: As in `input_norms`. Kernels of the optimizer
            that are not among `targets`, or that got no inputs but zeros, are
            ranked by magnitude alone. A warning names the latter.
        verbose, since: As in `Progress`.

    Raises:
        ValueError: If inputs are not finite; it names the kernel. Or if no
            kernel got any.
    """
    with Progress(len(batches), "batch", verbose, since) as progress:
        norms = input_norms(model, targets, progress.each(batches))
    for target, norm in zip(targets, norms):
        if norm is not None and not np.isfinite(norm).all():
            raise ValueError(
                "CAST ranks weights by the inputs of their layers, which must "
                f"be finite. Received: NaN or infinity at {target.path!r}. "
                "Look for bad values in the data, or pass "
                "`AdamS(criterion='magnitude')`."
            )
    known, unknown = {}, []
    for target, norm in zip(targets, norms):
        if norm is not None and norm.any():
            known[id(target.variable)] = norm
            continue
        why = reason_unread(target.layer, target.attribute) or UNREACHED
        why = why if norm is None else "its inputs are all 0"
        unknown.append(Skipped(target.path, why))
    if unknown and not known:
        raise unreached(unknown, "`AdamS(criterion='magnitude')` takes none.")
    if unknown:
        warnings.warn(
            f"CAST ranks the weights of {len(unknown)} kernels by magnitude "
            f"alone: {skipped_text(unknown)}",
            stacklevel=4,
        )
    importance = []
    for variable, axes, _ in optimizer.sparsified_state:
        norm = known.get(id(variable))
        size = contraction_size(variable.shape, axes)
        importance.append(np.ones(size) if norm is None else norm)
    optimizer.set_importance(importance)


@dataclasses.dataclass(frozen=True)
class Rows:
    """The inputs of one product with a kernel.

    Attributes:
        tensor: Tensor of shape `(..., S, K)`; S is 1 where all kernels of a
            stack have the same rows.
        stacks: Int, the number of kernels in the stack, 1 for a single one.
        routed: Boolean NumPy array (rows, stacks), which rows count for which
            kernel; None if all do.
    """

    tensor: Any
    stacks: int
    routed: Any = None

    def moment(self, used: Any = None) -> tuple[Any, int]:
        """Return `X^T X` of the rows, (stacks, K, K), and their number.

        Rows that `used`, a boolean array over the leading axes or None, leaves
        out are not counted.
        """
        parts, count = self._parts(used)
        moments = [ops.matmul(ops.swapaxes(x, -2, -1), x) for x in parts]
        if self.routed is not None:
            return ops.stack(moments), count
        shape = (self.stacks, *moments[0].shape[1:])
        return ops.broadcast_to(moments[0], shape), count

    def matrices(self, used: Any = None) -> list[Any]:
        """Return the rows of each kernel of the stack, (rows, K) float32."""
        parts, _ = self._parts(used)
        if self.routed is None:
            parts = list(parts[0])
            parts *= self.stacks // len(parts)
        return parts

    def squares(self, used: Any = None) -> tuple[Any, int]:
        """Return sums of squares, (K,), of a mean kernel, and the number."""
        parts, count = self._parts(used)
        sums = ops.stack([ops.sum(ops.square(x), axis=-2) for x in parts])
        sums = ops.reshape(sums, (-1, sums.shape[-1]))
        return ops.mean(sums, axis=0), count

    def same(self, other: "Rows") -> bool:
        """Return whether these are the same rows for as many kernels."""
        x, y = self.tensor, other.tensor
        return (
            (self.stacks, self.routed is None, tuple(x.shape))
            == (other.stacks, other.routed is None, tuple(y.shape))
        ) and (x is y or bool(ops.all(ops.equal(x, y))))

    def _parts(self, used: Any) -> tuple[list[Any], int]:
        """Return the rows as float32, and their number.

        This is one tensor (S, rows, K) for all kernels, with zeros for rows
        left out. If rows are routed, each kernel has rows of its own.
        """
        x = ops.cast(self.tensor, "float32")
        mask = mask_of(used, tuple(x.shape[:-2])).reshape(-1)
        count = int(mask.sum())
        x = ops.moveaxis(ops.reshape(x, (-1, *x.shape[-2:])), 1, 0)
        if self.routed is None:
            if not mask.all():
                # Not a product: padding may hold NaN.
                kept = ops.convert_to_tensor(mask[None, :, None])
                x = ops.where(kept, x, 0.0)
            return [x], count
        parts = []
        for index, own in enumerate((self.routed & mask[:, None]).T):
            (places,) = np.nonzero(own)
            rows = x[index if len(x) > 1 else 0]
            parts.append(ops.take(rows, places.astype("int32"), axis=0))
        return parts, count


def see_calls(
    model: Any,
    targets: Any,
    call: Callable[..., Any],
    calls: Iterable[tuple[Any, Any, Any]],
    see: Callable[[int, Rows, Any], None],
    needed: Callable[[], Iterable[int]] | None = None,
) -> None:
    """Run calls, each only until everything to be seen was seen.

    Args:
        model, targets: As in `rows_seen`.
        call: Callable, a part of the model.
        calls: Iterable of triples: what `see` gets of a call, such as which
            positions count, and its arguments, a tuple and a dict.
        see: Callable from the place of a target in the list, its `Rows`, and
            the first of the triple.
        needed: Callable to the places of targets to be seen in all calls but
            the first; by default, `None`, all.
    """
    last = [0] * len(targets)
    used, seen, enough = None, 0, None

    def count(place: int, rows: Rows) -> None:
        nonlocal seen
        see(place, rows, used)
        seen += 1
        last[place] = seen
        if seen == enough:
            raise _Enough

    with rows_seen(model, targets, count):
        for own, args, kwargs in calls:
            used, seen = own, 0
            with contextlib.suppress(_Enough):
                call(*args, **kwargs)
            if enough is None:
                # The first call runs to its end to find out.
                places = needed() if needed else range(len(last))
                enough = max((last[place] for place in places), default=0)


class _Enough(BaseException):
    """End a forward pass once everything to be seen was seen.

    The rest of a block, up to half of the time, would be wasted, and there is
    no other way out of a layer's code. It is not an `Exception`, which Keras
    would rewrite at each level and a layer might catch.
    """


@contextlib.contextmanager
def rows_seen(
    model: Any, targets: Any, see: Callable[[int, Rows], None]
) -> Iterator[None]:
    """Call `see(place, rows)` before each product with a target in a scope.

    Meanwhile the functions of `core.layer_calls` run their layers.

    Args:
        model: A model that holds all layers.
        targets: List of `Target`. Those with a `reason_unread` are not seen.
        see: Callable from the place of a target in the list and its `Rows`.
    """
    by_layer: dict[Any, dict[str, int]] = {}
    for place, target in enumerate(targets):
        if reason_unread(target.layer, target.attribute) is None:
            by_layer.setdefault(target.layer, {})[target.attribute] = place

    def call(
        layer: Any, router: Any, plain: Any, *args: Any, **kwargs: Any
    ) -> Any:
        routed = None if router is None else router(*args, **kwargs)
        multiply = _Seen(layer, plain, by_layer[layer], see, routed)
        kind: Any = kind_with_call(layer)
        return kind.call(layer, multiply, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for layer in by_layer:
            seen = functools.partial(call, layer, router_of(model, layer))
            stack.enter_context(called_by(layer, seen))
        yield


class _Seen(Products):
    """The products of a layer, whose rows are passed to `see`."""

    def __init__(self, layer, plain, own, see, routed):
        super().__init__(layer, plain)
        self.own, self.see, self.routed = own, see, routed

    def __call__(self, attribute, rows, stacked=False):
        if attribute in self.own:
            stacks = self.stacks(attribute, rows) if stacked else 1
            x = rows if stacked else rows[..., None, :]
            self.see(self.own[attribute], Rows(x, stacks, self.routed))
        return super().__call__(attribute, rows, stacked)


def router_of(model: Any, layer: Any) -> Any:
    """Return a function that says which tokens go to which expert of a bank.

    A callable from the arguments of the call to a boolean NumPy array (tokens,
    experts); None for a layer without routing, or one that `model` does not
    hold.
    """
    kind = kind_with_call(layer)
    if kind is None or kind.routed is None:
        return None
    for block in keras_compat.layers_of(model):
        if any(part is layer for part in keras_compat.parts_of(block)):
            return lambda *args, **kwargs: ops.convert_to_numpy(
                kind.routed(block, *args, **kwargs)
            )
    return None


def used_positions(sample_weight):
    """Return where weights are not 0; None if there are none or several."""
    if sample_weight is None or keras.tree.is_nested(sample_weight):
        return None
    used = ops.convert_to_numpy(sample_weight) != 0
    return used[..., 0] if used.ndim > 1 and used.shape[-1] == 1 else used


def mask_of(used: Any, leading: tuple[int, ...]) -> Any:
    """Return `used` for a tensor with these leading axes, a boolean array."""
    if used is not None and used.shape == leading[: used.ndim]:
        ones = (1,) * (len(leading) - used.ndim)
        return np.broadcast_to(used.reshape(used.shape + ones), leading)
    if used is not None and leading == (used.size,):
        # The positions of all sequences, one after the other.
        return used.reshape(-1)
    return np.ones(leading, bool)


def eager_forward() -> Any:
    """Return a scope for forward passes whose rows are seen.

    Torch keeps no activations. JAX would trace both branches of
    `keras.ops.cond` and the steps of loops, where rows have no values, so it
    runs op by op here.
    """
    if keras.backend.backend() == "jax":
        import jax

        return jax.disable_jit()
    if keras.backend.backend() == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()


def compiled() -> Any:
    """Let JAX compile again in a scope inside `eager_forward`."""
    if keras.backend.backend() != "jax":
        return contextlib.nullcontext()
    import jax

    return jax.disable_jit(False)


def gradients() -> Any:
    """Allow training of a block in a scope inside `eager_forward`."""
    if keras.backend.backend() != "torch":
        return compiled()
    import torch

    return torch.enable_grad()
