"""What the optimizers that train single entries of kernels have in common."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.core.weight_keys import same_path


@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """What is trained of one variable.

    Attributes:
        path: String, the variable's path.
        shape: Tuple of ints, its shape.
        size: Int, the number of entries trained; None for all of them.
        place: Int, its place among the variables that the model would train
            without the masks.
    """

    path: str
    shape: tuple[int, ...]
    size: int | None
    place: int


class MaskedState(keras.optimizers.Optimizer):
    """An optimizer that trains single entries of some variables.

    The masks are not known when Keras builds a model's optimizer: `build` does
    nothing then, and `PrincipalMaskCallback` calls `build_masked`. An optimizer
    from a file knows of what variables, and how many entries of each, it has
    state, and is built for these.

    Subclasses implement `_create_state`, `set_indices`, `indices_of` and
    `_only_masked`.
    """

    built: bool

    def __init__(self, *args: Any, masks: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._configured_specs = masks and [
            MaskSpec(**{**each, "shape": tuple(each["shape"])})
            for each in masks
        ]
        self._specs: list[MaskSpec] = []

    @property
    def masked_variables(self) -> list[keras.Variable]:
        """The variables of which single entries are trained, in order."""
        return [
            variable
            for variable, spec in zip(self._trainable_variables, self._specs)
            if spec.size is not None
        ]

    @property
    def specs(self) -> tuple[MaskSpec, ...]:
        """One `MaskSpec` for each variable it was built on."""
        return tuple(self._specs)

    @property
    def mask_step(self) -> int:
        """The updates made when the masks were last set, -1 for never."""
        if not self.built:
            return -1
        return int(ops.convert_to_numpy(self._mask_step.value))

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Build the state, if the masks are known from a file."""
        if self.built or self._configured_specs is None:
            return
        specs = self._configured_specs
        all_are_masked = len(variables) == len(specs)
        places = [
            i if all_are_masked else spec.place for i, spec in enumerate(specs)
        ]
        if not all(
            place < len(variables)
            and tuple(variables[place].shape) == spec.shape
            and same_path(variables[place].path, spec.path)
            for place, spec in zip(places, specs)
        ):
            raise ValueError(
                f"`{type(self).__name__}` was restored with masks of "
                f"{len(specs)} variables, the first being "
                f"{specs[0].path!r}, and must be built on the variables of "
                "the model that it was saved with. Received: "
                f"{len(variables)} variables that do not hold them. Compile "
                "the model with a new optimizer."
            )
        self.build_masked([variables[p] for p in places], specs, variables)

    def build_masked(
        self,
        variables: Sequence[keras.Variable],
        specs: Sequence[MaskSpec],
        known: Sequence[keras.Variable] | None = None,
    ) -> None:
        """Build the state.

        Args:
            variables: List of the `keras.Variable`s to train.
            specs: List of `MaskSpec`, one for each.
            known: List of all variables that the model could train.
        """
        if self.built:
            raise ValueError(
                f"`{type(self).__name__}` has been built already. Compile the "
                "model with a new optimizer."
            )
        self._specs = list(specs)
        self._configured_specs = None
        with keras.name_scope(self.name, caller=self):
            self._create_state(list(variables), known)
        self._mask_step = self.add_variable(
            shape=(),
            initializer=keras.initializers.Constant(-1),
            dtype="int32",
            aggregation="only_first_replica",
            name="mask_step",
        )
        self.built = True

    def set_masks(self, all_indices: Iterable[Any], step: int) -> None:
        """Move the masks.

        Args:
            all_indices: Iterable of rising int32 NumPy arrays, the entries of
                each of `masked_variables` in the flattened variable.
            step: Int, the updates made so far.
        """
        for variable, indices in zip(self.masked_variables, all_indices):
            self.set_indices(variable, indices)
        self._mask_step.assign(step)

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        self._check_masks()
        super().apply(grads, trainable_variables)

    def stateless_apply(
        self, optimizer_variables: Any, grads: Any, trainable_variables: Any
    ) -> Any:
        self._check_masks()
        return super().stateless_apply(
            optimizer_variables, grads, trainable_variables
        )

    def load_own_variables(self, store: Any) -> None:
        """Restore the state, which must have been built."""
        keys = list(store.keys())
        if not self.built and len(keys) > len(self.variables):
            raise ValueError(
                f"The file holds the state of a `{type(self).__name__}` with "
                "masks, and this one has none yet. Call "
                "`PrincipalMaskCallback.attach(model)` before the weights are "
                "loaded; put the callback in front of `BackupAndRestore`. "
                f"Received: {len(keys)} variables for {len(self.variables)}."
            )
        super().load_own_variables(store)

    def _check_masks(self) -> None:
        if not self.built:
            raise ValueError(
                f"`{type(self).__name__}` has no masks yet. Train with "
                "`model.fit(..., callbacks=[PrincipalMaskCallback(...)])`, or "
                "call `PrincipalMaskCallback(...).attach(model)` before a "
                "training loop of your own."
            )

    def _spec_of(self, variable: Any) -> Any:
        return self._specs[self._get_variable_index(variable)]

    def get_config(self) -> dict[str, Any]:
        specs = self._specs if self.built else self._configured_specs
        return {
            **super().get_config(),
            "masks": specs
            and [
                {**dataclasses.asdict(spec), "shape": list(spec.shape)}
                for spec in specs
            ],
        }

    def _update_model_variables_moving_average(
        self, trainable_variables: Any
    ) -> None:
        """As Keras, of masked entries; the average of others is their value.

        Computed, it would be off by a rounding, and they are to stay as they
        are bit for bit when the average is written to the model.
        """
        if not self.use_ema:
            return
        for variable, average in zip(
            trainable_variables, self._model_variables_moving_average
        ):
            if average is None:
                continue
            value = ops.convert_to_tensor(variable)
            old = ops.convert_to_tensor(average)
            momentum = self.ema_momentum * ops.cast(
                ops.not_equal(self.iterations, 0), value.dtype
            )
            new = momentum * old + (1 - momentum) * value
            average.assign(self._only_masked(variable, new, value))

    def _create_state(self, variables: Any, known: Any) -> Any:
        raise NotImplementedError

    def set_indices(self, variable: keras.Variable, indices: Any) -> None:
        """Move the mask of one variable."""
        raise NotImplementedError

    def indices_of(self, variable: keras.Variable) -> Any:
        """Return the mask of a variable.

        Args:
            variable: One of `masked_variables`.

        Returns:
            Rising int32 NumPy array, places in the flattened variable.
        """
        raise NotImplementedError

    def _only_masked(self, variable: Any, new: Any, old: Any) -> Any:
        """Tensor `old` with the masked entries of tensor `new`."""
        raise NotImplementedError


def moved_entries(old_indices: Any, new_indices: Any, values: Any) -> Any:
    """Return what each entry had under the old mask, zero for new ones.

    Args:
        old_indices, new_indices: Rising int NumPy arrays of one length.
        values: NumPy array of that length, for the old indices.

    Returns:
        NumPy array of the dtype of `values`, for the new indices.
    """
    _, before, after = np.intersect1d(
        old_indices, new_indices, assume_unique=True, return_indices=True
    )
    moved = np.zeros_like(values)
    moved[after] = values[before]
    return moved
