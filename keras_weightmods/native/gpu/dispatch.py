"""Which product is the fastest on a GPU: from a table of measured times.

The table is written by `benchmarks/sparse_matmul_gpu.py`. A GPU that it does
not hold multiplies dense: a product is never slower for being packed.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib

# Read instead of the table of the package, where it is set.
TABLE_VARIABLE = "KERAS_WEIGHTMODS_GPU_TABLE"

# A gain below this may be noise.
_MARGIN = 0.95
# A shape stands for others of up to this factor in each axis.
_REACH = 2.0

METHODS = ("dense", "decode", "cusparselt")
# The keys of an entry of the table, beside its times and algorithm.
_TEXTS = ("framework", "x_dtype", "value_dtype")
_SIZES = ("k", "n", "rows")


@dataclasses.dataclass(frozen=True)
class Measured:
    """Times of one product, by method.

    Args:
        rows: Int, the rows of the activation.
        microseconds: Dict of floats by method; a method that failed or does
            not apply is left out, `"dense"` is there.
        algorithm: Int, the best of cuSPARSELt's, -1 for the one it proposes.
    """

    rows: int
    microseconds: dict
    algorithm: int = -1


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to multiply by one kernel, for any number of rows.

    Besides the packed arrays a kernel may have one companion: itself, dense,
    or compressed by cuSPARSELt. It has the compressed one if with that no
    measured number of rows is slower than dense.

    Args:
        measured: Tuple of `Measured`, in rising order of rows; empty where
            nothing was measured.
    """

    measured: tuple = ()

    @functools.cached_property
    def companion(self):
        """`"dense"` or `"cusparselt"`."""
        gains = [
            (self._gain(m, "decode"), self._gain(m, "cusparselt"))
            for m in self.measured
        ]
        if any(compressed for _, compressed in gains) and all(map(any, gains)):
            return "cusparselt"
        return "dense"

    @functools.cached_property
    def is_sparse(self):
        """Whether anything is faster than dense."""
        return self.companion == "cusparselt" or any(
            self._gain(m, "decode") for m in self.measured
        )

    def choose(self, rows, companion=None):
        """Return the method for a number of rows.

        Args:
            rows: Int.
            companion: What there is besides the packed arrays: `"dense"`,
                `"cusparselt"` or None.

        Returns:
            Pair of the method and cuSPARSELt's algorithm for it, -1 for the
            one that it proposes.
        """
        # The next number of rows that was measured: kernels round up too.
        m = next((m for m in self.measured if m.rows >= rows), None)
        if companion == "cusparselt":
            if m is None:
                return "cusparselt", -1
            times = {"decode": math.inf, "cusparselt": math.inf}
            times.update(m.microseconds)
            if times["decode"] < times["cusparselt"]:
                return "decode", -1
            return "cusparselt", m.algorithm
        if m is not None and self._gain(m, "decode"):
            return "decode", -1
        return "dense", -1

    @staticmethod
    def _gain(measured, method):
        times = measured.microseconds
        return times.get(method, math.inf) <= _MARGIN * times["dense"]


def fits(method, shape, x_dtype):
    """Return whether a method can multiply by a kernel of a shape.

    Args:
        method: String, one of `METHODS`.
        shape: Pair of ints (K, N).
        x_dtype: String, type of the activations.
    """
    k, n = shape
    if method == "decode":
        return x_dtype == "float32" or (
            x_dtype in ("bfloat16", "float16") and k % 2 == 0
        )
    if method == "cusparselt":
        multiple = {"bfloat16": 16, "float16": 16, "int8": 32}.get(x_dtype)
        return multiple is not None and k % multiple == n % multiple == 0
    return True


@functools.cache
def plan(framework, device, shape, x_dtype, value_dtype):
    """Return the plan for a kernel.

    Args:
        framework: String, `"jax"` or `"torch"`.
        device: String, the GPU's name; None where there is none.
        shape: Pair of ints (K, N).
        x_dtype: String, type of the activations.
        value_dtype: String, type of the packed values.

    Returns:
        `Plan`, from the measured shape that is nearest.
    """
    groups: dict[tuple, list] = {}
    for entry in table().get(device, ()):
        kind = entry["framework"], entry["x_dtype"], entry["value_dtype"]
        if kind == (framework, x_dtype, value_dtype):
            groups.setdefault((entry["k"], entry["n"]), []).append(entry)

    def distance(other):
        return max(abs(math.log(a / b)) for a, b in zip(other, shape))

    if 0 in shape or not groups:
        return Plan()
    nearest = min(groups, key=distance)
    if distance(nearest) > math.log(_REACH):
        return Plan()
    usable = [m for m in METHODS if fits(m, shape, x_dtype)]
    return Plan(
        tuple(
            Measured(
                e["rows"],
                {m: t for m, t in e["microseconds"].items() if m in usable},
                e["algorithm"],
            )
            for e in sorted(groups[nearest], key=lambda e: e["rows"])
        )
    )


@functools.cache
def table():
    """Return the measured times: dict of lists of entries by the GPU's name.

    Raises:
        ValueError: If the file is no such table.
    """
    path = os.environ.get(TABLE_VARIABLE) or pathlib.Path(__file__).with_name(
        "dispatch.json"
    )
    return read_table(path)


def read_table(path):
    """Read and check a table.

    Args:
        path: String or path of a JSON file, as the benchmark writes it.

    Returns:
        Dict of lists of entries by the GPU's name.

    Raises:
        ValueError: If the file is no such table.
    """
    try:
        devices = json.loads(pathlib.Path(path).read_text())["devices"]
        entries = [e for found in devices.values() for e in found]
        bad = [e for e in entries if not _is_entry(e)]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is no table of GPU timings, which "
            "benchmarks/sparse_matmul_gpu.py writes. Received: "
            f"{type(error).__name__}: {error}"
        ) from error
    if bad:
        raise ValueError(
            f"{path}: an entry must have the keys framework, k, n, rows, "
            "x_dtype, value_dtype, algorithm and microseconds, the latter a "
            f"dict of positive times with 'dense' in it. Received: {bad[0]!r}"
        )
    return devices


def _is_entry(entry):
    times = entry["microseconds"]
    return (
        all(isinstance(entry[k], str) for k in _TEXTS)
        and all(type(entry[k]) is int and entry[k] > 0 for k in _SIZES)
        and type(entry["algorithm"]) is int
        and "dense" in times
        and set(times) <= set(METHODS)
        and all(isinstance(t, (int, float)) and t > 0 for t in times.values())
    )
