"""How fast a packed 2:4 kernel is multiplied, next to the dense one.

    python -m benchmarks.sparse_matmul
    python -m benchmarks.sparse_matmul --quick
    python -m benchmarks.sparse_matmul --peers jax --threads 1 --batches 1,16

x (B, K) times a kernel (K, N), on the CPU. Under JAX the dense product is XLA's
dot and the sparse one `ops.sparse_matmul`, both in `jax.jit`; under torch they
are `torch.mm` and the same op. Each peer and number of threads has a process.
In it dense and sparse products take turns, with every type of values and
instruction set of the machine. The row "int8/int8" has int8 values with int8
activations. The row "bfloat16/bfloat16" has bfloat16 values and activations,
with results in bfloat16. "16:32" has places by a mask. Shown is the median time
of the dense float32 product over that of the sparse one: above 1 the sparse one
is faster. One thread is one core: the process is bound to it.

Only good on a machine that does nothing else.
"""

import argparse
import os
import statistics
import time

from benchmarks import harness

SHAPES = [(576, 1536), (2048, 5632), (4096, 4096), (4096, 11008)]
BATCHES = [1, 2, 4, 8, 16, 64, 128, 512]
QUICK = {"shapes": SHAPES[:1], "batches": [1, 8, 64], "seconds": 0.2}
# Types of values, and of activations where these are not float32.
DTYPES = [
    *("float32", "bfloat16", "bfloat16/bfloat16"),
    *("int8", "int8/int8", "int4/int8", "16:32 int4/int8"),
]
ISAS = {"amx": 5, "avx512": 2, "avx_vnni": 4, "avx2": 1, "neon": 3}
PEERS = {"jax": "XLA dot", "torch": "torch.mm"}


def main():
    args = parse_arguments()
    if args.worker:
        harness.write_json(args.json, measure(args))
        return
    report = {
        "machine": harness.machine(),
        "dense": "float32",
        "results": [
            harness.run_worker(peer, f"--worker={peer}", f"--threads={threads}")
            for threads in args.threads
            for peer in args.peers
        ],
    }
    harness.write_json(args.json, report)
    print_report(report)


def parse_arguments():
    def integers(separator):
        return lambda text: [int(part) for part in text.split(separator)]

    def shapes(text):
        return [integers("x")(part) for part in text.split(",")]

    subset = harness.subset
    parser = harness.make_parser(__doc__)
    parser.add_argument("--peers", type=subset(PEERS), default=list(PEERS))
    parser.add_argument(
        "--threads", type=subset(["1", "all"]), default=["1", "all"]
    )
    parser.add_argument(
        "--shapes", type=shapes, help="such as 576x1536,4096x4096"
    )
    parser.add_argument("--batches", type=integers(","), help="such as 1,8")
    parser.add_argument("--dtypes", type=subset(DTYPES), default=DTYPES)
    parser.add_argument("--isas", type=subset(ISAS), default=list(ISAS))
    parser.add_argument(
        "--seconds", type=float, help="for a shape and batch; default 1.5"
    )
    parser.add_argument("--core", type=int, help="for one thread; the last")
    parser.add_argument("--quick", action="store_true")
    harness.add_json(parser, "sparse_matmul.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(args):
    # Before anything starts its threads.
    cores = sorted(os.sched_getaffinity(0))
    (threads,) = args.threads
    if threads == "1":
        cores = cores[-1:] if args.core is None else [args.core]
        os.sched_setaffinity(0, cores)
        os.environ["OMP_NUM_THREADS"] = "1"
    from rich.progress import track

    from keras_weightmods import native

    if not native.is_available():
        raise SystemExit(native.reason_unavailable())
    best = native.library().kwm_isa()
    isas = [
        name
        for name in args.isas
        if native.library().kwm_set_isa(ISAS[name]) == ISAS[name]
    ]
    shapes, batches, seconds = SHAPES, BATCHES, args.seconds or 1.5
    if args.quick:
        shapes, batches, seconds = QUICK.values()
    shapes, batches = args.shapes or shapes, args.batches or batches
    rows = []
    for k, n in track(shapes, f"{args.worker}, threads: {threads}"):
        kernels = Kernels(args.worker, k, n, args.dtypes)
        for batch in batches:
            contenders = kernels.contenders(batch, isas)
            rows.append(
                {
                    "shape": [k, n],
                    "batch": batch,
                    "milliseconds": interleaved(contenders, seconds),
                }
            )
    native.library().kwm_set_isa(best)
    return {
        "peer": args.worker,
        "threads": threads,
        "cores": len(cores),
        "isas": isas,
        "versions": harness.versions(),
        "rows": rows,
    }


class Kernels:
    """One kernel, dense and packed, as tensors of the backend."""

    def __init__(self, peer, k, n, dtypes):
        import keras
        import numpy as np

        from keras_weightmods.ops import Packed, nm_mask, pack_kernel

        self.peer = peer
        self.k = k
        rng = np.random.default_rng(0)
        kernel = rng.standard_normal((k, n), "float32") / k**0.5
        mask = keras.ops.convert_to_numpy(nm_mask(kernel, "2:4", axis=0))
        kernel *= mask
        self.dense = keras.ops.convert_to_tensor(kernel)
        self.packed = {}
        for name in dtypes:
            pattern, _, kind = name.rpartition(" ")
            kind = kind.removesuffix("/bfloat16").split("/")
            packed = pack_kernel(kernel, *kind, pattern=pattern or "2:4")
            arrays = [packed.values, packed.meta, packed.scale]
            arrays = [
                None if a is None else keras.ops.convert_to_tensor(a)
                for a in arrays
            ]
            self.packed[name] = Packed(*arrays, *_kind(packed))

    def contenders(self, batch, isas):
        """Functions without arguments that run one product and wait for it."""
        import keras
        import numpy as np

        x = np.random.default_rng(batch).standard_normal((batch, self.k))
        x = keras.ops.convert_to_tensor(x.astype("float32"))
        half = keras.ops.cast(x, "bfloat16")
        dense, sparse = getattr(self, f"_{self.peer}")(x)
        found = {"dense": (None, dense)}
        for isa in isas:
            for dtype, packed in self.packed.items():
                given = half if dtype.endswith("/bfloat16") else x
                found[f"{isa} {dtype}"] = (ISAS[isa], sparse(given, packed))
        return found

    def _jax(self, x):
        import jax

        from keras_weightmods.ops import Packed, sparse_matmul

        dense = jax.jit(lambda x, w: x @ w)

        def run(x, packed):
            @jax.jit
            def sparse(x, *arrays):
                return sparse_matmul(x, Packed(*arrays, *_kind(packed)))

            arrays = (packed.values, packed.meta, packed.scale)
            return lambda: sparse(x, *arrays).block_until_ready()

        return lambda: dense(x, self.dense).block_until_ready(), run

    def _torch(self, x):
        import torch

        from keras_weightmods.ops import sparse_matmul

        def run(x, packed):
            def call():
                with torch.inference_mode():
                    return sparse_matmul(x, packed)

            return call

        def dense():
            with torch.inference_mode():
                return torch.mm(x, self.dense)

        return dense, run


def _kind(packed):
    return packed.shape, packed.dtype, packed.activations


def interleaved(contenders, seconds):
    """Median milliseconds of each, from rounds in which all take turns."""
    from keras_weightmods import native

    times = {name: [] for name in contenders}
    end = None
    while end is None or len(times["dense"]) < 3 or time.monotonic() < end:
        for name, (isa, run) in contenders.items():
            if isa is not None:
                native.library().kwm_set_isa(isa)
            # The first call finds the caches full of another's weights.
            run()
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
        if end is None:
            # The first round compiles.
            times = {name: [] for name in contenders}
            end = time.monotonic() + seconds
    return {name: statistics.median(t) for name, t in times.items()}


def print_report(report):
    tables = []
    for result in report["results"]:
        cores = result["cores"]
        batches = list(dict.fromkeys(row["batch"] for row in result["rows"]))
        table = harness.table(
            f"Speed over dense float32 ({PEERS[result['peer']]}), "
            f"{cores} thread{'s' * (cores > 1)}",
            text=("K x N", "values"),
            numbers=[f"B={batch}" for batch in batches],
        )
        shapes = list(
            dict.fromkeys(tuple(row["shape"]) for row in result["rows"])
        )
        for shape in shapes:
            times = {
                row["batch"]: row["milliseconds"]
                for row in result["rows"]
                if tuple(row["shape"]) == shape
            }
            name = f"{shape[0]} x {shape[1]}"
            table.add_row(
                name,
                "dense, ms",
                *(f"{times[b]['dense']:.3g}" for b in batches),
            )
            for contender in times[batches[0]]:
                if contender == "dense":
                    continue
                ratios = [
                    times[b]["dense"] / times[b][contender] for b in batches
                ]
                table.add_row("", contender, *(f"{r:.2f}" for r in ratios))
        tables.append(table)
    # Tables that a narrow terminal would cut.
    harness.print_all(*tables, harness.describe(report), width=100)


if __name__ == "__main__":
    main()
