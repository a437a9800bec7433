"""ONNX files with operators of ONNX Runtime, by torch."""

import importlib
import sys
from typing import Any

import torch
from keras import ops, tree


def operator(name, inputs, attributes, shape):
    """Return the float32 output of an operator `com.microsoft::name`.

    It has no values: the operator exists only for the trace of `write`.
    """
    return torch.onnx.ops.symbolic(
        f"com.microsoft::{name}",
        inputs,
        attributes,
        dtype=torch.float32,
        shape=shape,
        version=1,
    )


def write(model, signature, path, **kwargs):
    """Write a model with such operators.

    Args:
        model: A `keras.Model`.
        signature: List of the model's arguments, structures of
            `keras.InputSpec`. Sizes that are None are free in the file.
        path: String.
        **kwargs: Of `torch.onnx.export`.
    """
    specs = tree.flatten(signature)

    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *inputs):
            return self.model(*tree.pack_sequence_as(signature, inputs))

    free = torch.export.Dim.DYNAMIC
    sizes = [
        {axis: free for axis, size in enumerate(spec.shape) if size is None}
        for spec in specs
    ]
    # torch treats a size of 1, or one equal to another axis, as fixed.
    samples = [
        ops.ones([n or 101 + axis for axis, n in enumerate(s.shape)], s.dtype)
        for s in specs
    ]
    names = [s.name or f"input_{i}" for i, s in enumerate(specs)]
    try:
        program: Any = torch.onnx.export(
            Flat().eval(),
            tuple(samples),
            input_names=names,
            dynamic_shapes=(tuple(sizes),),
            dynamo=True,
            **{"verbose": False, **kwargs},
        )
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(
            "torch cannot trace the model. Where a size is free, pass an "
            "`input_signature` of fixed shapes. Received: shapes "
            f"{[tuple(spec.shape) for spec in specs]}"
        ) from error
    # OpenVINO takes only constants. torch computes small ones right away, and
    # has one for each use of a Keras variable.
    optimizer = importlib.import_module("onnxscript.optimizer")
    optimizer.fold_constants(
        program.model,
        output_size_limit=sys.maxsize,
        should_fold=_is_for_operator,
    )
    optimizer.remove_unused_nodes(program.model)
    common = importlib.import_module("onnx_ir.passes.common")
    common.DeduplicateHashedInitializersPass(sys.maxsize)(program.model)
    program.save(path)


def _is_for_operator(node):
    """Return whether a node computes what an `operator` takes."""
    return any(
        use.node.domain == "com.microsoft"
        for output in node.outputs
        for use in output.uses()
    )
