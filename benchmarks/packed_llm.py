"""Tokens per second and size of a packed language model, and of its peers.

    python -m benchmarks.packed_llm
    python -m benchmarks.packed_llm --backends torch --rounds 3 --json FILE

SmolLM2-135M is made 2:4 by magnitude, which ruins its text but does not change
the speed. It writes text with `generate`, greedy, batch 1: it reads a prompt
and writes tokens one by one. Each backend has one process, in which the models
take turns in a rotating order, so that changes of the machine's speed affect
all of them. A ratio is the median, over the rounds, of the ratio to the dense
model in the same round.

The peers are the usual alternatives, on the same weights stored dense: bfloat16
weights, Keras' int8 quantization, and torch's dynamic int8 quantization. The
last uses the operator behind `torch.ao`'s dynamic Linear in the layers, because
Keras layers are no `torch.nn.Linear`.

Memory is that of the weights alone. The times are only good on a machine that
does nothing else.
"""

import functools
import pathlib
import statistics
import tempfile
import warnings

from benchmarks import harness, peers

PROMPT = "The most important task of the government is"
DENSE = "dense float32"
# Row: arguments of `pack`. Integers are multiplied by int8 inputs, unless the
# row says otherwise.
PACKED: dict[str, dict[str, str | None]] = {
    "packed float32": {"dtype": "float32"},
    "packed bfloat16": {"dtype": "bfloat16"},
    "packed int8, float inputs": {
        "dtype": "int8",
        "head": None,
        "activations": "float32",
    },
    "packed int8": {"dtype": "int8", "head": None},
    "packed int8, int8 head": {"dtype": "int8"},
    "packed int4": {"dtype": "int4", "head": None},
    "packed int4, int8 head": {"dtype": "int4", "head": "int8"},
    "packed int4, int4 head": {"dtype": "int4"},
}
# Added to the name of a row: the same, with `compile_generate`.
COMPILED = ", compiled"
PEERS = ("dense bfloat16", "Keras int8", "torch dynamic int8")

# Seconds for a text.
TOO_LONG = 60

# Over the dense model, at least.
SPEED_BARS = {
    "jax": {"packed float32": 1.5, "packed int8": 2.0},
    "tensorflow": {"packed float32": 1.0, "packed int8": 1.0},
    "torch": {"packed float32": 1.0, "packed int8": 1.0},
}
# Bytes of the packed kernels in a file over their dense bytes, at most.
SHARE_BARS = {
    "packed float32": 0.57,
    "packed bfloat16": 0.31,
    "packed int8": 0.2,
    "packed int4": 0.12,
}


def main():
    args = parse_arguments()
    about = {
        "model": "SmolLM2-135M-Instruct, 210 kernels made 2:4",
        "prompt": PROMPT,
        "new_tokens": args.new_tokens,
        "rounds": args.rounds,
    }
    harness.compare_backends(args, measure, about, print_report)


def parse_arguments():
    parser = harness.parser_of_workers(__doc__, "packed_llm.json")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--rows", help="names, with semicolons between; by default all"
    )
    parser.add_argument(
        "--compiled",
        action="store_true",
        help="each row also with compile_generate",
    )
    return parser.parse_args()


def measure(args):
    from rich.progress import track

    names = [DENSE, *PACKED, *PEERS]
    if args.worker != "torch":
        names.remove("torch dynamic int8")
    if args.rows:
        chosen = {DENSE, *args.rows.split(";")}
        names = [name for name in names if name in chosen]
    if args.compiled:
        names = [n for name in names for n in (name, name + COMPILED)]
    rows = {}
    models: dict = {}
    with warnings.catch_warnings():
        # keras_hub imports TensorFlow on every backend, with its own warnings.
        warnings.simplefilter("ignore")
        for name in track(names, description=f"{args.worker}: models"):
            models[name], rows[name] = make_row(name, models.get(DENSE))
    prompt_tokens = len(models[DENSE].preprocessor.tokenizer(PROMPT))
    calls = {
        name: functools.partial(
            harness.seconds_of,
            model.generate,
            PROMPT,
            max_length=prompt_tokens + args.new_tokens,
            stop_token_ids=None,
        )
        for name, model in models.items()
    }
    warm = harness.take_turns(calls, 1, f"{args.worker}: warm up")
    seconds = harness.take_turns(calls, 1, f"{args.worker}: first round")
    # One run says enough of a peer that is this slow.
    calls = {n: c for n, c in calls.items() if seconds[n][0] <= TOO_LONG}
    rounds = harness.take_turns(
        calls, args.rounds - 1, f"{args.worker}: other rounds"
    )
    for name, row in rows.items():
        (row["first_seconds"],) = warm[name]
        row["seconds"] = [*seconds[name], *rounds.get(name, [])]
        median = statistics.median(row["seconds"])
        row["tokens_per_second"] = args.new_tokens / median
        row["ratio"] = statistics.median(
            base / own
            for base, own in zip(rows[DENSE]["seconds"], row["seconds"])
        )
    return {
        "versions": harness.versions("keras-hub"),
        "prompt_tokens": prompt_tokens,
        "rows": [{"model": name, **row} for name, row in rows.items()],
    }


def make_row(name, dense):
    """A model, with the weights of `dense`, and what is known of it so far."""
    import keras_weightmods as kwm
    from examples.data.smollm2 import load_smollm2

    is_compiled, name = name.endswith(COMPILED), name.removesuffix(COMPILED)
    model = load_smollm2("bfloat16" if name == "dense bfloat16" else "float32")
    if dense is None:
        kwm.sparsify(model, "2:4", criterion="magnitude", verbose=0)
    else:
        model.set_weights(dense.get_weights())
    if name in PACKED:
        report = kwm.pack(model, **PACKED[name])
        kernels = [
            w for w in report.weights if not w.path.endswith("embeddings")
        ]
        dense = sum(weight.dense_bytes for weight in kernels)
        packed = sum(weight.packed_bytes for weight in kernels)
        row = {
            "memory_bytes": report.totals["model_bytes"],
            "packed_bytes": packed,
            "packed_share": packed / dense,
        }
    elif name == "Keras int8":
        # Not the model: its tokenizer is a layer that cannot be quantized.
        model.backbone.quantize("int8")
        row = {"memory_bytes": harness.nbytes(model.weights)}
    elif name == "torch dynamic int8":
        held = peers.quantize_products(model, peers.dynamic_int8)
        row = {"memory_bytes": held}
    else:
        row = {"memory_bytes": harness.nbytes(model.weights)}
    model.compile(sampler="greedy")
    if is_compiled:
        kwm.compile_generate(model)
    row["file_bytes"] = file_bytes(model, name)
    return model, row


def file_bytes(model, name):
    import keras_weightmods as kwm

    if name == "torch dynamic int8":
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model"
        if name in PACKED:
            kwm.save_model(model, path)
        else:
            path = path.with_suffix(".keras")
            model.save(path)
        return path.stat().st_size


def print_report(report):
    table = harness.table(
        f"{report['model']}, {report['new_tokens']} tokens, batch 1",
        text=("backend", "model"),
        numbers=("tokens/s", "x dense", "memory MB", "share", "file MB"),
    )
    for backend, result in report["backends"].items():
        for row in result["rows"]:
            name, size = row["model"], row["file_bytes"]
            share = row.get("packed_share")
            table.add_row(
                backend,
                name,
                f"{row['tokens_per_second']:.1f}",
                harness.verdict(
                    row["ratio"], SPEED_BARS[backend].get(name), ">="
                ),
                f"{row['memory_bytes'] / 1e6:.0f}",
                ""
                if share is None
                else harness.verdict(share, SHARE_BARS.get(name)),
                "" if size is None else f"{size / 1e6:.0f}",
            )
        table.add_section()
    harness.print_all(
        table,
        "share: bytes of the packed kernels over their dense float32 bytes; "
        "memory: all weights",
        harness.describe(report),
        width=100,
    )


if __name__ == "__main__":
    main()
