"""Principal weights: the entries of a matrix that its leading directions hold.

A kernel is one matrix of contraction x output here, or a stack of them. W_r is
its best approximation of rank r. The principal weights are the k entries of W_r
with the largest magnitude (LIFT, arXiv 2506.00772).
"""

import dataclasses
import math
from typing import Any

import numpy as np
from keras import ops

from keras_weightmods import backend
from keras_weightmods.ops import low_rank
from keras_weightmods.ops.random_places import random_places
from keras_weightmods.ops.refine import compiled
from keras_weightmods.utils import checks
from keras_weightmods.utils.matrix import (
    Axes,
    from_stack,
    stack_shape,
    to_matrix,
    to_stack,
)

CRITERIA = ("principal", "magnitude", "gradient", "random")


@dataclasses.dataclass(frozen=True)
class Selection:
    """The rule that selects entries of a kernel; see `principal_mask`.

    Attributes:
        rank, density, filter_rank, criterion, method, seed: The arguments of
            `principal_mask`, checked when it is made.
    """

    rank: int | None = None
    density: float | None = None
    filter_rank: int | None = None
    criterion: str = "principal"
    method: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.density is None):
            raise ValueError(
                "Give one of `rank`, for as many entries as a LoRA of that "
                "rank has numbers, and `density`, for a share of the entries. "
                f"Received: rank={checks.shown(self.rank)}, "
                f"density={checks.shown(self.density)}"
            )
        checks.check_int("rank", self.rank, 1, optional=True)
        checks.check_int("filter_rank", self.filter_rank, 1, optional=True)
        checks.check_int("seed", self.seed, 0, 2**31 - 1)
        if self.density is not None:
            checks.check_float("density", self.density, above=0, most=1)
        checks.check_choice("criterion", self.criterion, CRITERIA)
        checks.check_choice("method", self.method, low_rank.METHODS)

    def size(self, rows: int, columns: int) -> int:
        """Return how many entries of a matrix to select."""
        size = rows * columns
        if self.density is not None:
            count = round(self.density * size)
        else:
            count = min((rows + columns) * (self.rank or 0), size)
        if count == 0:
            raise ValueError(
                "Not one entry is selected. Received: "
                f"rank={self.rank}, density={self.density}, for a matrix of "
                f"{rows} x {columns}. Select more, or leave this kernel out."
            )
        return min(count, size)

    def rank_of_filter(self, rows: int, columns: int) -> int:
        """Return the rank r of the approximation."""
        # The default is that of the LoRA with as many numbers.
        entries = (self.density or 0) * rows * columns
        rank = self.filter_rank or self.rank
        rank = rank or round(entries / (rows + columns))
        return min(max(rank, 1), rows, columns)

    def mask(
        self,
        kernel: Any,
        contraction_axes: Axes = 0,
        stack_axes: Axes = (),
        gradient: Any = None,
        candidates: Any = None,
    ) -> Any:
        """Return the mask of a kernel; see `principal_mask`."""
        kernel = checks.check_tensor("kernel", kernel)
        ranked = kernel = _as_float(kernel)
        shape, axes = tuple(kernel.shape), (contraction_axes, stack_axes)
        if self.criterion == "gradient":
            ranked = _as_float(self._like("gradient", gradient, shape))
        stacks, *sizes = stack_shape(shape, *axes)
        # In the kernel's order, which the places of deltas use.
        in_order = self.criterion == "random" and stacks == 1

        def split(x: Any) -> Any:
            if in_order:
                return [ops.reshape(x, sizes)]
            # A single one is not copied.
            return [to_matrix(x, axes[0])] if one else [*to_stack(x, *axes)]

        one = isinstance(stack_axes, (tuple, list)) and not stack_axes
        matrices = split(ranked)
        allowed = [None] * len(matrices)
        if candidates is not None:
            candidates = self._like("candidates", candidates, shape)
            allowed = split(ops.cast(candidates, "bool"))
        with backend.current().full_precision():
            masks = [
                _mask_of(matrix, self, place, allowed[place])
                for place, matrix in enumerate(matrices)
            ]
        if in_order:
            return ops.reshape(masks[0], shape)
        return from_stack(ops.stack(masks), shape, *axes)

    @staticmethod
    def _like(name: str, value: Any, shape: tuple[int, ...]) -> Any:
        """Return a tensor of the shape of the kernel."""
        received = None
        if value is not None:
            value = checks.check_tensor(name, value)
            received = tuple(value.shape)
        if received != shape:
            expected = f"a tensor of the kernel's shape, {shape}"
            raise checks.error(name, expected, received)
        return value


def principal_mask(
    kernel: Any,
    rank: int | None = None,
    density: float | None = None,
    filter_rank: int | None = None,
    *,
    contraction_axes: Axes = 0,
    stack_axes: Axes = (),
    criterion: str = "principal",
    method: str = "auto",
    gradient: Any = None,
    candidates: Any = None,
    seed: int = 0,
) -> Any:
    r"""Mark the principal weights of a kernel.

    For a matrix `W` of m x n, these are the k largest magnitudes of `W_r`, the
    truncated singular value decomposition of rank r (LIFT, arXiv 2506.00772,
    section 3):

        W_r = sum_{i <= r} s_i u_i v_i^T,   k = min((m + n) * rank, m * n)

    or `k = round(density * m * n)`. Exactly k are marked in each matrix; ties
    keep the earlier entry.

    The leading directions are found on the kernel's device by one of

    - `"gram"`: the eigendecomposition of the smaller one of `W W^T` and
      `W^T W`. `W_r = U U^T W` needs the vectors of one side alone;
    - `"krylov"`: block Lanczos with full reorthogonalization, extended until
      the mask, not the spectrum, has settled;
    - `"exact"`: the whole singular value decomposition, the rule itself;
    - `"auto"`: `"krylov"` for matrices of more than 1,024 on their smaller
      side, where the rank is at most an eighth of it, `"gram"` for others.

    Args:
        kernel: Tensor or variable, finite.
        rank: Int, marks as many entries as a LoRA of this rank has numbers.
            Give this or `density`.
        density: Float in (0, 1], the share of the entries of each matrix.
        filter_rank: Int, r. Defaults to `rank`, or to the rank of a LoRA with
            about as many numbers as `density` marks. At most the smaller side
            is used. Only `"principal"` uses this and `method`.
        contraction_axes: Int or tuple of ints, the axes of the kernel that are
            the rows of the matrix. Defaults to 0.
        stack_axes: Tuple of ints, the axes that index whole matrices. Defaults
            to none.
        criterion: `"principal"`, or for comparison `"magnitude"` for the
            largest `|W|`, `"gradient"` for the largest `|gradient|`, or
            `"random"`, the same on each machine. Defaults to `"principal"`.
        method: See above. Defaults to `"auto"`.
        gradient: Tensor of the kernel's shape, used by `"gradient"` alone.
        candidates: Boolean tensor of the kernel's shape: only these are
            marked. Defaults to all.
        seed: Int, the seed of the random start and of `criterion="random"`.
            Defaults to 0.

    Returns:
        Boolean tensor of the shape of `kernel`.

    Raises:
        ValueError: If an argument is outside the ranges above, no entry is to
            be marked, or more than there are candidates, or the kernel is not
            finite.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.ops import principal_mask

    kernel = np.random.default_rng(0).normal(size=(32, 48))
    mask = principal_mask(kernel, density=0.05)
    assert np.array(mask).sum() == 77
    ```
    """
    selection = Selection(rank, density, filter_rank, criterion, method, seed)
    axes = contraction_axes, stack_axes
    return selection.mask(kernel, *axes, gradient, candidates)


def mask_indices(mask: Any) -> np.ndarray:
    """Return the places of a mask's entries in the flattened kernel, rising.

    Args:
        mask: Boolean tensor.

    Returns:
        int32 NumPy array.

    Raises:
        ValueError: If the kernel is too large for int32.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.ops.principal_mask import mask_indices

    assert mask_indices(np.eye(3) > 0).tolist() == [0, 4, 8]
    ```
    """
    if math.prod(mask.shape) >= 2**31:
        raise ValueError(
            "A kernel may have at most 2**31 - 1 entries. Received: "
            f"mask.shape={tuple(mask.shape)}"
        )
    # On the host, because `nonzero` on JAX takes longer than the selection.
    return np.flatnonzero(ops.convert_to_numpy(mask)).astype("int32")


def _mask_of(matrix: Any, selection: Any, place: int, allowed: Any) -> Any:
    rows, columns = matrix.shape
    size, count = rows * columns, selection.size(rows, columns)
    candidates = None
    if allowed is not None:
        candidates = np.flatnonzero(ops.convert_to_numpy(allowed))
        size = candidates.size
        if size < count:
            raise ValueError(
                "There must be as many candidates as entries to select. "
                f"Received: {size} candidates for {count} entries of a "
                f"matrix of {rows} x {columns}. Select fewer."
            )
    if selection.criterion == "random":
        places = random_places(selection.seed, size, count, place)
        mask = np.zeros((rows, columns), bool)
        mask.reshape(-1)[
            places if candidates is None else candidates[places]
        ] = True
        return ops.convert_to_tensor(mask)
    scores, rank = ops.abs(matrix), selection.rank_of_filter(rows, columns)
    method = low_rank.choose_method(selection.method, rows, columns, rank)
    if selection.criterion == "principal" and method == "gram":
        # JAX runs this as one program for each shape, not op by op.
        scores = compiled(_low_rank_scores, 1, 2)(matrix, rank, method)
    elif selection.criterion == "principal":
        share, seed = count / (rows * columns), selection.seed + place
        scores = _low_rank_scores(matrix, rank, method, seed, share)
    if allowed is not None:
        scores = ops.where(allowed, scores, ops.cast(-1, scores.dtype))
    return _largest(scores, count)


def _low_rank_scores(matrix: Any, *arguments: Any) -> Any:
    left, right = low_rank.low_rank_factors(matrix, *arguments)
    return ops.abs(ops.matmul(left, right))


def _largest(scores: Any, count: Any) -> Any:
    """Mark the `count` largest of a float32 matrix, ties in their order."""
    # The arrays of all backends have `device`.
    is_on_host = "cpu" in str(scores.device).lower()
    mask = None if is_on_host else _largest_on_device(scores, count)
    if mask is not None:
        return mask
    flat = ops.convert_to_numpy(scores).reshape(-1)
    # A sample gives a bound that most entries are below.
    sample = flat[:: flat.size // 2**16 | 1]
    below = int(sample.size * (1 - 1.2 * count / flat.size))
    some = flat
    if below > 0:
        some = flat[flat >= np.partition(sample, below)[below]]
    if some.size < count:
        some = flat
    threshold = np.partition(some, -count)[-count]
    mask = flat >= threshold
    surplus = np.count_nonzero(mask) - count
    if surplus:
        mask[np.flatnonzero(flat == threshold)[-surplus:]] = False
    return ops.convert_to_tensor(mask.reshape(scores.shape))


def _largest_on_device(scores: Any, count: Any) -> Any:
    """Do the same; None if only some of the ties belong to it."""
    ranked = ops.sort(ops.reshape(scores, (-1,)))
    mask = scores >= ranked[ranked.shape[0] - count]
    marked = int(ops.sum(ops.cast(mask, "int32")))
    return mask if marked == count else None


def _as_float(x: Any) -> Any:
    """Return a tensor in float32; raise ValueError if it is not finite."""
    x = ops.stop_gradient(ops.cast(ops.convert_to_tensor(x), "float32"))
    if not bool(ops.all(ops.isfinite(x))):
        raise ValueError(
            "`kernel` and `gradient` must be finite. Received: NaN or "
            f"infinity in a tensor of shape {tuple(x.shape)}"
        )
    return x
