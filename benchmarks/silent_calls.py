"""Which public calls on SmolLM2-135M leave one waiting, and show nothing.

    python -m benchmarks.silent_calls
    python -m benchmarks.silent_calls --backend jax --only pack,files

Each call runs with its defaults, not made quiet. Shown are its time, the time
of its first output, and the longest time between two outputs. It ends with an
error if a call shows nothing for more than two seconds, plus half a second for
the timer, both by the clock and in processor time. A busy machine takes longer
for everything.
"""

import io
import itertools
import pathlib
import sys
import tempfile
import time

from benchmarks import harness

DELAY = 2.5


class Watched(io.TextIOBase):
    """Passes text on to a stream, and keeps the times."""

    def __init__(self, stream):
        self.stream, self.times, self.worked = stream, [], []

    def write(self, text):
        if text.strip():
            self.times.append(time.perf_counter())
            self.worked.append(time.process_time())
        return self.stream.write(text)

    def flush(self):
        self.stream.flush()


class Calls:
    """Runs calls, and keeps how long each was silent."""

    def __init__(self):
        self.rows, self.late = [], []

    def __call__(self, name, function, *args, **kwargs):
        watched = Watched(sys.stderr)
        before, sys.stdout = sys.stdout, watched
        start, worked = time.perf_counter(), time.process_time()
        try:
            result = function(*args, **kwargs)
        finally:
            end = time.perf_counter()
            watched.worked.append(time.process_time())
            sys.stdout = before
        times = [start, *watched.times, end]
        first = times[1] - start
        last = end - times[-2]
        pause = max(b - a for a, b in itertools.pairwise(times))
        self.rows.append((name, end - start, first, pause, last))
        if min(first, watched.worked[0] - worked) > DELAY:
            self.late.append(name)
        print(f"\n{row_text(*self.rows[-1])}", flush=True)
        return result


def main():
    parser = harness.make_parser(__doc__)
    harness.add_backend(parser)
    parser.add_argument("--only", type=harness.subset(GROUPS), default=GROUPS)
    args = parser.parse_args()
    harness.choose_backend(args.backend)
    calls = Calls()
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            GROUPS[name](calls, pathlib.Path(folder))
    print(f"\n{HEADER}")
    for row in calls.rows:
        print(row_text(*row))
    if calls.late:
        names = ", ".join(calls.late)
        raise SystemExit(f"Silent for more than {DELAY} s: {names}")


HEADER = f"{'seconds':<36}  takes  shows  pause   last"


def row_text(name, *seconds):
    return f"{name:<36}" + "".join(f"{each:7.1f}" for each in seconds)


def load(rows=2, length=128, dtype="float32"):
    """Return the model, and rows of text as its inputs."""
    from examples.data.prose import load_rows, model_inputs
    from examples.data.smollm2 import load_smollm2

    model = load_smollm2(dtype)
    tokenizer = model.preprocessor.tokenizer
    (tokens,) = load_rows(tokenizer, length, train=rows)
    return model, model_inputs(tokens), tokens


def few(model, count=3):
    """Return the first kernels of the model."""
    import keras_weightmods as kwm

    return kwm.find_targets(model)[:count]


def prune(calls, folder):
    import keras_weightmods as kwm

    model, x, tokens = load()
    calls("find_targets", kwm.find_targets, model)
    calls("perplexity", kwm.perplexity, model, tokens)
    calls("self_generated", kwm.self_generated, model, 2, 64, batch_size=3)
    calls("sparsify, magnitude", kwm.sparsify, model, "2:4")
    calls("sparsity_report", kwm.sparsity_report, model)
    calls("assert_sparse", kwm.assert_sparse, model, "2:4")
    model, x, tokens = load()
    some = few(model)
    pruned = kwm.sparsify, model, "2:4", x
    calls("sparsify, Wanda", *pruned, criterion="wanda")
    refined = {"criterion": "sparsegpt", "refine": "swaps"}
    calls("sparsify, SparseGPT and swaps", *pruned, targets=some, **refined)
    plain = {"refine": None, "head": False}
    calls("quantize", kwm.quantize, model, x, targets=some, **plain)
    calls("quantize, head", kwm.quantize, model, x, targets=[])
    calls("quantize, blocks", kwm.quantize, model, x, targets=some, head=False)


def pack(calls, folder):
    import numpy as np

    import keras_weightmods as kwm

    model, _, tokens = load()
    kwm.sparsify(model, "2:4", verbose=0)
    calls("pack, float32", kwm.pack, model)
    calls("sparsity_report, packed", kwm.sparsity_report, model)
    calls("unpack", kwm.unpack, model)
    packed = {"head": "int8"}
    calls("pack, int4 and a head in int8", kwm.pack, model, "int4", **packed)
    path = folder / "packed.safetensors"
    calls("save_model, packed", kwm.save_model, model, path)
    calls("load_model, packed", kwm.load_model, path)
    calls("compile_generate", kwm.compile_generate, model)
    preprocessor, model.preprocessor = model.preprocessor, None
    model.compile(sampler="greedy")
    prompt = {
        "token_ids": np.array(tokens[:1, :64]),
        "padding_mask": np.arange(64)[None] < 32,
    }
    calls(
        "generate, the first",
        lambda: model.generate(prompt, stop_token_ids=None),
    )
    model.preprocessor = preprocessor
    calls("unpack, int4", kwm.unpack, model)


def files(calls, folder):
    import keras_weightmods as kwm

    model, _, _ = load()
    path = folder / "dense.safetensors"
    calls("save_model", kwm.save_model, model, path)
    other = calls("load_model", kwm.load_model, path)
    calls("merge, models", kwm.merge, [path, other], other)
    out = folder / "merged.safetensors"
    calls("merge, files, ties", kwm.merge, [path, path], out, "ties", base=path)
    base = model.get_weights()
    nudge(model)
    task = folder / "task.safetensors"
    patch_and_file(calls, model, base, task)
    lora = folder / "lora"
    calls("Patch.to_lora", kwm.Patch.load(task).to_lora, model, lora)
    calls("Patch.from_lora", kwm.Patch.from_lora, model, lora)


def patch_and_file(calls, model, base, path):
    import keras_weightmods as kwm

    patch = calls("Patch.from_models", kwm.Patch.from_models, model, base)
    calls("Patch.save", patch.save, path)
    model.set_weights(base)
    patch = calls("Patch.load", kwm.Patch.load, path)
    calls("Patch.apply", patch.apply, model)
    calls("Patch.remove", patch.remove, model)


def signatures(calls, folder):
    import keras_weightmods as kwm

    model, _, _ = load()
    init = model.get_weights()
    nudge(model)
    clean = model.get_weights()
    nudge(model)
    signature = calls(
        "WeightSignature.extract",
        *(kwm.WeightSignature.extract, init, clean, model),
        depth=211,
        statistics="keep",
        like=model,
    )
    model.set_weights(clean)
    small = calls("quantize", signature.quantize)
    calls("truncate", signature.truncate, 3)
    calls("report", signature.report)
    calls("cosine_similarity", signature.cosine_similarity, small)
    two = [signature, small]
    calls("WeightSignature.sum", kwm.WeightSignature.sum, two)
    path = folder / "signature.safetensors"
    calls("WeightSignature.save", signature.save, path)
    calls("WeightSignature.load", kwm.WeightSignature.load, path)
    calls("apply", signature.apply, model)
    calls("remove", signature.remove, model)


def cast(calls, folder):
    import keras_weightmods as kwm

    model, x, tokens = load(2)
    y = tokens
    wrapped = calls("CAST", kwm.CAST, model)
    calls("compile", wrapped.compile)
    calls("fit, two steps", wrapped.fit, x, y, batch_size=1)
    calls("finalize", wrapped.finalize)


def lift(calls, folder):
    import keras

    import keras_weightmods as kwm

    model, x, tokens = load(2)
    base = model.get_weights()
    # `fit` of a task would preprocess what are tokens already.
    model.preprocessor = None
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(kwm.SparseAdamW(1e-4), loss)
    masks = kwm.PrincipalMaskCallback(0.05, refresh_every=1)
    # Keras builds its metrics before `fit` asks any callback.
    model.evaluate(x, tokens, batch_size=1, verbose=0)
    calls("PrincipalMaskCallback.attach", masks.attach, model)
    # At the second step the masks are set anew.
    fit = {"batch_size": 1, "callbacks": [masks]}
    calls("fit, two steps", model.fit, x, tokens, **fit)
    calls("detach", masks.detach)
    path = folder / "task.safetensors"
    patch_and_file(calls, model, base, path)


def reparameterize(calls, folder):
    import keras_weightmods as kwm

    model, _, _ = load()
    calls("attach_compander", kwm.attach_compander, model)
    calls("fold", kwm.fold, model)
    calls("attach_weight_norm", kwm.attach_weight_norm, model)
    calls("fold", kwm.fold, model)
    calls("attach_scaling", kwm.attach_scaling, model)
    calls("fold", kwm.fold, model)
    constraint = kwm.SemiStructuredSparse
    calls("SemiStructuredSparse.attach", constraint.attach, model)
    calls("detach", constraint.detach, model)
    model.backbone.enable_lora(4)
    calls("merge_lora", kwm.merge_lora, model)


def exports(calls, folder):
    import keras

    import keras_weightmods as kwm
    from examples.data import smollm2

    model, _, _ = load()
    # KerasHub exports no tokenizer of this kind.
    model = type(model)(backbone=model.backbone, preprocessor=None)
    kwm.sparsify(model, "2:4", verbose=0)
    path = folder / "transformers"
    calls("export, transformers", kwm.export, model, path, "transformers")
    gguf = {"format": "gguf", "tokenizer_from": smollm2.find_gguf()}
    for dtype in ("f16", "q4_0"):
        path = folder / f"{dtype}.gguf"
        name = f"export, GGUF {dtype}"
        calls(name, kwm.export, model, path, dtype=dtype, **gguf)
    kwm.pack(model, verbose=0)
    format, path = {
        "torch": ("torch", folder / "model.pt2"),
        "tensorflow": ("tf_saved_model", folder / "saved"),
    }.get(keras.backend.backend(), (None, None))
    if format:
        calls(f"export, {format}", kwm.export, model, path, format)


def nudge(model):
    """Change all weights a little."""
    model.set_weights([each * 1.001 for each in model.get_weights()])


GROUPS = {
    "prune": prune,
    "pack": pack,
    "files": files,
    "signatures": signatures,
    "cast": cast,
    "lift": lift,
    "reparameterize": reparameterize,
    "exports": exports,
}

if __name__ == "__main__":
    main()
