"""The command `bench`: how fast a model is on this machine."""

import statistics
import time

import keras_weightmods as kwm
from keras_weightmods.cli.command import MODEL, argument, command
from keras_weightmods.cli.files import (
    inputs_of,
    is_language_model,
    load_model,
    read_data,
)
from keras_weightmods.utils import checks
from keras_weightmods.utils.dtypes import bytes_of
from keras_weightmods.utils.report import size_text


@command(
    "bench",
    MODEL,
    argument("--batch-size", type=int, default=1, help="default: 1"),
    argument(
        "--prompt", type=int, default=128, help="tokens to read; default: 128"
    ),
    argument(
        "--tokens", type=int, default=64, help="tokens to write; default: 64"
    ),
    argument("--rounds", type=int, default=5, help="default: 5"),
    argument(
        "--as-is",
        action="store_true",
        help="a language model without compile_generate",
    ),
    argument("--data", help="inputs of any other model, a .npy or .npz file"),
)
def _bench(args):
    """Measure how fast a model is, on this machine as it is.

    A language model of KerasHub writes text, greedily, by `compile_generate`:
    the tokens a second that it reads of a prompt, and writes after it. Any
    other model predicts a batch. Medians of some rounds after a first one,
    which compiles; a machine that does other work too gives other numbers.

    examples:
      keras-weightmods bench packed.safetensors --tokens 128
      keras-weightmods bench classifier.keras --batch-size 32 --json
    """
    for name in ("batch_size", "prompt", "rounds"):
        checks.check_int(name, getattr(args, name), 1)
    checks.check_int("tokens", args.tokens, 2)
    import keras

    model = load_model(args.model)
    found = {
        "backend": keras.backend.backend(),
        "weights_bytes": bytes_of((w.shape, w.dtype) for w in model.weights),
        "batch_size": args.batch_size,
    }
    if is_language_model(model) and hasattr(model, "generate"):
        found |= _speeds(model, args)
        text = (
            f"writes {found['written_per_second']:.1f} tokens/s, reads "
            f"{found['read_per_second']:.1f}"
        )
    else:
        found["seconds"] = _seconds_of_batch(model, args)
        found["per_second"] = args.batch_size / found["seconds"]
        text = (
            f"{1e3 * found['seconds']:.2f} ms for a batch, "
            f"{found['per_second']:.1f} inputs/s"
        )
    size = size_text(found["weights_bytes"])
    about = f"{found['backend']}, batch {args.batch_size}, weights {size}"
    return f"{text} ({about})", found


def _speeds(model, args):
    """Return the tokens a second that a language model reads and writes."""
    import numpy as np

    # Tokens, not text.
    model.preprocessor = None
    model.compile(sampler="greedy")
    if not args.as_is:
        kwm.compile_generate(model)
    most = model.backbone.vocabulary_size
    shape = args.batch_size, args.prompt
    rows = np.random.default_rng(0).integers(most, size=shape, dtype="int32")

    def generate(count):
        width = ((0, 0), (0, count))
        inputs = {
            "token_ids": np.pad(rows, width),
            "padding_mask": np.pad(np.ones_like(rows), width),
        }
        return lambda: model.generate(inputs, stop_token_ids=None)

    first = _median(generate(1), args.rounds)
    whole = _median(generate(args.tokens), args.rounds)
    # On a machine that does other work too, the longer may take no longer.
    rest = max(whole - first, 1e-9)
    return {
        "prompt": args.prompt,
        "tokens": args.tokens,
        "read_per_second": args.batch_size * args.prompt / first,
        "written_per_second": args.batch_size * (args.tokens - 1) / rest,
    }


def _seconds_of_batch(model, args):
    import keras
    import numpy as np

    random = np.random.default_rng(0)

    def array(tensor):
        shape = tensor.shape[1:]
        if None in shape:
            expected = f"given: the model takes inputs of shape {tensor.shape}"
            raise checks.error("data", expected, None)
        made = random.normal(size=(args.batch_size, *shape))
        return np.abs(made).astype(tensor.dtype)

    if args.data is not None:
        data = read_data(model, args.data, args.batch_size)
        x = inputs_of(model, data)
        if len(x) != args.batch_size:
            expected = f"of {args.batch_size} inputs at least"
            raise checks.error("data", expected, f"{len(x)} in {args.data}")
    else:
        inputs = getattr(model, "inputs", None)
        if inputs is None:
            raise checks.error(
                "data", "given for a model without `inputs`", None
            )
        # A Sequential model has no other.
        structure = getattr(model, "input", inputs[0])
        x = keras.tree.map_structure(array, structure)
    return _median(lambda: model.predict_on_batch(x), args.rounds)


def _median(call, rounds):
    """Return the median seconds of a call, after a first one."""
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
