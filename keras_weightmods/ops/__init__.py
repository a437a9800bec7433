"""Pure tensor functions, on the three backends through `keras.ops`."""

from keras_weightmods.native.layout import packed_arrays as packed_arrays
from keras_weightmods.native.packed import Packed as Packed
from keras_weightmods.native.packed import pack_kernel as pack_kernel
from keras_weightmods.native.packed import unpack_kernel as unpack_kernel
from keras_weightmods.ops.compand import compand as compand
from keras_weightmods.ops.compand import (
    compand_derivative as compand_derivative,
)
from keras_weightmods.ops.compand import compand_inverse as compand_inverse
from keras_weightmods.ops.nm import nm_mask as nm_mask
from keras_weightmods.ops.nm import nm_project as nm_project
from keras_weightmods.ops.nm import nm_violations as nm_violations
from keras_weightmods.ops.nm import pack_bits as pack_bits
from keras_weightmods.ops.nm import parse_pattern as parse_pattern
from keras_weightmods.ops.nm import unpack_bits as unpack_bits
from keras_weightmods.ops.principal_mask import (
    principal_mask as principal_mask,
)
from keras_weightmods.ops.sparse_matmul import sparse_matmul as sparse_matmul
