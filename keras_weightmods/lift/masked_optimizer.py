"""MaskedOptimizer: any optimizer, on single entries of kernels."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.core import keras_compat
from keras_weightmods.core.wrapping_optimizer import WrappingOptimizer
from keras_weightmods.lift.masked_state import MaskedState
from keras_weightmods.ops.nm import pack_bits, packed_size, unpack_bits
from keras_weightmods.utils import checks


@keras.saving.register_keras_serializable(package="keras_weightmods")
class MaskedOptimizer(MaskedState, WrappingOptimizer):
    """Let an optimizer change the masked entries of kernels alone.

    The wrapped optimizer sees gradients that are zero outside of the mask;
    after its step, all entries outside are what they were before, bit for
    bit: neither momentum nor weight decay moves them. The moments of an entry
    that leaves the mask fade, those of one that comes in start as they are,
    at zero where it never was in.

    The state is the wrapped optimizer's, of all weights that the model would
    train without masks, and one bit for each entry. For state that is as small
    as the masks, use `SparseAdamW`.

    `PrincipalMaskCallback` wraps the optimizer of the model by itself.
    It refuses kernels with constraints, which act on whole variables; those of
    variables without a mask apply after the step.

    Args:
        optimizer: The `keras.optimizers.Optimizer` to wrap. No
            `LossScaleOptimizer` or `MultiOptimizer`: these go around this
            one.
        name: String. Defaults to `"masked_optimizer"`.
        masks, inner_on_all: Of the config; leave them out.

    Raises:
        ValueError: If `optimizer` is not such an optimizer; when it is
            to step without masks.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8)])
    model.compile(kwm.MaskedOptimizer(keras.optimizers.Lion(1e-3)), "mse")
    before = np.array(model.layers[0].kernel)
    x = np.random.normal(size=(32, 16))
    model.fit(
        x, x[:, :8], verbose=0, callbacks=[kwm.PrincipalMaskCallback(0.25)]
    )
    changed = np.array(model.layers[0].kernel) != before
    assert changed.sum() == 32
    ```
    """

    refused = (MaskedState,)

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        name: str = "masked_optimizer",
        masks: list[dict[str, Any]] | None = None,
        inner_on_all: bool = True,
    ) -> None:
        checks.check_bool("inner_on_all", inner_on_all)
        super().__init__(optimizer, name=name, masks=masks)
        self.inner_on_all = inner_on_all

    def _create_state(self, variables: Any, known: Any) -> None:
        inner = self.optimizer
        if inner.built:
            # By Keras, before the masks were known.
            trained = keras_compat.optimizer_variables(inner)
            self.inner_on_all = len(trained) > len(variables)
            keras_compat.check_known(inner, variables)
            keras_compat.drop_averages(inner)
        keras.optimizers.Optimizer.build(self, variables)
        self._bits: list[Any] = [None] * len(variables)
        for place, spec in enumerate(self._specs):
            if spec.size is not None:
                shape = (packed_size(math.prod(spec.shape)),)
                name = f"mask_{place}"
                bits = self.add_variable(shape, dtype="uint8", name=name)
                self._bits[place] = bits
        if not inner.built:
            # As Keras does in `fit`, so that a checkpoint fits.
            inner.build(known if self.inner_on_all and known else variables)

    def indices_of(self, variable: keras.Variable) -> Any:
        self._check_masked(variable)
        mask = ops.convert_to_numpy(self._mask_of(variable))
        return np.flatnonzero(mask).astype("int32")

    def set_indices(self, variable: keras.Variable, indices: Any) -> None:
        self._check_masked(variable)
        indices = self._checked_indices(variable, indices)
        mask = np.zeros(math.prod(variable.shape), bool)
        mask[indices] = True
        self._bits[self._get_variable_index(variable)].assign(pack_bits(mask))

    def _backend_update_step(self, grads: Any, variables: Any, _: Any) -> None:
        """Have the wrapped optimizer step, then put the rest back."""
        grads, masked = list(grads), []
        for i, variable in enumerate(variables):
            mask = self._mask_of(variable)
            if mask is None:
                continue
            grads[i] = ops.where(mask, grads[i], ops.zeros_like(grads[i]))
            before = ops.stop_gradient(ops.convert_to_tensor(variable))
            masked.append((variable, mask, ops.copy(before)))
        self._apply_wrapped(grads, variables)
        for variable, mask, before in masked:
            after = ops.convert_to_tensor(variable)
            variable.assign(ops.where(mask, after, before))

    def _mask_of(self, variable: Any) -> Any:
        bits = self._bits[self._get_variable_index(variable)]
        if bits is None:
            return None
        shape = self._spec_of(variable).shape
        return unpack_bits(ops.convert_to_tensor(bits), shape)

    def _only_masked(self, variable: Any, new: Any, old: Any) -> Any:
        mask = self._mask_of(variable)
        return new if mask is None else ops.where(mask, new, old)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "inner_on_all": self.inner_on_all}
