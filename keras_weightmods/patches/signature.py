"""Robust weight signatures, and the arithmetic of weights."""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np

from keras_weightmods.core import filters, keras_compat
from keras_weightmods.patches import combine, tensors
from keras_weightmods.patches.checkpoint import Checkpoint, mismatches
from keras_weightmods.patches.entry import FLOATS, PatchEntry, quantize
from keras_weightmods.patches.patch import Patch
from keras_weightmods.utils import checks
from keras_weightmods.utils.progress import Progress

_REPLACED = {"keep": 0.0, "average": 0.5, "replace": 1.0}
_MISMATCH = "The checkpoints do not match:"


@dataclasses.dataclass(eq=False, repr=False)
class WeightSignature(Patch):
    """A `Patch` that makes a model robust against a corruption of its inputs.

    Make one with `extract`, `load` or `sum`, or by arithmetic: `a + b`,
    `a - b`, `2 * a`, `a / 2`, `-a`. It fits any model of the architecture. A
    signature is immutable. Its tensors are NumPy arrays in float32, or integers
    after `quantize`. Combinations of quantized signatures are in float32.

    The robust weight signature of a corruption c (RWS, arXiv 2302.12480) is,
    tensor by tensor,

        d_std = theta_clean - theta_init,    d_c = theta_robust - theta_init
        RWS_c = d_c - <d_c, d_std> / <d_std, d_std> * d_std

    for the shallow layers, and nothing elsewhere.

    Example:

    ```python
    import keras
    import numpy as np
    from keras_weightmods import WeightSignature

    def trained(seed):
        model = keras.Sequential(
            [keras.Input((8,)), keras.layers.Dense(4), keras.layers.Dense(2)]
        )
        rng = np.random.default_rng(seed)
        model.set_weights([rng.normal(size=w.shape) for w in model.weights])
        return model

    init, clean, robust = (trained(seed) for seed in range(3))
    signature = WeightSignature.extract(init, clean, robust, depth=1)
    before = clean.get_weights()

    signature.apply(clean, scale=0.5)
    assert not np.array_equal(clean.get_weights()[0], before[0])
    signature.remove(clean)
    for a, b in zip(clean.get_weights(), before):
        np.testing.assert_array_equal(a, b)

    small = signature.quantize(8)
    assert small.nbytes < signature.nbytes / 3
    ```
    """

    KIND: ClassVar[str] = "signature"

    @classmethod
    def extract(
        cls,
        init: Any,
        clean: Any,
        robust: Any,
        depth: int | None = None,
        *,
        targets: Any = None,
        statistics: str = "average",
        name: str | None = None,
        like: Any = None,
        verbose: int = 1,
    ) -> Self:
        """Return the change that leads from a clean checkpoint to a robust one.

        Each checkpoint is a built Keras model, or the list that its
        `get_weights()` returns. All three have one architecture and share their
        start. A weight that clean training did not move keeps its whole d_c.
        Weight and bias of a layer are two tensors, and so are gamma and beta of
        a normalization.

        With companders, the signature holds the stored weights, and fits only
        models with the same companders. Models with LoRA are refused: call
        `merge_lora` first. Models that Keras has quantized are refused too.

        Args:
            init: The checkpoint from which both trainings started. `None`
                leaves the projection out: the signature is then robust less
                clean, a task vector (arXiv 2212.04089).
            clean: The checkpoint trained on clean data.
            robust: The one trained in the same way on corrupted data.
            depth: Int, how many of the shallowest layers with a kernel are
                taken, in the order of execution. A layer without a kernel, such
                as a normalization, goes with the one that runs before it.
                Defaults to 7, the paper's choice for VGG-16, or to all where
                there are fewer.
            targets: Instead of `depth`: a regex searched for in the paths of
                all weights; a layer or a layer type, for all weights inside of
                them; or a list of these.
            statistics: What happens to the moving mean and variance of the
                batch normalizations taken: `"average"` goes half of the way to
                the robust checkpoint's statistics at scale 1, `"replace"` all
                of it, `"keep"` leaves them alone. The robust weights were
                trained with these statistics. They are not differences: on any
                model they lead to the robust checkpoint's statistics. Where the
                shares of several patches, or of a large scale, sum to more than
                1, they are divided by their sum. So the statistics stay between
                the clean and the robust ones. Defaults to `"average"`.
            name: String, what to call the signature in tables.
            like: Where all checkpoints are lists: a model of the
                architecture.
            verbose: 0 or 1. 0 shows no progress bar; 1 shows one once it has
                taken two seconds. Defaults to `1`.

        Returns:
            A `WeightSignature`.

        Raises:
            ValueError: If an argument is wrong. All problems of the checkpoints
                are listed at once: number, names, shapes, dtypes, companders,
                and values that are not finite.

        Example:

        ```python
        import keras
        import numpy as np
        from keras_weightmods import WeightSignature

        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        rng = np.random.default_rng(0)
        init, clean, robust = (
            [rng.normal(size=(3, 2)), rng.normal(size=2)] for _ in range(3)
        )
        signature = WeightSignature.extract(
            init, clean, robust, depth=1, like=model
        )
        patched = signature.apply(clean)  # a new list
        ```
        """
        checks.check_choice("statistics", statistics, _REPLACED)
        checks.check_verbose(verbose)
        # Files check it in the same way.
        checks.check_string("name", name, optional=True)
        if depth is not None and targets is not None:
            expected = (
                f"None where `depth` is given, which is {depth!r}, not both"
            )
            raise checks.error("targets", expected, targets)
        sources = {"clean": clean, "robust": robust}
        if init is not None:
            sources["init"] = init
        checkpoints = {name: Checkpoint(name, x) for name, x in sources.items()}
        # Several variables hold their kernels, which cannot be added.
        reasons = {
            "lora_enabled": "call `kwm.merge_lora(model)` first",
            "quantization_mode": "take it before Keras' `quantize`",
        }
        split = [
            f"{argument}, {layer.path}: {reason}"
            for argument, each in checkpoints.items()
            if each.model is not None
            for layer in keras_compat.layers_of(each.model)
            for attribute, reason in reasons.items()
            if getattr(layer, attribute, None)
        ]
        summary = "Signatures are of models without LoRA and quantized layers:"
        checks.raise_all(summary, split)
        layout = _layout(checkpoints, like)
        problems = [
            problem
            for argument, each in checkpoints.items()
            for problem in mismatches(layout.infos, each.infos, argument)
        ]
        checks.raise_all(_MISMATCH, problems)
        # Shapes and dtypes are the checkpoint's: `like` may have others.
        infos = tuple(
            dataclasses.replace(info, path=named.path, stored=named.stored)
            for info, named in zip(checkpoints["clean"].infos, layout.infos)
        )
        roles = layout.roles(frozen=True)
        depths = layout.depths(roles)
        usable_roles = ["weight"] + ["statistic"] * (statistics != "keep")
        taken = [i for i, role in enumerate(roles) if role in usable_roles]
        if targets is None:
            layers = 1 + max(depths)
            depth = min(7, layers) if depth is None else depth
            if checks.check_int("depth", depth, least=1) > layers:
                expected = (
                    f"at most the number of layers with a kernel, {layers}"
                )
                raise checks.error("depth", expected, depth)
            taken = [i for i in taken if depths[i] < depth]
        else:
            found = filters.matching_weights("targets", targets, layout.model)
            ids = {id(variable) for variable in found}
            taken = [i for i in taken if id(layout.variables[i]) in ids]
            if not taken:
                raise checks.error("targets", "of at least one weight", targets)
        for argument, each in checkpoints.items():
            problems += mismatches(infos, each.infos, argument, taken, True)
            problems += [
                f"{argument}, {infos[i].key}: values that are not finite floats"
                for i in taken
                if each.infos[i].dtype not in FLOATS
                or not tensors.is_finite(each.read(i))
            ]
        checks.raise_all(_MISMATCH, problems)
        first, second = checkpoints["robust"], checkpoints["clean"]
        if all(np.array_equal(first.read(i), second.read(i)) for i in taken):
            warnings.warn(
                "The signature is empty: `robust` equals `clean` in all of the "
                f"{len(taken)} weights that are taken. Pass the checkpoint "
                "trained on corrupted data, or take more layers by `depth` or "
                "`targets`.",
                stacklevel=2,
            )
        entries = []
        with Progress(len(taken), "weight", verbose) as progress:
            for i in taken:
                values = {
                    k: c.read(i).astype("float64")
                    for k, c in checkpoints.items()
                }
                replaced = 0.0
                if roles[i] == "statistic":
                    replaced = _REPLACED[statistics]
                    tensor = replaced * values["robust"]
                elif init is None:
                    tensor = values["robust"] - values["clean"]
                else:
                    start = values["init"]
                    tensor = residual(
                        values["robust"] - start, values["clean"] - start
                    )
                entry = PatchEntry(infos[i], None, replaced, depths[i])
                entries.append(entry.with_tensor(tensor))
                progress.add()
        method = "difference" if init is None else "rws"
        return cls(tuple(entries), infos, method=method, name=name)

    @property
    def depth(self) -> int:
        """Int, the number of shallow layers that hold all of it."""
        return 1 + max((entry.depth for entry in self.entries), default=-1)

    @staticmethod
    def sum(
        signatures: Sequence["WeightSignature"],
        method: str = "sum",
        weights: Sequence[float] | None = None,
        *,
        density: float | None = None,
        seed: int = 0,
        verbose: int = 1,
    ) -> "WeightSignature":
        """Combine several signatures of one architecture into one.

        If a signature lacks a weight that another one has, it counts as zero.
        Batch-norm statistics are always summed with the weights, or averaged
        where the method takes a mean. Where their shares sum to more than 1,
        the model gets their mean.

        Args:
            signatures: List of `WeightSignature`.
            method: String:
                `"sum"`: the sum of `weight * signature` (task arithmetic,
                arXiv 2212.04089). `"mean"`: that divided by the sum of the
                weights; with equal weights what RWS (arXiv 2302.12480) does
                with several. `"ties"` (arXiv 2306.01708): each signature is
                trimmed to its largest entries; an entry becomes the weighted
                mean of those that have the sign of their weighted sum.
                `"dare"` (arXiv 2311.03099): entries of each signature are
                kept at random and divided by `density`; then the sum.
            weights: List of floats, one for each signature; 0 or more for
                `"ties"`. Defaults to ones.
            density: Float in (0, 1], the share of entries that are kept: for
                `"ties"` over all of a signature's weights together, 0.2 by
                default; for `"dare"` the probability of each, 0.1 by default.
            seed: Int, for `"dare"`.
            verbose: 0 or 1. 0 shows no progress bar; 1 shows one once it has
                taken two seconds. Defaults to `1`.

        Returns:
            A `WeightSignature` in float32.

        Raises:
            ValueError: If an argument is wrong or not for the method, or the
                signatures have different architectures. All mismatches are
                listed.

        Example:

        ```python
        import keras
        from keras_weightmods import WeightSignature

        clean, noise, blur = (
            keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
            for _ in range(3)
        )
        signatures = [
            WeightSignature.extract(None, clean, robust, depth=1)
            for robust in (noise, blur)
        ]
        both = WeightSignature.sum(signatures, method="ties", density=0.5)
        ```
        """
        is_list = isinstance(signatures, (list, tuple)) and len(signatures) > 0
        if not is_list or not all(
            isinstance(each, WeightSignature) for each in signatures
        ):
            expected = "a non-empty list of `WeightSignature`"
            raise checks.error("signatures", expected, signatures)
        checks.check_verbose(verbose)
        with Progress(1, "step", verbose):
            made: WeightSignature = combine.summed(
                signatures, method, weights, density, seed
            )
        return made

    def truncate(self, depth: int) -> Self:
        """Return the part of the signature in the `depth` shallowest layers.

        Args:
            depth: Int, as in `extract`, and large enough for one weight.

        Returns:
            A `WeightSignature`.

        Raises:
            ValueError: If `depth` is something else.
        """
        shallowest = 1 + min((entry.depth for entry in self), default=0)
        checks.check_int("depth", depth, least=shallowest)
        return self.with_entries(e for e in self if e.depth < depth)

    def quantize(self, bits: int = 8, verbose: int = 1) -> Self:
        """Return the signature in integers of `bits` bits.

        The integers are symmetric around zero. Statistics stay in float32,
        because small variances would become zero.

        Args:
            bits: 8, 4 or 2; 4 and 2 are packed into bytes, also in files.
            verbose: As in `extract`.

        Returns:
            A `WeightSignature`.

        Raises:
            ValueError: If `bits` is something else.
        """
        checks.check_choice("bits", bits, (8, 4, 2))
        checks.check_verbose(verbose)
        entries = []
        with Progress(len(self), "weight", verbose) as progress:
            for entry in self:
                if not entry.info.is_statistic:
                    tensor = quantize(entry.dequantized(), bits)
                    entry = entry.with_tensor(tensor)
                entries.append(entry)
                progress.add()
        return self.with_entries(entries)

    def cosine_similarity(self, other: "WeightSignature") -> float:
        """Return the cosine similarity of two signatures, in [-1, 1].

        It covers all weights but statistics. A weight that only one of them has
        counts as zero in the other. A signature of zeros has the similarity 0.

        Args:
            other: A `WeightSignature` of the same architecture.

        Returns:
            Float.

        Raises:
            ValueError: If `other` is something else.
        """
        if not isinstance(other, WeightSignature):
            raise checks.error("other", "a `WeightSignature`", other)
        return combine.cosine_similarity(self, other)

    def with_entries(self, entries: Any, **fields: Any) -> Self:
        """Return the same signature with other entries."""
        return dataclasses.replace(self, entries=tuple(entries), **fields)

    def __add__(self, other: "WeightSignature") -> "WeightSignature":
        if not isinstance(other, WeightSignature):
            return NotImplemented
        return WeightSignature.sum([self, other])

    def __sub__(self, other: "WeightSignature") -> "WeightSignature":
        return self + -other

    def __mul__(self, factor: float) -> "WeightSignature":
        if not checks.is_number(factor):
            return NotImplemented
        factor = checks.check_float("factor", factor)
        made = WeightSignature.sum([self], weights=[factor])
        return made.with_entries(made.entries, method=self.method)

    __rmul__ = __mul__
    # NumPy scalars on the left would make an array of it.
    __array_ufunc__ = None

    def __truediv__(self, divisor: float) -> "WeightSignature":
        if not checks.is_number(divisor):
            return NotImplemented
        factor: float = 1.0 / checks.check_float("divisor", divisor)
        return self * factor

    def __neg__(self) -> "WeightSignature":
        return self * -1.0


def residual(change: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return `change` less its projection on `reference`, both flattened.

    RWS (arXiv 2302.12480): what a robust checkpoint learned beyond what clean
    training learned. Where `reference` is zero, that is all of `change`.

    Args:
        change, reference: float64 arrays of one shape.

    Returns:
        A float64 array of that shape.
    """
    # Avoids overflow and underflow of squares.
    largest = np.max(np.abs(reference), initial=0.0)
    if largest == 0.0:
        return change
    unit = reference / largest
    rest: np.ndarray = (
        change - np.vdot(change, unit) / np.vdot(unit, unit) * unit
    )
    return rest


def _layout(checkpoints: dict[str, Checkpoint], like: Any) -> Checkpoint:
    """Return the `Checkpoint` of a model, whose layers and paths count."""
    for found in checkpoints.values():
        if found.model is not None:
            return found
    if like is None or (found := Checkpoint("like", like)).model is None:
        expected = (
            "a built model of the architecture: lists of weights have no names"
        )
        raise checks.error("like", expected, like)
    return found
