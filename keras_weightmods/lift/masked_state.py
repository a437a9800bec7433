"""What the optimizers that train single entries of kernels have in common."""

import dataclasses
import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.core.weight_keys import same_path
from keras_weightmods.lift.frozen import unfreeze_trained_by
from keras_weightmods.ops.random_places import random_places, seed_of
from keras_weightmods.utils import checks


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

    def __init__(self, *args, masks=None, **kwargs):
        super().__init__(*args, **kwargs)
        self._configured_specs = None
        try:
            if masks is not None:
                self._configured_specs = [
                    MaskSpec(**{**each, "shape": tuple(each["shape"])})
                    for each in masks
                ]
        except (TypeError, KeyError) as error:
            expected = "None, or what `get_config` returned"
            raise checks.error("masks", expected, masks) from error
        self._specs: Any = []

    @property
    def masked_variables(self):
        """The variables of which single entries are trained, in order."""
        return [
            variable
            for variable, spec in zip(self._trainable_variables, self._specs)
            if spec.size is not None
        ]

    @property
    def specs(self):
        """One `MaskSpec` for each variable it was built on."""
        return tuple(self._specs)

    @property
    def mask_step(self):
        """The updates made when the masks were last set, -1 for never."""
        if not self.built:
            return -1
        return int(ops.convert_to_numpy(self._mask_step))

    @property
    def mask_seed(self):
        """The seed of the choices of masks, which a checkpoint so holds."""
        return int(ops.convert_to_numpy(self._mask_seed))

    def build(self, variables):
        """Build the state, if the masks are known from a file."""
        specs = self._configured_specs
        if self.built or specs is None:
            return
        places = [spec.place for spec in specs]
        if len(variables) == len(specs):
            places = list(range(len(specs)))
        if not all(
            place < len(variables)
            and tuple(variables[place].shape) == spec.shape
            and same_path(variables[place].path, spec.path)
            for place, spec in zip(places, specs)
        ):
            raise ValueError(
                f"`{type(self).__name__}` was restored with masks of "
                f"{len(specs)} variables, the first being {specs[0].path!r}. "
                f"Received: {len(variables)} variables that do not hold them. "
                "Compile the model with a new optimizer."
            )
        self.build_masked([variables[p] for p in places], specs, variables)

    def build_masked(self, variables, specs, known=None):
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
        self._mask_step = self._add_count("mask_step", -1)
        self._mask_seed = self._add_count("mask_seed", 0)
        self.built = True

    def _add_count(self, name, value):
        return self.add_variable(
            shape=(),
            initializer=keras.initializers.Constant(value),
            dtype="int32",
            aggregation="only_first_replica",
            name=name,
        )

    def set_masks(self, all_indices, step, seed=None):
        """Move the masks.

        Args:
            all_indices: Iterable of rising int32 NumPy arrays, the entries of
                each of `masked_variables` in the flattened variable.
            step: Int, the updates made so far.
            seed: Int below 2**31, of the choices to come. Defaults to `None`,
                for the one that is set.
        """
        for variable, indices in zip(self.masked_variables, all_indices):
            self.set_indices(variable, indices)
        self._mask_step.assign(step)
        if seed is not None:
            self._mask_seed.assign(seed)

    def drawn_masks(self):
        """Return the masks that `random_places` draws again from a seed.

        Returns:
            List of triples of the variable, the seed and the places.
        """
        step = self.mask_step
        if step < 0:
            return []
        found = []
        for number, variable in enumerate(self.masked_variables):
            # As `PrincipalMaskCallback` draws them.
            seed = seed_of(self.mask_seed, step, number)
            size, places = math.prod(variable.shape), self.indices_of(variable)
            drawn = random_places(seed, size, places.size)
            # All of a kernel are what any rule chooses.
            if places.size < size and np.array_equal(drawn, places):
                found.append((variable, seed, places))
        return found

    def apply(self, grads, trainable_variables=None):
        self._check_masks(len(grads))
        super().apply(grads, trainable_variables)

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        # Loss scaling passes gradients with what is its own.
        self._check_masks(len(trainable_variables))
        return super().stateless_apply(
            optimizer_variables, grads, trainable_variables
        )

    def finalize_variable_values(self, var_list):
        """End the training; on JAX `fit` does so on an error as well."""
        super().finalize_variable_values(var_list)
        unfreeze_trained_by(self)

    def load_own_variables(self, store):
        """Restore the state, which must have been built."""
        if not self.built and len(store.keys()) > len(self.variables):
            raise ValueError(
                f"The file holds the state of a `{type(self).__name__}` with "
                "masks, and this one has none yet. Call "
                "`PrincipalMaskCallback.attach(model)` before the weights are "
                "loaded; put the callback in front of `BackupAndRestore`."
            )
        # Of a model that was not trained: the iterations and the rate at most.
        held, wanted = len(store.keys()), len(self.variables)
        if self.built and held > 2 and held != wanted:
            raise ValueError(
                "The file holds the state of another optimizer, or of one with "
                f"other settings, than this `{type(self).__name__}`, and its "
                "masks would be lost. Compile the model as the one that was "
                "saved. To load the weights without this state, call "
                "`load_weights(path, skip_mismatch=True)`, or "
                "`load_model(path, compile=False)`. Received: "
                f"{held} variables, expected: {wanted}"
            )
        super().load_own_variables(store)

    def _check_masks(self, count):
        """Raise ValueError unless it has masks and state for all of these."""
        if not self.built:
            raise ValueError(
                f"`{type(self).__name__}` has no masks yet. Train with "
                "`model.fit(..., callbacks=[PrincipalMaskCallback(...)])`, or "
                "call `PrincipalMaskCallback(...).attach(model)` before a "
                "training loop of your own."
            )
        if count > len(self._specs):
            raise ValueError(
                f"`{type(self).__name__}` trains {len(self._specs)} variables, "
                "of which its masks are. To go on with them, pass "
                "`PrincipalMaskCallback` to `fit` again. To train all, compile "
                "the model with a new optimizer. Received: the gradients of "
                f"{count} variables"
            )

    def _check_masked(self, variable):
        """Raise ValueError unless a variable has a mask."""
        masked = self.masked_variables if self.built else []
        if not any(each is variable for each in masked):
            expected = "one of the optimizer's `masked_variables`"
            raise checks.error("variable", expected, variable)

    def _checked_indices(self, variable, indices):
        """Return rising places in a variable; else raise ValueError."""
        count, size = self._spec_of(variable).size, math.prod(variable.shape)
        array = checks.check_array("indices", indices)
        is_valid = array.shape == (count,) and array.dtype.kind in "iu"
        if is_valid and count:
            array = array.astype("int64")
            is_valid = array[0] >= 0 and array[-1] < size
            is_valid = is_valid and bool(np.all(np.diff(array) > 0))
        if not is_valid:
            expected = f"{count} rising ints, from 0 to {size - 1}"
            raise checks.error("indices", expected, indices)
        return array.astype("int32")

    def _spec_of(self, variable):
        return self._specs[self._get_variable_index(variable)]

    def get_config(self):
        specs = self._specs if self.built else self._configured_specs
        masks = specs and [
            {**dataclasses.asdict(spec), "shape": list(spec.shape)}
            for spec in specs
        ]
        return {**super().get_config(), "masks": masks}

    def _update_model_variables_moving_average(self, trainable_variables):
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

    def _create_state(self, variables, known):
        raise NotImplementedError

    def set_indices(self, variable, indices):
        """Move the mask of one variable."""
        raise NotImplementedError

    def indices_of(self, variable):
        """Return the mask of a variable.

        Args:
            variable: One of `masked_variables`.

        Returns:
            Rising int32 NumPy array, places in the flattened variable.
        """
        raise NotImplementedError

    def _only_masked(self, variable, new, old):
        """Tensor `old` with the masked entries of tensor `new`."""
        raise NotImplementedError
