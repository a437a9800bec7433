"""Speed, memory and quality of a small language model, by runtime.

    python -m benchmarks.runtimes
    python -m benchmarks.runtimes --backends tensorflow --rows packed --smoke
    python -m benchmarks.runtimes --model qwen_coder --rows int4
    python -m benchmarks.runtimes --model 1.5b
    python -m benchmarks.runtimes --report     (the log there is, once more)

A model (`--model`) runs dense, packed 2:4 in every form of `pack`, packed dense
in integers, and quantized by Keras and on torch. llama.cpp runs GGUF files of
the same weights, OpenVINO and ONNX Runtime what their own tools make of these.
Each form has a process that loads it from a file, and shows:

- write: new tokens per second, greedy, after a short prompt, batch 1 and 8;
- read: tokens of a long prompt over the seconds to the first new token;
- first: seconds of the first text of batch 1, which is compiled in it;
- memory: the resident size after the first text of batch 1, and the part that
  came with the model. The rest is the runtime, such as TensorFlow, which
  KerasHub imports on every backend. Also the size of the file;
- perplexity on the four texts of `benchmarks.quality`, the same rows for all,
  from the logits of the runtime itself. *x dense* is the geometric mean of the
  ratios to the dense model. A speed says nothing without it.

`generate` is compiled by `compile_generate`, for the peers too; the dense model
is there both ways.

The processes take turns on the same cores, in rotating order. Not all fit in
memory: `--together` of them live at a time, the dense model (which the ratios
are over) with each of these groups. Speeds are medians.

Two things to know. The weights in the wheels are already rounded, SmolLM2's to
Q4_1 (its embeddings to Q8_0) and the others' to Q4_K_M, and "dense" means
these. For llama.cpp that very file is exact, although it rounds activations to
int8. Other formats of 4 bits round a second time. The llama.cpp that pip
installs without compiling is for any machine with AVX2. `pip install
llama-cpp-python` compiles for this machine, and is used if it is there (`make
bench-runtimes LLAMA=llama-cpp-python`). The log says which.

The sparse weights are made by SparseGPT, or come from `--sparse FILE.npz`,
arrays in the order of `get_weights()`. For few bits, `quantize` rounds the
weights before `pack`, as in `benchmarks.quality`. The dense model wrote an
eighth of the rows, and three eighths are docstrings. This takes 15 to 30
minutes for each form of SmolLM2. `--rounding 0` rounds to nearest, which is the
default for the others. `--files` takes files that `save_model` has written. A
name that is not in the list becomes a new row.
llama.cpp's own tool makes the GGUF types with a K or an I from BF16. Those that
say imatrix weigh errors by the mean squares of the inputs, on rows of prose and
docstrings. `1b` and `1.5b` have random weights: speeds alone.

The times are only good on a machine that does nothing else.
"""

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
import traceback
import warnings

from benchmarks import harness
from benchmarks.packed_llm import COMPILED, PACKED
from benchmarks.quality import MODELS

PLOT = harness.ROOT / "docs" / "runtimes.png"
SIZES = PLOT.with_name("sizes.png")
CACHE = harness.ROOT / "build" / "runtimes"
# The type of the GGUF file that a model's weights come from.
SOURCES = {"smollm2": "Q4_1", "gemma3": "Q4_K_M", "qwen_coder": "Q4_K_M"}
# Models of random weights. "1b" is the shape of Llama 3.2 1B, with SmolLM2's
# vocabulary, and "1.5b" that of Qwen2.5 1.5B.
SHAPES = {
    # To see that all works.
    "tiny": {
        "vocabulary_size": 49152,
        "num_layers": 2,
        "hidden_dim": 128,
        "intermediate_dim": 256,
        "num_query_heads": 4,
        "num_key_value_heads": 2,
    },
    "1b": {
        "vocabulary_size": 49152,
        "num_layers": 16,
        "hidden_dim": 2048,
        "intermediate_dim": 8192,
        "num_query_heads": 32,
        "num_key_value_heads": 8,
        "rope_max_wavelength": 500000,
    },
    "1.5b": {
        "family": "Qwen",
        "vocabulary_size": 151936,
        "num_layers": 28,
        "hidden_dim": 1536,
        "intermediate_dim": 8960,
        "num_query_heads": 12,
        "num_key_value_heads": 2,
        "rope_max_wavelength": 1000000,
    },
}
# Their texts say nothing, and are not measured. Those of "tiny" are, as a test.
RANDOM = "1b", "1.5b"
SHORT, LONG = 8, 512
# Shares of the rows that the dense model wrote, and of docstrings.
MIXTURE = 0.125, 0.375
# Ends the names of files of weights whose head is rounded as well.
HEAD = ", and head"
BATCHES = (1, 8)
# A form that takes as many seconds for a task is asked once.
TOO_LONG = 60
DENSE = "dense float32"


@dataclasses.dataclass(frozen=True)
class Form:
    """A row of the table.

    Attributes:
        name: String.
        file: String, of the file it loads; see `write_files`.
        runtime: `"keras"`, `"torch"` (Keras' model with products of torch),
            `"llama.cpp"`, `"ik_llama.cpp"`, `"openvino"` or `"onnxruntime"`.
        option: Of the runtime: name of a function of `peers`.
        needs: Modules, of which one must be there.
        backend: String, of Keras; None where the runtime is no Keras.
        compiled: Bool, whether `compile_generate` is called.
    """

    name: str
    file: str
    runtime: str = "keras"
    option: str | None = None
    needs: tuple = ()
    backend: str | None = None
    compiled: bool = False

    @property
    def label(self):
        name = self.name + (COMPILED if self.compiled else "")
        return f"{self.backend}: {name}" if self.backend else name


# All weights held, in integers. Row: arguments of `pack`.
INTEGERS: dict[str, dict[str, str]] = {
    f"dense {dtype}, int8 head": {"dtype": dtype, "head": "int8"}
    for dtype in ("int8", "int4")
}
# To llama.cpp it goes as Q4_0, with the same integers.
INT4 = "dense int4, int4 head"
INTEGERS[INT4] = {"dtype": "int4"}
# Form: row of `benchmarks.quality` whose weights it packs.
ROUNDED = {
    INT4: "int4 by GPTQ + blocks + scales",
    "dense int4, int8 head": "int4 by GPTQ + blocks + scales + int8 head",
    **{name: name for name in ("45 MB", "60 MB", "85 MB", "int6")},
}
BUDGETS: dict[str, dict[str, str]] = {
    name: {} for name in ROUNDED if name not in INTEGERS
}
INTEGERS |= BUDGETS
FORMS = {**PACKED, **INTEGERS}
# By llama.cpp's own tool. Widths that are no multiple of 256, as those of
# `MODELS`, get a larger type than the name says.
BY_TOOL = (
    *("Q2_K", "Q3_K_M", "IQ4_NL", "Q4_K_M", "Q5_K_M", "Q6_K"),
    *(f"{x} imatrix" for x in ("Q2_K", "Q4_0", "IQ4_NL", "Q4_K_M")),
)
# On each backend. A name is a file: DENSE and "dense bfloat16", what `pack`
# makes with these arguments, and Keras' own quantization.
KERAS = (
    DENSE,
    "dense bfloat16",
    *PACKED,
    *INTEGERS,
    *(
        f"Keras {mode}{end}"
        for mode in ("int8", "int4", "gptq")
        for end in ("", ", packed")
    ),
)
# Rows and their length for Keras' gptq. More make no difference: its
# calibration in 3.15.1 sees none of them (keras#23512).
GPTQ_ROWS, GPTQ_LENGTH = 8, 128
# Its packed weights are objects that torch cannot write into a record.
NOT_COMPILED = "dynamic int8"
OTHERS = (
    *(
        Form(name, file, "torch", option, (module,), "torch")
        for name, file, option, module in (
            (NOT_COMPILED, DENSE, "dynamic_int8", "torch"),
            ("torchao int4", "dense bfloat16", "torchao_int4", "torchao"),
        )
    ),
    *(
        Form(
            f"llama.cpp {kind}",
            f"{kind}.gguf",
            "llama.cpp",
            needs=("llama_cpp", "llama_cpp_py_sync"),
        )
        for kind in ("BF16", "Q8_0", "Q4_0", "Q4_1", *BY_TOOL, INT4)
    ),
    *(
        Form(
            f"ik_llama {kind}",
            f"{kind}.gguf",
            "ik_llama.cpp",
            needs=("ik_llama_cpp",),
        )
        for kind in ("Q4_0", "IQ4_NL", INT4)
    ),
    Form(
        "OpenVINO GenAI int4",
        "F32.openvino/openvino_model.xml",
        "openvino",
        needs=("openvino_genai",),
    ),
    Form(
        "ONNX Runtime GenAI int4",
        "F32.onnxruntime/genai_config.json",
        "onnxruntime",
        needs=("onnxruntime_genai",),
    ),
)


def forms(backends, rows=None, plain=False, files=()):
    """Return the forms that are wanted, the anchor of the ratios first.

    `compile_generate` is called; the dense float32 model is there both ways.

    Args:
        backends: Strings, backends of Keras.
        rows: Strings; those forms whose label has one of them in it, and the
            dense model. One that begins with "-" is in none of the labels. By
            default all.
        plain: Bool, whether to have all of them both ways.
        files: Strings, names of `--files`. Unknown names become new forms.
    """
    made = [
        Form(name, name, needs=(backend,), backend=backend)
        for backend in backends
        for name in dict.fromkeys([*KERAS, *files])
    ]
    found = []
    for form in (*made, *OTHERS):
        if form.backend is None:
            found.append(form)
            continue
        if plain or form.name in (DENSE, NOT_COMPILED):
            found.append(form)
        if form.name != NOT_COMPILED:
            found.append(dataclasses.replace(form, compiled=True))
    return found[:1] + [
        form
        for form in found[1:]
        if not rows
        or (
            any(row in form.label for row in rows)
            and not any(row[1:] in form.label for row in rows if row[0] == "-")
        )
    ]


def main():
    args = parse_arguments()
    if args.worker:
        work(args)
    elif args.write:
        write_file(args.write, args)
    elif args.report:
        report = harness.read_json(args.json)
        print_report(report)
        plot(report, args.plot)
        plot_sizes(report, args.plot.with_name(SIZES.name))
    else:
        compare(args)


def parse_arguments(arguments=None):
    parser = harness.make_parser(__doc__)
    parser.add_argument(
        "--backends",
        type=harness.subset(harness.BACKENDS),
        default=["jax", "torch"],
        help="of Keras; the first has the dense model that ratios are over",
    )
    parser.add_argument(
        "--rows",
        type=lambda text: text.split(";"),
        help="parts of names, with semicolons between, and after a - parts "
        "that none has; by default all",
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="all rows also without compile_generate",
    )
    parser.add_argument(
        "--model", choices=(*MODELS, *SHAPES), default="smollm2"
    )
    parser.add_argument(
        "--files",
        type=lambda text: dict(x.split("=", 1) for x in text.split(";")),
        default={},
        help="NAME=FILE, with semicolons between: what forms of these names "
        'load, such as "dense int4, int8 head=model.safetensors". Other names '
        "make new forms",
    )
    parser.add_argument(
        "--sparse", type=pathlib.Path, help="npz of 2:4 weights"
    )
    parser.add_argument(
        "--calibration",
        type=int,
        help="rows of SparseGPT's data; 0 prunes by magnitude, as is done "
        "for other models and --smoke. Default: 32",
    )
    parser.add_argument(
        "--rounding",
        type=int,
        help="rows that int4 is rounded on; 0 rounds to nearest, as is done "
        "for other models and --smoke. Default: 128",
    )
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--together", type=int, help="default: 8, or 2 of other models"
    )
    parser.add_argument("--cores", type=int, default=len(cores()))
    parser.add_argument(
        "--texts", type=int, default=16, help="rows of each text"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="little of everything"
    )
    parser.add_argument(
        "--keep", action="store_true", help="the files of the last run"
    )
    parser.add_argument("--report", action="store_true", help="no measuring")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--plot", type=pathlib.Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--write", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.smoke:
        args.new_tokens, args.rounds, args.texts = 8, 1, 2
    other = args.model != "smollm2"
    if args.calibration is None:
        args.calibration = 0 if other or args.smoke else 32
    if args.rounding is None:
        args.rounding = 0 if other or args.smoke else 128
    name = f"runtimes_{args.model}" if other else "runtimes"
    args.together = args.together or (2 if other else 8)
    # A smoke run leaves the results alone.
    folder = CACHE if args.smoke else harness.RESULTS
    args.json = args.json or folder / f"{name}.json"
    plot = CACHE / f"{name}.png" if other or args.smoke else PLOT
    args.plot = args.plot or plot
    return args


def cores():
    return sorted(os.sched_getaffinity(0))


def folder_of(args):
    return CACHE / args.model


def source_of(args):
    """Return the name in `MODELS` of the model whose tokenizer is used."""
    shapes = {"tiny": "smollm2", "1b": "smollm2", "1.5b": "qwen_coder"}
    return shapes.get(args.model, args.model)


def find_gguf(args):
    return importlib.import_module(
        f"examples.data.{source_of(args)}"
    ).find_gguf()


def load_tokenizer(args):
    from benchmarks import quality

    return quality.load(source_of(args)).preprocessor.tokenizer


def quality_arguments(args, rows, own, **options):
    """Return arguments of `benchmarks.quality`, with its rows of training."""
    from benchmarks import quality

    options |= {
        "model": source_of(args),
        "steps": rows,
        "self-share": own,
        "documentation-share": MIXTURE[1],
    }
    return quality.parse_arguments([f"--{k}={v}" for k, v in options.items()])


# --- the files ---------------------------------------------------------------


def write_file(name, args):
    """Write a file of `folder_of(args)`, in this process.

    One that cannot be written is not there afterwards, but a file that says
    why.
    """
    path = folder_of(args) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    # keras_hub imports TensorFlow on every backend, with its own warnings.
    warnings.simplefilter("ignore")
    print(f"writing {name}", flush=True)
    path.unlink(missing_ok=True)
    failed = path.with_name(f"{path.name} failed")
    failed.unlink(missing_ok=True)
    if name in args.files:
        write = link_file
    elif name == "tokens.npz":
        write = write_tokens
    elif name.startswith("sparse"):
        write = write_sparse
    elif name.startswith("rounded"):
        write = write_rounded
    elif name.endswith((".xml", ".json")):
        write = write_converted
    elif name.endswith(".gguf"):
        write = write_gguf
    else:
        write = write_keras
    try:
        write(path, args)
    except Exception as error:
        traceback.print_exc()
        path.unlink(missing_ok=True)
        failed.write_text(f"{type(error).__name__}: {error}"[:300])


def write_tokens(path, args):
    """Prompts of `BATCHES`, the long prompt, and the rows of the texts."""
    import numpy as np

    from benchmarks.quality import TEXTS
    from examples.data.prose import load_rows

    tokenizer, arrays = load_tokenizer(args), {}
    prompts = {"short": (SHORT, max(BATCHES)), "long": (LONG, 1)}
    for name, (length, count) in prompts.items():
        (arrays[name],) = load_rows(tokenizer, length, held_out=count)
    texts = load_rows(tokenizer, 257, **dict.fromkeys(TEXTS, args.texts))
    arrays |= {f"text {name}": rows for name, rows in zip(TEXTS, texts)}
    np.savez(path, **arrays)


def make_model(args, dtype="float32"):
    """The dense model, without a preprocessor."""
    import keras

    from benchmarks import quality
    from examples.data import smollm2

    if args.model in MODELS:
        model = quality.load(args.model, dtype)
        return type(model)(backbone=model.backbone, preprocessor=None)
    keras.utils.set_random_seed(0)
    model = harness.make_llm(dtype, **SHAPES[args.model])
    smollm2.keep_tied_embeddings(model.backbone)
    return model


def write_sparse(path, args):
    """The 2:4 weights, one array for each of the model's."""
    import numpy as np

    import keras_weightmods as kwm
    from examples.data.prose import load_rows, model_inputs

    model = make_model(args)
    if args.calibration:
        (rows,) = load_rows(
            load_tokenizer(args), 256, seed=1, train=args.calibration
        )
        kwm.sparsify(
            model,
            "2:4",
            model_inputs(rows),
            criterion="sparsegpt",
            batch_size=4,
        )
    else:
        kwm.sparsify(model, "2:4", criterion="magnitude")
    np.savez(path, *model.get_weights())


def write_rounded(path, args):
    """The weights that a form of few bits starts from.

    `benchmarks.quality` makes those of dense forms.
    """
    import numpy as np

    import keras_weightmods as kwm
    from benchmarks import quality
    from examples.data.prose import model_inputs

    options = {
        "dtype": "mixed_bfloat16",
        "methods": path.stem.removesuffix(" 0"),
        "save": path.parent,
        "json": path.with_suffix(".json"),
    }
    options = quality_arguments(args, args.rounding, MIXTURE[0], **options)
    if path.parent != folder_of(args):
        quality.run(options)
        return
    # Blocks are trained, which bfloat16 makes twice as fast here.
    model = make_model(args, "mixed_bfloat16")
    is_head = path.stem.endswith(HEAD)
    start = path.with_stem(path.stem.removesuffix(HEAD))
    harness.load_weights(model, start if is_head else sparse_file(args))
    rows = quality.mixed_rows(options, load_tokenizer(args), 0)
    which: dict = {"targets": []} if is_head else {"head": False}
    report = kwm.quantize(
        model, model_inputs(rows[:, :-1]), batch_size=4, **which
    )
    print(report)
    np.savez(path, *model.get_weights())


def rounded_file(name, args):
    """The file of `write_rounded` for a form; None where it needs none."""
    folder = f"rounded_{args.rounding}"
    if name in ROUNDED:
        # Not every row of `benchmarks.quality` has "int4" in its name.
        found = folder_of(args) / folder / f"{ROUNDED[name]} 0.npz"
        return found if args.rounding else None
    if not args.rounding or "int4" not in name:
        return None
    head = HEAD if "int4 head" in name else ""
    kind = f"of {sparse_file(args).stem}"
    return folder_of(args) / f"{folder} {kind}{head}.npz"


def link_file(path, args):
    path.symlink_to(pathlib.Path(args.files[path.name]).resolve(strict=True))


def write_keras(path, args):
    import keras_weightmods as kwm

    name = path.name
    model = make_model(args, "bfloat16" if "dense bf" in name else "float32")
    if name in FORMS:
        source = rounded_file(name, args)
        if source is None and name in PACKED:
            source = sparse_file(args)
        if source is not None:
            harness.load_weights(model, source)
        elif name in BUDGETS:
            raise ValueError(f"--rounding 0 makes no form {name!r}")
        kwm.pack(model, **FORMS[name])
    if name.startswith("Keras"):
        mode = name.split()[1].removesuffix(",")
        quantize_by_keras(model, mode, path, args)
    if name.endswith(", packed"):
        try:
            kwm.pack(model)
        except ValueError as error:
            print(f"{name}: {error}")
            kwm.pack(model, "int8")
    if name.startswith("Keras") and not name.endswith(", packed"):
        model.save(path.with_name(f"{name}.keras"))
        path.with_name(f"{name}.keras").rename(path)
    else:
        kwm.save_model(model, path)


def quantize_by_keras(model, mode, path, args):
    """Quantize a model by Keras, gptq once: it takes a quarter of an hour."""
    import keras
    import numpy as np

    from examples.data.prose import load_rows

    if mode != "gptq":
        model.quantize(mode)
        return
    file = path.with_name("rounded by gptq of Keras.npz")
    size = {"num_samples": GPTQ_ROWS, "sequence_length": GPTQ_LENGTH}
    grid = {"group_size": 64, "symmetric": True}
    if not file.exists():
        tokenizer = load_tokenizer(args)
        (rows,) = load_rows(tokenizer, GPTQ_LENGTH, train=GPTQ_ROWS)
        config = keras.quantizers.GPTQConfig(rows, (), **size, **grid)
        model.quantize("gptq", config=config)
        np.savez(file, *model.get_weights())
        return
    config = keras.quantizers.GPTQConfig(None, None, **grid)
    for layer in model._flatten_layers():
        if isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense)):
            layer.quantize("gptq", config=config)
            del layer._kernel
            layer.is_gptq_calibrated = True
    harness.load_weights(model, file)


def write_gguf(path, args):
    import keras_weightmods as kwm

    if path.stem == SOURCES.get(args.model):
        # What the weights come from, so that nothing is rounded again.
        shutil.copy(find_gguf(args), path)
        return
    if path.stem in BY_TOOL:
        quantize_by_llama(path, args)
        return
    is_packed = path.stem == INT4
    kwm.export(
        kwm.load_model(path.with_suffix("")) if is_packed else make_model(args),
        path,
        format="gguf",
        dtype="q4_0" if is_packed else path.stem.lower(),
        tokenizer_from=find_gguf(args),
    )


def quantize_by_llama(path, args):
    """A file of a type of llama.cpp, made of that in BF16."""
    from benchmarks import peers, quality
    from examples.data.prose import model_inputs

    kind, *weighted = path.stem.split()
    squares = {}
    if weighted:
        model = make_model(args)
        options = quality_arguments(args, 64, 0.0)
        rows = quality.mixed_rows(options, load_tokenizer(args), 0)
        squares = peers.input_squares(model, model_inputs(rows[:, :-1]))
    peers.requantize(path.with_stem("BF16"), path, kind, squares)


def write_converted(path, args):
    from benchmarks import peers

    convert = peers.convert_to_onnxruntime
    if path.suffix == ".xml":
        convert = peers.convert_to_openvino
    convert(path.parent.with_suffix(".gguf"), path.parent)


def sparse_file(args):
    made = folder_of(args) / f"sparse_{args.calibration}.npz"
    return args.sparse or made


def make_files(wanted, args):
    """Write what the forms load, each in a process of its own.

    Two models of the 1B shape in one are too many for 24 GB.
    """
    files = [form.file for form in wanted]
    sources = ["tokens.npz"]
    if not args.sparse and any(file in PACKED for file in files):
        sources.append(sparse_file(args).name)
    names = [file.removesuffix(".gguf") for file in files]
    made = [name for name in names if name in FORMS and name not in args.files]
    rounded = [rounded_file(name, args) for name in made]
    for path in filter(None, rounded):
        start = path.with_stem(path.stem.removesuffix(HEAD))
        sources += [str(p.relative_to(folder_of(args))) for p in (start, path)]
    if set(names) & {*BY_TOOL} - {SOURCES.get(args.model)}:
        sources.append("BF16.gguf")
    if f"{INT4}.gguf" in files:
        sources.append(INT4)
    sources += [
        file.split(".")[0] + ".gguf"
        for file in files
        if file.endswith((".xml", ".json"))
    ]
    missing = [
        file
        for file in dict.fromkeys([*sources, *files])
        # Minutes are not spent twice.
        if file.removesuffix(".gguf") in args.files
        or not (folder_of(args) / file).exists()
        or not (args.keep or file.startswith(("sparse", "rounded")))
    ]
    for file in missing:
        ended = subprocess.run(command(f"--write={file}"), **surroundings(args))
        if ended.returncode:
            print(f"writing {file} ended with status {ended.returncode}")
            (folder_of(args) / file).unlink(missing_ok=True)
        if not (folder_of(args) / sources[0]).exists():
            raise SystemExit("No form can run without these texts: see above")


def command(*arguments):
    module = "benchmarks.runtimes"
    return [sys.executable, "-m", module, *sys.argv[1:], *arguments]


def surroundings(args, backend="torch"):
    """Keywords of `subprocess`: folder and environment of a process."""
    threads = str(args.cores)
    return {
        "cwd": harness.ROOT,
        "env": {
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "OPENVINO_LOG_LEVEL": "0",
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "KERAS_BACKEND": backend or "torch",
        },
    }


# --- a process that holds one form -------------------------------------------


class KerasRuntime:
    """A KerasHub model from a file of `save_model`, or of Keras itself."""

    def __init__(self, form, args, path):
        import keras
        import keras_hub  # noqa: F401

        import keras_weightmods as kwm
        from benchmarks import peers
        from keras_weightmods.ops.sparse_matmul import reason_for_dense

        if form.file in FORMS and (reason := reason_for_dense()):
            # The kernels would be held dense: not what the row says.
            raise RuntimeError(reason)
        if form.file == "Keras gptq":
            # Keras cannot load what it has saved of these.
            self.model = make_model(args)
            quantize_by_keras(self.model, "gptq", path, args)
        elif form.file in ("Keras int8", "Keras int4"):
            # Keras asks for the ending.
            link = path.with_name(f"{path.name}.{os.getpid()}.keras")
            link.symlink_to(path)
            try:
                self.model = keras.models.load_model(link, compile=False)
            finally:
                link.unlink()
        else:
            self.model = kwm.load_model(path)
        self.held = None
        if form.option:
            make = getattr(peers, form.option)
            self.held = peers.quantize_products(self.model, make)
        self.model.compile(sampler="greedy")
        if form.compiled:
            # Where it cannot be done, the row would be another one.
            warnings.filterwarnings("error", ".*compile_generate")
            kwm.compile_generate(self.model)

    def about(self):
        found = harness.versions("keras-hub")
        return ", ".join(f"{key} {value}" for key, value in found.items())

    def generate(self, rows, count):
        import numpy as np

        padding = ((0, 0), (0, count))
        inputs = {
            "token_ids": np.pad(rows, padding),
            "padding_mask": np.pad(np.ones(rows.shape, bool), padding),
        }
        # `generate` itself fails on Gemma 3, whose tokens come with no images.
        found = self.model.make_generate_function()(inputs, None)
        return np.asarray(found["token_ids"])[:, -count:]

    def perplexity(self, rows):
        import keras_weightmods as kwm

        if not hasattr(self, "measure"):
            self.measure = kwm.Perplexity(self.model, batch_size=4)
        return self.measure(rows, verbose=0)


def load(form, path, args):
    """Return the runtime of a form, and the bytes of the process before."""
    from benchmarks import peers

    if form.runtime in ("keras", "torch"):
        import keras_hub

        import keras_weightmods

        made = functools.partial(KerasRuntime, form, args)
        _ = keras_hub, keras_weightmods
    elif form.runtime == "llama.cpp":
        made = functools.partial(peers.LlamaCpp, threads=args.cores)
    elif form.runtime == "ik_llama.cpp":
        made = functools.partial(peers.IkLlamaCpp, threads=args.cores)
    elif form.runtime == "onnxruntime":
        import onnxruntime_genai

        _ = onnxruntime_genai
        path = path.parent
        made = functools.partial(peers.OnnxRuntimeGenAI, threads=args.cores)
    else:
        import openvino_genai

        _ = openvino_genai
        path = path.parent
        made = functools.partial(peers.OpenVino, threads=args.cores)
    before = harness.resident_bytes()
    return made(path), before


def work(args):
    """Answer what the parent asks, one line of JSON for each."""
    import numpy as np

    # What libraries print goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    (form,) = (
        form
        for form in forms(args.backends, args.rows, args.plain, args.files)
        if form.label == args.worker
    )
    with np.load(folder_of(args) / "tokens.npz") as file:
        tokens = {name: file[name] for name in file.files}
    runtime = None

    def start():
        nonlocal runtime
        path = folder_of(args) / form.file
        runtime, before = load(form, path, args)
        first = seconds("write 1")
        resident = harness.resident_bytes()
        # Compiled, where that is done.
        for task in TASKS:
            seconds(task)
        files = [path]
        if form.runtime in ("openvino", "onnxruntime"):
            files = path.parent.glob("*model.*")
        # What is made of a loaded model has no file of its own.
        made = getattr(runtime, "held", None)
        return {
            "about": runtime.about(),
            "file_bytes": sum(f.stat().st_size for f in files)
            if made is None
            else None,
            "weight_bytes": made,
            "first_seconds": first,
            "resident_bytes": resident,
            "model_bytes": resident - before,
        }

    def seconds(task):
        kind, batch = task.split()
        rows = tokens["long" if kind == "read" else "short"][: int(batch)]
        count = 1 if kind == "read" else args.new_tokens
        began = time.perf_counter()
        found = runtime.generate(rows, count)
        passed = time.perf_counter() - began
        assert found.shape == (len(rows), count), found.shape
        return passed

    def perplexity():
        return {
            name.split()[1]: runtime.perplexity(rows)
            for name, rows in tokens.items()
            if name.startswith("text ")
        }

    known = {"start": start, "seconds": seconds, "perplexity": perplexity}
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            answer = {"answer": known[name](*arguments)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """The parent's side of a process that runs `work`."""

    def __init__(self, form, args):
        self.process = subprocess.Popen(
            command(f"--worker={form.label}"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **surroundings(args, form.backend),
        )

    def ask(self, *task):
        """Return the answer.

        Raises:
            RuntimeError: If there is an error instead, or no answer.
        """
        print(json.dumps(task), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"ended with {self.process.wait()}")
        found = json.loads(line)
        if "error" in found:
            raise RuntimeError(found["error"])
        return found["answer"]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


# --- the comparison ----------------------------------------------------------


def compare(args):
    os.sched_setaffinity(0, cores()[: args.cores])
    wanted = forms(args.backends, args.rows, args.plain, args.files)
    left_out = {}
    if unused := set(args.files) - {form.file for form in wanted}:
        raise SystemExit(
            "Expected `--files` for rows that are wanted. Received files for "
            f"{', '.join(sorted(unused))}, of which `--rows` has none"
        )

    def leave_out(form, reason):
        left_out[form.label] = reason
        print(f"left out: {form.label}: {reason}", flush=True)

    for form in wanted:
        if form.needs and not any(map(importlib.util.find_spec, form.needs)):
            leave_out(form, f"not installed: {' or '.join(form.needs)}")
    wanted = [form for form in wanted if form.label not in left_out]
    make_files(wanted, args)
    for form in wanted:
        path = folder_of(args) / form.file
        failed = path.with_name(f"{path.name} failed")
        if not path.exists():
            reason = failed.read_text() if failed.exists() else "see above"
            leave_out(form, f"its file could not be written: {reason}")
    wanted = [form for form in wanted if form.label not in left_out]
    anchor, *others = wanted
    report = {
        "machine": {**harness.machine(), "threads": str(args.cores)},
        "model": args.model,
        "files": {k: pathlib.Path(v).name for k, v in args.files.items()},
        "sparse": str(args.sparse.name) if args.sparse else None,
        "calibration_rows": args.calibration,
        "rounding_rows": args.rounding,
        "prompts": {"short": SHORT, "long": LONG},
        "new_tokens": args.new_tokens,
        "rounds": args.rounds,
        "texts": args.texts,
        "together": args.together,
        "rows": [],
        "left_out": left_out,
    }
    rows = {}
    size = max(1, args.together - 1)
    groups = [others[i : i + size] for i in range(0, len(others), size)]
    worker = start(anchor, args, rows, leave_out)
    if worker is None:
        raise SystemExit("the dense model, which all is compared to, failed")
    try:
        for group in groups or [[]]:
            measure_group(anchor, worker, group, args, rows, leave_out)
            report["rows"] = list(rows.values())
            harness.write_json(args.json, report)
    finally:
        worker.close()
    add_ratios(report["rows"])
    harness.write_json(args.json, report)
    print_report(report)
    plot(report, args.plot)
    if args.model not in RANDOM:
        plot_sizes(report, args.plot.with_name(SIZES.name))


def start(form, args, rows, leave_out):
    """Start a worker; None, and a line, where it fails."""
    worker = Worker(form, args)
    try:
        rows[form.label] = {
            "form": form.label,
            "weights": "2:4" if form.file in PACKED else "dense",
            **worker.ask("start"),
            "seconds": {},
            "ratios": {},
        }
    except RuntimeError as error:
        leave_out(form, str(error))
        worker.close()
        return None
    return worker


def measure_group(anchor, anchor_worker, group, args, rows, leave_out):
    """Let the forms of a group and the anchor take turns, task by task."""
    workers = {anchor.label: anchor_worker}
    try:
        for form in group:
            print(f"loading {form.label}", flush=True)
            worker = start(form, args, rows, leave_out)
            if worker is not None:
                workers[form.label] = worker
        for task in TASKS:
            calls = {
                label: functools.partial(worker.ask, "seconds", task)
                for label, worker in workers.items()
            }
            found = harness.take_turns(calls, 1)
            quick = {
                label: call
                for label, call in calls.items()
                if found[label][0] <= TOO_LONG
            }
            if quick:
                more = harness.take_turns(quick, args.rounds - 1)
                found = {k: found[k] + more.get(k, []) for k in found}
            for label, seconds in found.items():
                row = rows[label]
                row["seconds"].setdefault(task, []).extend(seconds)
                row["ratios"].setdefault(
                    task, ratio(found[anchor.label], seconds)
                )
        for label, worker in workers.items():
            if args.model not in RANDOM and "perplexity" not in rows[label]:
                try:
                    rows[label]["perplexity"] = worker.ask("perplexity")
                except RuntimeError as error:
                    print(f"no perplexity: {label}: {error}", flush=True)
    finally:
        for label, worker in workers.items():
            if label != anchor.label:
                worker.close()
    for label in workers:
        rows[label]["tokens_per_second"] = {
            task: tokens_of(task, args.new_tokens) / statistics.median(seconds)
            for task, seconds in rows[label]["seconds"].items()
        }


TASKS = (*(f"write {batch}" for batch in BATCHES), "read 1")


def tokens_of(task, new_tokens):
    """Tokens that a task is counted as."""
    kind, batch = task.split()
    return int(batch) * (LONG if kind == "read" else new_tokens)


def ratio(base, own):
    """Median of the ratios of the rounds."""
    return statistics.median(b / o for b, o in zip(base, own))


def add_ratios(rows):
    """Add "x_dense", over the first row: the geometric mean of the texts."""
    base = rows[0].get("perplexity")
    for row in rows:
        if base and "perplexity" in row:
            row["x_dense"] = statistics.geometric_mean(
                row["perplexity"][name] / base[name] for name in base
            )


def print_report(report):
    table = harness.table(
        f"{report['model']}, {report['new_tokens']} new tokens, a prompt of "
        f"{report['prompts']['long']} to read; tokens/s",
        text=("form", "weights"),
        numbers=(*TASKS, "memory MB", "model", "file", "x dense", "first s"),
    )
    for row in report["rows"]:
        table.add_row(*cells(row), f"{row.get('first_seconds', 0):.1f}")
    harness.print_all(
        table,
        "x dense: perplexity, geometric mean over four texts; the other "
        "columns say nothing without it",
        *(f"left out: {k}: {v}" for k, v in report["left_out"].items()),
        harness.describe(report),
        *dict.fromkeys(row["about"] for row in report["rows"]),
        width=140,
    )


def cells(row):
    """A row of a table, as strings."""
    speeds = row["tokens_per_second"]
    return [
        row["form"],
        row["weights"],
        *(f"{speeds[task]:.1f}" for task in TASKS),
        *(
            "" if row[name] is None else f"{row[name] / 1e6:.0f}"
            for name in ("resident_bytes", "model_bytes", "file_bytes")
        ),
        f"{row['x_dense']:.3f}" if "x_dense" in row else "",
    ]


def subject(report):
    """Return what a picture is about: the model, processor and threads."""
    model, about = report["model"], report["machine"]
    name = MODELS.get(model, model)
    return f"{name}, {about['cpu']}, {about['threads']} threads"


def plot(report, path):
    """Draw speed against perplexity, the size of a file as that of its dot."""
    rows = [row for row in report["rows"] if "x_dense" in row]
    if not rows or not importlib.util.find_spec("matplotlib"):
        print("no plot: no perplexities, or no matplotlib")
        return
    import matplotlib

    import keras_weightmods as kwm

    matplotlib.use("agg")
    from matplotlib import pyplot

    # Short where the form that is not compiled is no row.
    names = {row["form"]: row["form"].removesuffix(COMPILED) for row in rows}
    axes = kwm.plot.speed(
        {
            "name": row["form"]
            if names[row["form"]] in names
            else names[row["form"]],
            "kind": f"{row['weights']} weights",
            "perplexity": row["x_dense"],
            "tokens_per_second": row["tokens_per_second"]["write 1"],
            "nbytes": row["file_bytes"] or row["weight_bytes"],
        }
        for row in rows
    )
    axes.set_xlabel("perplexity over that of the dense model (four texts)")
    axes.set_ylabel("new tokens a second, batch 1")
    axes.set_title(
        f"{subject(report)}; the area is the file's size",
        fontsize=10,
    )
    axes.figure.savefig(path, dpi=120)
    pyplot.close(axes.figure)
    print(f"written to {path}")


def plot_sizes(report, path):
    """Draw perplexity against the size of the file, the area as the speed."""
    import matplotlib

    from keras_weightmods.plot import style

    matplotlib.use("agg")
    from matplotlib import pyplot

    kinds = {"llama.cpp": [], "llama.cpp, imatrix": [], "Keras": []}
    kinds["other runtimes"] = []
    far = 0.4 * report["rows"][0]["file_bytes"]
    kinds = {"keras_weightmods": [], **kinds}
    for row in report["rows"]:
        name = row["form"].partition(": ")[2] or row["form"]
        name = name.removesuffix(COMPILED)
        kind = "keras_weightmods"
        if name.startswith("Keras"):
            kind = "Keras"
        elif name.startswith("llama.cpp") and INT4 not in name:
            kind = "llama.cpp" + ", imatrix" * name.endswith("imatrix")
        elif name.startswith(("OpenVINO", "ik_llama", "ONNX")):
            kind = "other runtimes"
        # The others are far away.
        is_near = (row["file_bytes"] or far) < far and "x_dense" in row
        if is_near and row["x_dense"] < 2:
            short = name.removeprefix("llama.cpp ").removesuffix(" imatrix")
            if short == INT4:
                short = "int4" if short == name else "int4 in llama.cpp"
            speed = row["tokens_per_second"]["write 1"]
            place = row["file_bytes"] / 1e6, row["x_dense"]
            kinds[kind].append((*place, speed, short))
    axes = style.new_axes(None, 8, 6)
    for kind, points in kinds.items():
        if points:
            x, y, speeds, _ = zip(*points)
            axes.scatter(x, y, s=speeds, alpha=0.6, label=kind)
    # Neighbors have their names on the two sides.
    every = [point for points in kinds.values() for point in points]
    every.sort(key=lambda point: point[1])
    for rank, (x, y, _, name) in enumerate(every):
        axes.annotate(
            name,
            (x, y),
            xytext=(-10 if rank % 2 else 10, -3),
            textcoords="offset points",
            ha="right" if rank % 2 else "left",
            fontsize=7,
        )
    axes.margins(x=0.15)
    axes.set(
        xlabel="file, MB",
        ylabel="perplexity over that of the dense model (four texts)",
    )
    axes.set_title(
        f"{subject(report)}; the area is the new tokens a second",
        fontsize=10,
    )
    if axes.collections:
        for dot in style.legend(axes).legend_handles:
            dot.set_sizes([40])
    axes.figure.savefig(path, dpi=120)
    pyplot.close(axes.figure)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
