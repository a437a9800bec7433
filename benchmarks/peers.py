"""What others run a language model with, for the benchmarks.

Two kinds: products of torch to put into the layers of a Keras model, and whole
runtimes that read a GGUF file, or what their tools make of one. A runtime has

    generate(rows, count)   int array (batch, prompt) -> (batch, count), greedy
    perplexity(rows)        of int array (rows, tokens); not of the first ones
"""

import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np


def quantize_products(model, make):
    """Replace all products of a Keras model on torch, and drop its kernels.

    Keras' layers are no `torch.nn.Linear`, so what torch has for these is put
    into the layers' `call`.

    Args:
        model: A KerasHub language model with tied embeddings.
        make: Function from a matrix (out, in) to its product, a function, and
            to the bytes that this holds: `dynamic_int8` or `torchao_int4`.

    Returns:
        Bytes of the weights.
    """
    import keras
    import torch

    import keras_weightmods as kwm
    from benchmarks import harness

    def projection(layer, kernel, axes):
        # The contraction comes first in the kernel, and last in the input.
        if axes != tuple(range(len(axes))):
            raise ValueError(
                "Expected kernels whose contraction axes come first. Received: "
                f"{layer.path}, with the contraction axes {axes}"
            )
        bias = getattr(layer, "bias", None)
        size = math.prod(kernel.shape[axis] for axis in axes)
        units = kernel.shape[len(axes) :]
        matrix = kernel.detach().reshape(size, -1).T.contiguous()
        product, held = make(matrix)

        def call(x, training=None):
            leading = x.shape[: x.ndim - len(axes)]
            y = product(x.reshape(*leading, size)).reshape(*leading, *units)
            return y if bias is None else y + bias.value

        vars(layer)["call"] = call
        return held - kernel.nbytes

    total = harness.nbytes(model.weights)
    for target in kwm.find_targets(model):
        kernel = target.variable.value
        total += projection(target.layer, kernel, target.contraction_axes)
        kernel.data = torch.empty(0)
    embedding = model.backbone.token_embedding
    assert isinstance(embedding, keras.layers.ReversibleEmbedding)
    # The table itself is still looked up.
    table, look_up = embedding.embeddings.value.detach(), embedding.call
    head, held = make(table)
    vars(embedding)["call"] = lambda x, reverse=False: (
        head(x) if reverse else look_up(x)
    )
    return total + held


def dynamic_int8(matrix):
    """int8 weights, a scale for each output, and int8 activations on the fly.

    The operator is the one of `torch.ao.nn.quantized.dynamic.Linear`.
    """
    import torch

    scale = matrix.abs().amax(1).clamp(min=1e-9) / 127
    zeros = torch.zeros(len(scale), dtype=torch.long)
    quantized = torch.quantize_per_channel(matrix, scale, zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantized, None)
    return (
        lambda x: torch.ops.quantized.linear_dynamic(x, packed),
        matrix.numel() + 4 * len(matrix),
    )


def torchao_int4(matrix):
    """int4 weights in groups of 32, each with a scale and a zero point.

    For bfloat16: its product of float32 is many times as slow.
    """
    import torch
    from torchao.prototype.quantization.int4 import (
        PrototypeInt4WeightOnlyConfig,
    )
    from torchao.quantization import quantize_

    units, size = matrix.shape
    linear = torch.nn.Linear(size, units, bias=False, dtype=matrix.dtype)
    linear.weight = torch.nn.Parameter(matrix, requires_grad=False)
    quantize_(linear, PrototypeInt4WeightOnlyConfig(group_size=32))
    weight = linear.weight
    names = weight.tensor_data_names
    return linear, sum(getattr(weight, name).nbytes for name in names)


# Tokens that llama.cpp reads at once.
BATCH = 512


class LlamaCpp:
    """llama.cpp by its C interface, on a GGUF file.

    From the package llama-cpp-python, which pip compiles for this machine, or
    else from llama-cpp-py-sync, a wheel for any with AVX2. Their structures
    have the same names. Without `mmap`, so that the memory is the process's.

    Args:
        path: Of the GGUF file.
        threads: Int.
    """

    def __init__(self, path, threads):
        self.lib, self.address, self.package = self.library()
        lib = self.lib
        lib.llama_backend_init()
        options = lib.llama_model_default_params()
        self.choose(options)
        self.model = lib.llama_model_load_from_file(os.fsencode(path), options)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.threads, self.contexts, self.context = threads, {}, None
        vocabulary = lib.llama_model_get_vocab(self.model)
        self.vocabulary = lib.llama_vocab_n_tokens(vocabulary)
        self.batch = lib.llama_batch_init(BATCH, 0, 1)

    def library(self):
        return _llama_library()

    def options(self):
        """What a context begins with."""
        return self.lib.llama_context_default_params()

    def choose(self, options):
        """Choose how the model is loaded."""
        # The older and the newer name.
        if hasattr(options, "use_mmap"):
            options.use_mmap = False
        else:
            options.load_mode = 0  # LLAMA_LOAD_MODE_NONE

    def about(self):
        """What was built into the library, as a string."""
        import ctypes
        import importlib.metadata

        info = self.lib.llama_print_system_info()
        if not isinstance(info, bytes):
            info = ctypes.string_at(self.address(info))
        info = info.decode()
        version = importlib.metadata.version(self.package)
        return f"{self.package} {version}; {info.strip(' |')}"

    def generate(self, rows, count):
        return np.stack(self.answer(rows, count))

    def answer(self, rows, count, stop_token_ids=(), length=None):
        """Return new tokens after each row, up to a stop token, or `count`.

        Args:
            rows: Lists of tokens, of any lengths.
            count: Int.
            stop_token_ids: Ints. A row ends with one of them.
            length: Int, of the context of a row. Defaults to what is needed.
        """
        self.begin(len(rows), length or max(map(len, rows)) + count)
        logits, found = self.decode(rows, [0] * len(rows)), [[] for _ in rows]
        going = range(len(rows))
        while True:
            for index, token in zip(going, logits.argmax(-1).tolist()):
                found[index].append(token)
            going = [
                index
                for index in going
                if len(found[index]) < count
                and found[index][-1] not in stop_token_ids
            ]
            if not going:
                return found
            places = [len(rows[i]) + len(found[i]) - 1 for i in going]
            last = [found[i][-1:] for i in going]
            logits = self.decode(last, places, going)

    def perplexity(self, rows):
        def logits_of(row):
            self.begin(1, len(row))
            return self.decode(row[None], [0], every=True)

        return perplexity_of(rows, logits_of)

    def begin(self, rows, length):
        """Take a context of this size, and forget what is in it."""
        if (rows, length) not in self.contexts:
            options = self.options()
            options.n_ctx = rows * length
            options.n_batch = options.n_ubatch = BATCH
            options.n_seq_max = rows
            options.n_threads = options.n_threads_batch = self.threads
            self.contexts[rows, length] = self.lib.llama_init_from_model(
                self.model, options
            )
        self.context = self.contexts[rows, length]
        self.lib.llama_memory_clear(
            self.lib.llama_get_memory(self.context), True
        )

    def decode(self, rows, starts, sequences=None, every=False):
        """Logits of the last token of each row, or of every token.

        Args:
            rows: Lists of tokens, of any lengths.
            starts: Ints, the place of the first token of each.
            sequences: Ints, which row of the context each is. By default the
                first ones.
            every: Bool.
        """
        batch, found = self.batch, []
        tokens = [
            (sequence, start + offset, token, every or offset == len(row) - 1)
            for sequence, start, row in zip(
                sequences or range(len(rows)), starts, rows
            )
            for offset, token in enumerate(row)
        ]
        for first in range(0, len(tokens), BATCH):
            part = tokens[first : first + BATCH]
            for index, (sequence, place, token, is_wanted) in enumerate(part):
                batch.token[index] = int(token)
                batch.pos[index] = place
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = sequence
                batch.logits[index] = is_wanted
            batch.n_tokens = len(part)
            if self.lib.llama_decode(self.context, batch):
                raise RuntimeError("llama_decode failed")
            found += [self.logits(i) for i, each in enumerate(part) if each[-1]]
        return np.stack(found)

    def logits(self, index):
        import ctypes

        address = self.address(
            self.lib.llama_get_logits_ith(self.context, index)
        )
        array = (ctypes.c_float * self.vocabulary).from_address(address)
        return np.frombuffer(array, "float32").copy()


class IkLlamaCpp(LlamaCpp):
    """ik_llama.cpp, a fork of llama.cpp, with weights repacked as by `-rtr`.

    From the package ik-llama-cpp-python. Its wheel is for any processor with
    AVX2. `pip install --no-binary :all: ik-llama-cpp-python` compiles it for
    this one.
    """

    def library(self):
        import ctypes
        import types

        from ik_llama_cpp import _ctypes_api as api

        about, log = (
            getattr(api._lib, f"llama_{name}")
            for name in ("print_system_info", "log_set")
        )
        about.restype = ctypes.c_char_p
        quiet = ctypes.CFUNCTYPE(
            None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p
        )(lambda *_: None)
        log(quiet, None)
        _KEPT.append(quiet)
        names = {
            # A context of the fork holds what llama.cpp calls its memory.
            "llama_get_memory": lambda context: context,
            "llama_memory_clear": lambda context, _: api.llama_kv_cache_clear(
                context
            ),
            "llama_print_system_info": about,
        }
        return (
            types.SimpleNamespace(**vars(api) | names),
            lambda pointer: ctypes.addressof(pointer.contents),
            "ik-llama-cpp-python",
        )

    def options(self):
        options = super().options()
        # Without VNNI this attention gives wrong values, and aborts.
        options.flash_attn = "VNNI = 1" in self.about()
        return options

    def choose(self, options):
        super().choose(options)
        options.repack_tensors = True


def _llama_library():
    """The functions of llama.cpp, `address(pointer)`, and their package."""
    import ctypes
    import importlib.util

    if importlib.util.find_spec("llama_cpp"):
        import llama_cpp

        quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
        _KEPT.append(quiet)

        return (
            llama_cpp,
            lambda pointer: ctypes.addressof(pointer.contents),
            "llama-cpp-python",
        )
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    ffi, lib = get_ffi(), get_lib()
    quiet = ffi.callback(
        "void(enum ggml_log_level, const char *, void *)", lambda *_: None
    )
    lib.llama_log_set(quiet, ffi.NULL)
    _KEPT.append(quiet)
    return (
        lib,
        lambda pointer: int(ffi.cast("uintptr_t", pointer)),
        "llama-cpp-py-sync",
    )


def requantize(source, path, kind, squares=None):
    """Write a GGUF file of another type, as llama.cpp's own tool does.

    Args:
        source, path: Of the files.
        kind: String, such as `"Q4_K_M"`.
        squares: Dict from names of tensors to float32 arrays (K,), the mean
            squares of their inputs: the importance matrix.
    """
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    ffi, lib = get_ffi(), get_lib()
    lib.llama_backend_init()
    options = lib.llama_model_quantize_default_params()
    options.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{kind}")
    options.nthread = 1
    kept = []
    if squares:
        # The last one has no name.
        data = ffi.new("struct llama_model_imatrix_data[]", len(squares) + 1)
        for each, (name, values) in zip(data, squares.items()):
            kept += [
                ffi.new("char[]", name.encode()),
                ffi.from_buffer("float[]", values),
            ]
            each.name, each.data, each.size = *kept[-2:], len(values)
        options.imatrix = data
    if lib.llama_model_quantize(
        os.fsencode(source), os.fsencode(path), ffi.addressof(options)
    ):
        raise RuntimeError(f"llama.cpp cannot make {path}")


def input_squares(model, data):
    """Return the mean squares of the inputs of kernels, by names of GGUF."""
    import keras_weightmods as kwm
    from keras_weightmods.calibration.inputs import input_norms
    from keras_weightmods.core.data import calibration_batches
    from keras_weightmods.exporting.gguf_families import family_of
    from keras_weightmods.exporting.gguf_file import tensors

    _, family = family_of(model.backbone)
    stored = tensors(family, model.backbone).items()
    names = {id(part): name for name, parts in stored for part in parts}
    targets = kwm.find_targets(model)
    norms = input_norms(model, targets, calibration_batches(model, data, 4))
    return {
        names[id(target.variable)]: np.square(norm)
        for target, norm in zip(targets, norms)
        if norm is not None
    }


# What C calls must stay.
_KEPT: list = []


class OpenVino:
    """OpenVINO GenAI, on the folder that `convert_to_openvino` has made.

    Everything by default, as is the precision: int8 activations where the
    weights are integers, bfloat16 on a processor that has it.
    """

    def __init__(self, folder, threads):
        import openvino_genai

        self.folder, self.genai = pathlib.Path(folder), openvino_genai
        # "SDPA" keeps no prompts: "PA" would read one that it knows for free.
        self.options = {"INFERENCE_NUM_THREADS": threads}
        self.pipeline = openvino_genai.LLMPipeline(
            str(folder), "CPU", ATTENTION_BACKEND="SDPA", **self.options
        )
        self.compiled = None

    def about(self):
        return f"OpenVINO GenAI {self.genai.__version__}"

    def generate(self, rows, count):
        import openvino

        config = self.genai.GenerationConfig()
        config.ignore_eos = True
        config.max_new_tokens = config.min_new_tokens = count
        rows = np.asarray(rows, "int64")
        inputs = self.genai.TokenizedInputs(
            openvino.Tensor(rows), openvino.Tensor(np.ones_like(rows))
        )
        return np.asarray(self.pipeline.generate(inputs, config).tokens)

    def perplexity(self, rows):
        import openvino

        if self.compiled is None:
            # The pipeline gives no logits of a prompt; the model does.
            self.compiled = openvino.Core().compile_model(
                self.folder / "openvino_model.xml", "CPU", self.options
            )
        request = self.compiled.create_infer_request()

        def logits_of(row):
            request.reset_state()
            row = np.asarray(row, "int64")[None]
            feeds = {
                "input_ids": row,
                "attention_mask": np.ones_like(row),
                "position_ids": np.arange(row.size)[None],
                "beam_idx": np.zeros(1, "int32"),
            }
            names = {name for x in self.compiled.inputs for name in x.names}
            feeds = {n: feeds[n] for n in feeds if n in names}
            return request.infer(feeds)["logits"][0]

        return perplexity_of(rows, logits_of)


def convert_to_openvino(gguf, folder):
    """Convert a GGUF file by optimum-intel, which rounds to int4.

    In blocks of 32 with zero points, the table in int8, also as the head.
    `pip install openvino-genai optimum-intel`, beside torch. Gemma 3 takes
    'transformers==5.0.*', which the tool of ONNX Runtime does not.
    """
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    rounding = OVWeightQuantizationConfig(
        bits=4, sym=False, group_size=32, ratio=1.0
    )
    with tempfile.TemporaryDirectory() as copy:
        convert_to_transformers(gguf, copy)
        OVModelForCausalLM.from_pretrained(
            copy, export=True, compile=False, quantization_config=rounding
        ).save_pretrained(folder)


class OnnxRuntimeGenAI:
    """ONNX Runtime GenAI, on the folder that its model builder has made.

    `pip install onnxruntime-genai`.
    """

    def __init__(self, folder, threads):
        import onnxruntime_genai

        self.genai = onnxruntime_genai
        config = onnxruntime_genai.Config(str(folder))
        options = {"intra_op_num_threads": threads}
        decoder = {"session_options": options}
        config.overlay(json.dumps({"model": {"decoder": decoder}}))
        made = json.loads((folder / "genai_config.json").read_text())
        window = made["model"]["decoder"].get("sliding_window", {})
        # The cache of a model with a window must not be shorter than it.
        self.shortest = window.get("window_size", 0)
        self.model = onnxruntime_genai.Model(config)

    def about(self):
        return f"ONNX Runtime GenAI {self.genai.__version__}"

    def generate(self, rows, count):
        rows = np.asarray(rows, "int32")
        generator = self.begin(len(rows), rows.shape[1] + count)
        generator.append_tokens(rows)
        for _ in range(count):
            generator.generate_next_token()
        found = [generator.get_sequence(i) for i in range(len(rows))]
        return np.stack(found)[:, -count:]

    def perplexity(self, rows):
        def logits_of(row):
            generator, found = self.begin(1, len(row) + 1), []
            # The file has the logits of the last token only.
            for token in row:
                generator.append_tokens(np.array([[token]], "int32"))
                found.append(generator.get_logits().reshape(-1))
            return np.stack(found)

        return perplexity_of(rows, logits_of)

    def begin(self, rows, length):
        length = max(length, self.shortest)
        parameters = self.genai.GeneratorParams(self.model)
        parameters.set_search_options(
            batch_size=rows,
            do_sample=False,
            max_length=length,
            # Goes on after a stop token.
            min_length=length,
        )
        return self.genai.Generator(self.model, parameters)


def convert_to_onnxruntime(gguf, folder):
    """Convert a GGUF file by the model builder, which rounds to int4.

    In blocks of 32 with zero points, the head in int8, activations in int8.
    `pip install onnxruntime-genai 'transformers<5.6' accelerate`, beside torch.
    """
    options = {
        "accuracy_level": 4,
        "algo_config": "k_quant_last",
        "block_size": 32,
        "is_symmetric": "false",
        "prune_lm_head": "true",
    }
    with tempfile.TemporaryDirectory() as copy:
        convert_to_transformers(gguf, copy)
        subprocess.run(
            [
                *(sys.executable, "-m", "onnxruntime_genai.models.builder"),
                *("-i", copy, "-o", folder, "-c", copy),
                *("-p", "int4", "-e", "cpu", "--extra_options"),
                *(f"{key}={value}" for key, value in options.items()),
            ],
            check=True,
        )


def convert_to_transformers(gguf, folder):
    import transformers

    source = {
        "pretrained_model_name_or_path": gguf.parent,
        "gguf_file": gguf.name,
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    tokenizer.save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **source, dtype="float32"
    )
    rope = model.config.rope_parameters
    if "sliding_attention" in rope:
        # Builder 0.18.0 knows Gemma 3 by its names in transformers 4.
        local = rope["sliding_attention"]["rope_theta"]
        rope |= {**rope["full_attention"], "rope_local_base_freq": local}
    model.save_pretrained(folder)


def perplexity_of(rows, logits_of):
    """Perplexity of int array (rows, tokens), of all but the first tokens.

    Args:
        rows: Int array of shape (rows, tokens).
        logits_of: Function from a row without its last token, of shape
            (tokens - 1,), to logits of shape (tokens - 1, vocabulary).
    """
    losses = []
    for row in np.asarray(rows):
        logits = np.asarray(logits_of(row[:-1]), "float64")
        logits -= logits.max(-1, keepdims=True)
        norm = np.log(np.exp(logits).sum(-1))
        losses.append(norm - logits[np.arange(len(logits)), row[1:]])
    return float(np.exp(np.mean(losses)))
