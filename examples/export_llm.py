"""Takes a 2:4 SmolLM2-135M out of Keras, and compares what runs it there.

    python -m examples.export_llm --backend torch
    python -m examples.export_llm --backend tensorflow

Pruned in one shot by Wanda, packed, and exported by `kwm.export`:

- to transformers (`pip install transformers`): the logits of a prompt;
- to GGUF in f16, q8_0 and q4_0 (`pip install llama-cpp-py-sync`, or
  llama-cpp-python, which is compiled): how many of the tokens that llama.cpp
  writes, greedily, are those that Keras writes;
- on TensorFlow to a SavedModel, dense and packed, which runs in another
  process: the logits of the prompt.

What is not installed is left out. Nothing is trained: the text is poor.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from examples import command_line
from examples.data.prose import load_rows, model_inputs

PROMPTS = (
    "The most important task of the government is",
    "The capital of France is",
    "Once upon a time there was a",
)
LLAMA_CPP = ("llama_cpp", "llama_cpp_py_sync")
SERVE = """
import sys
import numpy as np
import tensorflow as tf
import keras_weightmods.runtime
model = tf.saved_model.load(sys.argv[1])
x = dict(np.load(sys.argv[2]))
np.save(sys.argv[3], model.serve(x).numpy())
"""


def main():
    parser = command_line.make_parser(__doc__)
    command_line.add_backend(parser)
    parser.add_argument("--rows", type=int, default=8, help="for Wanda")
    parser.add_argument(
        "--dense", action="store_true", help="neither prune nor pack"
    )
    parser.add_argument("--tokens", type=int, default=32, help="to write")
    args = parser.parse_args()
    command_line.check(parser, args, ("rows", "tokens"))
    command_line.choose_backend(args.backend)
    run(args)


def run(args):
    import keras

    import keras_weightmods as kwm
    from examples.data.smollm2 import load_smollm2

    model = load_smollm2("float32")
    tokenizer = model.preprocessor.tokenizer
    prompts = [[int(t) for t in tokenizer(text)] for text in PROMPTS]
    if not args.dense:
        (rows,) = load_rows(tokenizer, 256, train=args.rows)
        kwm.sparsify(
            model, "2:4", model_inputs(rows), criterion="wanda", verbose=0
        )
        print(kwm.pack(model).totals)
    # KerasHub exports no tokenizer of this kind.
    model = type(model)(backbone=model.backbone, preprocessor=None)
    logits = logits_of(model, prompts[0])
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        to_transformers(model, prompts[0], logits, folder / "transformers")
        if keras.backend.backend() == "tensorflow":
            kinds = (False,) if args.dense else (False, True)
            to_saved_model(model, prompts[0], logits, folder, kinds)
        to_gguf(model, prompts, args.tokens, folder)


def logits_of(model, prompt):
    import numpy as np
    from keras import ops

    return ops.convert_to_numpy(model(model_inputs(np.array([prompt]))))


def to_transformers(model, prompt, expected, path):
    import keras_weightmods as kwm

    try:
        import torch
        import transformers
    except ImportError as error:
        print(f"transformers: left out, {error}")
        return
    exported("transformers", kwm.export, model, path, format="transformers")
    found = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        logits = found(torch.tensor([prompt])).logits.numpy()
    report_difference("transformers", logits, expected)
    kept = [
        int((weight.reshape(len(weight), -1, 4) != 0).sum(-1).max())
        for name, weight in found.state_dict().items()
        if "_proj" in name
    ]
    print(f"  {len(kept)} kernels, at most {max(kept)} of 4 weights not zero")


def to_saved_model(model, prompt, expected, folder, kinds):
    import numpy as np

    import keras_weightmods as kwm

    x, y = folder / "x.npz", folder / "y.npy"
    inputs = model_inputs(np.array([prompt], "int32"))
    np.savez(x, **inputs)
    for kept in kinds:
        name = "SavedModel, packed" if kept else "SavedModel"
        path = folder / name
        exported(name, kwm.export, model, path, keep_packed=kept)
        command = [sys.executable, "-c", SERVE, path, x, y]
        subprocess.run(command, check=True)
        report_difference(name, np.load(y), expected)


def to_gguf(model, prompts, count, folder):
    import numpy as np

    import keras_weightmods as kwm
    from benchmarks.peers import LlamaCpp
    from examples.data import smollm2

    if not any(map(importlib.util.find_spec, LLAMA_CPP)):
        print(f"GGUF: left out, no {' or '.join(LLAMA_CPP)}")
        return
    written = [by_keras(model, prompt, count) for prompt in prompts]
    for dtype in ("f16", "q8_0", "q4_0"):
        path = folder / f"{dtype}.gguf"
        exported(
            f"GGUF {dtype}",
            kwm.export,
            model,
            path,
            format="gguf",
            dtype=dtype,
            tokenizer_from=smollm2.find_gguf(),
        )
        llama = LlamaCpp(path, threads=1)
        print(f"  {llama.about().split(';')[0]}")
        for text, prompt, expected in zip(PROMPTS, prompts, written):
            (found,) = llama.generate(np.array([prompt]), count).tolist()
            same = [a == b for a, b in zip(found, expected)]
            first = same.index(False) if False in same else count
            print(f"  {first} of {count} tokens alike: {text!r}")


def by_keras(model, prompt, count):
    import numpy as np

    model.compile(sampler="greedy")
    padded = np.zeros((1, len(prompt) + count), "int32")
    padded[0, : len(prompt)] = prompt
    inputs = model_inputs(padded)
    inputs["padding_mask"][0, len(prompt) :] = 0
    found = model.generate(inputs, stop_token_ids=None)
    return np.asarray(found["token_ids"])[0, len(prompt) :].tolist()


def exported(name, export, model, path, **kwargs):
    start = time.perf_counter()
    export(model, path, **kwargs)
    seconds = time.perf_counter() - start
    files = [path] if path.is_file() else path.rglob("*")
    size = sum(os.path.getsize(file) for file in files) / 1e6
    print(f"{name}: {size:.0f} MB in {seconds:.1f} s")


def report_difference(name, found, expected):
    import numpy as np

    difference = np.abs(found - expected).max()
    largest = np.abs(expected).max()
    print(f"  logits differ by at most {difference:.1e} of {largest:.1f}")


if __name__ == "__main__":
    main()
