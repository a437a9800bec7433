"""The models that the matrix tries everything on: tiny, but for the nets.

Those of KerasHub are found by their names, and made with as many of `SIZES` as
their constructors take: two blocks of 32 units. A family whose constructor
needs something else is left out, which the page says.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from tests import models

# Arguments of KerasHub's backbones, by name; others keep their defaults.
SIZES = {
    "vocabulary_size": 96,
    "num_layers": 2,
    "num_heads": 4,
    "num_query_heads": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 32,
    "embedding_dim": 32,
    "intermediate_dim": 64,
    "head_dim": 8,
    "max_sequence_length": 32,
    "max_position_embeddings": 32,
    "num_experts": 4,
    "num_experts_per_token": 2,
    "top_k": 2,
    "moe_intermediate_dim": 32,
    "expert_intermediate_dim": 32,
    "shared_expert_intermediate_dim": 32,
    "shared_expert_intermediate_size": 32,
    "image_size": 16,
    "image_shape": (32, 32, 3),
    "patch_size": 8,
    "mlp_dim": 64,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rope_layer_enabled_list": [True, True],
    "layer_types": ["full_attention"] * 2,
    "mlp_bias": False,
    "layer_norm_epsilon": 1e-5,
    "rope_theta": 1e4,
    "partial_rotary_factor": 1.0,
}
# And those that a family alone has.
OWN_SIZES = {
    "Gemma3nBackbone": {
        "text_vocab_size": 96,
        "text_hidden_size": 32,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "intermediate_size": [64, 64],
        "hidden_activation": "gelu_approximate",
        "sliding_window": 4,
        "vocab_size_per_layer_input": 96,
        "hidden_size_per_layer_input": 4,
        "altup_num_inputs": 2,
        "laurel_rank": 2,
    },
    "RWKV7Backbone": {
        "hidden_size": 32,
        "head_size": 8,
        "gate_lora": 8,
        "mv_lora": 8,
        "aaa_lora": 8,
        "decay_lora": 8,
    },
    "PaliGemmaBackbone": {
        "vit_patch_size": 8,
        "vit_num_heads": 4,
        "vit_hidden_dim": 32,
        "vit_num_layers": 2,
        "vit_intermediate_dim": 64,
    },
}
NETS = (
    *("ConvNeXtTiny", "DenseNet121", "EfficientNetB0", "EfficientNetV2B0"),
    *("InceptionV3", "MobileNet", "MobileNetV2", "MobileNetV3Small"),
    *("ResNet50", "ResNet50V2", "VGG16", "Xception"),
)
TOKENS = 8


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        name: String.
        kind: `"own"`, `"language"`, `"encoder"` or `"net"`.
        make: Callable that returns a model, with the same weights each time.
        shape: Tuple, of the input of a model that does not tell it.
    """

    name: str
    kind: str
    make: Callable[[], Any]
    shape: tuple[int, ...] = ()

    def inputs(self, model: Any) -> Any:
        """Return a batch of four rows."""
        if self.shape:
            return models.normal(4, *self.shape)
        is_chain = isinstance(model, keras.Sequential)
        inputs = model.inputs[0] if is_chain else model.input
        return keras.tree.map_structure(_batch, inputs)


def _batch(tensor):
    shape = (4, *(TOKENS if n is None else n for n in tensor.shape[1:]))
    if "position" in tensor.name:
        return np.broadcast_to(np.arange(shape[1]), shape)
    if "mask" in tensor.name or "segment" in tensor.name:
        return np.full(shape, "mask" in tensor.name, "int32")
    if "int" in tensor.dtype:
        return np.random.default_rng(0).integers(1, 20, shape)
    return models.normal(*shape)


def families():
    """Return all families, by name."""
    found = [*_own(), *_of_hub(), *map(_net, NETS)]
    return {family.name: family for family in found}


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
        "Conv1D, causal": lambda: _net_of(
            (12, 8), keras.layers.Conv1D(8, 3, padding="causal")
        ),
        "Conv3D": lambda: _net_of((4, 4, 4, 4), keras.layers.Conv3D(8, 2)),
        "Conv2DTranspose": lambda: _net_of(
            (4, 4, 8), keras.layers.Conv2DTranspose(8, 2)
        ),
        "DepthwiseConv2D": lambda: _net_of(
            (6, 6, 8), keras.layers.DepthwiseConv2D(2)
        ),
        "SeparableConv2D": lambda: _net_of(
            (6, 6, 8), keras.layers.SeparableConv2D(8, 2)
        ),
        "LSTM": lambda: _net_of((6, 8), keras.layers.LSTM(8)),
        "GRU, bidirectional": lambda: _net_of(
            (6, 8), keras.layers.Bidirectional(keras.layers.GRU(8))
        ),
        "TimeDistributed": lambda: _net_of(
            (6, 8), keras.layers.TimeDistributed(keras.layers.Dense(8))
        ),
        "GroupQueryAttention": _grouped_attention,
    }
    yield from (Family(name, "own", make) for name, make in makers.items())
    yield Family("a subclassed model", "own", _subclassed, (8,))


def _net_of(shape, layer):
    keras.utils.set_random_seed(0)
    head = keras.layers.Dense(4)
    return models.sequential(shape, layer, keras.layers.Flatten(), head)


def _grouped_attention():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 16))
    attention = keras.layers.GroupQueryAttention(8, 4, 2)
    return keras.Model(inputs, attention(inputs, inputs))


def _subclassed():
    keras.utils.set_random_seed(0)
    model = models.Subclassed()
    model(models.normal(1, 8))
    return model


def _of_hub():
    import keras_hub

    public = sorted(dir(keras_hub.models))
    tasks = [
        getattr(keras_hub.models, name)
        for name in public
        if name.endswith("CausalLM") and name != "CausalLM"
    ]
    taken = {task.backbone_cls for task in tasks}
    for task in tasks:
        yield Family(task.__name__, "language", lambda t=task: _task(t))
    for name in public:
        cls = getattr(keras_hub.models, name)
        is_backbone = name.endswith("Backbone") and name != "Backbone"
        if is_backbone and cls not in taken:
            yield Family(name, "encoder", lambda c=cls: _backbone(c))


def _backbone(cls):
    arguments = inspect.signature(cls.__init__).parameters
    own = {key: SIZES[key] for key in arguments if key in SIZES}
    keras.utils.set_random_seed(0)
    return cls(**own, **OWN_SIZES.get(cls.__name__, {}))


def _task(cls):
    return cls(backbone=_backbone(cls.backbone_cls), preprocessor=None)


def _net(name):
    def make():
        keras.utils.set_random_seed(0)
        net = getattr(keras.applications, name)
        return net(weights=None, input_shape=(96, 96, 3))

    return Family(name, "net", make)
