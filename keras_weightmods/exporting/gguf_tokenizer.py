"""The tokenizers of GGUF files as KerasHub's."""

import importlib
import warnings
from typing import Any

from keras_weightmods.core import keras_compat

# Kinds of tokens in GGUF, which are those of SentencePiece.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
# KerasHub's byte pairs -> the tokens that end a text there, and others that it
# needs.
_BYTE_PAIRS = {
    "Llama3": (
        ("<|end_of_text|>", "<|eot_id|>"),
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    ),
    "Qwen": (("<|endoftext|>",), ()),
    "Qwen3": (("<|im_end|>",), ("<|endoftext|>",)),
    "SmolLM3": (
        ("<|end_of_text|>", "<|im_end|>"),
        ("<|begin_of_text|>", "<think>", "</think>"),
    ),
}
# How text is split before the merges, by `tokenizer.ggml.pre`: a regex, whether
# digits are apart first, and whether a part that is a token is not merged.
_GPT2 = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
    r"|\s+(?!\S)|\s+"
)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "gpt-2": (_GPT2, False, False),
    "smollm": (_GPT2, True, False),
    "qwen2": (_LLAMA3.replace("{1,3}", ""), False, False),
    "llama-bpe": (_LLAMA3, False, True),
    "smaug-bpe": (_LLAMA3, False, False),
    "dbrx": (_LLAMA3, False, False),
}


def make_preprocessor(fields: dict[str, Any], family: str) -> Any:
    """Return KerasHub's preprocessor with the tokenizer of a file.

    Args:
        fields: Dict of the fields of the file.
        family: String, how the names of KerasHub's classes begin.

    Returns:
        A `keras_hub.models.CausalLMPreprocessor`; None where the file has no
        tokenizer, or none of KerasHub's classes can be it, with a warning.
    """
    from keras_hub import models

    kind = fields.get("tokenizer.ggml.model", "none")
    if kind == "none":
        return None
    try:
        make = {"gpt2": _byte_pairs, "llama": _sentence_piece}.get(kind)
        if make is None:
            raise ValueError(f"it is of the kind {kind!r}")
        tokens = fields["tokenizer.ggml.tokens"]
        for name in ("scores", "token_type"):
            count = len(fields.get(f"tokenizer.ggml.{name}", tokens))
            if count != len(tokens):
                raise ValueError(f"{count} {name} for {len(tokens)} tokens")
        kinds = fields.get("tokenizer.ggml.token_type", [1] * len(tokens))
        tokenizer = make(fields, tokens, kinds, family)
        start, end = tokenizer.start_token_id, tokenizer.end_token_id
        starts = fields.get("tokenizer.ggml.add_bos_token", start is not None)
        own = fields.get("tokenizer.ggml.bos_token_id", start)
        if starts and (own is None or own != start):
            token = "a token" if own is None else repr(tokens[own])
            raise ValueError(f"it begins texts by {token}")
    # What KerasHub says of tokens that a class needs, and SentencePiece.
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error)
        if isinstance(error, KeyError):
            reason = f"it lacks {error}"
        elif isinstance(error, IndexError):
            reason = "the id of a special token is too large"
        warnings.warn(
            f"KerasHub has no tokenizer like that of the file: {reason}. "
            "`model.preprocessor` is None: the model takes token ids.",
            # The line that calls `load_gguf`.
            stacklevel=3,
        )
        return None
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    own = fields.get("tokenizer.ggml.eos_token_id", end)
    if own != end:
        # `generate` stops here too.
        tokenizer.end_token2_id = own
    cls = getattr(models, f"{family}CausalLMPreprocessor")
    return cls(tokenizer, add_start_token=bool(starts))


def _byte_pairs(fields: Any, tokens: Any, kinds: Any, family: str) -> Any:
    from keras_hub import tokenizers

    place = fields.get("tokenizer.ggml.eos_token_id")
    end = tokens[place] if place is not None else None
    vocabulary = {token: index for index, token in enumerate(tokens)}
    for name in sorted(_BYTE_PAIRS, key=family.__ne__):
        ends, others = _BYTE_PAIRS[name]
        if end in ends and vocabulary.keys() >= {*ends, *others}:
            break
    else:
        raise ValueError(f"it ends texts by {end!r}")
    special = [
        token
        for token, kind in zip(tokens, kinds)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer = getattr(tokenizers, f"{name}Tokenizer")(
        vocabulary=vocabulary,
        merges=fields["tokenizer.ggml.merges"],
        unsplittable_tokens=special,
    )
    kind = fields.get("tokenizer.ggml.pre")
    if kind not in _SPLITS:
        warnings.warn(
            f"The tokenizer of the file splits text as {kind!r}. It is split "
            "as by Llama 3: where words end at other places, token ids differ.",
            # The line that calls `load_gguf`.
            stacklevel=4,
        )
    split = _SPLITS.get(kind, _SPLITS["smaug-bpe"])
    keras_compat.split_text(tokenizer, *split)
    return tokenizer


def _sentence_piece(fields: Any, tokens: Any, kinds: Any, family: str) -> Any:
    from keras_hub import tokenizers

    pieces = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    proto = pieces.ModelProto()
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    unknown = fields.get("tokenizer.ggml.unknown_token_id", 0)
    scores = fields["tokenizer.ggml.scores"]
    for index, (token, score, kind) in enumerate(zip(tokens, scores, kinds)):
        if index == unknown:
            kind = _UNKNOWN
        # What controls is not found in text.
        elif kind == _CONTROL:
            kind = _USER_DEFINED
        # A file has spaces in what is found in text, a proto none.
        token = token.replace(" ", "▁")
        proto.pieces.add(piece=token, score=score, type=kind)
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = True
    trainer.unk_piece, trainer.unk_id = tokens[unknown], unknown
    for ours, theirs in ("bos", "bos"), ("eos", "eos"), ("pad", "padding"):
        place = fields.get(f"tokenizer.ggml.{theirs}_token_id", -1)
        setattr(trainer, f"{ours}_id", place)
        if place >= 0:
            setattr(trainer, f"{ours}_piece", tokens[place])
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = fields.get(
        "tokenizer.ggml.add_space_prefix", True
    )
    normalizer.remove_extra_whitespaces = False
    options = {"has_vision_tokens": False} if family == "Gemma3" else {}
    return getattr(tokenizers, f"{family}Tokenizer")(
        proto=proto.SerializeToString(), **options
    )
