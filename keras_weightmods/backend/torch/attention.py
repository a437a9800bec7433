"""The kernel of `backend.attention` on torch: an operator, without gradients.

For recordings (`recorded_call`), which call `attend` past the operator.
"""

import torch

from keras_weightmods import native
from keras_weightmods.backend.torch.threads import threads


def kernel(query, key, value, mask, scale):
    """See `attend` of `backend.attention`."""
    if not (query.is_cpu and key.is_cpu):
        return None
    operators = torch.ops.keras_weightmods
    floats = (x.float() for x in (query, key, value))
    return operators.attend(*floats, mask, scale).to(query.dtype)


_library = torch.library.Library("keras_weightmods", "FRAGMENT")
_library.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor"
)


@torch.library.impl(_library, "attend", "CPU")
def attend(q, k, v, mask, scale):
    """The operator itself, without what torch does for one."""
    batch, places, key_heads, size = k.shape
    inner = (key_heads * size, size, 1)
    if k.stride() != v.stride() or k.stride()[1:] != inner:
        k, v = k.contiguous(), v.contiguous()
    q = q.contiguous()
    seen = None if mask is None else mask.contiguous()
    out = torch.empty_like(q)
    queries, heads = q.shape[1:3]
    native.library().kwm_attend(
        *(q.data_ptr(), k.data_ptr(), v.data_ptr(), k.stride(0)),
        None if seen is None else seen.data_ptr(),
        *(batch, queries, places, heads, key_heads, size, scale),
        out.data_ptr(),
        *threads(2 * batch * queries * heads * places * size),
    )
    return out
