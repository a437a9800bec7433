"""A model as a file for other runtimes."""

import dataclasses
import errno
import importlib.metadata
import importlib.util
import os
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import keras

from keras_weightmods.core import keras_compat
from keras_weightmods.core.head import input_of
from keras_weightmods.core.reparameterization import reparameterizations
from keras_weightmods.core.restored import RestoredOnError
from keras_weightmods.exporting import compressed_tensors, gguf_file, onnx_file
from keras_weightmods.exporting.dense_copy import dense_copy, packed_weights
from keras_weightmods.saving import model_card
from keras_weightmods.saving.atomic_file import replace_all, unfinished
from keras_weightmods.utils import checks
from keras_weightmods.utils.dtypes import bytes_of
from keras_weightmods.utils.progress import Progress

# What writes a file, once all is checked.
Write = Callable[[str, Progress], Any]


@dataclasses.dataclass(frozen=True)
class ExportFormat:
    """A format of `export`.

    Attributes:
        writer: Callable from a model, and the further arguments of `export`,
            to what writes the file or folder: a callable from its path and a
            `Progress`. The first checks all, the second raises no more errors
            of the user.
        ending: String, of the file; empty for a folder.
        needs: Dict from the backends that can write it, `""` for any, to the
            names of the modules that it imports there.
        keeps_packed: String, the backend on which its writer takes packed
            weights as they are with `keep_packed=True`, or `"any"`; empty for
            none.
        reads_packed: Bool, whether its writer takes a model with packed
            weights as it is; others take a copy with dense ones.
    """

    writer: Callable[..., Write]
    ending: str = ""
    needs: dict[str, tuple[str, ...]] = dataclasses.field(
        default_factory=lambda: {"": ()}
    )
    keeps_packed: str = ""
    reads_packed: bool = False


def register_export_format(
    name: str, writer: Callable[..., Any], **fields: Any
) -> None:
    """Add a format to `export` and to the command line.

    Args:
        name: String, the `format` of `export`.
        writer: Callable that takes a model with dense weights and the further
            arguments of `export`. It returns a callable that writes the file.
            That one takes its path and a progress bar, whose `add()` counts a
            step.
        **fields: `ending`, `needs`, `keeps_packed` and `reads_packed`, see
            `ExportFormat`.

    Raises:
        ValueError: If the format exists already, or `writer` is not callable.

    Example:

    ```python
    import os
    import tempfile
    import keras
    import numpy as np
    import keras_weightmods as kwm

    def writer(model):
        def write(path, progress):
            np.savez(path, *model.get_weights())

        return write

    kwm.register_export_format("arrays", writer, ending=".npz")
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.npz")
        kwm.export(model, path, "arrays")
        assert np.load(path)["arr_0"].shape == (8, 4)
    ```
    """
    checks.check_string("name", name)
    if name in FORMATS:
        expected = f"another name than {', '.join(map(repr, FORMATS))}"
        raise checks.error("name", expected, name)
    if not callable(writer):
        raise checks.error("writer", "a callable", writer)
    FORMATS[name] = ExportFormat(writer, **fields)


def export(
    model: keras.Model,
    filepath: Any,
    format: str | None = None,
    *,
    keep_packed: bool = False,
    overwrite: bool = True,
    verbose: int = 1,
    card: model_card.ModelCard | None = None,
    **kwargs: Any,
) -> None:
    """Write a model for another runtime, with packed kernels in dense form.

    Other runtimes do not read packed kernels. So this function builds a copy of
    the model from its config, with dense kernels, and writes the copy; a
    warning says so. Activations in int8 belong to the packed product. A model
    that was packed with them is exported with float ones.

    Some formats hold the integers of `quantize` and `pack` as they are: ONNX
    and transformers with `keep_packed=True`, and GGUF by its `dtype`.

    The files appear whole, when all is written, or not at all.

    | `format` | file | backends | needs |
    |---|---|---|---|
    | `"tf_saved_model"` | a folder | TensorFlow, JAX | tensorflow |
    | `"onnx"` | `.onnx` | all | tf2onnx, jax2onnx, or onnx and onnxscript |
    | `"openvino"` | `.xml`, `.bin` | TensorFlow, torch | openvino |
    | `"litert"` | `.tflite` | TensorFlow, torch | on torch litert-torch |
    | `"torch"` | `.pt2` | torch | |
    | `"transformers"` | a folder | all | a KerasHub model it can export |
    | `"gguf"` | `.gguf` | all | gguf, a KerasHub model it knows |

    `keras.Model.export` writes the first five. `"transformers"` is KerasHub's
    `export_to_transformers`: `config.json`, `model.safetensors` and the
    tokenizer. `"gguf"` is for llama.cpp, and knows Llama, Qwen, Gemma 3,
    SmolLM3 and Phi 3. `register_export_format` adds further formats.

    Args:
        model: A built `keras.Model`.
        filepath: String or path of the file or folder to write, with the
            ending above.
        format: String, one of the above. By default, `None`, the ending of
            `filepath` decides: the first format with that ending, or
            `"tf_saved_model"` where there is none.
        keep_packed: Bool, whether packed kernels stay packed in the file.
            Defaults to `False`. These formats take it:

            - `"tf_saved_model"` on TensorFlow, and `"torch"`. The process that
              runs the file must `import keras_weightmods.runtime` after the
              framework. This import does not load Keras.
            - `"onnx"` on torch: the file has the model's integers and scales,
              for the operators `MatMulNBits` and `GatherBlockQuantized` of ONNX
              Runtime. OpenVINO has them too.
            - `"transformers"`, in the format `pack-quantized` of
              compressed-tensors, which vLLM reads too. Integers of at most 4
              bits take 4, with a scale for 64 inputs (32 where 64 do not divide
              them); others take 8. Tables, heads and what does not fit become
              floats; a warning counts them.
        overwrite: Bool, whether to replace what is there. Defaults to `True`.
        verbose: 0 or 1. 0 shows no progress bar; 1 shows one after two seconds:
            for packed weights that are made dense, for the tensors of a GGUF
            file, and for the file. Defaults to `1`.
        card: `kwm.ModelCard`, what to say of the model in Markdown:
            `model.onnx.md` beside `model.onnx`, and `README.md` in a folder. A
            GGUF file also has the license, the base model and the steps in its
            header. Defaults to `None`, for no card; a warning says if that of
            an earlier model is beside the file.
        **kwargs: What the format takes. For `"gguf"` these are

            - `dtype`: `"f32"`, `"f16"`, `"bf16"`, `"q8_0"`, `"q4_1"` or
              `"q4_0"`, the type of matrices. Matrices that `kwm.quantize` or
              `kwm.pack` has rounded keep their integers: int4 in q4_0, int4 and
              int8 in q8_0. Others are rounded to nearest; a warning counts
              those that get 4 bits. The embeddings of a 4-bit file are in q8_0
              if they are not in int4. Defaults to `"f16"`.
            - `tokenizer_from`: path of a GGUF file whose tokenizer is copied.
              By default the file gets the tokenizer of the model's
              preprocessor, which must be a `Llama3Tokenizer`. A model without a
              preprocessor gets none, for prompts of token ids.
            - `context_length`: int, the context length that the file states.
              Defaults to that of the backbone, or `8192` if it has none.

            For `"onnx"` with `keep_packed` they are

            - `activations`: `"float32"`, or `"int8"` to let ONNX Runtime round
              the inputs of integers in blocks of 64, which is faster. Defaults
              to what the model was packed with.
            - `input_signature`: list of a structure of `keras.InputSpec` for
              each argument of the model. Sizes that are `None` are free. By
              default they are those of the model's inputs, also for a language
              model in floats on torch.

            and those of `torch.onnx.export`. `"transformers"` takes none, and
            the others what `keras.Model.export` does, as `input_signature`.

    Raises:
        ValueError: If this model or backend cannot write the format, or no file
            can be written at `filepath`. Nothing is written then.
        ImportError: If a package is missing. The message names it.
        FileExistsError: If there is a file and `overwrite` is `False`, or a
            `README.md` or a file in the card's place that is no card.

    Example:

    ```python
    import os
    import tempfile
    import keras
    import keras_weightmods as kwm
    from keras_hub import models

    model = models.Llama3CausalLM(
        models.Llama3Backbone(96, 1, 4, 32, 64, 2), preprocessor=None
    )
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model")
        kwm.export(model, path, format="transformers")
        assert sorted(os.listdir(path)) == ["config.json", "model.safetensors"]
    ```
    """
    format = format_of(filepath, format)
    checks.check_bool("keep_packed", keep_packed)
    checks.check_bool("overwrite", overwrite)
    checks.check_verbose(verbose)
    chosen = FORMATS[format]
    path = _check_path(filepath, chosen.ending, overwrite)
    model_card.check_card(card)
    card_path = model_card.path_of(os.fspath(path), not chosen.ending)
    # A folder is replaced with the card in it.
    if card is None and chosen.ending:
        model_card.warn_of_old(card_path)
    else:
        model_card.check_path(card_path, overwrite)
    if not isinstance(model, keras.Model) or not model.built:
        expected = "a built `keras.Model`. Call it on data once"
        raise checks.error("model", expected, model)
    _check_needs(format, keep_packed)
    if keep_packed and not packed_weights(model):
        expected = "a model with packed weights. Call `kwm.pack(model)` first"
        raise checks.error("model", expected, model)
    is_left = keep_packed or chosen.reads_packed
    packed = [] if is_left else packed_weights(model)
    options = kwargs | ({"card": card} if format == "gguf" else {})
    with RestoredOnError(), Progress(1, "step", verbose) as progress:
        written = dense_copy(model, progress)[0] if packed else model
        write = chosen.writer(written, **options)
        if packed:
            warnings.warn(
                f"{len(packed)} packed weights are exported in dense form. "
                "`kwm.save_model` keeps them packed.",
                stacklevel=2,
            )
        with unfinished(path.parent) as folder:
            made_path = os.path.join(folder, path.name)
            write(made_path, progress)
            if card is not None:
                given = [f"{k}={checks.shown(v)}" for k, v in kwargs.items()]
                given += ["keep_packed=True"] * keep_packed
                step = ", ".join([f"Export: {format}", *given])
                card = dataclasses.replace(card, steps=[*card.steps, step])
                files = pathlib.Path(folder).rglob("*")
                size = sum(p.stat().st_size for p in files if p.is_file())
                model_card.write(card, made_path, size, written, format)
            # More than one is there for OpenVINO, or a large ONNX model.
            made = sorted(os.listdir(folder), key=path.name.__eq__)
            for each in made:
                _check_overwrite(path.parent / each, overwrite)
            replace_all(folder, made)


def format_of(filepath: Any, format: str | None) -> str:
    """Return the format of a file: the one that is given, or by its ending."""
    if format is not None:
        checked: str = checks.check_choice("format", format, tuple(FORMATS))
        return checked
    ending = pathlib.Path(checks.check_path("filepath", filepath)).suffix
    if not ending:
        return "tf_saved_model"
    for name, each in FORMATS.items():
        if each.ending == ending:
            return name
    endings = ", ".join(x.ending for x in FORMATS.values() if x.ending)
    expected = f"a file with one of the endings {endings}, or a folder without "
    expected += "an ending; or pass `format`"
    raise checks.error("filepath", expected, os.fspath(filepath))


def _check_path(filepath: Any, ending: str, overwrite: bool) -> pathlib.Path:
    path = pathlib.Path(
        os.path.abspath(checks.check_path("filepath", filepath))
    )
    received = os.fspath(filepath)
    others = [each.ending for each in FORMATS.values() if each.ending]
    is_other = path.exists() and path.is_dir() is bool(ending)
    # No folder has the name of a file of another format.
    has_ending = path.suffix == ending if ending else path.suffix not in others
    if not path.parent.is_dir() or not has_ending or is_other:
        kind = f"a file with the ending {ending!r}"
        if not ending:
            kind = f"a folder, with none of the endings {', '.join(others)}"
        expected = f"{kind}, in a folder that exists"
        raise checks.error("filepath", expected, received)
    _check_overwrite(path, overwrite)
    if path.is_dir():
        names = {each.name for each in path.iterdir()}
        # Not any folder is replaced, by a slip.
        if names and not names & {"saved_model.pb", "model.safetensors"}:
            expected = "empty, or a folder that was exported"
            raise checks.error("filepath", expected, received)
    return path


def _check_overwrite(path: pathlib.Path, overwrite: bool) -> None:
    if not overwrite and path.exists():
        raise FileExistsError(
            "Pass `overwrite=True` to replace what is there. Received: "
            f"filepath={os.fspath(path)!r}, overwrite=False"
        )


def _check_needs(format: str, keep_packed: bool) -> None:
    """Raise ValueError or ImportError where a format cannot be written."""
    chosen, name = FORMATS[format], keras.backend.backend()
    needed = chosen.needs.get(name, chosen.needs.get(""))
    if needed is None:
        raise ValueError(
            f"The format {format!r} is written on {' and '.join(chosen.needs)} "
            f"alone. Received: the backend {name!r}. Save the model by "
            "`kwm.save_model`, and load it under another KERAS_BACKEND."
        )
    if keep_packed and chosen.keeps_packed not in (name, "any"):
        kept = ", ".join(
            f"{key!r} on {each.keeps_packed}"
            for key, each in FORMATS.items()
            if each.keeps_packed
        )
        raise ValueError(
            f"Packed weights can be kept in these formats: {kept}. Received: "
            f"keep_packed=True, format={format!r} on {name!r}. `kwm.save_model`"
            " keeps them for another KERAS_BACKEND."
        )
    if keep_packed and format == "torch":
        version = importlib.metadata.version("torch")
        if tuple(map(int, version.split(".")[:2])) < (2, 10):
            # It gives gradients to all that it loads, and integers have none.
            raise ValueError(
                "torch before 2.10 cannot load the integer weights that it "
                "writes. Upgrade torch, or leave out `keep_packed`. Received: "
                f"keep_packed=True with torch {version}"
            )
    missing = [m for m in needed if importlib.util.find_spec(m) is None]
    if missing:
        packages = " ".join(missing).replace("_", "-")
        raise checks.not_installed(f"The format {format!r} on {name}", packages)


def _by_keras(format: str) -> Callable[..., Write]:
    """Return the writer of a format of `keras.Model.export`."""

    def writer(model: Any, **kwargs: Any) -> Write:
        kwargs = {"verbose": False, **kwargs}
        return lambda path, _: model.export(path, format=format, **kwargs)

    return writer


def _onnx_writer(model: Any, **kwargs: Any) -> Write:
    def spec_of(tensor: Any) -> keras.InputSpec:
        shape = (None, *tensor.shape[1:])
        return keras.InputSpec(tensor.dtype, shape, name=tensor.name)

    inputs = input_of(model)
    # Where sizes are free Keras takes the older tracer of torch, which fails on
    # language models.
    is_text = hasattr(model, "generate") and "input_signature" not in kwargs
    is_ours = is_text and keras.backend.backend() == "torch"
    if inputs is not None:
        # Keras asks for a call of the model first, or for this.
        signature = [keras.tree.map_structure(spec_of, inputs)]
        kwargs = {"input_signature": signature, **kwargs}
    if packed_weights(model) or is_ours:
        return onnx_file.writer(model, **kwargs)
    return _by_keras("onnx")(model, **kwargs)


def _torch_writer(model: Any, **kwargs: Any) -> Write:
    by_keras = _by_keras("torch")(model, **kwargs)

    def write(path: str, progress: Progress) -> None:
        # torch ends the process where the disk is full. It writes each weight
        # twice, and its graph.
        reserve = getattr(os, "posix_fallocate", None)
        if reserve is not None:
            size = 2 * bytes_of(model.weights)
            try:
                with open(path, "wb") as file:
                    reserve(file.fileno(), 0, size + size // 20 + 2**24)
            except OSError as error:
                # Some file systems reserve nothing.
                if error.errno in (errno.EDQUOT, errno.EFBIG, errno.ENOSPC):
                    raise OSError(error.errno, error.strerror, path) from error
            os.remove(path)
        by_keras(path, progress)

    return write


def _gguf_writer(model: Any, **kwargs: Any) -> Write:
    _check_plain(model, "gguf")
    return gguf_file.writer(model, **kwargs)


def _transformers_writer(model: Any) -> Write:
    _check_plain(model, "transformers")
    write = getattr(model, "export_to_transformers", None)
    if write is None:
        expected = "a KerasHub model with `export_to_transformers`"
        raise checks.error("model", expected, model)
    if packed_weights(model):
        return compressed_tensors.writer(model)
    return lambda path, _: write(path)


def _check_plain(model: Any, format: str) -> None:
    """Raise ValueError unless weights are what layers compute with."""
    found = {
        item.target.path: f"reparameterized: call `{item.finish}` first"
        for item in reparameterizations(model)
        if item.keeps_stored
    }
    for layer in keras_compat.layers_of(model):
        if getattr(layer, "quantization_mode", None) is not None:
            found[layer.path] = "quantized by Keras: export before `quantize`"
        elif getattr(layer, "lora_enabled", False):
            found[layer.path] = "with LoRA: call `kwm.merge_lora(model)` first"
    if found:
        path, reason = next(iter(found.items()))
        raise ValueError(
            f"The format {format!r} takes the weights of plain layers. "
            f"Received: {len(found)} that are not, the first being {path!r}, "
            f"{reason}."
        )


# All formats, by their names. OpenVINO does not convert the calls of XLA that
# JAX 0.10 gives.
FORMATS: dict[str, ExportFormat] = {
    "tf_saved_model": ExportFormat(
        _by_keras("tf_saved_model"),
        needs={
            "tensorflow": (),
            "jax": ("tensorflow",),
            "torch": ("torch_xla", "tensorflow"),
        },
        keeps_packed="tensorflow",
    ),
    "onnx": ExportFormat(
        _onnx_writer,
        ".onnx",
        {
            "tensorflow": ("tf2onnx",),
            "jax": ("jax2onnx",),
            "torch": ("onnx", "onnxscript"),
        },
        keeps_packed="torch",
    ),
    "openvino": ExportFormat(
        _by_keras("openvino"),
        ".xml",
        {"tensorflow": ("openvino",), "torch": ("openvino",)},
    ),
    "litert": ExportFormat(
        _by_keras("litert"),
        ".tflite",
        {"tensorflow": (), "torch": ("litert_torch",)},
    ),
    "torch": ExportFormat(
        _torch_writer, ".pt2", {"torch": ()}, keeps_packed="torch"
    ),
    "transformers": ExportFormat(
        _transformers_writer, needs={"": ("keras_hub",)}, keeps_packed="any"
    ),
    "gguf": ExportFormat(
        _gguf_writer, ".gguf", {"": ("gguf",)}, reads_packed=True
    ),
}
