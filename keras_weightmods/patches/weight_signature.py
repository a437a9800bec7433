"""Robust weight signatures, and the arithmetic of weights."""

import dataclasses
import functools
import hashlib
import json
import math
import numbers
import re

import numpy as np

from keras_weightmods.core.targets import Target, Targets
from keras_weightmods.patches import checkpoint as checkpoints
from keras_weightmods.patches import tensors
from keras_weightmods.patches.checkpoint import Checkpoint, WeightInfo
from keras_weightmods.patches.report import (
    SignatureReport,
    SignatureRow,
    Similarity,
)
from keras_weightmods.patches.tensors import Quantized

_STATISTICS = {"keep": 0.0, "average": 0.5, "replace": 1.0}


@dataclasses.dataclass(frozen=True, eq=False)
class SignatureEntry:
    """What a signature does to one weight.

    At scale s the weight w becomes `w + s * (tensor - pull * w)`.

    Attributes:
        info: `WeightInfo` of the weight, as in the model it came from.
        depth: Int, place of the weight's layer among the weighted layers.
        tensor: Read-only float32 array, or `Quantized`.
        pull: Float, 0 for a weight. For a batch-norm statistic, which is
            replaced and not added to, the share that is replaced.
    """

    info: WeightInfo
    depth: int
    tensor: np.ndarray | Quantized
    pull: float = 0.0

    @property
    def key(self):
        """String `"{position}:{path}"`."""
        return self.info.key

    @property
    def is_statistic(self):
        """Whether it is a moving mean or variance."""
        name = self.info.path.rpartition("/")[2]
        return name in checkpoints.STATISTICS

    @property
    def nbytes(self):
        """Int, the bytes of the tensor, with its scales where quantized."""
        return self.tensor.nbytes

    def dequantized(self):
        """The tensor as a float32 array."""
        if isinstance(self.tensor, Quantized):
            return self.tensor.dequantized()
        return self.tensor


class WeightSignature:
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

    def __init__(
        self,
        entries,
        architecture,
        *,
        method,
        name=None,
        model_class=None,
        fingerprints=None,
    ):
        self.entries = tuple(
            sorted(entries, key=lambda entry: entry.info.position)
        )
        self.architecture = tuple(architecture)
        self.method = method
        self.name = name
        self.model_class = model_class
        self.fingerprints = dict(fingerprints or {})
        broken = []
        for entry in self.entries:
            tensor = entry.tensor
            if isinstance(tensor, Quantized):
                tensor = tensor.scales
            else:
                tensor.flags.writeable = False
            if not (tensors.is_finite(tensor) and math.isfinite(entry.pull)):
                broken.append(f"{entry.key}: not finite in float32")
        checkpoints.raise_all("The signature cannot be made:", broken)

    @classmethod
    def extract(
        cls,
        init,
        clean,
        robust,
        depth=None,
        targets=None,
        statistics="keep",
        *,
        name=None,
        like=None,
    ):
        """The signature that leads from a clean checkpoint to a robust one.

        Each checkpoint is a built Keras model, or the list that its
        `get_weights()` returns; all three have one architecture and share
        their start. A weight that clean training did not move keeps its whole
        d_c. Weight and bias of a layer are two tensors, and so are gamma and
        beta of a normalization.

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
                Defaults to 7, the paper's choice for VGG-16.
            targets: Instead of `depth`: `find_targets(model)` or a list of
                its elements, for all weights of their layers; or a regex, or a
                list of them, to search for in the weights' paths.
            statistics: What happens to the moving mean and variance of the
                batch normalizations taken: `"keep"` never touches them,
                `"replace"` puts the robust checkpoint's in their place at
                scale 1, `"average"` goes half of the way there. They are no
                differences: on any model they lead to the robust
                checkpoint's statistics.
            name: String, what to call the signature in tables.
            like: Where all checkpoints are lists: a model of the
                architecture, or the list of its weights' paths.

        Returns:
            A `WeightSignature`.

        Raises:
            ValueError: If the arguments are wrong, listing all that is wrong
                with the checkpoints at once: number, names, shapes, dtypes,
                and values that are not finite.

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
        if statistics not in _STATISTICS:
            raise ValueError(
                f"`statistics` must be one of {list(_STATISTICS)}. Received: "
                f"statistics={statistics!r}"
            )
        if depth is not None and targets is not None:
            raise ValueError(
                "Give `depth` or `targets`, not both. Received: "
                f"depth={depth!r}, targets={targets!r}"
            )
        sources = {"init": init, "clean": clean, "robust": robust}
        given = {
            argument: Checkpoint(argument, source)
            for argument, source in sources.items()
            if source is not None or argument != "init"
        }
        layout, infos = _layout(given, like)
        problems = [
            problem
            for argument, each in given.items()
            for problem in checkpoints.architecture_problems(
                infos, each.infos, argument
            )
        ]
        checkpoints.raise_all("The checkpoints do not match:", problems)
        roles = checkpoints.roles(layout, infos)
        depths = checkpoints.depths(layout, infos, roles)
        taken = _taken(layout, infos, roles, depths, depth, targets)
        checkpoints.raise_all(
            "The checkpoints do not match:",
            [
                problem
                for position in taken
                if roles[position] == "weight" or statistics != "keep"
                for problem in _tensor_problems(given, infos[position])
            ],
        )
        entries = []
        for position in taken:
            values = {
                argument: each.read(position).astype("float64")
                for argument, each in given.items()
            }
            pull = 0.0
            if roles[position] == "statistic":
                pull = _STATISTICS[statistics]
                if not pull:
                    continue
                tensor = pull * values["robust"]
            elif init is None:
                tensor = values["robust"] - values["clean"]
            else:
                tensor = tensors.residual(
                    values["robust"] - values["init"],
                    values["clean"] - values["init"],
                )
            entries.append(
                SignatureEntry(
                    infos[position], depths[position], _float32(tensor), pull
                )
            )
        model = layout.model
        return cls(
            entries,
            infos,
            method="difference" if init is None else "rws",
            name=name,
            model_class=None if model is None else type(model).__name__,
            fingerprints={
                argument: each.fingerprint() for argument, each in given.items()
            },
        )

    @property
    def depth(self):
        """Int, the number of shallow layers that hold all of it."""
        return 1 + max((entry.depth for entry in self.entries), default=-1)

    @property
    def nbytes(self):
        """Int, the bytes of the tensors: packed codes and scales."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def model_nbytes(self):
        """Int, the bytes of all weights of the model it came from."""
        return sum(info.nbytes for info in self.architecture)

    @functools.cached_property
    def digest(self):
        """String, the SHA-256 of all that the signature is."""
        digest = hashlib.sha256()
        header = json.dumps(self.get_config(), sort_keys=True)
        digest.update(header.encode())
        for tensor in self.get_tensors().values():
            checkpoints.update_digest(digest, tensor)
        return digest.hexdigest()

    def get_config(self):
        """All but the tensors, as plain Python values, ready for JSON."""
        return {
            "method": self.method,
            "name": self.name,
            "model_class": self.model_class,
            "fingerprints": self.fingerprints,
            "architecture": [
                [info.path, list(info.shape), info.dtype]
                for info in self.architecture
            ],
            "entries": [
                {
                    "position": entry.info.position,
                    "depth": entry.depth,
                    "pull": entry.pull,
                    "bits": getattr(entry.tensor, "bits", 32),
                }
                for entry in self.entries
            ],
        }

    def get_tensors(self):
        """Dict from `"{position}"`, `"{position}.scales"` to arrays."""
        found = {}
        for entry in self.entries:
            position = str(entry.info.position)
            if isinstance(entry.tensor, Quantized):
                found[position] = entry.tensor.packed
                found[f"{position}.scales"] = entry.tensor.scales
            else:
                found[position] = entry.tensor
        return found

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, key):
        """The float32 tensor under a key `"{position}:{path}"`."""
        for entry in self.entries:
            if entry.key == key:
                return entry.dequantized()
        raise KeyError(key)

    def keys(self):
        """List of the keys `"{position}:{path}"`."""
        return [entry.key for entry in self.entries]

    def apply(self, model, scale=1.0):
        """Adds `scale` times the signature to a model.

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
                architecture, names, shapes, dtypes, values that are not
                finite before or after. The model is unchanged then.

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
        from keras_weightmods.patches.patches import Patches, patched_list

        if isinstance(model, (list, tuple)):
            return patched_list(model, self, scale)
        return Patches(model).add(self, scale)

    def remove(self, model, force=False, scale=1.0):
        """Takes the signature off a model again.

        Args:
            model: A model that `apply` or `Patches.add` has patched: with the
                last patch gone its weights are the clean ones, bit for bit.
                Or a list of arrays; nothing is known of its clean values, so
                it takes `force=True`.
            force: Whether to subtract the signature from weights that were
                changed since, by training for instance. That is no return to
                the clean model.
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
        from keras_weightmods.patches.patches import Patches, unpatched_list

        if isinstance(model, (list, tuple)):
            return unpatched_list(model, self, scale, force)
        patches = Patches(model)
        return patches.remove(patches.name_of(self), force=force)

    def truncate(self, depth):
        """The part of the signature in the `depth` shallowest layers.

        Args:
            depth: Int, at least 1, as in `extract`.

        Returns:
            A `WeightSignature`.

        Raises:
            ValueError: If `depth` is wrong, or nothing remains.
        """
        _check_depth(depth)
        kept = [entry for entry in self.entries if entry.depth < depth]
        if not kept:
            raise ValueError(
                "The signature holds nothing at this depth. Received: "
                f"depth={depth}, and the shallowest weight has depth "
                f"{min(entry.depth for entry in self.entries) + 1}"
            )
        return self.with_entries(kept)

    def quantize(self, bits=8, per_channel=False):
        """The signature in integers of `bits` bits.

        Symmetric around zero. Statistics stay in float32: small variances
        would become zero.

        Args:
            bits: 8, 4 or 2; 4 and 2 are packed into bytes, also in files.
            per_channel: Bool, a scale for each index of a kernel's last axis,
                the output units of Dense and Conv layers, instead of one for
                each tensor. Defaults to False.

        Returns:
            A `WeightSignature`.

        Raises:
            ValueError: If `bits` is something else.
        """
        if bits not in (8, 4, 2) or isinstance(bits, (bool, float)):
            raise ValueError(
                "`bits` must be the number of bits of a weight: 8, 4 or 2. "
                f"Received: bits={bits!r}"
            )
        return self.with_entries(
            entry
            if entry.is_statistic
            else dataclasses.replace(
                entry,
                tensor=tensors.quantize(
                    entry.dequantized(), int(bits), bool(per_channel)
                ),
            )
            for entry in self.entries
        )

    def cosine_similarity(self, other):
        """How far two signatures point in one direction, in [-1, 1].

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
        self._check_compatible(other)
        mine, theirs = ({e.info.position: e for e in s} for s in (self, other))
        whole = np.zeros(3)
        layers = {}
        for group in checkpoints.layer_groups(self.architecture):
            products = np.zeros(3)
            for position in group:
                pair = [each.get(position) for each in (mine, theirs)]
                if any(e is not None and e.is_statistic for e in pair):
                    continue
                a, b = (
                    None if e is None else _float64(e).reshape(-1) for e in pair
                )
                products[1] += 0.0 if a is None else a @ a
                products[2] += 0.0 if b is None else b @ b
                if a is not None and b is not None:
                    products[0] += a @ b
            if any(place in mine or place in theirs for place in group):
                info = self.architecture[group[0]]
                layer = info.path.rpartition("/")[0]
                layers[f"{info.position}:{layer}"] = _cosine(products)
                whole += products
        return Similarity(_cosine(whole), layers)

    def report(self):
        """What the signature holds, as a `SignatureReport`: a table to print.

        Returns:
            A `SignatureReport`.
        """
        return SignatureReport(
            name=self.name,
            method=self.method,
            model_class=self.model_class,
            depth=self.depth,
            nbytes=self.nbytes,
            model_nbytes=self.model_nbytes,
            rows=tuple(
                SignatureRow(
                    key=entry.key,
                    path=entry.info.path,
                    shape=entry.info.shape,
                    depth=entry.depth,
                    bits=getattr(entry.tensor, "bits", 32),
                    nbytes=entry.nbytes,
                    norm=float(np.linalg.norm(_float64(entry))),
                    pull=entry.pull,
                )
                for entry in self.entries
            ),
        )

    def save(self, path, overwrite=True):
        """Writes the signature to a safetensors file.

        Args:
            path: String or path. `.safetensors` is the usual ending.
            overwrite: Bool, whether a file that exists is replaced, which
                happens at once when the new one is complete. Defaults to
                True.

        Raises:
            FileExistsError: If it exists and `overwrite` is False.
            ImportError: If the package `safetensors` is missing.
        """
        from keras_weightmods.patches.files import save_signature

        save_signature(self, path, overwrite)

    @classmethod
    def load(cls, path):
        """Reads a signature that `save` has written.

        Args:
            path: String or path.

        Returns:
            A `WeightSignature`.

        Raises:
            ValueError: If the file is no signature, is damaged, or was made
                by a later version of the format. Nothing in a file is ever
                executed.
            ImportError: If the package `safetensors` is missing.
        """
        from keras_weightmods.patches.files import load_signature

        return load_signature(path)

    def __iter__(self):
        return iter(self.entries)

    def __add__(self, other):
        if not isinstance(other, WeightSignature):
            return NotImplemented
        return linear_combination([self, other], [1.0, 1.0], "sum")

    def __sub__(self, other):
        if not isinstance(other, WeightSignature):
            return NotImplemented
        return linear_combination([self, other], [1.0, -1.0], "sum")

    def __mul__(self, factor):
        if not _is_number(factor):
            return NotImplemented
        check_number("factor", factor)
        return linear_combination([self], [float(factor)], self.method)

    __rmul__ = __mul__
    # NumPy scalars on the left would make an array of it.
    __array_ufunc__ = None

    def __truediv__(self, divisor):
        if not _is_number(divisor):
            return NotImplemented
        check_number("divisor", divisor)
        if divisor == 0:
            raise ZeroDivisionError("A signature cannot be divided by 0.")
        return self * (1.0 / divisor)

    def __neg__(self):
        return self * -1.0

    def __repr__(self):
        name = "" if self.name is None else f"{self.name!r}, "
        return (
            f"<WeightSignature {name}{self.method}, {len(self)} weights, depth "
            f"{self.depth}, {self.nbytes:,} bytes>"
        )

    def __str__(self):
        return str(self.report())

    def with_entries(self, entries):
        """The same with other `SignatureEntry`s, an iterable of them."""
        return WeightSignature(
            entries,
            self.architecture,
            method=self.method,
            name=self.name,
            model_class=self.model_class,
            fingerprints=self.fingerprints,
        )

    def _check_compatible(self, other):
        if not isinstance(other, WeightSignature):
            raise ValueError(
                "A `WeightSignature` is expected. Received: "
                f"{type(other).__name__}"
            )
        check_compatible([self, other])


def linear_combination(signatures, weights, method):
    """The sum of `weights[i] * signatures[i]`, computed in float64."""
    return combined(
        signatures,
        lambda parts: sum(w * x for w, x in zip(weights, parts)),
        weights,
        method,
    )


def combined(signatures, function, weights, method):
    """Puts signatures together, weight by weight.

    Args:
        signatures: List of `WeightSignature`, compatible.
        function: Callable from a list of float64 arrays, one for each
            signature and zero where it has nothing, to an array. Statistics
            are summed with `weights` instead.
        weights: List of floats.
        method: String, the `method` of the result.

    Returns:
        A `WeightSignature` in float32.
    """
    if len(signatures) > 1:
        check_compatible(signatures)
    lookups = [{e.info.position: e for e in s.entries} for s in signatures]
    entries = []
    for position in sorted(set().union(*lookups)):
        found = [lookup.get(position) for lookup in lookups]
        first = next(entry for entry in found if entry is not None)
        parts = [
            np.zeros(first.info.shape) if entry is None else _float64(entry)
            for entry in found
        ]
        if first.is_statistic:
            tensor = sum(w * x for w, x in zip(weights, parts))
        else:
            tensor = function(parts)
        entries.append(
            dataclasses.replace(
                first,
                tensor=_float32(tensor),
                pull=math.fsum(
                    w * entry.pull
                    for w, entry in zip(weights, found)
                    if entry is not None
                ),
            )
        )
    first = signatures[0]
    return WeightSignature(
        entries,
        first.architecture,
        method=method,
        name=first.name if len(signatures) == 1 else None,
        model_class=first.model_class,
        fingerprints={
            key: value
            for key, value in first.fingerprints.items()
            if all(s.fingerprints.get(key) == value for s in signatures)
        },
    )


def map_weights(signature, function):
    """The signature with `function` of the list of its weights' arrays.

    Statistics stay as they are.
    """
    weights = [entry for entry in signature if not entry.is_statistic]
    arrays = function([_float64(entry) for entry in weights])
    changed = [
        dataclasses.replace(entry, tensor=_float32(array))
        for entry, array in zip(weights, arrays)
    ]
    statistics = [entry for entry in signature if entry.is_statistic]
    return signature.with_entries(changed + statistics)


def check_compatible(signatures):
    """Raises unless all signatures are of one architecture."""
    first = signatures[0]
    shapes = {e.info.position: e.info.shape for e in first.entries}
    problems = []
    for number, other in enumerate(signatures[1:], start=2):
        argument = f"signature {number}"
        problems += checkpoints.architecture_problems(
            first.architecture, other.architecture, argument
        )
        for entry in other.entries:
            shape = shapes.setdefault(entry.info.position, entry.info.shape)
            if shape != entry.info.shape:
                problems.append(
                    f"{argument}, {entry.key}: shape {entry.info.shape}, and "
                    f"{shape} is expected"
                )
    checkpoints.raise_all("The signatures do not match:", problems)


def check_number(name, value):
    """Raises unless `value` is a finite real number."""
    if not _is_number(value) or not math.isfinite(value):
        raise ValueError(
            f"`{name}` must be a finite number. Received: {name}={value!r}"
        )


def _is_number(value):
    return isinstance(value, (numbers.Real, np.floating)) and not isinstance(
        value, (bool, np.bool_)
    )


def _check_depth(depth):
    if type(depth) is not int or depth < 1:
        raise ValueError(
            "`depth` must be an int of at least 1, the number of layers. "
            f"Received: depth={depth!r}"
        )


def _layout(given, like):
    """The checkpoint that tells the layers, and `WeightInfo`s with paths."""
    for argument in ("clean", "robust", "init"):
        if argument in given and given[argument].model is not None:
            return given[argument], given[argument].infos
    if like is None:
        raise ValueError(
            "With lists alone the weights have no names. Give `like`: a model "
            "of the architecture, or the list of its weights' paths. "
            "Received: like=None"
        )
    clean = given["clean"]
    if not isinstance(like, (list, tuple)):
        model = Checkpoint("like", like)
        checkpoints.raise_all(
            "The checkpoints do not match:",
            checkpoints.architecture_problems(
                model.infos, clean.infos, "clean"
            ),
        )
        # Shapes and dtypes are the checkpoint's: `like` may have others.
        return model, tuple(
            dataclasses.replace(info, path=named.path)
            for info, named in zip(clean.infos, model.infos)
        )
    if len(like) != len(clean.infos) or not all(
        isinstance(path, str) and path for path in like
    ):
        raise ValueError(
            f"`like` must hold one path for each of the {len(clean.infos)} "
            f"weights of `clean`. Received: like={like!r}"
        )
    return clean, tuple(
        dataclasses.replace(info, path=path)
        for info, path in zip(clean.infos, like)
    )


def _taken(layout, infos, roles, depths, depth, targets):
    """The positions that `depth` or `targets` stand for."""
    usable = [i for i, role in enumerate(roles) if role != "other"]
    if targets is None:
        depth = 7 if depth is None else depth
        _check_depth(depth)
        layers = 1 + max(depths)
        if depth > layers:
            raise ValueError(
                "`depth` must be at most the number of layers with a kernel. "
                f"Received: depth={depth}, and there are {layers}"
            )
        return [i for i in usable if depths[i] < depth]
    if isinstance(targets, (str, re.Pattern)):
        targets = [targets]
    if isinstance(targets, (list, tuple, Targets)) and len(targets):
        if all(isinstance(each, Target) for each in targets):
            return _taken_by_target(layout, usable, targets)
        if all(isinstance(each, (str, re.Pattern)) for each in targets):
            return _taken_by_regex(infos, usable, targets)
    raise ValueError(
        "`targets` must be what `find_targets(model)` returns, a list of its "
        "elements, a regular expression for the weights' paths, or a list of "
        f"these. Received: targets={targets!r}"
    )


def _taken_by_target(layout, usable, targets):
    if layout.model is None:
        raise ValueError(
            "`targets` from `find_targets` need a model among the "
            "checkpoints; for lists give regular expressions. Received: "
            f"targets={targets!r}"
        )
    known = {id(v) for v in layout.variables}
    strange = [t.path for t in targets if id(t.variable) not in known]
    if strange:
        raise ValueError(
            f"`targets` must be weights of `{layout.argument}`, the model "
            f"whose layers count. Received: {', '.join(strange)}"
        )
    holders = checkpoints.owners(layout.model)
    layers = {id(holders[id(target.variable)]) for target in targets}
    return [i for i in usable if id(holders[id(layout.variables[i])]) in layers]


def _taken_by_regex(infos, usable, patterns):
    taken = set()
    for pattern in patterns:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"`targets` must be valid regular expressions ({error}). "
                f"Received: targets={pattern!r}"
            ) from error
        found = [i for i in usable if regex.search(infos[i].path)]
        if not found:
            paths = ", ".join(infos[i].path for i in usable[:5])
            raise ValueError(
                "Each of `targets` must match a weight. Received: "
                f"targets={pattern!r}, which matches none of {len(usable)}, "
                f"among them {paths}"
            )
        taken.update(found)
    return sorted(taken)


def _tensor_problems(given, info):
    problems = []
    dtypes = {}
    for argument, each in given.items():
        found = each.infos[info.position]
        dtypes[argument] = found.dtype
        if found.shape != info.shape:
            problems.append(
                f"{argument}, {info.key}: shape {found.shape}, and "
                f"{info.shape} is expected"
            )
        if found.dtype not in checkpoints.FLOATS:
            problems.append(
                f"{argument}, {info.key}: dtype {found.dtype}, and one of "
                f"{', '.join(checkpoints.FLOATS)} is expected"
            )
        elif not tensors.is_finite(each.read(info.position)):
            problems.append(
                f"{argument}, {info.key}: values that are not finite"
            )
    if len(set(dtypes.values())) > 1:
        listed = ", ".join(f"{k} {v}" for k, v in dtypes.items())
        problems.append(f"{info.key}: one dtype is expected, not {listed}")
    return problems


def _float32(tensor):
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(tensor, "float32").reshape(np.shape(tensor))


def _float64(entry):
    return entry.dequantized().astype("float64")


def _cosine(products):
    norms = math.sqrt(products[1] * products[2])
    return float(products[0] / norms) if norms else 0.0
