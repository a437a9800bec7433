"""Which product is the fastest on a GPU, by the number of rows.

Decided by the times in `dispatch.json`, which `make gpu` measures and writes.
Until a card was measured, by `published.json`: what others have published of
cuSPARSELt on such cards, with larger margins. A GPU that is in neither file
multiplies dense. `why` says which of these it was. With the environment
variable KERAS_WEIGHTMODS_GPU_TABLE at `dense` every product is dense; at the
path of another table that is read instead.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib

TABLE_VARIABLE = "KERAS_WEIGHTMODS_GPU_TABLE"
# Its value for no product but the dense one.
DENSE = "dense"
PUBLISHED = pathlib.Path(__file__).with_name("published.json")

# A gain below this may be noise.
_MARGIN = 0.95
# A shape stands for others of up to this factor in each axis.
_REACH = 2.0

METHODS = ("dense", "decode", "cusparselt")
VALUE_TYPES = ("float32", "bfloat16", "int8", "int4")
# The keys of an entry of the table, beside its times and algorithm.
_TEXTS = ("framework", "x_dtype", "value_dtype")
_SIZES = ("k", "n", "rows")


@dataclasses.dataclass(frozen=True)
class Measured:
    """Times of one product, by method.

    Args:
        rows: Int, the rows of the activation. The times stand for fewer rows
            too, down to the next `Measured`: kernels round up.
        microseconds: Dict of floats by method; a method that failed or does
            not apply is left out, `"dense"` is there. Published figures are
            ratios: `"dense"` is 1.
        algorithm: Int, the best of cuSPARSELt's, -1 for the one it proposes.
    """

    rows: int
    microseconds: dict
    algorithm: int = -1

    @functools.cached_property
    def best(self):
        """The fastest method; dense unless another gains clearly."""
        times = self.microseconds
        best = min(times, key=times.__getitem__)
        return best if times[best] <= _MARGIN * times["dense"] else "dense"


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to multiply by one kernel, for any number of rows.

    Besides the packed arrays a kernel may have companions: itself, dense, or
    compressed by cuSPARSELt, each used at the numbers of rows where it wins.

    Args:
        measured: Tuple of `Measured`, in rising order of rows; empty where
            nothing is known.
        source: String, where the times are from, or why there are none.
        is_published: Bool, whether others have published the times: no table
            was measured on such a card.
        dropped: Tuple of strings, the methods that cannot be used, whatever
            companions there are.
    """

    measured: tuple = ()
    source: str = ""
    is_published: bool = False
    dropped: tuple = ()

    @functools.cached_property
    def companions(self):
        """The companions to make, `"dense"`, `"cusparselt"` or both."""
        best = [m.best for m in self.measured]
        # The decode kernel takes few rows: a product with more is dense.
        if not best or best[-1] == "decode":
            best.append("dense")
        return tuple(kind for kind in ("dense", "cusparselt") if kind in best)

    @functools.cached_property
    def is_sparse(self):
        """Whether anything is faster than dense."""
        return any(m.best != "dense" for m in self.measured)

    def choose(self, rows, companions=()):
        """Return the method for a number of rows.

        Args:
            rows: Int.
            companions: Tuple. What there is besides the packed arrays:
                `"dense"`, `"cusparselt"`. Without any, a dense product unpacks
                the kernel in each call. Defaults to none.

        Returns:
            Pair of the method and cuSPARSELt's algorithm for it, -1 for the
            one that it proposes.
        """
        m = self._at(rows)
        compressed = "cusparselt" in companions
        compressed = compressed and "cusparselt" not in self.dropped
        if compressed and "dense" not in companions:
            times = m.microseconds if m else {}
            decode = times.get("decode", math.inf)
            if decode < times.get("cusparselt", math.inf):
                return "decode", -1
            return "cusparselt", m.algorithm if m else -1
        if m is None:
            last = self.measured[-1].best if self.measured else "dense"
            return (
                "cusparselt" if compressed and last == "cusparselt" else "dense"
            ), -1
        times = {
            method: t
            for method, t in m.microseconds.items()
            if method != "cusparselt" or compressed
        }
        best = Measured(m.rows, times).best
        return best, m.algorithm if best == "cusparselt" else -1

    def without(self, method, reason):
        """Return the plan for where a method cannot be used.

        Args:
            method: String, one of `METHODS` but the dense one.
            reason: String.
        """
        left = [
            {name: t for name, t in m.microseconds.items() if name != method}
            for m in self.measured
        ]
        return dataclasses.replace(
            self,
            measured=tuple(
                Measured(m.rows, times) for m, times in zip(self.measured, left)
            ),
            source=f"{self.source}; without {method}: {reason}",
            dropped=(*self.dropped, method),
        )

    def why(self, rows):
        """Return which method is used for a number of rows, and why.

        Args:
            rows: Int.
        """
        method, _ = self.choose(rows, self.companions)
        m = self._at(rows) or (self.measured[-1] if self.measured else None)
        if m is None:
            return f"{method}: {self.source}"
        gains = ", ".join(
            f"{name} {m.microseconds['dense'] / time:.2f}x"
            for name, time in m.microseconds.items()
            if name != "dense"
        )
        return f"{method}: over dense {gains or 'nothing'} ({self.source})"

    def _at(self, rows):
        return next((m for m in self.measured if m.rows >= rows), None)


def fits(method, shape, x_dtype):
    """Return whether a method can multiply by a kernel of a shape.

    Args:
        method: String, one of `METHODS`.
        shape: Pair of ints (K, N).
        x_dtype: As of `plan`.
    """
    k, n = shape
    if method == "decode":
        return x_dtype in ("float32", "bfloat16", "float16", "int8")
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
        x_dtype: String, type of the activations; `"int8"` for floats of any
            type that are rounded to int8 first. Dense is by bfloat16 then.
        value_dtype: String, type of the packed values.

    Returns:
        `Plan`, from the measured shape that is nearest, or else from what was
        published of such a GPU.
    """
    if device is None:
        return Plan((), "there is no NVIDIA GPU")
    if 0 in shape:
        return Plan((), "the kernel is empty")
    if os.environ.get(TABLE_VARIABLE) == DENSE:
        return Plan((), f"the environment variable {TABLE_VARIABLE} says so")
    if value_dtype not in VALUE_TYPES:
        return Plan((), f"no product on a GPU takes values of {value_dtype}")
    if x_dtype == "int8" and value_dtype != "int8":
        # A row of rounded activations has one scale, as a column must have.
        return Plan((), "int8 activations are multiplied by int8 values alone")
    usable = [m for m in METHODS if fits(m, shape, x_dtype)]
    kind = framework, x_dtype, value_dtype
    groups: dict[tuple, list] = {}
    for entry in table().get(device, ()):
        if kind == tuple(entry[name] for name in _TEXTS):
            groups.setdefault((entry["k"], entry["n"]), []).append(entry)

    def distance(other):
        return max(abs(math.log(a / b)) for a, b in zip(other, shape))

    nearest = min(groups, key=distance, default=None)
    if nearest is None or distance(nearest) > math.log(_REACH):
        # One's own table, once there is one for this GPU, is all that counts.
        if device not in table() and "cusparselt" in usable:
            return _published_plan(device, shape, x_dtype)
        return _unmeasured(device, shape, x_dtype)
    return Plan(
        tuple(
            Measured(
                e["rows"],
                {m: t for m, t in e["microseconds"].items() if m in usable},
                e["algorithm"],
            )
            for e in sorted(groups[nearest], key=lambda e: e["rows"])
        ),
        f"measured on this GPU's model at {nearest[0]} x {nearest[1]}",
    )


def why(framework, device, shape, x_dtype, value_dtype, rows):
    """Return which method a product uses, and why: from which figures.

    Args:
        framework, device, shape, x_dtype, value_dtype: As of `plan`.
        rows: Int, the rows of the activation.

    Example:

    ```python
    from keras_weightmods.native.gpu import dispatch

    kind = "jax", "NVIDIA H100 PCIe", (4096, 4096), "bfloat16", "bfloat16"
    assert dispatch.why(*kind, rows=2048).startswith("cusparselt: over dense")
    assert "not measured by this library" in dispatch.why(*kind, rows=2048)
    ```
    """
    return plan(framework, device, shape, x_dtype, value_dtype).why(rows)


def _published_plan(device, shape, x_dtype):
    """A `Plan` from the least gains that were published."""
    published = json.loads(PUBLISHED.read_text())
    for card in published["cards"]:
        if not device.startswith(card["device"]):
            continue
        figures = card["least_gains"].get(x_dtype)
        if figures is None or min(shape) < published["least_size"]:
            break
        # A gain holds from its number of rows on, up to the next number. Of
        # more than the last, `choose` takes the last.
        last = [rows - 1 for rows, _ in figures[1:]] + [figures[-1][0]]
        below = Measured(figures[0][0] - 1, {"dense": 1.0})
        return Plan(
            (below,)
            + tuple(
                Measured(rows, {"dense": 1.0, "cusparselt": 1 / gain})
                for rows, (_, gain) in zip(last, figures)
            ),
            f"published figures of {card['measured_on']}, not measured by "
            f"this library: {published['source']}. `make gpu` measures",
            is_published=True,
        )
    return _unmeasured(device, shape, x_dtype)


def _unmeasured(device, shape, x_dtype):
    return Plan(
        (),
        f"nothing is known of {device} for a kernel of shape {shape} and "
        f"activations of {x_dtype}. `make gpu` measures it",
    )


@functools.cache
def table():
    """Return the measured times: dict of lists of entries by the GPU's name.

    Raises:
        ValueError: If the file is no such table.
    """
    path = os.environ.get(TABLE_VARIABLE)
    own = pathlib.Path(__file__).with_name("dispatch.json")
    return read_table(own if path in (None, "", DENSE) else path)


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
