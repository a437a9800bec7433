"""Where the time of a new token goes, by the shapes of the kernels.

    python -m benchmarks.token_time "build/runtimes/smollm2/85 MB"

The file is a packed language model of `kwm.save_model`. On JAX, with one row
of activations, the products with all kernels of a shape run one after the
other, as in a step of `compile_generate`. A plain read of 256 MB goes before
each, so that the kernels come from memory, as they do for a token. Shown are
medians: the time of all kernels of a shape, its part of the measured time of a
token, and the bytes a second, beside those of the plain read. "the rest" of a
token is attention, norms, the work of XLA and what a step loses between
products. Products that share an input are one call there, and two or three
here, and each begins with cold memory. So small kernels take longer here, and
the parts can sum to more than the token.

The times are only good on a machine that does nothing else.
"""

import collections
import concurrent.futures
import os
import pathlib
import statistics
import warnings

from benchmarks import harness

READ = 2**28  # bytes of a plain read
PROMPT = 8


def main():
    parser = harness.make_parser(__doc__)
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    harness.choose_backend("jax")
    # keras_hub imports TensorFlow on every backend, with its own warnings.
    warnings.simplefilter("ignore")
    report = {
        "machine": harness.machine(),
        "file": args.file.name,
        **measure(args),
    }
    if args.json:
        harness.write_json(args.json, report)
    print_report(report)


def measure(args):
    import keras_hub  # noqa: F401

    import keras_weightmods as kwm
    from keras_weightmods.core.reparameterization import reparameterizations
    from keras_weightmods.packing.packed_parameters import PackedParameters

    model = kwm.load_model(args.file)
    shapes = collections.defaultdict(list)
    for item in reparameterizations(model, PackedParameters):
        shapes[*item.shape, item.form.name].append(item.packed)
    calls = {"read": plain_read(), "token": token(model, args.new_tokens)}
    calls |= {shape: products(found) for shape, found in shapes.items()}
    for call in calls.values():
        call()  # compiles
    times = collections.defaultdict(list)
    for _ in range(args.rounds):
        for name, call in calls.items():
            if name not in ("read", "token"):
                times["read"].append(harness.seconds_of(calls["read"]))
            times[name].append(harness.seconds_of(call))
    seconds = {name: statistics.median(found) for name, found in times.items()}
    return {
        "bytes_per_second": READ / seconds["read"],
        "token": seconds["token"] / args.new_tokens,
        "rows": [
            {
                "shape": shape,
                "count": len(found),
                "bytes": sum(map(bytes_of, found)),
                "seconds": seconds[shape],
            }
            for shape, found in shapes.items()
        ],
    }


def plain_read():
    """Return a function that reads `READ` bytes, a part in each thread."""
    import numpy as np

    threads = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(READ // 8, "int64"), threads)
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    return lambda: list(pool.map(np.bitwise_or.reduce, parts))


def token(model, count):
    """Return a function that writes tokens after a short prompt."""
    import numpy as np

    import keras_weightmods as kwm

    model.compile(sampler="greedy")
    kwm.compile_generate(model)
    length = PROMPT + count
    inputs = {
        "token_ids": np.ones((1, length), "int32"),
        "padding_mask": np.arange(length)[None] < PROMPT,
    }
    generate = model.make_generate_function()
    return lambda: np.asarray(generate(inputs, None)["token_ids"])


def products(kernels):
    """Return a function that multiplies one row by each kernel in turn."""
    import jax
    import jax.numpy as jnp

    from keras_weightmods.ops import Packed, sparse_matmul

    kind = kernels[0].shape, kernels[0].dtype, kernels[0].activations

    @jax.jit
    def run(x, kernels):
        for arrays in kernels:
            y = sparse_matmul(x, Packed(*arrays, *kind))
            # The next waits for this one.
            x = x + 0 * y[:, :1]
        return x

    x = jnp.ones((1, kernels[0].shape[0]))
    given = list(map(arrays_of, kernels))
    return lambda: run(x, given).block_until_ready()


def arrays_of(packed):
    import keras

    return [
        x if x is None else keras.ops.convert_to_tensor(x)
        for x in (packed.values, packed.meta, packed.scale)
    ]


def bytes_of(packed):
    return sum(x.nbytes for x in arrays_of(packed) if x is not None)


def print_report(report):
    token, speed = report["token"], report["bytes_per_second"]
    table = harness.table(
        f"{report['file']}: a token takes {1e3 * token:.2f} ms",
        text=("kernels", "type"),
        numbers=("count", "MB", "ms", "of token", "GB/s", "of a read"),
    )

    def add(name, kind, count, size, seconds):
        rate = size / seconds
        table.add_row(
            *(name, kind, str(count), f"{size / 1e6:.1f}"),
            *(f"{1e3 * seconds:.2f}", f"{seconds / token:.1%}"),
            *(f"{rate / 1e9:.1f}", f"{rate / speed:.2f}"),
        )

    rows = report["rows"]
    for row in rows:
        k, n, kind = row["shape"]
        figures = (row[name] for name in ("count", "bytes", "seconds"))
        add(f"{k} x {n}", kind, *figures)
    count, size, seconds = (
        sum(row[name] for row in rows) for name in ("count", "bytes", "seconds")
    )
    add("all products", "", count, size, seconds)
    add("the token", "", "", size, token)
    rest = token - seconds
    table.add_row(
        "the rest", *[""] * 3, f"{1e3 * rest:.2f}", f"{rest / token:.1%}"
    )
    harness.print_all(
        table,
        f"a plain read: {speed / 1e9:.1f} GB/s",
        harness.describe(report),
        width=100,
    )


if __name__ == "__main__":
    main()
