"""What GGUF and KerasHub call the parts of the models that both know.

One table for both directions: `export` writes files by it, and `load_gguf`
reads them.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from keras_weightmods.core.reparameterization import reparameterizations

# Argument of a backbone -> the key of GGUF behind "<architecture>.", its type,
# and what a file without it means; None where each file has it.
_SIZES: dict[str, tuple[str, type, Any]] = {
    "num_layers": ("block_count", int, None),
    "hidden_dim": ("embedding_length", int, None),
    "intermediate_dim": ("feed_forward_length", int, None),
    "num_query_heads": ("attention.head_count", int, None),
    "num_key_value_heads": ("attention.head_count_kv", int, None),
    "layer_norm_epsilon": ("attention.layer_norm_rms_epsilon", float, None),
}
_ROPE = {"rope_max_wavelength": ("rope.freq_base", float, 10000.0)}
# Linear scaling of positions, under the name that a backbone has for it.
SCALING_FACTOR = "rope.scaling.factor"
_SCALING = (SCALING_FACTOR, float, 1.0)
_HEAD = {"head_dim": ("attention.key_length", int, None)}
# GGUF tensor -> path of the KerasHub variable, in the model and in a block. A
# tensor with several paths holds the rows of these variables in this order.
_TENSORS: dict[str, Any] = {
    "token_embd.weight": "token_embedding/embeddings",
    "output.weight": "token_embedding/reverse_embeddings",
    "output_norm.weight": "sequence_output_layernorm/scale",
}
_BLOCK: dict[str, Any] = {
    "attn_norm.weight": "self_attention_layernorm/scale",
    "attn_q.weight": "self_attention/query/kernel",
    "attn_k.weight": "self_attention/key/kernel",
    "attn_v.weight": "self_attention/value/kernel",
    "attn_output.weight": "self_attention/attention_output/kernel",
    "ffn_norm.weight": "feedforward_layernorm/scale",
    "ffn_gate.weight": "feedforward_gate_dense/kernel",
    "ffn_up.weight": "feedforward_intermediate_dense/kernel",
    "ffn_down.weight": "feedforward_output_dense/kernel",
}
_BIASES = {
    "attn_q.bias": "self_attention/query/bias",
    "attn_k.bias": "self_attention/key/bias",
    "attn_v.bias": "self_attention/value/bias",
}
_GEMMA3_BLOCK: dict[str, Any] = {
    "attn_norm.weight": "pre_attention_norm/scale",
    "attn_q.weight": "attention/query/kernel",
    "attn_q_norm.weight": "attention/query_norm/scale",
    "attn_k.weight": "attention/key/kernel",
    "attn_k_norm.weight": "attention/key_norm/scale",
    "attn_v.weight": "attention/value/kernel",
    "attn_output.weight": "attention/attention_output/kernel",
    "post_attention_norm.weight": "post_attention_norm/scale",
    "ffn_norm.weight": "pre_ffw_norm/scale",
    "ffn_gate.weight": "ffw_gating/kernel",
    "ffn_up.weight": "ffw_gating_2/kernel",
    "ffn_down.weight": "ffw_linear/kernel",
    "post_ffw_norm.weight": "post_ffw_norm/scale",
}
_SMOLLM3_BLOCK: dict[str, Any] = {
    "attn_norm.weight": "input_layernorm/scale",
    "attn_q.weight": "self_attn/q_proj/kernel",
    "attn_k.weight": "self_attn/k_proj/kernel",
    "attn_v.weight": "self_attn/v_proj/kernel",
    "attn_output.weight": "o_proj/kernel",
    "ffn_norm.weight": "post_attention_layernorm/scale",
    "ffn_gate.weight": "mlp/gate_proj/kernel",
    "ffn_up.weight": "mlp/up_proj/kernel",
    "ffn_down.weight": "mlp/down_proj/kernel",
}
_PHI3_BLOCK: dict[str, Any] = {
    "attn_norm.weight": "pre_attention_layernorm/scale",
    "attn_qkv.weight": (
        *("attention/query/kernel", "attention/key/kernel"),
        "attention/value/kernel",
    ),
    "attn_output.weight": "attention/attention_output/kernel",
    "ffn_norm.weight": "post_attention_layernorm/scale",
    "ffn_up.weight": (
        "feedforward_gate_dense/kernel",
        "feedforward_intermediate_dense/kernel",
    ),
    "ffn_down.weight": "feedforward_output_dense/kernel",
}
# Phi 3's factors of frequencies, for long texts and for others.
LONG_FACTORS = {
    f"rope_factors_{kind}.weight": f"rope_scaling_{kind}_factor"
    for kind in ("long", "short")
}
ATTENTION_FACTOR = "rope.scaling.attn_factor"


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture of GGUF, and the models of KerasHub that have it.

    Attributes:
        names: Tuple of strings, how the classes of KerasHub begin: for byte
            pairs, and for SentencePiece.
        fields: Dict from arguments of the backbone to keys of the file.
        tensors: Dict from the tensors of the file to paths of variables.
        block: The same of a block, whose name is `block_name`.
        fixed: Dict of the arguments that each model in a file has. A function
            gives the value for a number of blocks.
        constants: Dict from keys to the values that each file has.
        unused: Dict of arguments that the backbone asks for needlessly, as
            `fixed`.
        computed: Tuple of strings, the ends of paths of variables that no file
            has: the backbone computes them.
        rotates_pairs: Bool, whether llama.cpp rotates neighbors, where KerasHub
            rotates the halves of a head.
        norm_offset: Float, what the file adds to the scales of norms.
        heads_first: Bool, whether kernels have the axis of heads first.
        is_untied: Bool, whether the head always has a table of its own.
    """

    names: tuple[str, ...]
    fields: dict[str, tuple[str, type, Any]]
    tensors: dict[str, Any]
    block: dict[str, Any]
    fixed: dict[str, Any]
    block_name: str = "transformer_layer"
    constants: dict[str, float] = dataclasses.field(default_factory=dict)
    unused: dict[str, Any] = dataclasses.field(default_factory=dict)
    computed: tuple[str, ...] = ()
    rotates_pairs: bool = False
    norm_offset: float = 0.0
    heads_first: bool = False
    is_untied: bool = False

    def head_size(self, backbone: Any) -> int:
        """Return the size of a head of a backbone."""
        keys = {key: name for name, (key, _, _) in self.fields.items()}
        heads = getattr(backbone, keys["attention.head_count"])
        size = getattr(backbone, "head_dim", None)
        return int(size or backbone.hidden_dim // heads)

    def tensor_names(self, blocks: int, is_tied: bool) -> list[str]:
        """Return the names of the tensors of a file."""
        names = [n for n in self.tensors if n != "output.weight" or not is_tied]
        return names + [
            f"blk.{i}.{n}" for i in range(blocks) for n in self.block
        ]

    def variable_paths(self, name: str) -> list[str]:
        """Return the paths of the KerasHub variables of a GGUF tensor."""
        if name in self.tensors:
            return [self.tensors[name]]
        _, index, tensor = name.split(".", 2)
        paths = self.block[tensor]
        paths = [paths] if isinstance(paths, str) else paths
        return [f"{self.block_name}_{index}/{path}" for path in paths]

    def file_shape(self, name: str, shape: Any) -> tuple[int, ...]:
        """Return the shape of a tensor, from that of its variable."""
        if name.endswith(".bias"):
            return (math.prod(shape),)
        if len(shape) == 1 or name == "token_embd.weight":
            return tuple(shape)
        if self._has_heads_first(name, shape):
            shape = shape[1], shape[0], shape[2]
        inputs = _inputs(name)
        return math.prod(shape[inputs:]), math.prod(shape[:inputs])

    def to_file(self, name: str, value: Any, head_size: int) -> Any:
        """Return the array of a tensor, from that of its variable."""
        if name == "token_embd.weight":
            return value
        if name.endswith(".bias"):
            return value.reshape(-1)
        if value.ndim == 1:
            return value + np.float32(self.norm_offset)
        if self._has_heads_first(name, value.shape):
            value = value.swapaxes(0, 1)
        inputs = _inputs(name)
        value = value.reshape(math.prod(value.shape[:inputs]), -1).T
        if self._is_permuted(name):
            value = permute(value, len(value) // head_size)
        return np.ascontiguousarray(value)

    def from_file(
        self, name: str, value: Any, shape: Any, head_size: int
    ) -> Any:
        """Return the array of a variable of `shape`, from that of a tensor."""
        if name == "token_embd.weight" or name.endswith(".bias"):
            return value.reshape(shape)
        if value.ndim == 1:
            return value - np.float32(self.norm_offset)
        if self._is_permuted(name):
            value = permute(value, len(value) // head_size, back=True)
        if not self._has_heads_first(name, shape):
            return np.ascontiguousarray(value.T).reshape(shape)
        value = value.T.reshape(shape[1], shape[0], shape[2])
        return np.ascontiguousarray(value.swapaxes(0, 1))

    def _is_permuted(self, name: str) -> bool:
        ends = "attn_q.weight", "attn_k.weight"
        return self.rotates_pairs and name.endswith(ends)

    def _has_heads_first(self, name: str, shape: Any) -> bool:
        return self.heads_first and len(shape) == 3 and _inputs(name) == 1


def _inputs(name: str) -> int:
    """Return how many axes of a kernel are inputs."""
    return 2 if name.endswith("attn_output.weight") else 1


def permute(value: Any, heads: int, back: bool = False) -> Any:
    """Interleave the two halves of each head, as llama.cpp rotates pairs."""
    rows, columns = value.shape
    half = rows // heads // 2
    value = value.reshape(heads, *((half, 2) if back else (2, half)), columns)
    return value.swapaxes(1, 2).reshape(rows, columns)


def of_blocks(arguments: dict[str, Any], blocks: int) -> dict[str, Any]:
    """Return `fixed` or `unused` of a family for a number of blocks."""
    return {
        name: value(blocks) if callable(value) else value
        for name, value in arguments.items()
    }


def weights_of(backbone: Any) -> dict[str, Any]:
    """Return {path: weight} of a backbone.

    A weight is a variable, or the `Reparameterization` of one that is packed.
    A path begins with the layer of the backbone: in KerasHub's SmolLM3 each
    block has a variable `o_proj/kernel`.
    """
    weights = {}
    for layer in backbone.layers:
        found = {variable.path: variable for variable in layer.weights}
        found |= {x.target.path: x for x in reparameterizations(layer)}
        for path, weight in found.items():
            path = path.removeprefix(f"{layer.name}/")
            weights[f"{layer.name}/{path}"] = weight
    return weights


# By the architecture that the file names.
FAMILIES = {
    "llama": Family(
        ("Llama3", "Llama"),
        {**_SIZES, **_ROPE},
        _TENSORS,
        _BLOCK,
        # KerasHub 0.32 keeps another factor, and computes without it.
        {"rope_position_scaling_factor": 1.0},
        rotates_pairs=True,
    ),
    "qwen2": Family(
        ("Qwen",),
        {**_SIZES, **_ROPE, "rope_scaling_factor": _SCALING},
        _TENSORS,
        {**_BLOCK, **_BIASES},
        {"use_sliding_window_attention": False},
    ),
    "qwen3": Family(
        ("Qwen3",),
        {**_SIZES, **_ROPE, **_HEAD, "rope_scaling_factor": _SCALING},
        _TENSORS,
        {
            **_BLOCK,
            "attn_q_norm.weight": "self_attention/query_dense_layernorm/scale",
            "attn_k_norm.weight": "self_attention/key_dense_layernorm/scale",
        },
        {},
        # KerasHub's default is longer than texts, and not always used.
        unused={"sliding_window_size": None},
    ),
    "gemma3": Family(
        ("Gemma3",),
        {
            **_SIZES,
            **_HEAD,
            "sliding_window_size": ("attention.sliding_window", int, None),
            "global_rope_scaling_factor": _SCALING,
        },
        {
            "token_embd.weight": "token_embedding/embeddings",
            "output_norm.weight": "final_normalization/scale",
        },
        _GEMMA3_BLOCK,
        {
            # Not in the model of 27 billion weights, as in llama.cpp.
            "query_head_dim_normalize": lambda blocks: blocks != 62,
            "use_query_key_norm": True,
            "use_post_ffw_norm": True,
            "use_post_attention_norm": True,
            "attention_logit_soft_cap": None,
            "final_logit_soft_cap": None,
            "use_sliding_window_attention": True,
            "local_rope_scaling_factor": 1.0,
            "vision_encoder": None,
            "use_bidirectional_attention": False,
        },
        block_name="decoder_block",
        # KerasHub has no others.
        constants={"rope.freq_base": 1e6, "rope.freq_base_swa": 1e4},
        unused={"image_size": None},
        norm_offset=1.0,
        heads_first=True,
    ),
    "smollm3": Family(
        ("SmolLM3",),
        {
            **{k: v for k, v in _SIZES.items() if k != "num_query_heads"},
            "num_attention_heads": _SIZES["num_query_heads"],
            "rope_theta": _ROPE["rope_max_wavelength"],
            "max_position_embeddings": ("context_length", int, None),
        },
        {k: v for k, v in _TENSORS.items() if k != "output.weight"},
        _SMOLLM3_BLOCK,
        {
            "attention_bias": False,
            "mlp_bias": False,
            "partial_rotary_factor": 1.0,
            # Each fourth block knows no positions.
            "rope_layer_enabled_list": lambda blocks: [
                block % 4 != 3 for block in range(blocks)
            ],
        },
        unused={
            "attention_dropout": 0.0,
            "layer_types": lambda blocks: ["full_attention"] * blocks,
        },
        computed=("rotary_emb/inv_freq",),
        rotates_pairs=True,
    ),
    "phi3": Family(
        ("Phi3",),
        {
            **_SIZES,
            **_ROPE,
            "max_sequence_length": ("context_length", int, None),
            "pretraining_sequence_length": (
                *("rope.scaling.original_context_length", int),
                4096,
            ),
        },
        _TENSORS,
        _PHI3_BLOCK,
        {},
        is_untied=True,
    ),
}


def family_of(backbone: Any) -> tuple[str, Family] | None:
    """Return the architecture of a backbone, and its family; None for none."""
    from keras_hub import models

    for architecture, family in FAMILIES.items():
        for name in family.names:
            if isinstance(backbone, getattr(models, f"{name}Backbone")):
                return architecture, family
    return None
