"""Split what stands for a weight over devices as the weight itself is.

A layout is that of a Keras variable under `keras.distribution`: a
`TensorLayout`, or a JAX sharding.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import keras

from keras_weightmods.native.layout import COLUMNS, GROUP, ROWS, is_grouped
from keras_weightmods.native.packed import Packed


@dataclasses.dataclass(frozen=True)
class Split:
    """How a packed matrix (K, N) is split.

    Attributes:
        mesh: `jax.sharding.Mesh`.
        rows: Tuple of strings, the axes of the mesh that split K.
        columns: Tuple of strings, those that split N.
    """

    mesh: jax.sharding.Mesh
    rows: tuple[str, ...]
    columns: tuple[str, ...]

    def parts(self, side):
        """Return the number of parts of `"rows"` or `"columns"`."""
        return math.prod(self.mesh.shape[a] for a in getattr(self, side))

    def specs(self, arrays):
        """Return the `PartitionSpec` of each array of `packed_arrays`.

        Columns are the first axis of each, rows the second, except where each
        column has one scale.
        """
        whole = (self.columns or None, self.rows or None)
        return {
            name: jax.sharding.PartitionSpec(*whole[: max(1, len(shape) - 1)])
            for name, (shape, _) in arrays.items()
        }

    def layouts(self, arrays):
        """Return the layout of each array of `packed_arrays`."""
        return {
            name: jax.sharding.NamedSharding(self.mesh, spec)
            for name, spec in self.specs(arrays).items()
        }


@dataclasses.dataclass(frozen=True, eq=False)
class SplitPacked(Packed):
    """A packed kernel whose arrays are split over devices.

    Args:
        split: `Split`.
    """

    split: Split | None = None


def split_of(layout, contraction_axes, matrix_shape, dtype, sides):
    """Return how to split the packed matrix of a kernel.

    The mesh axes that split the kernel split the matrix. Axes of the
    contraction split its rows, the others its columns. An axis that does not
    divide the format's blocks on its side moves to the other side.

    Args:
        layout: Layout of the kernel, or None.
        contraction_axes: Tuple of ints, axes of the kernel.
        matrix_shape: Pair of ints (K, N).
        dtype: String, type of the packed values.
        sides: Tuple of what may be split, of `"rows"` and `"columns"`.

    Returns:
        Pair of a `Split`, None without a mesh, and the list of the axes of
        the mesh that split the kernel, but cannot split the matrix.
    """
    found = _axes_of(layout)
    if found is None:
        return None, []
    mesh, axes = found
    block = {"rows": GROUP if is_grouped(dtype) else ROWS, "columns": COLUMNS}
    sizes = dict(zip(("rows", "columns"), matrix_shape))
    blocks = {
        side: sizes[side] // block[side] if not sizes[side] % block[side] else 1
        for side in sides
    }
    chosen: dict[str, tuple[str, ...]] = {"rows": (), "columns": ()}
    left = []
    for place, names in enumerate(axes):
        wanted = "rows" if place in contraction_axes else "columns"
        for name in names:
            parts = mesh.shape[name]
            for side in sorted(sides, key=lambda side: side != wanted):
                if blocks[side] % parts == 0:
                    blocks[side] //= parts
                    chosen[side] += (name,)
                    break
            else:
                left.append(name)
    return Split(mesh, **chosen), left


def split_vector(layout):
    """Return how to split a vector that holds entries of a weight.

    Args:
        layout: Layout of the weight, or None.

    Returns:
        Pair of a layout and the number of its parts; None where the weight is
        not split.
    """
    found = _axes_of(layout)
    names = [name for names in found[1] for name in names] if found else []
    if not names:
        return None
    spec = jax.sharding.PartitionSpec(tuple(names))
    parts = math.prod(found[0].shape[name] for name in names)
    return jax.sharding.NamedSharding(found[0], spec), parts


def batch_axis(x, split):
    """Return the axis of the mesh that splits the rows of `x`, or None.

    It is the data axis of the current distribution. It is None where that axis
    splits the weights, which are never gathered.
    """
    distribution = keras.distribution.distribution()
    name = getattr(distribution, "batch_dim_name", None)
    if x.ndim < 2 or name not in split.mesh.shape:
        return None
    if name in (*split.rows, *split.columns):
        return None
    return name if x.shape[0] % split.mesh.shape[name] == 0 else None


def taken(x, indices):
    """Return entries of a split weight as a vector.

    They are taken by their coordinates, because flattening would gather the
    weight. Each device takes what it holds, and only entries are exchanged.

    Args:
        x: Array.
        indices: int32 array, places in its flattened form. Those beyond the
            array give zero.
    """
    places = _coordinates(x.shape, indices)
    return jnp.asarray(x).at[places].get(mode="fill", fill_value=0)


def put(x, indices, values):
    """Return the array with new entries; places beyond it are ignored."""
    places = _coordinates(x.shape, indices)
    return jnp.asarray(x).at[places].set(values, mode="drop")


def _coordinates(shape, indices):
    indices = jnp.asarray(indices)
    found = []
    for size in reversed(shape[1:]):
        found.append(indices % size)
        indices = indices // size
    return indices, *reversed(found)


def _axes_of(layout):
    """Return the mesh of a layout and its axes for each axis of the weight."""
    sharding = getattr(layout, "backend_layout", layout)
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return None
    axes = [
        () if names is None else (names,) if isinstance(names, str) else names
        for names in sharding.spec
    ]
    return sharding.mesh, axes
