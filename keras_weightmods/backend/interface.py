"""What the library asks of a backend of Keras beyond `keras.ops`."""

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np


class Backend(Protocol):
    """One of `backend/{jax,tensorflow,torch}/implementation.py`.

    Reached by `backend.current()`. What says so may be None: the backend has
    no use for it, and the caller goes by `keras.ops`.
    """

    def vjp(
        self, function: Callable[..., Any], *inputs: Any
    ) -> tuple[Any, Callable[[Any], Any]]:
        """Return `function(*inputs)`, and its pullback.

        Gradients can so be taken within a forward pass.

        Args:
            function: Callable from float tensors to one.
            *inputs: Its inputs.

        Returns:
            The output, and a function from the gradient of the output to those
            of the inputs, to be called once.
        """

    def loss_gradients(
        self, model: Any, variables: Any, x: Any, y: Any, sample_weight: Any
    ) -> Any:
        """Return the gradients of a compiled model's loss, as it infers."""

    def full_precision(self) -> contextlib.AbstractContextManager[Any]:
        """Return a scope in which no factor of a float32 product is rounded.

        A GPU may round them to TF32 outside of it.
        """

    def compiled(
        self, function: Callable[..., Any], static: tuple[int, ...] = ()
    ) -> Callable[..., Any]:
        """Return a function that is one program where each op would be one.

        That is so on JAX. Elsewhere it is the function itself.

        Args:
            function: Of tensors, and of the arguments that are static.
            static: Tuple of ints, the places of these.
        """

    def fused(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a pure function, compiled also where the step is not.

        Keras on TensorFlow compiles the train step of only some models. Op by
        op, each operation would read and write whole kernels through memory.
        Elsewhere it is the function itself.

        Args:
            function: Takes tensors, nests of them, and values that are part of
                the program, by position.
        """

    def compiled_call(self, layer: Any) -> Callable[[Any], Any]:
        """Return a compiled function from a layer's inputs to its outputs."""

    def after(self, tensors: list[Any], first: list[Any]) -> list[Any]:
        """Return tensors as they are, at hand only once others are computed.

        - Before a step changes some entries of a weight in place, XLA copies
          it: once for what still reads it, once more for the change, all
          weights at the start. What is computed from a weight when its gradient
          is there, entry by entry, needs no memory of its own for long.
        - What is computed from a variable on TensorFlow may still be under way
          when the variable is updated in its place; seen in the branch of a
          condition.

        Args:
            tensors: List of tensors; on TensorFlow also `tf.IndexedSlices`.
            first: List of tensors that are not empty.
        """

    def view_of(self, tensor: Any) -> np.ndarray | None:
        """Return the tensor as an array in its own memory, or None."""

    def array_of(self, tensor: Any) -> np.ndarray:
        """Return the values of a tensor as an array, bit for bit."""

    def tensor_of(self, array: np.ndarray) -> Any:
        """Return a tensor, on the CPU in the memory of the array if it can."""

    def layouts(self) -> Any:
        """Return the module of weights that are split over devices, or None.

        It has `split_of`, `split_vector`, `SplitPacked`, `taken` and `put`.
        """

    def processes(self) -> Any:
        """Return the module of what several processes share; None for one.

        It has `index`, `wait`, `gathered`, `rows_of_all`, `whole`, `own_part`.
        """

    def in_place(self) -> Any:
        """Return the module of steps that change tensors in place, or None.

        It has `adam_s`, `sparse_adamw` and `distillation_gradient`.
        """

    def products(self) -> Any:
        """Return the module of products with packed kernels.

        It has `sparse_matmul`, and `reason_unavailable` for why there is none
        that is compiled.
        """

    def gpu_products(self) -> Any:
        """Return the module of those products on an NVIDIA GPU, or None."""

    def attention(self) -> Any:
        """Return the module of the `kernel` of an attention, or None."""

    def generation(self) -> Any:
        """Return the module of `CompiledGenerate` and its `LENGTH_STEP`."""
