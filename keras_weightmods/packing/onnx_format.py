"""Integers as the operators of ONNX Runtime take them."""

import numpy as np
from keras import ops

from keras_weightmods import backend
from keras_weightmods.native import layout
from keras_weightmods.native.layout import GROUP
from keras_weightmods.packing.formats import Format


class OnnxFormat(Format):
    """Unsigned integers of 2, 4 or 8 bits, for a model on its way to ONNX.

    `values` (N, ceil(K / 64), 8 * bits) are the integers of an output plus
    2^(bits - 1), low bits first. `scale` (N, ceil(K / 64)) has one for 64
    inputs. The products have no values: they become operators in a file.

    Args:
        dtype: String, the type of the integers. Those of 3, 5 and 6 bits are
            stored in 4 and 8.
    """

    activations = layout.ACTIVATIONS

    def __init__(self, dtype):
        self.dtype = dtype
        own = layout.bits_of(dtype)
        self.bits = min(bits for bits in (2, 4, 8) if bits >= own)

    def arrays(self, shape):
        rows, columns = shape
        sizes = columns, -(-rows // GROUP)
        values = (*sizes, GROUP * self.bits // 8), "uint8"
        return {"values": values, "scale": (sizes, "float32")}

    def pack_integers(self, codes, scale):
        rows, columns = codes.shape
        missing = -rows % GROUP
        codes = np.pad(codes, ((0, missing), (0, 0))).T + 2 ** (self.bits - 1)
        runs = codes.astype("uint8").reshape(columns, -1, 8 // self.bits)
        runs <<= np.arange(0, 8, self.bits, dtype="uint8")
        values = np.bitwise_or.reduce(runs, axis=-1)
        shape, _ = self.arrays((rows, columns))["values"]
        return {"values": values.reshape(shape), "scale": scale[::GROUP].T}

    def multiply(self, item, x, columns=None):
        arrays = item.named["values"].value, item.named["scale"].value
        if columns is not None:
            arrays = tuple(array[columns] for array in arrays)
        size = arrays[0].shape[0]
        attributes = {"K": x.shape[-1], "N": size, "bits": self.bits}
        attributes["block_size"] = GROUP
        if item.rounds_inputs:
            # The runtime may round them to int8, in blocks of 64.
            attributes["accuracy_level"] = 4
        inputs = ops.cast(x, "float32"), *arrays
        operator = backend.current().onnx().operator
        shape = *x.shape[:-1], size
        y = operator("MatMulNBits", inputs, attributes, shape)
        return ops.cast(y, x.dtype)

    def look_up(self, item, indices):
        values, scale = item.named["values"].value, item.named["scale"].value
        attributes = {"bits": self.bits, "block_size": GROUP}
        attributes |= {"gather_axis": 0, "quantize_axis": 2}
        blocks = scale.shape[1]
        rows = (
            backend.current()
            .onnx()
            .operator(
                "GatherBlockQuantized",
                (values, indices, ops.expand_dims(scale, -1)),
                attributes,
                (*indices.shape, blocks, GROUP),
            )
        )
        shape = *ops.shape(indices), blocks * GROUP
        return ops.reshape(rows, shape)[..., : item.shape[0]]
