"""The base of optimizers that train single entries of kernels."""

import dataclasses
import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods import backend
from keras_weightmods.core import keras_compat
from keras_weightmods.core.restored import RestoredOnError
from keras_weightmods.core.weight_keys import same_path
from keras_weightmods.lift.frozen import unfreeze_trained_by
from keras_weightmods.ops.random_places import random_places, seed_of
from keras_weightmods.utils import checks

# State that is split over devices has a multiple of this length, so that a
# checkpoint fits most meshes.
_PART = 256


@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """The trained entries of one variable.

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

    When Keras builds a model's optimizer the masks are unknown, so `build` does
    nothing, and `PrincipalMaskCallback` calls `build_masked`. An optimizer from
    a file knows its variables and their numbers of entries, and is built for
    these.

    A mask is a variable with the places of its entries. Subclasses implement
    `_create_state(variables, known)`, which `build_masked` calls.

    Attributes:
        specs: List of `MaskSpec`, one for each variable it is built on, or is
            to be, if it comes from a file.
    """

    built: bool

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.specs: Any = []
        self._indices: Any = []
        self._mask_step: Any = None
        self._has_masks = False

    @property
    def variables(self):
        # `fit` on JAX takes the values before it traces a step, and no value
        # can be read there.
        self._look_for_masks()
        return super().variables

    @property
    def masked_variables(self):
        """The variables that have a mask, in order."""
        return [
            variable
            for variable, spec in zip(self._trainable_variables, self.specs)
            if spec.size is not None
        ]

    @property
    def mask_step(self):
        """The number of updates when the masks were last set, -1 for never."""
        if not self.built:
            return -1
        return int(ops.convert_to_numpy(self._mask_step))

    @property
    def mask_seed(self):
        """The seed of the mask choices, kept here for checkpoints."""
        return int(ops.convert_to_numpy(self._mask_seed))

    def indices_of(self, variable):
        """Return the mask of a variable.

        Args:
            variable: One of `masked_variables`.

        Returns:
            Rising int32 NumPy array, places in the flattened variable.
        """
        if not any(each is variable for each in self.masked_variables):
            expected = "one of the optimizer's `masked_variables`"
            raise checks.error("variable", expected, variable)
        return self._places_of(variable)

    def set_masks(self, all_indices, step, seed=None):
        """Move the masks.

        Args:
            all_indices: Iterable of rising int32 NumPy arrays, the entries of
                each of `masked_variables` in the flattened variable, as many as
                there were.
            step: Int, the updates made so far.
            seed: Int below 2**31, of the choices to come. Defaults to `None`,
                for the one that is set.
        """
        own = [each for each in self._indices if each is not None]
        changed = [*own, self._mask_step, self._mask_seed]
        with RestoredOnError(self, values=changed):
            for variable, indices in zip(self.masked_variables, all_indices):
                self._set_places(variable, indices)
            self._mask_step.assign(step)
            self._has_masks = step >= 0
            if seed is not None:
                self._mask_seed.assign(seed)

    def drawn_masks(self):
        """Return the masks that `random_places` can draw again from a seed.

        Returns:
            List of triples of the variable, the seed and the places.
        """
        found, step = [], self.mask_step
        variables = self.masked_variables if step >= 0 else ()
        for number, variable in enumerate(variables):
            # `PrincipalMaskCallback` draws them in the same way.
            seed = seed_of(self.mask_seed, step, number)
            size, places = math.prod(variable.shape), self._places_of(variable)
            drawn = random_places(seed, size, places.size)
            # A mask of the whole kernel may come from any rule.
            if places.size < size and np.array_equal(drawn, places):
                found.append((variable, seed, places))
        return found

    def build(self, variables):
        """Build the state, if the masks are known from a file."""
        specs = self.specs
        if self.built or not specs:
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

    def build_masked(self, variables, specs, known):
        """Build the state.

        Args:
            variables: List of the `keras.Variable`s to train.
            specs: List of `MaskSpec`, one for each.
            known: List of all variables that the model could train.
        """
        self.specs = list(specs)
        with keras.name_scope(self.name, caller=self):
            keras.optimizers.Optimizer.build(self, list(variables))
            self._indices = [
                None
                if spec.size is None
                else self._add_vector(v, "int32", f"indices_{place}")
                for place, (v, spec) in enumerate(zip(variables, specs))
            ]
            self._create_state(variables, known)
        self._mask_step, self._mask_seed = (
            self.add_variable(
                shape=(),
                initializer=keras.initializers.Constant(value),
                dtype="int32",
                aggregation="only_first_replica",
                name=name,
            )
            for name, value in (("mask_step", -1), ("mask_seed", 0))
        )
        self.built = True

    def apply(self, grads, trainable_variables=None):
        self._look_for_masks()
        self._check_masks(len(grads))
        super().apply(grads, trainable_variables)

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        # Loss scaling passes its own variables too.
        self._check_masks(len(trainable_variables))
        return super().stateless_apply(
            optimizer_variables, grads, trainable_variables
        )

    def _look_for_masks(self):
        """Find out whether masks were set or loaded after `build`."""
        if self._mask_step is not None and not self._has_masks:
            step = keras_compat.held_value(self._mask_step)
            self._has_masks = step is not None and int(step) >= 0

    def _check_masks(self, count):
        """Raise ValueError unless it has masks of so many variables."""
        known = len(self.specs) if self._has_masks else 0
        if count > known:
            raise ValueError(
                f"`{type(self).__name__}` has masks of {known} variables. Pass "
                "`PrincipalMaskCallback` to each `fit`, or call its "
                "`attach(model)` before a training loop of your own. To train "
                "all variables, compile the model with a new optimizer. "
                f"Received: the gradients of {count} variables"
            )

    def finalize_variable_values(self, var_list):
        """End the training; on JAX `fit` calls this after an error too."""
        super().finalize_variable_values(var_list)
        unfreeze_trained_by(self)

    def load_own_variables(self, store):
        """Restore the state, which must already be built."""
        held, wanted = len(store.keys()), len(self.variables)
        # An untrained optimizer has at most the iterations and the rate.
        if held > 2 and held != wanted:
            raise ValueError(
                "The file holds the state of another optimizer, whose masks "
                "would be lost. Compile the model like the saved one. Put "
                "`PrincipalMaskCallback` in front of other callbacks, or "
                "`attach` it before you load the weights. To load only the "
                "weights, pass `skip_mismatch=True`, or `compile=False` to "
                f"`load_model`. Received: {held} variables for the {wanted} of "
                f"a `{type(self).__name__}`"
            )
        super().load_own_variables(store)

    def get_config(self):
        masks = [
            {**dataclasses.asdict(spec), "shape": list(spec.shape)}
            for spec in self.specs
        ]
        return {**super().get_config(), "masks": masks}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        masks = config.pop("masks", ())
        optimizer = super().from_config(config, custom_objects)
        optimizer.specs = [
            MaskSpec(**{**each, "shape": tuple(each["shape"])})
            for each in masks
        ]
        return optimizer

    def _update_model_variables_moving_average(self, trainable_variables):
        """Average the masked entries; others have their value as the average.

        A computed average would be off by rounding. The others must stay the
        same bit for bit when the averages are written to the model.
        """
        super()._update_model_variables_moving_average(trainable_variables)
        averages = self._model_variables_moving_average if self.use_ema else ()
        for variable, average in zip(trainable_variables, averages):
            if average is not None:
                pair = map(ops.convert_to_tensor, (average, variable))
                average.assign(self._only_masked(variable, *pair))

    def _only_masked(self, variable, new, old):
        """Return tensor `old` with the masked entries of tensor `new`."""
        place = self._get_variable_index(variable)
        indices = self._indices[place]
        if indices is None:
            return new
        split = split_of(self._trainable_variables[place])
        return put(old, indices, taken(new, indices, split), split)

    def _places_of(self, variable):
        place = self._get_variable_index(variable)
        indices = ops.convert_to_numpy(self._indices[place])
        return indices[: self.specs[place].size]

    def _set_places(self, variable, indices):
        state = self._indices[self._get_variable_index(variable)]
        # Pad with places beyond the last entry.
        missing = state.shape[0] - len(indices)
        beyond = np.full(missing, math.prod(variable.shape), "int32")
        state.assign(np.append(np.asarray(indices, "int32"), beyond))

    def _add_vector(self, variable, dtype, name, initializer="zeros"):
        """Add state for the masked entries of a variable, split as it is."""
        place = self._get_variable_index(variable)
        size, layout = self.specs[place].size, None
        split = split_of(variable)
        if split is not None:
            layout, parts = split
            multiple = math.lcm(parts, _PART)
            size = -(-size // multiple) * multiple
        return self.add_variable(
            (size,), initializer, dtype, layout=layout, name=name
        )


def split_of(variable):
    """Return how the state of a variable is split over devices.

    This is a pair of a layout and the number of parts, or None.
    """
    layouts = backend.current().layouts()
    if layouts is None:
        return None
    return layouts.split_vector(keras_compat.layout_of(variable))


def taken(x, indices, split):
    """Return the entries of a tensor at places in its flattened form."""
    x, indices = map(ops.convert_to_tensor, (x, indices))
    if split is not None:
        return backend.current().layouts().taken(x, indices)
    return ops.take(ops.reshape(x, (-1,)), indices)


def put(x, indices, values, split):
    """Return the tensor with other entries at these places."""
    indices = ops.convert_to_tensor(indices)
    if split is not None:
        return backend.current().layouts().put(x, indices, values)
    flat, places = ops.reshape(x, (-1,)), ops.expand_dims(indices, -1)
    return ops.reshape(ops.scatter_update(flat, places, values), x.shape)
