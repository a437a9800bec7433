"""The models that the matrix tries everything on: tiny, but for the nets.

Those of KerasHub are found by their names, and made by `hub`. A family whose
constructor needs something that is not in `hub_sizes` is left out, and the page
says why.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from tests import models
from tests.matrix import hub, states
from tests.matrix.hub_sizes import TOKENS
from tests.matrix.states import ROWS

NETS = (
    *("ConvNeXtTiny", "DenseNet121", "EfficientNetB0", "EfficientNetV2B0"),
    *("InceptionV3", "MobileNet", "MobileNetV2", "MobileNetV3Small"),
    *("ResNet50", "ResNet50V2", "VGG16", "Xception"),
)


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of model; `make` draws the same weights each time."""

    name: str
    kind: str  # own, language, encoder, net, or pair: see `states`
    make: Callable[[], Any]
    shape: tuple[int, ...] = ()  # of an input that the model does not tell

    @property
    def generates(self) -> bool:
        """Bool, whether it writes text."""
        return self.kind == "language" or "CausalLM" in self.name

    def inputs(self, model: Any) -> Any:
        """Return a batch of `ROWS`."""
        if self.shape:
            return models.normal(ROWS, *self.shape)
        is_chain = isinstance(model, keras.Sequential)
        inputs = model.inputs[0] if is_chain else model.input
        batch = keras.tree.map_structure(_batch, inputs)
        given = hub.given(self.name, ROWS)
        return batch | given if given else batch


def _batch(tensor):
    shape = (ROWS, *(TOKENS if n is None else n for n in tensor.shape[1:]))
    if "position" in tensor.name:
        return np.broadcast_to(np.arange(shape[1]), shape)
    if "mask" in tensor.name or "segment" in tensor.name:
        return np.full(shape, "mask" in tensor.name, "int32")
    if "int" in tensor.dtype:
        return np.random.default_rng(0).integers(1, 20, shape)
    return models.normal(*shape)


def families():
    """Return all families, by name."""
    found = [*_own(), *map(_net, NETS)]
    for name, kind, make in hub.families():
        found.append(Family(name, kind, _seeded(make)))
    found += _after_others({family.name: family for family in found})
    return {family.name: family for family in found}


def _after_others(plain):
    """Yield a family for each state that a model may be in."""

    def maker(base, reach):
        def make():
            model = base.make()
            reach(model, base.inputs(model))
            return model

        return make

    for base in map(plain.get, states.BASES):
        for name, reach in states.STATES.items():
            yield Family(f"{base.name}, {name}", "pair", maker(base, reach))


# The shape of the inputs, and the layer behind them, of `keras.layers`.
LAYERS = {
    "Conv1D, causal": ((12, 8), lambda k: k.Conv1D(8, 3, padding="causal")),
    "Conv3D": ((4, 4, 4, 4), lambda k: k.Conv3D(8, 2)),
    "Conv2DTranspose": ((4, 4, 8), lambda k: k.Conv2DTranspose(8, 2)),
    "DepthwiseConv2D": ((6, 6, 8), lambda k: k.DepthwiseConv2D(2)),
    "SeparableConv2D": ((6, 6, 8), lambda k: k.SeparableConv2D(8, 2)),
    "LSTM": ((6, 8), lambda k: k.LSTM(8)),
    "GRU, bidirectional": ((6, 8), lambda k: k.Bidirectional(k.GRU(8))),
    "TimeDistributed": ((6, 8), lambda k: k.TimeDistributed(k.Dense(8))),
}


def _own():
    makers = {
        "Dense": models.mlp,
        "Conv2D": models.conv_net,
        "EinsumDense": lambda: models.einsum_net(time=6),
        "MultiHeadAttention": models.attention_net,
        "a shared layer": models.shared_net,
        "nested models": models.nested_net,
        "two outputs": models.two_heads,
        "outputs in a dict": lambda: models.two_heads(as_dict=True),
        "an embedding": models.token_net,
        "GroupQueryAttention": _grouped_attention,
    }
    for name, (shape, layer) in LAYERS.items():
        makers[name] = functools.partial(_net_of, shape, layer)
    for name, make in makers.items():
        yield Family(name, "own", _seeded(make))
    yield Family("a subclassed model", "own", _seeded(_subclassed), (8,))


def _net_of(shape, layer):
    head = keras.layers.Flatten(), keras.layers.Dense(4)
    return models.sequential(shape, layer(keras.layers), *head)


def _grouped_attention():
    inputs = keras.Input((6, 16))
    attention = keras.layers.GroupQueryAttention(8, 4, 2)
    return keras.Model(inputs, attention(inputs, inputs))


def _subclassed():
    model = models.Subclassed()
    model(models.normal(1, 8))
    return model


def _seeded(make):
    def seeded():
        keras.utils.set_random_seed(0)
        return make()

    return seeded


def _net(name):
    def make():
        net = getattr(keras.applications, name)
        return net(weights=None, input_shape=(96, 96, 3))

    return Family(name, "net", _seeded(make))
