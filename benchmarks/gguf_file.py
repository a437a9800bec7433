"""KerasHub's Llama models as GGUF files, for llama.cpp and OpenVINO.

The other way round than `examples.data.smollm2`, which reads such files.
"""

import numpy as np

from examples.data import smollm2

QUANTIZATIONS = ("F32", "BF16", "Q8_0", "Q4_1", "Q4_0")


def write_gguf(path, backbone, quantization="F32", tokenizer_of=None):
    """Write a Llama backbone as a GGUF file.

    Matrices are rounded as `quantization` says, by the package `gguf`; with
    Q4 the embeddings, which are the head as well, become Q8_0, as they do
    by llama.cpp's own program where their rows are not of a length that Q6_K
    takes. Vectors stay float32.

    Args:
        path: Of the file to write.
        backbone: A `keras_hub.models.LlamaBackbone` with tied embeddings.
        quantization: String, one of `QUANTIZATIONS`.
        tokenizer_of: Path of a GGUF file whose tokenizer is copied; by
            default that of SmolLM2.

    Raises:
        ValueError: If the embeddings are not tied.
    """
    import gguf

    if not backbone.token_embedding.tie_weights:
        raise ValueError(
            "Expected a backbone with tied embeddings. Received: "
            f"{backbone.name!r} with a head of its own"
        )
    writer = gguf.GGUFWriter(path, "llama")
    types = gguf.LlamaFileType
    prefix = "ALL" if quantization == "F32" else "MOSTLY"
    writer.add_file_type(types[f"{prefix}_{quantization}"])
    _add_config(writer, backbone)
    _copy_tokenizer(writer, tokenizer_of or smollm2.find_gguf())
    kinds = gguf.GGMLQuantizationType
    for name, variable in gguf_names(backbone).items():
        value = gguf_value(name, variable)
        kind = kinds[quantization]
        if value.ndim == 1:
            kind = kinds.F32
        elif name == "token_embd.weight" and kind.name.startswith("Q4"):
            kind = kinds.Q8_0
        data = gguf.quants.quantize(value, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_names(backbone):
    """Return {name of a GGUF tensor: variable} of a tied Llama backbone."""
    variables = {variable.path: variable for variable in backbone.weights}
    names = ["token_embd.weight", "output_norm.weight"]
    names += [
        f"blk.{block}.{tensor}.weight"
        for block in range(backbone.num_layers)
        for tensor in smollm2.BLOCK_TENSORS
    ]
    return {name: variables[smollm2.variable_path(name)] for name in names}


def gguf_value(name, variable):
    """Return the float32 array that GGUF keeps of a variable."""
    from keras import ops

    value = ops.convert_to_numpy(ops.cast(variable.value, "float32"))
    if value.ndim == 1 or name == "token_embd.weight":
        return value
    inputs = 2 if name.endswith("attn_output.weight") else 1
    heads = value.shape[1]
    value = value.reshape(np.prod(value.shape[:inputs]), -1).T
    if name.endswith(("attn_q.weight", "attn_k.weight")):
        value = permute(value, heads)
    return np.ascontiguousarray(value)


def permute(value, heads):
    """Interleave the two halves of each head, as llama.cpp rotates pairs."""
    rows, columns = value.shape
    value = value.reshape(heads, 2, rows // heads // 2, columns)
    return value.swapaxes(1, 2).reshape(rows, columns)


def _add_config(writer, backbone):
    config = backbone.get_config()
    head_size = config["hidden_dim"] // config["num_query_heads"]
    writer.add_vocab_size(config["vocabulary_size"])
    writer.add_context_length(8192)
    writer.add_block_count(config["num_layers"])
    writer.add_embedding_length(config["hidden_dim"])
    writer.add_feed_forward_length(config["intermediate_dim"])
    writer.add_head_count(config["num_query_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(float(config["rope_max_wavelength"]))
    writer.add_layer_norm_rms_eps(config["layer_norm_epsilon"])


def _copy_tokenizer(writer, path):
    import gguf

    for name, field in gguf.GGUFReader(path).fields.items():
        if name.startswith("tokenizer."):
            kind, *element = field.types
            writer.add_key_value(
                name,
                field.contents(),
                kind,
                sub_type=element[0] if element else None,
            )
