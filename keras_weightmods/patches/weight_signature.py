"""Robust weight signatures, and the arithmetic of weights."""

import dataclasses
import functools
import math
from typing import Any, Self

import numpy as np

from keras_weightmods.patches import architecture, checkpoint, combine, files
from keras_weightmods.patches import report as reports
from keras_weightmods.patches.entry import Change, SignatureEntry
from keras_weightmods.patches.extract import extract
from keras_weightmods.patches.patches import Patches
from keras_weightmods.patches.quantized import quantize
from keras_weightmods.patches.sums import changed_list
from keras_weightmods.patches.tensors import is_finite
from keras_weightmods.utils import checks
from keras_weightmods.utils.progress import Progress


@dataclasses.dataclass(eq=False, repr=False)
class WeightSignature(Change):
    """What to add to a few weights of a model, to patch it and to unpatch it.

    Made by `extract`, `load`, `sum_signatures`, or arithmetic: `a + b`,
    `a - b`, `2 * a`, `a / 2`, `-a`. A signature is immutable; its tensors are
    NumPy arrays in float32, or integers after `quantize`. Combining quantized
    signatures gives one in float32.

    The robust weight signature of a corruption c (RWS, arXiv 2302.12480) is,
    tensor by tensor,

        d_std = theta_clean - theta_init,    d_c = theta_robust - theta_init
        RWS_c = d_c - <d_c, d_std> / <d_std, d_std> * d_std

    for the shallow layers, and nothing elsewhere.

    Attributes:
        entries: Tuple of `SignatureEntry`, in the order of the weights.
        architecture: Tuple of `WeightInfo`, all weights of the model.
        method: String, how it was made.
        name: String or None.
        model_class: String or None, the class of the model.
        fingerprints: Dict from `"init"`, `"clean"`, `"robust"` to the SHA-256
            of the checkpoint's values. A combination keeps those that all
            its parts share.
        reparameterized: Dict from positions, as strings, to how the weights
            there are stored, where a fixed compander stands for them.

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

    entries: tuple[SignatureEntry, ...]
    architecture: tuple[checkpoint.WeightInfo, ...]
    _: dataclasses.KW_ONLY
    method: str
    name: str | None = None
    model_class: str | None = None
    fingerprints: dict[str, str] = dataclasses.field(default_factory=dict)
    reparameterized: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.entries = tuple(sorted(self.entries, key=lambda e: e.position))
        broken = []
        for entry in self.entries:
            numbers: Any = getattr(entry.tensor, "scales", entry.tensor)
            numbers.flags.writeable = False
            if not (is_finite(numbers) and math.isfinite(entry.replaced)):
                broken.append(f"{entry.key}: not finite in float32")
        checks.raise_all("The signature cannot be made:", broken)

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
        """Return what leads from a clean checkpoint to a robust one.

        Each checkpoint is a built Keras model, or the list that its
        `get_weights()` returns; all three have one architecture and share
        their start. A weight that clean training did not move keeps its whole
        d_c. Weight and bias of a layer are two tensors, and so are gamma and
        beta of a normalization. Of models with companders it is what these
        store, and goes onto models with the same ones alone. Models with
        LoRA are refused: call `merge_lora` first.

        Args:
            init: The checkpoint from which both trainings started. `None`
                leaves the projection out: the signature is then robust less
                clean, a task vector (arXiv 2212.04089).
            clean: The checkpoint trained on clean data.
            robust: The one trained in the same way on corrupted data.
            depth: Int, how many of the shallowest layers with a kernel are
                taken, in the order of execution (in that of the list where no
                model is given). A layer without a kernel, such as a
                normalization, goes with the one that runs before it.
                Defaults to 7, the paper's choice for VGG-16, or to all where
                there are fewer.
            targets: Instead of `depth`: a regex, or a list of them, to search
                for in the paths of all weights; or, where there is a model,
                what `resolve_targets` takes, for all weights of the layers.
            statistics: What happens to the moving mean and variance of the
                batch normalizations taken, which the robust weights were
                trained with: `"average"` goes half of the way to the robust
                checkpoint's at scale 1, `"replace"` all of it, `"keep"`
                never touches them. They are no differences: on any model
                they lead to the robust checkpoint's statistics. Shares of
                several patches, or of a large scale, that sum to more than 1
                are divided by their sum, so that the statistics stay between
                the clean and the robust ones. Defaults to `"average"`.
            name: String, what to call the signature in tables.
            like: Where all checkpoints are lists: a model of the
                architecture, or the list of its weights' paths.
            verbose: 0 or 1. 0 shows no progress bar; 1 shows one once it has
                taken two seconds. Defaults to `1`.

        Returns:
            A `WeightSignature`.

        Raises:
            ValueError: If the arguments are wrong, listing all that is wrong
                with the checkpoints at once: number, names, shapes, dtypes,
                companders, and values that are not finite.

        Example:

        ```python
        import numpy as np
        from keras_weightmods import WeightSignature

        rng = np.random.default_rng(0)
        init, clean, robust = (
            [rng.normal(size=(3, 2)), rng.normal(size=2)] for _ in range(3)
        )
        signature = WeightSignature.extract(
            init, clean, robust, depth=1, like=["dense/kernel", "dense/bias"]
        )
        patched = signature.apply(clean)  # a new list
        ```
        """
        taken = depth, targets, statistics
        return cls(**extract(init, clean, robust, *taken, name, like, verbose))

    @property
    def depth(self) -> int:
        """Int, the number of shallow layers that hold all of it."""
        return 1 + max((entry.depth for entry in self.entries), default=-1)

    @property
    def nbytes(self) -> int:
        """Int, the bytes of the tensors: packed codes and scales."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def model_nbytes(self) -> int:
        """Int, the bytes of all weights of the model it came from."""
        return sum(info.nbytes for info in self.architecture)

    @functools.cached_property
    def digest(self) -> str:
        """String, the SHA-256 of all that the signature is."""
        arrays = files.arrays_of(self).values()
        return checkpoint.digest_of(files.config_of(self), arrays)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: str) -> np.ndarray:
        """Return the float32 tensor under a key `"{position}:{path}"`."""
        for entry in self.entries:
            if entry.key == key:
                return entry.dequantized()
        raise KeyError(key)

    def keys(self) -> list[str]:
        """Return the list of the keys `"{position}:{path}"`."""
        return [entry.key for entry in self.entries]

    def apply(self, model: Any, scale: float = 1.0) -> Any:
        """Add `scale` times the signature to a model.

        The tensors that are replaced are kept, in `Patches(model)`, for
        `remove`. The optimizer's state is not changed.

        Args:
            model: A built Keras model of the architecture, trained on
                whatever data; the sizes of the weights that are not patched
                may differ. Or a list as from `model.get_weights()`.
            scale: Float, the strength, 1 by default.

        Returns:
            A `PatchReport`. For a list, a new list of arrays instead; the one
            given and its arrays are not changed.

        Raises:
            ValueError: Listing all that is wrong at once: another
                architecture, names, shapes, dtypes, companders, values that
                are not finite before or after. The model is unchanged then.

        Example:

        ```python
        import keras
        from keras_weightmods import WeightSignature

        def dense():
            return keras.Sequential([keras.Input((8,)), keras.layers.Dense(2)])

        model, robust = dense(), dense()
        signature = WeightSignature.extract(None, model, robust, depth=1)
        print(signature.apply(model))
        ```
        """
        if not isinstance(model, (list, tuple)):
            return Patches(model).add(self, scale)
        scale = checks.check_float("scale", scale)
        return changed_list(model, self, lambda replaced: scale)

    def remove(
        self, model: Any, force: bool = False, scale: float = 1.0
    ) -> Any:
        """Take the signature off a model again.

        Args:
            model: A model that `apply` or `Patches.add` has patched: with the
                last patch gone its weights are the clean ones, bit for bit.
                Or a list of arrays; nothing is known of its clean values, so
                it takes `force=True`.
            force: Bool, whether to subtract the signature from weights that
                were changed since, by training for instance. That is no return
                to the clean model.
            scale: Float, the scale to subtract from a list. A model's is
                known.

        Returns:
            A `PatchReport`. For a list, a new list of arrays instead.

        Raises:
            ValueError: If the model does not have this patch, or weights were
                changed since and `force` is not set. The model is unchanged
                then.

        Example:

        ```python
        import keras
        from keras_weightmods import WeightSignature

        def dense():
            return keras.Sequential([keras.Input((8,)), keras.layers.Dense(2)])

        model, robust = dense(), dense()
        signature = WeightSignature.extract(None, model, robust, depth=1)
        signature.apply(model)
        signature.remove(model)
        ```
        """
        if not isinstance(model, (list, tuple)):
            patches = Patches(model)
            return patches.remove(patches.name_of(self), force=force)
        scale = checks.check_float("scale", scale)
        if not force:
            raise ValueError(
                "The clean values of a list are not known: keep the list that "
                "you gave to `apply`, which it did not change. `force=True` "
                "subtracts the signature, which rounds. Received: force=False"
            )
        checks.raise_all(
            "Statistics that were replaced as a whole cannot be subtracted:",
            [each.key for each in self if scale * each.replaced >= 1.0],
        )
        # Solves new = old + scale * (tensor - replaced * old) for the old one.
        return changed_list(
            model, self, lambda replaced: -scale / (1.0 - scale * replaced)
        )

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

    def quantize(
        self, bits: int = 8, per_channel: bool = False, verbose: int = 1
    ) -> Self:
        """Return the signature in integers of `bits` bits.

        Symmetric around zero. Statistics stay in float32: small variances
        would become zero.

        Args:
            bits: 8, 4 or 2; 4 and 2 are packed into bytes, also in files.
            per_channel: Bool, a scale for each index of a kernel's last axis,
                the output units of Dense and Conv layers, instead of one for
                each tensor. Defaults to False.
            verbose: As in `extract`.

        Returns:
            A `WeightSignature`.

        Raises:
            ValueError: If `bits` is something else.
        """
        checks.check_choice("bits", bits, (8, 4, 2))
        checks.check_bool("per_channel", per_channel)
        checks.check_verbose(verbose)
        entries = []
        with Progress(len(self), "weight", verbose) as progress:
            for entry in self:
                if not entry.is_statistic:
                    tensor = quantize(entry.dequantized(), bits, per_channel)
                    entry = entry.with_tensor(tensor)
                entries.append(entry)
                progress.add()
        return self.with_entries(entries)

    def cosine_similarity(self, other: "WeightSignature") -> reports.Similarity:
        """Return how far two signatures point in one direction, in [-1, 1].

        Over all weights but statistics. Where only one of them has a weight,
        the other counts as zero there; with a zero, the similarity is 0.

        Args:
            other: A `WeightSignature` of the same architecture.

        Returns:
            A `Similarity`: `whole`, and `layers`, a dict from the layer's
            place and path to its similarity.

        Raises:
            ValueError: If `other` is something else.
        """
        if not isinstance(other, WeightSignature):
            raise checks.error("other", "a `WeightSignature`", other)
        return combine.cosine_similarity(self, other)

    def report(self) -> reports.SignatureReport:
        """Return what the signature holds, as a table to print."""
        return reports.signature_report(self)

    def save(
        self, filepath: Any, overwrite: bool = True, verbose: int = 1
    ) -> None:
        """Write the signature to a safetensors file.

        Args:
            filepath: String or path. `.safetensors` is the usual ending.
            overwrite: Bool, whether a file that exists is replaced, which
                happens at once when the new one is complete. Defaults to
                True.
            verbose: As in `extract`.

        Raises:
            ValueError: If `filepath` is no place for a file.
            FileExistsError: If it exists and `overwrite` is False.
        """
        checks.check_verbose(verbose)
        with Progress(1, "step", verbose):
            files.save(filepath, self, overwrite)

    @classmethod
    def load(cls, filepath: Any, verbose: int = 1) -> Self:
        """Read a signature that `save` has written.

        Args:
            filepath: String or path.
            verbose: As in `extract`.

        Returns:
            A `WeightSignature`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is no signature, is damaged, or was made
                by a later version of the format. Nothing in a file is ever
                executed.
        """
        checks.check_verbose(verbose)
        with Progress(1, "step", verbose):
            return cls(**files.load(filepath))

    def problems(self, model: checkpoint.Checkpoint) -> list[str]:
        """Return what keeps the signature from fitting a `Checkpoint`."""
        infos, argument = model.infos, f"`{model.argument}`"
        expected = [entry.info for entry in self]
        return (
            architecture.problems(self.architecture, infos, argument)
            + architecture.weight_problems(expected, infos, argument)
            + architecture.reparameterization_problems(
                self.reparameterized, model, expected
            )
        )

    def with_entries(self, entries: Any, **fields: Any) -> Self:
        """Return the same with other entries."""
        return dataclasses.replace(self, entries=tuple(entries), **fields)

    def __add__(self, other: Self) -> Self:
        if not isinstance(other, WeightSignature):
            return NotImplemented
        return combine.linear_combination([self, other], [1.0, 1.0], "sum")

    def __sub__(self, other: Self) -> Self:
        return self + -other

    def __mul__(self, factor: float) -> Self:
        if not checks.is_number(factor):
            return NotImplemented
        factor = checks.check_float("factor", factor)
        return combine.linear_combination([self], [factor], self.method)

    __rmul__ = __mul__
    # NumPy scalars on the left would make an array of it.
    __array_ufunc__ = None

    def __truediv__(self, divisor: float) -> Self:
        if not checks.is_number(divisor):
            return NotImplemented
        factor: float = 1.0 / checks.check_float("divisor", divisor)
        return self * factor

    def __neg__(self) -> Self:
        return self * -1.0

    def __repr__(self) -> str:
        name = "" if self.name is None else f"{self.name!r}, "
        return (
            f"<WeightSignature {name}{self.method}, {len(self)} weights, depth "
            f"{self.depth}, {self.nbytes:,} bytes>"
        )

    def __str__(self) -> str:
        return str(self.report())
