"""What the library needs from a Keras backend beyond `keras.ops`."""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

Function = Callable[..., Any]


class Backend:
    """The defaults, for a backend that needs no code of its own.

    The subclasses are in `backend/{jax,tensorflow,torch}/implementation.py`.
    `backend.current()` returns the one in use.
    """

    def vjp(self, function: Function, *inputs: Any) -> tuple[Any, Function]:
        """Return `function(*inputs)`, and its pullback.

        This allows gradients within a forward pass.

        Args:
            function: Callable from float tensors to one.
            *inputs: Its inputs.

        Returns:
            The output, and a function from the gradient of the output to those
            of the inputs, to be called once.
        """
        raise NotImplementedError

    def full_precision(self) -> contextlib.AbstractContextManager[Any]:
        """Return a scope in which factors of float32 products are not rounded.

        Outside of it a GPU may round them to TF32.
        """
        raise NotImplementedError

    def compiled(self, function: Function, static: Any = ()) -> Function:
        """Return a function that runs as one program, not op by op.

        Torch returns the function itself.

        Args:
            function: Of tensors, and of the arguments that are static.
            static: Tuple of ints, the places of these.
        """
        return function

    def fused(self, function: Function) -> Function:
        """Return a pure function, compiled even if the train step is not.

        Keras on TensorFlow compiles the train step of only some models. Op by
        op, each operation would read and write whole kernels through memory.
        Other backends return the function itself.

        Args:
            function: Takes tensors, nests of them, and values that are part of
                the program, by position.
        """
        return function

    def recomputed(self, function: Function) -> Function:
        """Return a function that is computed again in the backward pass.

        Until then only its inputs and outputs are in memory. JAX and TensorFlow
        would lose the masks that Keras attaches to tensors: they return the
        function itself.
        """
        return function

    def compiled_call(self, layer: Any) -> Function:
        """Return a compiled function from a layer's inputs to its outputs."""
        return layer.predict_on_batch

    def after(self, tensors: list[Any], first: list[Any]) -> list[Any]:
        """Return tensors unchanged, available only once others are computed.

        - Before a step changes some entries of a weight in place, XLA copies
          the weight, once for later reads and once for the change. It copies
          all weights at the start. Work that waits for the gradient of its
          weight holds its memory only for a short time.
        - On TensorFlow a variable may be updated in place while something is
          still computed from it. This was seen in the branch of a condition.

        Args:
            tensors: List of tensors; on TensorFlow also `tf.IndexedSlices`.
            first: List of tensors that are not empty.
        """
        return tensors

    def outside_trace(self) -> contextlib.AbstractContextManager[Any]:
        """Return a scope in which variables have values, even in a trace."""
        return contextlib.nullcontext()

    def view_of(self, tensor: Any) -> np.ndarray | None:
        """Return the tensor as an array in its own memory, or None."""
        raise NotImplementedError

    def array_of(self, tensor: Any) -> np.ndarray:
        """Return the values of a tensor as an array, bit for bit."""
        return keras.ops.convert_to_numpy(tensor)

    def tensor_of(self, array: np.ndarray) -> Any:
        """Return a tensor, on the CPU in the memory of the array if it can."""
        raise NotImplementedError

    def processes(self) -> Any:
        """Return the module for what several processes share; None for one.

        It has `index`, `wait`, `gathered`, `rows_of_all` and `whole`.
        """
        return None

    def layouts(self) -> Any:
        """Return the module for weights that are split over devices, or None.

        It has `split_of`, `split_vector`, `SplitPacked`, `taken` and `put`.
        """
        return self._module("layouts")

    def in_place(self) -> Any:
        """Return the module of steps that change tensors in place, or None.

        It has `adam_s`, `adamw`, `distillation_gradient` and `multiples`.
        """
        return self._module("in_place")

    def products(self) -> Any:
        """Return the module of products with packed kernels.

        It has `sparse_matmul`, and `reason_unavailable`, which says why there
        is no compiled one.
        """
        return self._module("sparse_matmul")

    def gpu_products(self) -> Any:
        """Return the module of those products on an NVIDIA GPU, or None."""
        return self._module("sparse_matmul_gpu")

    def generation(self) -> Any:
        """Return the module of `CompiledGenerate` and its `LENGTH_STEP`."""
        return self._module("generation")

    def onnx(self) -> Any:
        """Return the module of files with operators of ONNX Runtime, or None.

        It has `operator`, for a node of the graph, and `write`.
        """
        return self._module("onnx")

    @functools.cache  # noqa: B019
    def _module(self, name: str) -> Any:
        """Return a module of the backend's folder, None if it has none."""
        path = f"{type(self).__module__.rpartition('.')[0]}.{name}"
        found = importlib.util.find_spec(path)
        return found and importlib.import_module(path)
