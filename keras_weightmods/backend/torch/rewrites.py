"""Keras' calls of torch, rewritten so that a recording repeats them fast.

Keras writes into a slice through an index for each entry, and into a copy. It
reads the start of a slice from a tensor. KerasHub repeats keys and values for
each group of heads that shares them. A torch mode sees these calls, in one
thread and one scope.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from keras_weightmods.backend import attention
from keras_weightmods.backend.torch.recorded_call import memory, tensors

_SDPA = torch.nn.functional.scaled_dot_product_attention
_SOFTMAX = torch.nn.functional.softmax
# Functions whose results are remembered with the arguments that made them.
_SEEN = {
    torch.Tensor.contiguous,
    torch.Tensor.flatten,
    torch.Tensor.reshape,
    torch.Tensor.to,
    torch.einsum,
    _SOFTMAX,
    torch.stack,
    torch.transpose,
    torch.where,
}


class Rewrites(TorchFunctionMode):
    """Replace functions of torch by others that give the same numbers.

    Args:
        inputs: List of tensors of the function; parts of them may be written
            into in place of a copy.
        weights: List of its weights.
    """

    def __init__(self, inputs, weights=()):
        super().__init__()
        self.inputs = {memory(x) for x in inputs}
        self.made = WeakIdKeyDictionary()
        # Tensors that depend on these.
        self.varying = WeakIdKeyDictionary(
            dict.fromkeys([*inputs, *weights], True)
        )

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = None
        given = tensors((args, kwargs))
        if function is torch.narrow:
            result = self._narrow(*args)
        elif function is torch.Tensor.__getitem__:
            part = self._part(*args)
            if part is not None:
                given, result = [part], part.to(args[0].dtype)
        elif function in (torch.Tensor.clone, torch.clone):
            result = self._clone(*args)
        elif function is torch.Tensor.index_put_:
            result = self._put(*args, **kwargs)
        elif function is _SDPA:
            result = self._attention(*args, **kwargs)
        elif function is torch.einsum:
            result = self._attention_by_groups(*args)
        if result is None:
            result = function(*args, **kwargs)
        if any(x in self.varying for x in given):
            self.varying.update(dict.fromkeys(tensors(result), True))
        if function is torch.meshgrid:
            for axis, grid in enumerate(result):
                self.made[grid] = torch.meshgrid, (args, axis)
        elif function in _SEEN and not any(result is x for x in args):
            self.made[result] = function, (*args, *kwargs.values())
        return result

    def _source(self, x, *functions):
        """Return `x`, or the tensor that these functions made it from."""
        while self._made_by(x, *functions):
            x = self.made[x][1][0]
        return x

    def _made_by(self, x, *functions):
        return self.made.get(x, (None,))[0] in functions

    def _narrow(self, x, axis, start, size):
        """Return a slice whose start is known only at run time."""
        if not isinstance(start, torch.Tensor) or start not in self.varying:
            return None
        places = start.to(torch.int64).reshape(1)
        if int(size) != 1:
            places = places + torch.arange(int(size), device=x.device)
        return x.index_select(axis, places)

    def _part(self, x, index):
        """Return the number that a stack of numbers has at a place, or None."""
        stack = self._source(x, torch.Tensor.to)
        if not isinstance(index, int) or not self._made_by(stack, torch.stack):
            return None
        part = self.made[stack][1][0][index]
        return None if part.ndim else part

    def _clone(self, x):
        """Return the cache itself: Keras copies it only to update it."""
        return x.view(x.shape) if memory(x) in self.inputs else None

    def _put(self, x, indices, values):
        """Write a block whose indices are the grid of its places."""
        grids = [self._source(i, torch.Tensor.flatten) for i in indices]
        if not all(self._made_by(grid, torch.meshgrid) for grid in grids):
            return None
        vectors, axes = zip(*(self.made[grid][1] for grid in grids))
        vectors = vectors[0]
        if axes != tuple(range(x.ndim)) or len(vectors) != x.ndim:
            return None
        block, moving = x, []
        for axis, places in enumerate(vectors):
            if places in self.varying:
                moving.append((axis, places.long()))
            elif places.tolist() != list(range(x.shape[axis])):
                block = block.narrow(axis, int(places[0]), len(places))
        if len(moving) > 1:
            return None
        values = values.reshape([len(places) for places in vectors])
        if moving:
            block.index_copy_(*moving[0], values)
        else:
            block.copy_(values)
        return x

    def _attention(self, query, key, value, attn_mask=None, **options):
        scale = options.pop("scale", None)
        query, key, value = (
            self._source(x, torch.Tensor.contiguous)
            for x in (query, key, value)
        )
        mask = self._bool_mask(attn_mask)
        if any(options.values()) or (mask is None) != (attn_mask is None):
            return None
        query, key, value = (
            x.transpose(1, 2)
            for x in (query, self._shared(key), self._shared(value))
        )
        result = attention.attend(
            kernel, query, key, value, mask=mask, scale=scale
        )
        return None if result is None else result.transpose(1, 2)

    def _attention_by_groups(self, equation, weights=None, *values):
        """Attend as KerasHub's Gemma models do on a CPU."""
        if not _is_equation(equation, "bkgqp,bpkd->bqkgd"):
            return None
        x, found = weights, []
        for function, place in (
            *((torch.where, 1), (_SOFTMAX, 0)),
            *((torch.where, 1), (torch.einsum, 0)),
        ):
            x = self._source(x, torch.Tensor.to)
            if not self._made_by(x, function):
                return None
            found.append(self.made[x][1])
            x = found[-1][place]
        (mask, _, zero), (_, axis, *_), (other, _, low), made = found
        scores, query, keys = made
        is_attention = _is_equation(scores, "bqkgd,bpkd->bkgqp") and (
            mask is other and zero == 0.0 and low < -1e4 and axis == -1
        )
        if not is_attention or mask.shape[1:3] != (1, 1):
            return None
        mask, given = mask[:, 0], (query.flatten(2, 3), keys, *values)
        result = attention.attend(kernel, *given, mask=mask, scale=1.0)
        if result is None:
            return None
        # Where nothing is attended to, the kernel gives the mean.
        attends = mask[:, 0].any(-1)[:, :, None, None]
        return (result * attends).reshape(query.shape)

    def _bool_mask(self, mask):
        """Return the boolean mask behind an additive mask of Keras, or None."""
        if mask is None:
            return None
        mask = self._source(mask, torch.Tensor.contiguous)
        if not self._made_by(mask, torch.where):
            return None
        condition, kept, left_out = self.made[mask][1]
        is_mask = kept == 0.0 and left_out < -1e4
        return condition if is_mask else None

    def _shared(self, x):
        """Return keys of shape (batch, heads, places, size), not repeated."""
        before = self._source(x, torch.transpose)
        if not self._made_by(before, torch.Tensor.reshape):
            return x
        # (batch, places, heads, repeats, size), all repeats in one memory.
        wide = self.made[before][1][0]
        if wide.ndim != 5 or wide.stride(3) or wide.shape[3:4] == (1,):
            return x
        return wide[:, :, :, 0].transpose(1, 2)


def _is_equation(equation, expected):
    """Whether two equations of `einsum` differ in the names of axes alone."""
    pairs = set(zip(equation, expected))
    return len(equation) == len(expected) and (
        len(pairs) == len(set(equation)) == len(set(expected))
    )


def kernel(query, key, value, mask, scale):
    """Attend by the compiled kernel; see `backend.attention`."""
    if not (query.is_cpu and key.is_cpu):
        return None
    floats = (x.float() for x in (query, key, value))
    attend = torch.ops.keras_weightmods.attend
    return attend(*floats, mask, scale).to(query.dtype)
