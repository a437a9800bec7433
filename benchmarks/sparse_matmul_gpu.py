"""How fast a packed 2:4 kernel is multiplied on a GPU, next to the dense one.

    python -m benchmarks.sparse_matmul_gpu
    python -m benchmarks.sparse_matmul_gpu --seconds 120 --frameworks torch
    python -m benchmarks.sparse_matmul_gpu --dry-run

x (rows, K) times a square kernel (K, K), under JAX and under torch:

  dense       what the framework does: XLA with its autotuning, or cuBLAS
  decode      the decode kernel on the packed arrays, for each type of values
  cusparselt  cuSPARSELt: by this library under JAX, under torch by torch's
              own semi-structured tensors

A product is timed in a chain of some 24, one compiled program or CUDA graph,
through copies of the kernel that together do not fit into a cache. Methods take
turns, and the median counts. Before that the product of each is compared with
a float64 one; a method that fails or is wrong is recorded as failed, with its
message, and does not stop the rest.

The times go to benchmarks/results/sparse_matmul_gpu.json and, as the table of
the dispatcher, to keras_weightmods/native/gpu/dispatch.json. What is not
done when the time is up is left out: the table then knows less.

--dry-run is for machines without a GPU: tiny products on the CPU, by which
the script itself can be tried; nothing is written.
"""

import argparse
import datetime
import functools
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from benchmarks import harness

TABLE = harness.ROOT / "keras_weightmods" / "native" / "gpu" / "dispatch.json"

SIZES = (4096, 8192)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# Types of activations, in order of interest, and the values they multiply.
TYPES = {
    "bfloat16": ("bfloat16", "int8"),
    "int8": ("int8",),
    "float16": ("bfloat16", "int8"),
    "float32": ("float32", "bfloat16", "int8"),
}
SHARES = {"jax": 0.7, "torch": 0.3}  # of the time
TOLERANCES = {"float32": 1e-3, "bfloat16": 1e-2, "float16": 5e-3, "int8": 1e-2}
CHAIN = 24
COPIED_BYTES = 192 * 2**20  # more than an L2 cache
ROUNDS = 7
ROUND_SECONDS = 4e-3
CHECKED_COLUMNS = 64


def main():
    args = parse_arguments()
    if args.worker:
        work(args)
        return
    report = {"machine": machine(), "frameworks": {}}
    for framework in args.frameworks.split(","):
        report["frameworks"][framework] = run_worker(args, framework)
    print(json.dumps(report["machine"]))
    if args.dry_run:
        return
    if not any(f.get("cases") for f in report["frameworks"].values()):
        raise SystemExit("Nothing was measured, and nothing is written.")
    harness.write_json(args.json, report)
    write_table(pathlib.Path(args.table), report)


def parse_arguments():
    parser = harness.make_parser(__doc__)
    parser.add_argument("--frameworks", default=",".join(SHARES))
    parser.add_argument("--seconds", type=float, default=330, help="in all")
    harness.add_json(parser, "sparse_matmul_gpu.json")
    parser.add_argument("--table", default=str(TABLE))
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--without", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_worker(args, framework):
    """The results of one framework, in a process of its own.

    An error of the GPU, such as a bad address, ends all work of a process. It
    is started again then, where it stopped, without the method that failed.
    """
    shares = [SHARES[name] for name in args.frameworks.split(",")]
    deadline = time.time() + args.seconds * SHARES[framework] / sum(shares)
    merged, without, start = None, [], 0
    while True:
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder, "part.json")
            command = [sys.executable, "-m", "benchmarks.sparse_matmul_gpu"]
            command += ["--worker", framework]
            command += ["--json", str(file), "--start", str(start)]
            command += ["--seconds", str(max(deadline - time.time(), 1))]
            command += ["--without", ",".join(without)]
            command += ["--dry-run"] if args.dry_run else []
            environment = {
                **os.environ,
                "KERAS_BACKEND": framework,
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
                "TF_CPP_MIN_LOG_LEVEL": "3",
            }
            process = subprocess.run(command, env=environment, cwd=harness.ROOT)
            if not file.exists():
                return merged or {
                    "error": f"the process ended with {process.returncode}"
                }
            part = json.loads(file.read_text())
        if merged is None:
            merged = part
        else:
            merged["cases"] += part["cases"]
        running, start = part.pop("running"), part.pop("next")
        merged.pop("running", None), merged.pop("next", None)
        if running is None or running == "dense" or len(without) == 2:
            return merged
        without.append(running)
        print(f"{framework}: again, without {running}", flush=True)


def work(args):
    """Measures case by case; the file always holds what is done."""
    deadline = time.time() + args.seconds
    bench = {"jax": Jax, "torch": Torch}[args.worker](args.dry_run)
    state = {
        **bench.describe(),
        "cases": [],
        "running": None,
        "next": args.start,
    }
    file = pathlib.Path(args.json)

    def save(**changes):
        state.update(changes)
        file.write_text(json.dumps(state))

    save()
    for method, reason in state["not_available"].items():
        print(f"{args.worker}: {method} is not available: {reason}")
    for index, case in enumerate(all_cases(args.dry_run)):
        if index < args.start or not bench.knows(case):
            continue
        if time.time() > deadline:
            break
        save(next=index)
        result = measure(bench, case, args.without.split(","), save)
        state["cases"].append(result)
        save(next=index + 1)
        print(line(args.worker, result), flush=True)
        if "dense" in result["failures"]:
            return
        save(running=None)
    save(running=None)
    for result in state["cases"]:
        if time.time() > deadline or not bench.is_alive():
            break
        if "cusparselt" in result["microseconds"]:
            bench.tune(result)
            save()


def all_cases(dry_run):
    """(size, rows, type of x), the first ones being of most interest."""
    sizes, rows = ((64,), (1, 8)) if dry_run else (SIZES, ROWS)
    return [(s, r, x_dtype) for x_dtype in TYPES for s in sizes for r in rows]


def measure(bench, case, without, save):
    """Times and failures of all methods for one case, by method and values."""
    size, rows, x_dtype = case
    x = activations(rows, size, x_dtype)
    failures, errors, programs = {}, {}, {}
    for method in bench.methods(case):
        name, value_dtype = method
        if name in without:
            failures[key(method)] = "left out after an error of the GPU"
            continue
        save(running=name)
        try:
            product = bench.product(case, method)
            error = relative_error(bench, product, x, size, value_dtype)
            errors[key(method)] = error
            if not error <= TOLERANCES[x_dtype]:
                raise ArithmeticError(f"wrong: relative error {error:.2e}")
            programs[key(method)] = bench.program(case, method, x)
        except Exception as failure:
            text = " ".join(str(failure).split())
            failures[key(method)] = f"{type(failure).__name__}: {text[:200]}"
            if not bench.is_alive():
                failures.setdefault("dense", "the GPU failed")
                break
    times = interleaved(bench, programs) if "dense" in programs else {}
    return {
        "k": size,
        "n": size,
        "rows": rows,
        "x_dtype": x_dtype,
        "microseconds": times,
        "errors": errors,
        "failures": failures,
        "algorithm": -1,
    }


def key(method):
    """`decode/int8`, say; the other methods do not depend on the values."""
    name, value_dtype = method
    return f"{name}/{value_dtype}" if name == "decode" else name


def interleaved(bench, programs):
    """Median microseconds of one product, the methods taking turns."""
    repeats = {}
    for name, program in programs.items():
        once = bench.seconds(program, 1)
        repeats[name] = max(1, math.ceil(ROUND_SECONDS / max(once, 1e-6)))
    samples = {name: [] for name in programs}
    for _ in range(ROUNDS):
        for name, program in programs.items():
            seconds = bench.seconds(program, repeats[name])
            samples[name].append(1e6 * seconds / repeats[name] / bench.chain)
    return {name: statistics.median(s) for name, s in samples.items()}


def activations(rows, size, x_dtype):
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows, size)).astype("float32")
    return np.rint(40 * x).clip(-127, 127) if x_dtype == "int8" else x


@functools.cache
def kernel_of(size):
    """A 2:4 kernel through which activations keep their size."""
    from keras_weightmods.native.packed import pack_kernel, unpack_kernel

    rng = np.random.default_rng(size)
    kernel = rng.normal(size=(size // 4, 4, size)).astype("float32")
    places = itertools.combinations(range(4), 2)
    patterns = np.array([[i in kept for i in range(4)] for kept in places])
    mask = patterns[rng.integers(6, size=(size // 4, size))]
    kernel = (kernel * mask.transpose(0, 2, 1)).reshape(size, size)
    kernel /= np.sqrt(size * np.mean(kernel[:, :64] ** 2))
    packed = {}
    for value_dtype in ("float32", "bfloat16", "int8"):
        packed[value_dtype] = pack_kernel(kernel, value_dtype)
    columns = np.linspace(0, size - 1, CHECKED_COLUMNS).astype(int)
    checked = {
        value_dtype: unpack_kernel(p)[:, columns].astype("float64")
        for value_dtype, p in packed.items()
    }
    return packed, columns, checked


def relative_error(bench, product, x, size, value_dtype):
    """Of some columns, against float64."""
    _, columns, checked = kernel_of(size)
    given, y = bench.run(product, x)
    expected = given.astype("float64") @ checked[value_dtype]
    difference = y[:, columns].astype("float64") - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


class Bench:
    """What is the same under both frameworks."""

    def __init__(self, dry_run):
        self.dry_run = dry_run
        self.chain = 2 if dry_run else CHAIN
        self.kept = None, None

    def methods(self, case):
        """(method, type of values): dense first, as all others need it."""
        _, rows, x_dtype = case
        values = TYPES[x_dtype]
        methods = [("dense", values[0])]
        if rows <= self.gpu.decode_rows(x_dtype):
            methods += [("decode", value_dtype) for value_dtype in values]
        if x_dtype != "float32":
            methods.append(("cusparselt", values[0]))
        return methods

    def copies(self, case, method):
        """The weights of a method several times, for a chain to go through."""
        size, _, x_dtype = case
        about = size, x_dtype
        if self.kept[0] != about:
            self.kept = about, {}
        kept = self.kept[1]
        if method not in kept:
            bytes_of_one = size * size * self.bytes_of[x_dtype]
            count = min(max(2, math.ceil(COPIED_BYTES / bytes_of_one)), 8)
            kept[method] = [self.weights(case, method) for _ in range(count)]
        return kept[method]

    bytes_of = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


class Jax(Bench):
    def __init__(self, dry_run):
        super().__init__(dry_run)
        import jax

        from keras_weightmods.backend.jax import sparse_matmul_gpu
        from keras_weightmods.native import gpu

        self.jax, self.products, self.gpu = jax, sparse_matmul_gpu, gpu
        if sparse_matmul_gpu.device_name() is None and not dry_run:
            raise SystemExit("JAX finds no NVIDIA GPU.")

    def describe(self):
        name = self.products.device_name()
        reasons = {
            method: self.products.reason_unavailable(method)
            for method in ("decode", "cusparselt")
        }
        version = None
        if name and not reasons["cusparselt"]:
            version = self.gpu.library().kwm_gpu_cusparselt_version(0)
        return {
            "device": name,
            "versions": versions("keras", "jax", "jaxlib"),
            "cusparselt": version,
            "not_available": {m: r for m, r in reasons.items() if r},
        }

    def knows(self, case):
        del case
        return True

    def is_alive(self):
        try:
            return float(self.jax.numpy.ones(()) + 1) == 2
        except Exception:
            return False

    def weights(self, case, method):
        size, _, x_dtype = case
        name, value_dtype = method
        packed = kernel_of(size)[0][value_dtype]
        put = self.jax.device_put
        if name == "decode":
            if not self.dry_run:
                self.products._require("decode")
            scale = None if packed.scale is None else put(packed.scale)
            return put(packed.values), put(packed.meta), scale
        prepared = self.products.prepare(packed, x_dtype, name)
        scale = None if packed.scale is None else put(packed.scale)
        return prepared.companion, scale

    def product(self, case, method, algorithm=-1):
        """A function of x and one copy of the weights."""
        size, _, x_dtype = case
        name, value_dtype = method
        shape = size, size

        def multiply(x, weights):
            jnp, products = self.jax.numpy, self.products
            if name == "decode":
                packed = products.Packed(*weights, shape, value_dtype)
                return products.matmul(x, packed, "decode")
            companion, scale = weights
            if name == "dense" and x_dtype != "int8":
                return jnp.matmul(x, companion)
            if name == "dense":
                integer = {"preferred_element_type": jnp.int32}
                y = jnp.matmul(x, companion, **integer)
            else:
                y = products._cusparselt(x, companion, size, algorithm)
            return y if x_dtype != "int8" else y * scale.ravel()[:size]

        return multiply, x_dtype, self.copies(case, method)

    def run(self, product, x):
        multiply, x_dtype, copies = product
        x = self.jax.numpy.asarray(x, x_dtype)
        y = self.jax.jit(multiply)(x, copies[0])
        return np.asarray(x.astype("float32")), np.asarray(y.astype("float32"))

    def program(self, case, method, x, algorithm=-1):
        multiply, x_dtype, copies = self.product(case, method, algorithm)

        @self.jax.jit
        def chain(x, copies):
            for i in range(self.chain):
                x = multiply(x, copies[i % len(copies)]).astype(x_dtype)
            return x

        x = self.jax.numpy.asarray(x, x_dtype)
        self.jax.block_until_ready(chain(x, copies))
        return functools.partial(chain, x, copies)

    def seconds(self, program, repeats):
        start = time.perf_counter()
        for _ in range(repeats):
            y = program()
        self.jax.block_until_ready(y)
        return time.perf_counter() - start

    def tune(self, result):
        """Tries the algorithms of cuSPARSELt."""
        size, rows, x_dtype = (
            result[name] for name in ("k", "rows", "x_dtype")
        )
        case, x = (size, rows, x_dtype), activations(rows, size, x_dtype)
        method = "cusparselt", TYPES[x_dtype][0]
        padded = -(-rows // 16) * 16
        found = {-1: result["microseconds"]["cusparselt"]}
        tries = []
        try:
            count = self.gpu.cusparselt_algorithms(
                0, padded, (size, size), x_dtype
            )
            tries = range(min(count, 16))
        except RuntimeError as error:
            result["failures"]["algorithms"] = str(error)[:300]
        for algorithm in tries:
            try:
                product = self.product(case, method, algorithm)
                error = relative_error(self, product, x, size, method[1])
                if error <= TOLERANCES[x_dtype]:
                    program = self.program(case, method, x, algorithm)
                    (found[algorithm],) = interleaved(
                        self, {"": program}
                    ).values()
            except Exception as error:
                result["failures"][f"algorithm {algorithm}"] = str(error)[:100]
        best = min(found, key=found.__getitem__)
        result["algorithm"] = best
        result["microseconds"]["cusparselt"] = found[best]
        result["algorithms"] = {str(a): t for a, t in found.items()}


class Torch(Bench):
    def __init__(self, dry_run):
        super().__init__(dry_run)
        import torch

        from keras_weightmods.backend.torch import sparse_matmul_gpu
        from keras_weightmods.native import gpu

        self.torch, self.products, self.gpu = torch, sparse_matmul_gpu, gpu
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cpu" and not dry_run:
            raise SystemExit("torch finds no NVIDIA GPU.")
        torch.set_grad_enabled(False)

    def describe(self):
        reasons = {
            method: self.products.reason_unavailable(method)
            for method in ("decode", "cusparselt")
        }
        return {
            "device": self.products.device_name(),
            "versions": versions("keras", "torch"),
            "cuda": self.torch.version.cuda,
            "not_available": {m: r for m, r in reasons.items() if r},
        }

    def knows(self, case):
        # `torch._int_mm` takes more than 16 rows.
        _, rows, x_dtype = case
        return x_dtype != "int8" or rows > 16

    def is_alive(self):
        try:
            return float(self.torch.ones((), device=self.device) + 1) == 2
        except Exception:
            return False

    def weights(self, case, method):
        torch, (size, _, x_dtype) = self.torch, case
        name, value_dtype = method
        packed = kernel_of(size)[0][value_dtype]
        if name == "decode":
            if self.products.reason_unavailable("decode") and not self.dry_run:
                raise RuntimeError(self.products.reason_unavailable("decode"))
            return tuple(
                None if a is None else self.tensor(a)
                for a in (packed.values, packed.meta, packed.scale)
            )
        arrays = (packed.values, packed.meta, packed.scale)
        arrays = [None if a is None else self.tensor(a) for a in arrays]
        on_device = self.products.Packed(*arrays, packed.shape, value_dtype)
        kernel = self.products.unpack_tensor(on_device)
        scale = None
        if x_dtype == "int8":
            scale = arrays[2].ravel()[:size]
            kernel = torch.round(kernel / scale)
        kernel = kernel.to(getattr(torch, x_dtype))
        if name == "dense":
            return kernel, scale
        kernel = kernel.T.contiguous()
        if x_dtype == "int8":
            return torch._cslt_compress(kernel), scale
        return torch.sparse.to_sparse_semi_structured(kernel), scale

    def tensor(self, array):
        from keras import ops

        return ops.convert_to_tensor(array).to(self.device)

    def product(self, case, method):
        torch, (size, _, x_dtype) = self.torch, case
        name, _ = method

        def multiply(x, weights):
            if name == "decode":
                product = self.products.sparse_matmul
                return product(x, *weights, size, "decode")
            kernel, scale = weights
            if x_dtype != "int8":
                if name == "dense":
                    return x @ kernel
                return torch.nn.functional.linear(x, kernel)
            if name == "dense":
                return torch._int_mm(x, kernel) * scale
            y = torch._cslt_sparse_mm(
                kernel, x.T, out_dtype=torch.int32, transpose_result=True
            )
            return y * scale

        return multiply, getattr(torch, x_dtype), self.copies(case, method)

    def run(self, product, x):
        multiply, x_dtype, copies = product
        x = self.torch.from_numpy(x).to(self.device, x_dtype)
        y = multiply(x, copies[0])
        return x.float().cpu().numpy(), y.float().cpu().numpy()

    def program(self, case, method, x):
        multiply, x_dtype, copies = self.product(case, method)
        x = self.torch.from_numpy(x).to(self.device, x_dtype)

        def chain():
            y = x
            for i in range(self.chain):
                y = multiply(y, copies[i % len(copies)]).to(x_dtype)
            return y

        chain()
        if self.device == "cpu":
            return chain
        self.torch.cuda.synchronize()
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            chain()
        return graph.replay

    def seconds(self, program, repeats):
        if self.device == "cpu":
            start = time.perf_counter()
            for _ in range(repeats):
                program()
            return time.perf_counter() - start
        events = [self.torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for _ in range(repeats):
            program()
        events[1].record()
        self.torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) / 1e3

    def tune(self, result):
        """torch chooses the algorithm by itself."""


def machine():
    found = {
        "date": datetime.date.today().isoformat(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions("keras-weightmods", "numpy"),
    }
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total"]
    try:
        answer = subprocess.run(
            [*query, "--format=csv,noheader"], capture_output=True, text=True
        )
        found["gpu"] = answer.stdout.strip()
    except OSError:
        found["gpu"] = None
    return found


def versions(*names):
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def write_table(path, report):
    """Puts the measured frameworks' entries in the place of older ones."""
    devices = json.loads(path.read_text())["devices"] if path.exists() else {}
    for framework, results in report["frameworks"].items():
        if not results.get("cases"):
            continue
        entries = devices.setdefault(results["device"], [])
        entries[:] = [e for e in entries if e["framework"] != framework]
        for case in results["cases"]:
            entries += table_entries(framework, case)
    path.write_text(json.dumps({"devices": devices}, indent=1) + "\n")
    print(f"wrote {path}")


def table_entries(framework, case):
    times = case["microseconds"]
    if "dense" not in times:
        return []
    entries = []
    for value_dtype in TYPES[case["x_dtype"]]:
        measured = {
            "dense": times["dense"],
            "decode": times.get(f"decode/{value_dtype}"),
            "cusparselt": times.get("cusparselt"),
        }
        entries.append(
            {
                "framework": framework,
                **{name: case[name] for name in ("k", "n", "rows", "x_dtype")},
                "value_dtype": value_dtype,
                "algorithm": case["algorithm"],
                "microseconds": {
                    name: round(t, 3) for name, t in measured.items() if t
                },
            }
        )
    return entries


def line(framework, case):
    times = case["microseconds"]
    dense = times.get("dense")
    text = f"{framework} {case['x_dtype']:>8} {case['k']:5} x {case['rows']:<5}"
    if dense:
        text += f" dense {dense:8.1f} us"
        for name, t in times.items():
            if name != "dense":
                text += f"  {name} {dense / t:.2f}x"
    for name, message in case["failures"].items():
        text += f"\n    {name}: {message}"
    return text


if __name__ == "__main__":
    main()
