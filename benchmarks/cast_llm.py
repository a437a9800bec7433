"""CAST on a real LLM with a real budget, resumable: one JSON log for each run.

    python -m benchmarks.cast_llm --tokens 51200
    python -m benchmarks.cast_llm --preset gemma3_1b --tokens 1_000_000_000 \\
        --backend jax --dtype mixed_bfloat16 --batch-size 64 --length 1024 \\
        --text corpus.txt

Made for a GPU, and the same on a CPU. Stopped and started again with the same
arguments, it goes on from its last checkpoint. The log has the perplexity of
the dense model, before and after the prune, and quantized, on held-out text of
the same kind and on unrelated text. `benchmarks/results_page.py` makes
docs/results.md of the logs and fits the scaling law through them.
"""

import json
import os
import pathlib
import platform
import shutil
import time

from benchmarks import harness
from examples.command_line import add_preset, check
from examples.data.prose import load_rows, model_inputs

QUANTIZED = ("packed_int8", "int8", "int4")
LOGS = harness.RESULTS / "cast_llm"


def main():
    args = parse_arguments()
    harness.choose_backend(args.backend)
    run(args)


def parse_arguments():
    parser = harness.make_parser(__doc__)
    add_preset(parser)
    parser.add_argument("--tokens", type=int, default=51_200, help="to train")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument(
        "--init",
        default="dense",
        choices=("dense", "magnitude", "wanda", "sparsegpt"),
        help="what the training starts from, default: dense",
    )
    harness.add_backend(parser, "torch")
    parser.add_argument("--dtype", default="float32", help="Keras policy")
    parser.add_argument("--teacher-dtype", help="bfloat16 halves its memory")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--length", type=int, default=256, help="of a row")
    parser.add_argument(
        "--learning-rate", type=float, help="its peak, default: the recipe's"
    )
    parser.add_argument("--text", help="a UTF-8 file to train on instead")
    parser.add_argument("--rows", type=int, default=32, help="to evaluate on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--checkpoints", type=int, default=10, help="of one run, default: 10"
    )
    parser.add_argument(
        "--quantize",
        type=harness.subset(["", *QUANTIZED]),
        default=["packed_int8"],
        help=f"comma-separated, of {', '.join(QUANTIZED)}; default: the first",
    )
    parser.add_argument(
        "--json", help=f"default: in {LOGS.relative_to(harness.ROOT)}"
    )
    parser.add_argument("--save", help="a .keras file for the sparse model")
    args = parser.parse_args()
    check(
        parser, args, ("tokens", "batch_size", "length", "rows", "checkpoints")
    )
    args.quantize = [mode for mode in args.quantize if mode]
    args.steps = args.tokens // (args.batch_size * args.length)
    if not args.steps:
        parser.error("--tokens must be enough for one batch of rows")
    # Parts of one length, each of ten steps at least.
    args.checkpoints = min(args.checkpoints, max(1, args.steps // 10))
    args.steps -= args.steps % args.checkpoints
    if args.json is None:
        name = pathlib.Path(args.preset or "smollm2_135m").name
        if args.init != "dense":
            name += f"-{args.init}"
        args.json = LOGS / f"{name}-{args.tokens}-seed{args.seed}.json"
    return args


def run(args):
    import keras

    import keras_weightmods as kwm
    from examples.data.smollm2 import load_causal_lm

    keras.utils.set_random_seed(args.seed)
    model = load_causal_lm(args.preset, args.dtype)
    train, held_out, unrelated = load_rows(
        model.preprocessor.tokenizer,
        args.length + 1,
        args.text,
        train=None,
        held_out=args.rows,
        reference=args.rows // 2 or 1,
    )
    # Not a part of the state that a checkpoint holds.
    model.preprocessor = None
    measured = {}

    def record(name):
        # Measures the current `model`.
        measure = kwm.Perplexity(model)
        measured[name] = {
            "held_out": measure(held_out, "held-out"),
            "unrelated": measure(unrelated, "unrelated"),
        }
        print(f"{name}: {measured[name]}", flush=True)

    record("dense")
    cast = kwm.CAST(
        model,
        pattern=args.pattern,
        init=args.init,
        teacher_dtype=args.teacher_dtype,
    )
    recipe = kwm.CAST.default_recipe(args.init, targets=cast.targets)
    if args.learning_rate is None:
        cast.compile()
    else:
        recipe["learning_rate"] = args.learning_rate
        cast.compile(make_optimizer(args, recipe))
    seconds = train_resumably(cast, train, args)
    record("before_prune")
    cast.finalize()
    kwm.assert_sparse(model, args.pattern)
    record("after_prune")
    if args.save:
        model.save(args.save)
    sparse = model.get_weights() if args.quantize else None
    for mode in args.quantize:
        if mode == "packed_int8":
            kwm.pack(model, dtype="int8")
        else:
            # A model is quantized once, and for good.
            model = load_causal_lm(args.preset, args.dtype)
            model.preprocessor = None
            model.set_weights(sparse)
            model.quantize(mode)
            kwm.assert_sparse(model, args.pattern)
        record(mode)
    log = {
        "model": args.preset or "SmolLM2-135M-Instruct",
        "pattern": args.pattern,
        "seed": args.seed,
        "tokens": args.steps * args.batch_size * args.length,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "length": args.length,
        "text": args.text or "sotu",
        "evaluated_tokens": held_out[:, 1:].size,
        "init": args.init,
        "recipe": recipe,
        "perplexity": measured,
        "seconds": round(seconds, 1),
        "backend": args.backend,
        "dtype": args.dtype,
        "machine": {**harness.machine(), "accelerator": accelerator()},
        "environment": {
            name: value
            for name, value in os.environ.items()
            if name.startswith("MALLOC_")
        },
        "versions": {
            "python": platform.python_version(),
            "keras_weightmods": kwm.__version__,
            **harness.versions("keras-hub"),
        },
    }
    harness.write_json(args.json, log)
    print(f"written to {args.json}")


def make_optimizer(args, recipe):
    """The recipe with its schedule at another learning rate."""
    import keras_weightmods as kwm
    from keras_weightmods.calibration.schedule import WarmupLinearDecay

    schedule = WarmupLinearDecay(
        recipe["learning_rate"], max(1, round(0.1 * args.steps)), args.steps
    )
    return kwm.AdamS(
        pattern=args.pattern,
        total_steps=args.steps,
        **{**recipe, "learning_rate": schedule},
    )


def train_resumably(cast, rows, args):
    """Trains, from the last checkpoint on; returns the seconds it took."""
    import keras

    batches = make_batches(rows, args, args.steps // args.checkpoints)
    folder = pathlib.Path(args.json).with_suffix(".checkpoint")
    clock = folder / "seconds.json"

    class Clock(keras.callbacks.Callback):
        """Adds up the time of all the parts of an interrupted run."""

        seconds = json.loads(clock.read_text()) if clock.exists() else 0.0

        def on_epoch_begin(self, epoch, logs=None):
            batches.epoch = epoch
            self.began = time.monotonic()

        def on_epoch_end(self, epoch, logs=None):
            self.seconds += time.monotonic() - self.began
            folder.mkdir(parents=True, exist_ok=True)
            clock.write_text(json.dumps(self.seconds))

    watch = Clock()
    cast.fit(
        batches,
        epochs=args.checkpoints,
        shuffle=False,
        verbose=2,
        callbacks=[watch, keras.callbacks.BackupAndRestore(folder / "run")],
    )
    shutil.rmtree(folder, ignore_errors=True)
    return watch.seconds


def make_batches(rows, args, steps_per_epoch):
    import keras
    import numpy as np

    class Batches(keras.utils.PyDataset):
        """The batches of one part of the run, whatever was run before it.

        Rows are taken in a random order, another one in each pass.
        """

        epoch = 0

        def __len__(self):
            return steps_per_epoch

        def __getitem__(self, index):
            first = (self.epoch * len(self) + index) * args.batch_size
            batch = np.stack(
                [rows[row_of(i)] for i in range(first, first + args.batch_size)]
            )
            return model_inputs(batch[:, :-1]), batch[:, 1:]

    orders = {}

    def row_of(index):
        turn, place = divmod(index, len(rows))
        if turn not in orders:
            orders.clear()
            random = np.random.default_rng([args.seed, turn])
            orders[turn] = random.permutation(len(rows))
        return orders[turn][place]

    return Batches()


def accelerator():
    """The name of the GPU or TPU in use, or None."""
    import keras

    if keras.backend.backend() == "torch":
        import torch

        on_gpu = torch.cuda.is_available()
        return torch.cuda.get_device_name() if on_gpu else None
    if keras.backend.backend() == "jax":
        import jax

        (device, *_) = jax.devices()
        return None if device.platform == "cpu" else device.device_kind
    import tensorflow as tf

    devices = tf.config.list_physical_devices("GPU")
    return devices[0].name if devices else None


if __name__ == "__main__":
    main()
