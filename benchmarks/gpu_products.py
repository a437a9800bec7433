"""The products of `sparse_matmul_gpu.py`, under JAX and under torch.

Not yet run on a GPU.
"""

import dataclasses
import functools
import importlib.metadata
import itertools
import math
import time

import numpy as np

# Types of activations, in order of interest, and the values they multiply. int8
# is bfloat16 that is rounded to int8 in the product, next to dense bfloat16.
TYPES = {
    "bfloat16": ("bfloat16", "int8", "int4"),
    "int8": ("int8",),
    "float32": ("float32", "bfloat16", "int8"),
    "float16": ("bfloat16", "int8"),
}
NO_GPU = "no GPU, a dry run"
CHAIN = 24
COPIED_BYTES = 192 * 2**20  # more than an L2 cache
CHECKED_COLUMNS = 64
# Of one kernel entry, by the type that it is read in.
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "int4": 0.5}


def copies_of(method, case):
    """Return how many kernels a chain must go through to miss the cache.

    By the bytes that the method reads, which for a packed kernel are half of
    the dense ones or less.
    """
    size, _, x_dtype = case
    name, value_dtype = method
    bytes_of_one = size * size * BYTES[read_type(name, x_dtype)]
    if name == "decode":
        bytes_of_one = size * size * (BYTES[value_dtype] / 2 + 1 / 8)
    elif name == "cusparselt":
        bytes_of_one *= 9 / 16
    return min(max(2, math.ceil(COPIED_BYTES / bytes_of_one)), CHAIN)


def read_type(name, x_dtype):
    """Return the type that a method reads dense or compressed kernels in."""
    return "bfloat16" if (name, x_dtype) == ("dense", "int8") else x_dtype


def type_of(x_dtype):
    """Return the type of the array of activations."""
    return "bfloat16" if x_dtype == "int8" else x_dtype


def rounds(case):
    """Return the activations of a packed kernel for a case."""
    return "int8" if case[2] == "int8" else "float32"


def activations(rows, size):
    rng = np.random.default_rng(rows)
    return rng.normal(size=(rows, size)).astype("float32")


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
    for value_dtype in ("float32", "bfloat16", "int8", "int4"):
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
        self.won = []  # algorithms of cuSPARSELt that were the fastest

    def methods(self, case):
        """(method, type of values): dense first, as all others need it."""
        _, rows, x_dtype = case
        values = TYPES[x_dtype]
        methods = [("dense", values[0])]
        if rows <= self.gpu.decode_rows(type_of(x_dtype)):
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
            count = 2 if self.dry_run else copies_of(method, case)
            one = self.weights(case, method)
            kept[method] = [one] + [self.copy(one) for _ in range(count - 1)]
        return kept[method]


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
            "device": name or NO_GPU,
            "versions": versions("keras", "jax", "jaxlib"),
            "cusparselt": version,
            "not_available": {m: r for m, r in reasons.items() if r},
        }

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
        scale = None if packed.scale is None else put(packed.scale)
        if name == "decode":
            if not self.dry_run:
                self.products._require("decode")
            return put(packed.values), put(packed.meta), scale
        packed = dataclasses.replace(packed, activations=rounds(case))
        prepared = self.products.prepare(packed, type_of(x_dtype), [name])
        return prepared.companions[name], scale

    def copy(self, weights):
        return self.jax.tree.map(self.jax.numpy.copy, weights)

    def product(self, case, method, algorithm=-1):
        """A function of x and one copy of the weights."""
        size, _, x_dtype = case
        name, value_dtype = method
        shape = size, size

        def multiply(x, weights):
            jnp, products = self.jax.numpy, self.products
            if name == "decode":
                packed = products.Packed(
                    *weights, shape, value_dtype, rounds(case)
                )
                return products.matmul(x, packed, "decode")
            companion, scale = weights
            if name == "dense":
                # float32 is promised to be multiplied in float32.
                precision = "highest" if x_dtype == "float32" else None
                return jnp.matmul(x, companion, precision=precision)
            if x_dtype == "int8":
                given = x, companion, scale.ravel()[:size]
                return products._cusparselt_int8(size, algorithm, *given)
            return products._cusparselt(size, algorithm, x, companion)

        return multiply, type_of(x_dtype), self.copies(case, method)

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

    def algorithms(self, case, x):
        """cuSPARSELt's, all that it has for the product."""
        del x
        size, rows, x_dtype = case
        rows = -(-rows // 16) * 16
        return range(
            self.gpu.cusparselt_algorithms(0, rows, (size, size), x_dtype)
        )


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
            "device": self.products.device_name() or NO_GPU,
            "versions": versions("keras", "torch"),
            "cuda": self.torch.version.cuda,
            "not_available": {m: r for m, r in reasons.items() if r},
        }

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
        dtype = getattr(torch, read_type(name, x_dtype))
        kernel = self.products.unpack(*arrays, size, size, dtype)
        if name == "cusparselt":
            kernel = torch._cslt_compress(kernel.T.contiguous())
        return kernel, arrays[2]

    def copy(self, weights):
        return tuple(None if w is None else w.clone() for w in weights)

    def tensor(self, array):
        from keras import ops

        return ops.convert_to_tensor(array).to(self.device)

    def product(self, case, method, algorithm=-1):
        size, _, x_dtype = case
        name, _ = method
        products = self.products

        def multiply(x, weights):
            if name == "decode":
                rounded = x_dtype == "int8"
                product = (
                    products.sparse_matmul_int8
                    if rounded
                    else products.sparse_matmul
                )
                return product(x, *weights, size, "decode")
            kernel, scale = weights
            if name == "dense":
                return x @ kernel
            if x_dtype == "int8":
                return products._cusparselt_int8(x, kernel, scale, algorithm)
            return products._cusparselt(x, kernel, algorithm)

        dtype = getattr(self.torch, type_of(x_dtype))
        return multiply, dtype, self.copies(case, method)

    def run(self, product, x):
        multiply, x_dtype, copies = product
        x = self.torch.from_numpy(x).to(self.device, x_dtype)
        y = multiply(x, copies[0])
        return x.float().cpu().numpy(), y.float().cpu().numpy()

    def program(self, case, method, x, algorithm=-1):
        multiply, x_dtype, copies = self.product(case, method, algorithm)
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

    def algorithms(self, case, x):
        """The one that cuSPARSELt itself finds to be the fastest."""
        product = self.product(case, ("cusparselt", TYPES[case[2]][0]))
        _, x_dtype, copies = product
        x = self.torch.from_numpy(x).to(self.device, x_dtype)
        x = self.torch.nn.functional.pad(x, (0, 0, 0, -len(x) % 16))
        compressed, scale = copies[0]
        epilogue = {}
        if case[2] == "int8":
            x, _ = self.products.round_rows(x)
            epilogue["out_dtype"] = self.torch.bfloat16
            epilogue["alpha"] = scale.reshape(-1)
        found = self.torch._cslt_sparse_mm_search(
            compressed, x.T, transpose_result=True, **epilogue
        )
        return [int(found)]


def versions(*names):
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
