"""The attention of one query of each sequence, by a compiled kernel on a CPU.

For recordings: torch's own takes keys and values repeated for each group of
heads, in another order, all places of the cache. The kernel reads the places
that are seen, once. It has no gradients.
"""

import torch

from keras_weightmods import native
from keras_weightmods.backend.torch.threads import threads


def attend(query, key, value, bias=None, mask=None, scale=None, **options):
    """Return what Keras' `dot_product_attention` does, or None.

    Args:
        query: Tensor of shape (batch, 1, heads, size).
        key, value: Tensors of shape (batch, places, key heads, size).
        bias, mask, scale, **options: As in Keras; None for what the kernel
            is not made for.
    """
    if bias is not None or any(options.values()):
        return None
    if not _fits(query, key, value):
        return None
    if mask is not None:
        if mask.ndim != 4 or mask.shape[1:3] != (1, 1):
            return None
        if mask.dtype is not torch.bool:
            return None
        mask = mask[:, 0, 0].expand(key.shape[:2])
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    operators = torch.ops.keras_weightmods
    return operators.attend(query, key, value, mask, scale)


def _fits(query, key, value):
    return (
        query.ndim == key.ndim == 4
        and query.shape[1] == 1
        and query.dtype == key.dtype == value.dtype == torch.float32
        and key.shape == value.shape
        and query.shape[-1] == key.shape[-1]
        and query.shape[-1] % native.LANES == 0
        and query.shape[2] % key.shape[2] == 0
        and query.is_cpu
        and key.is_cpu
        and native.has_vectors()
    )


_library = torch.library.Library("keras_weightmods", "FRAGMENT")
_library.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor? seen, float scale) -> Tensor"
)


@torch.library.impl(_library, "attend", "CPU")
def native_attend(q, k, v, seen, scale):
    """The operator itself, without what torch does for one."""
    batch, places, key_heads, size = k.shape
    inner = (key_heads * size, size, 1)
    if k.stride() != v.stride() or k.stride()[1:] != inner:
        k, v = k.contiguous(), v.contiguous()
    q = q.contiguous()
    pointer = None
    if seen is not None:
        seen = seen.contiguous()
        pointer = seen.data_ptr()
    out = torch.empty_like(q)
    heads = q.shape[2]
    native.library().kwm_attend(
        *(q.data_ptr(), k.data_ptr(), v.data_ptr(), k.stride(0), pointer),
        *(batch, places, heads, key_heads, size, scale, out.data_ptr()),
        *threads(2 * batch * heads * places * size),
    )
    return out


@torch.library.register_fake("keras_weightmods::attend")
def _fake_attend(q, k, v, seen, scale):
    return q.new_empty(q.shape)
