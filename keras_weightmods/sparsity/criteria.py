"""Pruning criteria, which decide the weights of a group to keep.

`sparsify` and the one-shot start of `CAST` read the table `CRITERIA`. To add a
criterion, add an entry:

```python
import keras_weightmods as kwm
from keras import ops
from keras_weightmods.sparsity.criteria import CRITERIA, Criterion

def prune_by_square(weights, inputs, pattern):
    scores = weights**2 * inputs.norms[:, None]
    mask = kwm.ops.nm_mask(scores, pattern)
    return ops.where(mask, weights, ops.zeros_like(weights))

CRITERIA["square"] = Criterion(prune_by_square)
del CRITERIA["square"]
```
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from keras import ops

from keras_weightmods.ops.nm import nm_project
from keras_weightmods.ops.sparsegpt import inverse_factor, sparsegpt, wanda


class Inputs:
    """Statistics of the inputs of a matrix, over the calibration data.

    Attributes:
        second_moment: Tensor of shape `(K, K)`, the mean of `x x^T`.
        norms: Tensor of shape `(K,)`, the root mean square of each input.
        inverse_factor: Array of shape `(K, K)`, U of `U^T U = H^-1`, H being
            the damped second moment.

    Args:
        second_moment: Tensor of shape `(K, K)`.
        damping: Float > 0, the share of the mean of the diagonal that is added
            to it.
    """

    def __init__(self, second_moment: Any, damping: float) -> None:
        self.second_moment = second_moment
        self._damping = damping

    @functools.cached_property
    def norms(self) -> Any:
        return ops.sqrt(ops.diagonal(self.second_moment))

    @functools.cached_property
    def inverse_factor(self) -> Any:
        moment = ops.convert_to_numpy(self.second_moment)
        return inverse_factor(moment, self._damping)


@dataclasses.dataclass(frozen=True)
class Criterion:
    """A way to prune a matrix.

    Attributes:
        prune: Callable from a tensor of shape `(K, R)`, its `Inputs` and a
            pattern to the pruned tensor, exactly N:M along the first axis.
        needs_data: Bool. If False, `prune` gets `None` in place of `Inputs`
            where there are no data. Defaults to `True`.
    """

    prune: Callable[..., Any]
    needs_data: bool = True


CRITERIA = {
    "magnitude": Criterion(
        lambda weights, _, pattern: nm_project(weights, pattern),
        needs_data=False,
    ),
    "wanda": Criterion(
        lambda weights, inputs, pattern: wanda(weights, inputs.norms, pattern)
    ),
    "sparsegpt": Criterion(
        lambda weights, inputs, pattern: sparsegpt(
            weights, inputs.inverse_factor, pattern
        )
    ),
}
