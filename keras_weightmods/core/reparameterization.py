"""How effective weights follow from stored variables."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

from keras import ops

from keras_weightmods.core import keras_compat
from keras_weightmods.utils.checks import check_model

# The attribute of a layer with its {attribute: Reparameterization}.
SLOT = "_reparameterizations"
# {name: class} of those that have a name, for files.
KINDS: dict[str, type["Reparameterization"]] = {}


class Reparameterization:
    """How the effective weight of one target follows from stored variables.

    Subclasses implement `create_parameters` and `effective`.

    Attributes:
        name: String, unique, under which `save_model` records it. Without
            one, a model with it cannot be saved by `save_model`.
        finish: String, the call that ends the reparameterization, named in
            error messages.
        keeps_stored: Bool. If False, the parameters stand for the stored
            variable, the first of them for its values: the variable leaves the
            layer and gives back its memory, until the fold. It must be an
            attribute of the layer.
        pattern: String, the N:M pattern of the weights that the parameters
            can hold; None for any weights.
        mixin: A class to put in front of the layer's, with another `call`.
        is_empty: Bool, whether it was made from a file, see `from_config`.
        is_own: Bool, whether the layer's own class made it, and not `attach`.
        is_idle: Bool, whether the layer computes with the stored weight
            meanwhile, as if there were no reparameterization.
        get_model: Callable that returns the model that `attach` was given.

    Args:
        target: The `Target` to reparameterize; None if `bind` is to give it,
            as for a layer that is not built yet.
    """

    name: str | None = None
    finish = "kwm.fold(model)"
    keeps_stored = True
    pattern: str | None = None
    mixin: type | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name is not None and "name" in cls.__dict__:
            KINDS[cls.name] = cls

    def __init__(self, target: Any = None) -> None:
        self.parameters: tuple[Any, ...] = ()
        self.is_empty = self.is_own = self.is_idle = False
        self.get_model: Any = lambda: None
        # What `seam` replaced in the variable, and its place there.
        self.replaced: dict[str, Any] = {}
        self.place: Any = None
        if target is not None:
            self.bind(target)

    def bind(self, target: Any) -> None:
        """Set the target."""
        self.target = target
        # Read now: inside an autocast scope it would be another one.
        self.dtype = target.variable.dtype

    @property
    def rounds_inputs(self) -> bool:
        """Whether its layer rounds the inputs of the products."""
        return False

    def start(self, weight: Any) -> Any:
        """Return what to store so that the effective weight is `weight`.

        Called once, before `create_parameters`. Raises ValueError if no value
        gives the weight; the model is then unchanged.
        """
        return weight

    def get_config(self) -> dict[str, Any]:
        """Return what `from_config` needs besides the target, as JSON."""
        return {}

    @classmethod
    def from_config(cls, target: Any, config: dict[str, Any]) -> Self:
        """Create it for the same target of a new model.

        `config` comes from a file. Raises ValueError unless `get_config` could
        have returned it for this target. The item is marked `is_empty`: its
        variables have no values, and nothing reads them before they are loaded.
        """
        item = cls(target, **config)
        item.is_empty = True
        return item

    def create_parameters(self, add_weight: Callable[..., Any]) -> None:
        """Create the parameters through the layer's `add_weight`.

        They become `self.parameters`, in this order. Their names must be
        unique in the layer, as they are keys in checkpoints.
        """
        raise NotImplementedError

    def effective(self, stored: Any) -> Any:
        """Return the effective weight for the value `stored` of the variable.

        Do not read `stored` if `keeps_stored` is False.
        """
        raise NotImplementedError

    def is_identity(self) -> bool:
        """Whether, as it is now, it leaves any stored weight as it is."""
        return False

    def regularizer(self, regularizer: Any) -> Any:
        """Return the replacement of the variable's `regularizer`."""
        return lambda stored: regularizer(self.effective(stored))

    def constraint(self, constraint: Any) -> Any:
        """Return the replacement of the variable's `constraint`."""
        return constraint

    def summary(self) -> Any:
        """Return what reports say of it."""
        raise NotImplementedError

    def folded(self) -> Any:
        """Return the value that the fold leaves in the variable."""
        return ops.cast(self.effective(self.target.variable), self.dtype)

    def saved_arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return {key: (shape, dtype)} of `saved`, without reading a value."""
        return {
            parameter.name: (tuple(parameter.shape), parameter.dtype)
            for parameter in self.parameters
        }

    def saved(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it, {key: variable or array}."""
        return {parameter.name: parameter for parameter in self.parameters}

    def load(self, saved: dict[str, Any]) -> None:
        """Take what `saved` returned, as NumPy arrays."""
        for parameter in self.parameters:
            parameter.assign(saved[parameter.name])


def reparameterizations(
    model: Any, kind: Any = Reparameterization
) -> list[Any]:
    """Return the `Reparameterization`s of class `kind` in `model`."""
    check_model(model)
    items = [
        item
        for layer in keras_compat.layers_of(model)
        for item in slots(layer).values()
        if isinstance(item, kind)
    ]
    return sorted(items, key=lambda item: item.target.depth)


@contextlib.contextmanager
def left_out(items: Iterable[Any]) -> Iterator[None]:
    """Let the layers compute with the stored weights of some items."""
    items = list(items)
    try:
        for item in items:
            item.is_idle = True
        yield
    finally:
        for item in items:
            item.is_idle = False


def weight_formats(model: Any) -> list[tuple[tuple[int, ...], str]]:
    """Return shape and format of each weight of a model.

    A packed weight has the shape of the dense one. The format is its name in
    files, or the dtype of a plain weight.
    """
    packed = [x for x in reparameterizations(model) if not x.keeps_stored]
    found = [(x.target.shape, x.get_config()["format"]) for x in packed]
    arrays = {id(v) for item in packed for v in item.parameters}
    others = [v for v in model.weights if id(v) not in arrays]
    return found + [(tuple(v.shape), v.dtype) for v in others]


def slots(layer: Any) -> Any:
    """Return {attribute: Reparameterization} of a layer."""
    return keras_compat.attributes(layer).get(SLOT, {})
