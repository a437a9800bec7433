"""The arguments of KerasHub's constructors, for tiny models.

Models have two blocks of 32 units, for images of 32 pixels. A constructor gets
the `SIZES` that it takes by name. The entry of `OWN` for its class goes over
these. A `Part` there is a model or a layer, made anew for each model.
"""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Part:
    """A model or a layer of KerasHub; `own` goes over `SIZES` and `OWN`."""

    name: str
    own: dict[str, Any] = dataclasses.field(default_factory=dict)


IMAGE = (32, 32, 3)
TOKENS = 8
PROMPT = 12  # Tokens that are written, with those that they begin with.
# Arguments of the constructors, by name; others keep their defaults.
_SIZES = {
    96: "vocabulary_size vocab_size",
    2: "num_layers num_key_value_heads num_experts_per_token top_k",
    4: "num_heads num_query_heads num_attention_heads num_experts",
    8: "head_dim head_size patch_size",
    16: "image_size",
    32: "hidden_dim hidden_size embedding_dim projection_dim "
    "max_sequence_length max_position_embeddings moe_intermediate_dim "
    "expert_intermediate_dim shared_expert_intermediate_dim "
    "shared_expert_intermediate_size",
    64: "intermediate_dim mlp_dim",
    False: "attention_bias mlp_bias",
    1e-5: "layer_norm_epsilon",
    1e4: "rope_theta",
    1.0: "partial_rotary_factor",
    None: "preprocessor",
    IMAGE: "image_shape",
}
SIZES = {
    "rope_layer_enabled_list": [True, True],
    "layer_types": ["full_attention"] * 2,
    "attention_dropout": 0.0,
    **{name: size for size, names in _SIZES.items() for name in names.split()},
}
# T5Gemma's, once for its encoder and once for its decoder.
SIDES = {
    f"{side}_{name}": SIZES[name]
    for side in ("encoder", "decoder")
    for name in (
        *("hidden_dim", "intermediate_dim", "num_layers", "head_dim"),
        *("num_attention_heads", "num_key_value_heads", "layer_types"),
    )
}
# A net from P2 to P5. The first stack has 64 filters in all of its sizes.
PYRAMID = {
    "stackwise_num_filters": [64, 16, 16, 16],
    "stackwise_num_blocks": [1] * 4,
    "stackwise_num_strides": [1, 2, 2, 2],
}
# HGNetV2's stages.
STAGES = [(16, 16, 32, 1, 2, 3), *[(32, 16, 32, 1, 2, 3)] * 2]
# Stable Diffusion takes what a block inside gives, too.
CLIP = {"intermediate_output_index": 0}


def _each(value, names, prefix=""):
    """Return {name: value} of several names in a string."""
    return {f"{prefix}{name}": value for name in names.split()}


# fmt: off
OWN: dict[str, dict[str, Any]] = {
    # Its first block takes what a convolution of `projection_filters` gives.
    "BASNetBackbone": {
        "image_encoder": Part("ResNetBackbone", {
            **PYRAMID, "input_conv_filters": [8],
            "stackwise_num_filters": [64, 8, 8, 8],
            "block_type": "basic_block_vd", "image_shape": (None, None, 3),
        }),
        "projection_filters": 8, "num_classes": 4,
    },
    "BLIP2Backbone": {
        "vision_encoder": Part("BLIP2VisionEncoder"),
        "qformer": Part("BLIP2QFormer"),
        "language_model": Part("BLIP2CustomOPT"),
    },
    "BLIP2CustomOPT": {
        "num_query_tokens": 4, "dropout": 0.0, "qformer_hidden_dim": 32,
    },
    "BLIP2QFormer": {
        "num_query_tokens": 4, "vision_dim": 32, "cross_attention_frequency": 2,
        "dropout": 0.0,
    },
    "BLIP2VisionEncoder": {
        **_each(True, "patch_bias class_token mha_bias mlp_bias", "use_"),
        "dropout_rate": 0.0, "initializer_range": 0.02,
    },
    "CLIPBackbone": {
        "vision_encoder": Part("CLIPVisionEncoder"),
        "text_encoder": Part("CLIPTextEncoder"),
    },
    "CSPNetBackbone": {
        "stem_filters": 16, "stem_kernel_size": 3, "stem_strides": 1,
        "stackwise_depth": [1, 1], "stackwise_strides": [1, 2],
        "stackwise_num_filters": [16, 32], "block_ratio": [0.5],
        "block_type": "dark_block", "stage_type": "cs3",
    },
    "DFineBackbone": {
        "backbone": Part("HGNetV2Backbone", {
            "depths": [1] * 3, "hidden_sizes": [32] * 3,
            "stackwise_stage_filters": STAGES,
            "apply_downsample": [False, True, True],
            "use_lightweight_conv_block": [False, True, True],
            "out_features": ["stage2", "stage3"],
        }),
        "out_features": ["stage2", "stage3"],
        **_each([32, 32], "encoder_in_channels decoder_in_channels"),
        **_each(64, "encoder_ffn_dim decoder_ffn_dim"),
        **_each(2, "num_decoder_layers num_feature_levels num_lqe_layers"),
        **_each(8, "num_queries num_labels"), **_each(0, "num_denoising seed"),
        "encoder_hidden_dim": 32, "num_encoder_layers": 1,
        "encode_proj_layers": [1], "hidden_expansion": 0.5,
        "depth_multiplier": 0.34, "decoder_attention_heads": 4,
        "decoder_n_points": [2, 2], "feat_strides": [8, 16],
        "anchor_image_size": IMAGE[:2], "learn_initial_query": False,
        "lqe_hidden_dim": 16, "eval_idx": -1,
    },
    "DeepLabV3Backbone": {
        "image_encoder": Part("ResNetBackbone", PYRAMID),
        "low_level_feature_key": "P2", "spatial_pyramid_pooling_key": "P4",
        "upsampling_size": 4, "dilation_rates": [2, 4],
        "projection_filters": 16,
    },
    "DenseNetBackbone": {"stackwise_num_repeats": [1, 1], "growth_rate": 16},
    "DepthAnythingBackbone": {
        "image_encoder": Part("DINOV2Backbone"), "reassemble_factors": [2, 1],
        "neck_hidden_dims": [16, 32], "fusion_hidden_dim": 16,
        "head_hidden_dim": 8, "head_in_index": -1,
        "feature_keys": ["stage1", "stage2"],
    },
    "EdRecBackbone": {"num_layers_enc": 2, "num_layers_dec": 2},
    "EfficientNetBackbone": {
        "stackwise_kernel_sizes": [3, 3, 3], "stackwise_num_repeats": [1, 1, 1],
        "stackwise_input_filters": [16, 16, 16],
        "stackwise_output_filters": [16, 16, 32],
        "stackwise_expansion_ratios": [1, 4, 4],
        "stackwise_squeeze_and_excite_ratios": [0.25, 0.0, 0.25],
        "stackwise_strides": [1, 2, 2],
        "stackwise_block_types": ["v1", "fused", "unfused"],
        "width_coefficient": 1.0, "depth_coefficient": 1.0,
        "input_shape": IMAGE,
    },
    # The embeddings are projected where they are smaller than the blocks.
    "ElectraBackbone": {"embedding_dim": 16},
    "FluxBackbone": {
        "input_channels": 16, "mlp_ratio": 2.0, "depth": 2,
        "depth_single_blocks": 2, "axes_dim": [4, 2, 2], "theta": 10_000,
        "use_bias": True, "image_shape": (4, 16), "text_shape": (TOKENS, 32),
        "image_ids_shape": (4, 3), "text_ids_shape": (TOKENS, 3),
        "y_shape": (32,),
    },
    "Gemma3nBackbone": {
        "text_vocab_size": 96, "text_hidden_size": 32, "num_hidden_layers": 2,
        "pad_token_id": 0, "intermediate_size": [64, 64],
        "hidden_activation": "gelu_approximate", "sliding_window": 4,
        "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 4,
        "altup_num_inputs": 2, "laurel_rank": 2,
    },
    "Gemma4AssistantCausalLM": {
        "backbone_hidden_size": 32, "num_centroids": 8,
        "centroid_intermediate_top_k": 2, "use_ordered_embeddings": True,
    },
    "HGNetV2Backbone": {
        "depths": [1, 1], "embedding_size": 16, "hidden_sizes": [32, 32],
        "stem_channels": [3, 16, 16], "hidden_act": "relu",
        "use_learnable_affine_block": True,
        "stackwise_stage_filters": STAGES[:2],
        "apply_downsample": [False, True],
        "use_lightweight_conv_block": [False, True],
    },
    "MetaCLIP2Backbone": {
        "vision_encoder": Part("MetaCLIP2VisionEncoder"),
        "text_encoder": Part("MetaCLIP2TextEncoder"),
    },
    "MiTBackbone": {
        "layerwise_depths": [1, 1], "layerwise_num_heads": [2, 4],
        "layerwise_sr_ratios": [2, 1], "max_drop_path_rate": 0.1,
        "layerwise_patch_sizes": [7, 3], "layerwise_strides": [4, 2],
        "hidden_dims": [16, 32],
    },
    "MobileNetBackbone": {
        "stackwise_expansion": [[32], [32]], "stackwise_num_blocks": [1, 1],
        "stackwise_num_filters": [[16], [32]],
        "stackwise_kernel_size": [[3], [5]],
        "stackwise_num_strides": [[2], [1]],
        "stackwise_se_ratio": [[None], [0.25]],
        "stackwise_activation": [["relu"], ["hard_swish"]],
        "stackwise_padding": [[1], [2]], "output_num_filters": 32,
        "depthwise_filters": 16, "depthwise_stride": 1,
        "depthwise_residual": False, "last_layer_filter": 32,
        "squeeze_and_excite": 0.5,
    },
    "MobileNetV5Backbone": {
        "stackwise_block_types": [["er"], ["uir", "mqa"]],
        "stackwise_num_blocks": [1, 2],
        "stackwise_num_filters": [[16], [32, 32]],
        "stackwise_strides": [[2], [2, 1]],
        "stackwise_act_layers": [["gelu"], ["gelu", "gelu"]],
        "stackwise_exp_ratios": [[2.0], [2.0, 1.0]],
        "stackwise_se_ratios": [[0.0], [0.0, 0.0]],
        "stackwise_dw_kernel_sizes": [[0], [3, 0]],
        "stackwise_dw_start_kernel_sizes": [[0], [3, 0]],
        "stackwise_dw_end_kernel_sizes": [[0], [0, 0]],
        "stackwise_exp_kernel_sizes": [[3], [0, 0]],
        "stackwise_pw_kernel_sizes": [[1], [0, 0]],
        "stackwise_num_heads": [[0], [0, 4]],
        **_each([[0], [0, 8]], "key_dims value_dims", "stackwise_"),
        "stackwise_kv_strides": [[0], [0, 1]],
        "stackwise_use_cpe": [[False], [False, False]], "num_features": 32,
        "msfa_output_resolution": 4,
    },
    "MoonshineBackbone": {
        "filter_dim": 32, **_each(2, "encoder_num_layers decoder_num_layers"),
        **_each(4, "encoder_num_heads decoder_num_heads"),
    },
    # The loss that it compiles by itself needs a tokenizer.
    "PARSeqCausalLM": {"compile": False},
    "PARSeqBackbone": {
        "image_encoder": Part("ViTBackbone", {"use_class_token": False}),
        "max_label_length": PROMPT, "decoder_hidden_dim": 32,
        "num_decoder_layers": 2, "num_decoder_heads": 4, "decoder_mlp_dim": 64,
    },
    "PaliGemmaBackbone": {
        f"vit_{name}": SIZES[name]
        for name in (
            "patch_size", "num_heads", "hidden_dim", "num_layers",
            "intermediate_dim",
        )
    },
    "RWKV7Backbone": _each(8, "gate_lora mv_lora aaa_lora decay_lora"),
    "ResNetBackbone": {
        "input_conv_filters": [16], "input_conv_kernel_sizes": [7],
        "stackwise_num_filters": [64, 16], "stackwise_num_blocks": [1, 1],
        "stackwise_num_strides": [1, 2], "block_type": "bottleneck_block",
    },
    "RetinaNetBackbone": {
        "image_encoder": Part("ResNetBackbone", PYRAMID), "min_level": 3,
        "max_level": 6, "use_p5": False,
    },
    "SAM3DetrDecoder": {"num_queries": 4},
    "SAM3GeometryEncoder": {"roi_size": 3},
    "SAM3MaskDecoder": {"num_upsampling_stages": 3},
    "SAM3PromptableConceptBackbone": {
        f"{name}_{side}".lower(): Part(f"SAM3{name.capitalize()}{side}")
        for side, names in (
            ("Encoder", ("vision", "text", "geometry", "detr")),
            ("Decoder", ("detr", "mask")),
        )
        for name in names
    },
    "SAM3VisionEncoder": {
        "fpn_hidden_dim": 32, "fpn_scale_factors": [4.0, 2.0, 1.0, 0.5],
        "pretrain_image_shape": (16, 16, 3), "window_size": 2,
        "global_attn_indexes": [1],
    },
    "SAMBackbone": {
        "image_encoder": Part("ViTDetBackbone"),
        "prompt_encoder": Part("SAMPromptEncoder"),
        "mask_decoder": Part("SAMMaskDecoder"),
    },
    "SAMMaskDecoder": {"iou_head_hidden_dim": 32},
    "SAMPromptEncoder": {
        "image_embedding_size": (4, 4), "input_image_size": IMAGE[:2],
    },
    "SegFormerBackbone": {
        "image_encoder": Part("MiTBackbone"), "projection_filters": 16,
    },
    "SigLIPBackbone": {
        "vision_encoder": Part("SigLIPVisionEncoder"),
        # It takes texts of this length alone.
        "text_encoder": Part(
            "SigLIPTextEncoder", {"max_sequence_length": TOKENS},
        ),
    },
    "StableDiffusion3Backbone": {
        **_each(2, "patch_size num_layers", "mmdit_"),
        **_each(4, "num_heads position_size", "mmdit_"), "mmdit_hidden_dim": 32,
        "mmdit_qk_norm": "rms_norm", "mmdit_dual_attention_indices": None,
        "vae": Part("VAEBackbone"),
        "clip_l": Part("CLIPTextEncoder", CLIP | {"name": "clip_l"}),
        "clip_g": Part("CLIPTextEncoder", CLIP | {"name": "clip_g"}),
    },
    "SwinTransformerBackbone": {
        "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4),
        "window_size": 4, "patch_size": 4,
    },
    "T5Gemma2Backbone": SIDES, "T5GemmaBackbone": SIDES,
    "VGGBackbone": {
        "stackwise_num_repeats": [1, 1], "stackwise_num_filters": [16, 32],
    },
    # Images are eight times as wide as what it makes of them. It gives its
    # mean, as a drawn one is another at each call.
    "VAEBackbone": {
        **_each([32] * 4, "encoder_num_filters decoder_num_filters"),
        **_each([1] * 4, "encoder_num_blocks decoder_num_blocks"),
        "sampler_method": "mode",
    },
    "ViTDetBackbone": {
        "global_attention_layer_indices": [1], "num_output_channels": 32,
        "window_size": 2,
    },
    "VideoPrismBackbone": {
        **_each(2, "frames spatial_layers temporal_layers text_layers", "num_"),
        "num_auxiliary_layers": 1,
    },
    "XceptionBackbone": {
        "stackwise_conv_filters": [[16, 16], [32, 32], [32, 32]],
        "stackwise_pooling": [False, True, False],
    },
}

# What models take of which their inputs do not tell the length or the range,
# for one row.
GIVEN: dict[str, dict[str, Any]] = {
    # Three convolutions with a stride of 384 together.
    "MoonshineBackbone": {
        "encoder_input_values": np.sin(np.arange(2048.0))[:, None],
        "encoder_padding_mask": np.ones(2048, bool),
    },
    # It is trained on labels of its own length alone.
    "PARSeqCausalLM": {
        "token_ids": np.arange(1, PROMPT + 1),
        "padding_mask": np.ones(PROMPT, "int32"),
    },
    # A point that is meant, a corner of a box, and the mask of an image.
    "SAMBackbone": {
        "points": np.array([[8.0, 8.0]], "float32"),
        "labels": np.ones(1, "float32"),
        "boxes": np.array([[[4.0, 4.0], [20.0, 20.0]]], "float32"),
        "masks": np.ones((1, 16, 16, 1), "float32"),
    },
    # No box: for these KerasHub needs torchvision on torch.
    "SAM3PromptableConceptBackbone": {
        "boxes": np.ones((0, 5), "float32"), "box_labels": np.ones(0, "int32"),
    },
}
# fmt: on
