"""What GGUF and KerasHub call the parts of the models that both know.

One table for both directions: `export` writes files by it, and `load_gguf`
reads them.
"""

import dataclasses
import math
from typing import Any

import numpy as np

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
# GGUF tensor -> path of the KerasHub variable, in the model and in a block.
_TENSORS = {
    "token_embd.weight": "token_embedding/embeddings",
    "output.weight": "token_embedding/reverse_embeddings",
    "output_norm.weight": "sequence_output_layernorm/scale",
}
_BLOCK = {
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
_GEMMA3_BLOCK = {
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


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture of GGUF, and the models of KerasHub that have it.

    Attributes:
        names: Tuple of strings, how the classes of KerasHub begin: for byte
            pairs, and for SentencePiece.
        fields: Dict from arguments of the backbone to keys of the file.
        tensors: Dict from the tensors of the file to paths of variables.
        block: The same of a block, whose name is `block_name`.
        fixed: Dict of the arguments that each model in a file has.
        by_blocks: Dict from numbers of blocks to others of these, by which
            llama.cpp knows a model.
        constants: Dict from keys to the values that each file has.
        unused: Dict of arguments that the backbone asks for needlessly.
        rotates_pairs: Bool, whether llama.cpp rotates neighbors, where KerasHub
            rotates the halves of a head.
        norm_offset: Float, what the file adds to the scales of norms.
        heads_first: Bool, whether kernels have the axis of heads first.
    """

    names: tuple[str, ...]
    fields: dict[str, tuple[str, type, Any]]
    tensors: dict[str, str]
    block: dict[str, str]
    fixed: dict[str, Any]
    by_blocks: dict[int, dict[str, Any]] = dataclasses.field(
        default_factory=dict
    )
    block_name: str = "transformer_layer"
    constants: dict[str, float] = dataclasses.field(default_factory=dict)
    unused: dict[str, Any] = dataclasses.field(default_factory=dict)
    rotates_pairs: bool = False
    norm_offset: float = 0.0
    heads_first: bool = False

    def fixed_of(self, blocks: int) -> dict[str, Any]:
        """Return the arguments that each model with so many blocks has."""
        return {**self.fixed, **self.by_blocks.get(blocks, {})}

    @staticmethod
    def head_size(backbone: Any) -> int:
        """Return the size of a head of a backbone."""
        size = getattr(backbone, "head_dim", None)
        return int(size or backbone.hidden_dim // backbone.num_query_heads)

    def tensor_names(self, blocks: int, is_tied: bool) -> list[str]:
        """Return the names of the tensors of a file."""
        names = [n for n in self.tensors if n != "output.weight" or not is_tied]
        return names + [
            f"blk.{i}.{n}" for i in range(blocks) for n in self.block
        ]

    def variable_path(self, name: str) -> str:
        """Return the path of the KerasHub variable of a GGUF tensor."""
        if name in self.tensors:
            return self.tensors[name]
        _, index, tensor = name.split(".", 2)
        return f"{self.block_name}_{index}/{self.block[tensor]}"

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

    def to_file(self, name: str, value: Any) -> Any:
        """Return the array of a tensor, from that of its variable."""
        if name == "token_embd.weight":
            return value
        if name.endswith(".bias"):
            return value.reshape(-1)
        if value.ndim == 1:
            return value + np.float32(self.norm_offset)
        if self._has_heads_first(name, value.shape):
            value = value.swapaxes(0, 1)
        heads = value.shape[1]
        inputs = _inputs(name)
        value = value.reshape(math.prod(value.shape[:inputs]), -1).T
        if self._is_permuted(name):
            value = permute(value, heads)
        return np.ascontiguousarray(value)

    def from_file(self, name: str, value: Any, shape: Any) -> Any:
        """Return the array of a variable of `shape`, from that of a tensor."""
        if name == "token_embd.weight" or name.endswith(".bias"):
            return value.reshape(shape)
        if value.ndim == 1:
            return value - np.float32(self.norm_offset)
        if self._is_permuted(name):
            value = permute(value, shape[1], back=True)
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
            "query_head_dim_normalize": True,
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
        # The model of 27 billion weights.
        {62: {"query_head_dim_normalize": False}},
        block_name="decoder_block",
        # KerasHub has no others.
        constants={"rope.freq_base": 1e6, "rope.freq_base_swa": 1e4},
        unused={"image_size": None},
        norm_offset=1.0,
        heads_first=True,
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
