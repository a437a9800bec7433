"""Several signatures on one model, and off it again bit for bit."""

import concurrent.futures
import dataclasses
import functools
import weakref

import numpy as np

from keras_weightmods.signatures import checkpoint as checkpoints
from keras_weightmods.signatures import tensors
from keras_weightmods.signatures.checkpoint import Checkpoint
from keras_weightmods.signatures.weight_signature import (
    WeightSignature,
    check_number,
)


@dataclasses.dataclass(frozen=True)
class PatchReport:
    """What a call changed on a model.

    Attributes:
        action: String: `"add"`, `"rescale"` or `"remove"`.
        name: String, the patch.
        scale: Float, its scale; the last one where it was removed.
        changed: Tuple of the keys of the weights that were written, from
            what they are without any patch.
        subtracted: Tuple of the keys of weights that had been changed since
            they were patched, from which the patch was subtracted.
        left: Tuple of the keys of statistics that had been changed since they
            were replaced, and were left as they are.
        active: Dict from the names of the patches now on the model to their
            scales.
        kept_nbytes: Int, the memory that the clean tensors take.
    """

    action: str
    name: str
    scale: float
    changed: tuple[str, ...]
    subtracted: tuple[str, ...]
    left: tuple[str, ...]
    active: dict[str, float]
    kept_nbytes: int

    def __str__(self):
        active = ", ".join(f"{k} x {v:g}" for k, v in self.active.items())
        lines = [
            f"{self.action} {self.name} x {self.scale:g}: "
            f"{len(self.changed)} weights written; now on the model: "
            f"{active or 'nothing'}; {self.kept_nbytes:,} bytes kept"
        ]
        lines += [f"  {key}: subtracted" for key in self.subtracted]
        lines += [f"  {key}: left as it is" for key in self.left]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True, eq=False)
class Patch:
    """A signature on a model, and its scale."""

    signature: WeightSignature
    scale: float


@dataclasses.dataclass(eq=False)
class _State:
    """What is on a model: patches by name, clean tensors by position."""

    patches: dict[str, Patch] = dataclasses.field(default_factory=dict)
    clean: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """What a call will do to one weight.

    `before` and `new` are what is in it and what to write, each as an array
    and the terms to add, if any.
    """

    kind: str
    clean: np.ndarray
    before: tuple[np.ndarray, list | None]
    new: tuple[np.ndarray, list | None]
    problems: list[str]


# One for each model, so that two managers never take each other's patches
# for the clean model. Not in the model, which would save and copy it.
_STATES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class Patches:
    """The signatures on a model: add, rescale and remove them in any order.

    A patched weight is always computed anew, `clean + sum of scale *
    signature` in float32 (float64 for float64) and rounded once, from the
    clean tensor, which is kept. So the order of the calls leaves no trace:
    equal patches give equal weights, and without the last one the model is
    the clean one bit for bit. Kept are the tensors of patched weights alone,
    and until the last patch on them is gone.

    All `Patches(model)` of one model are the same patches, those of
    `WeightSignature.apply` too. They live in memory, with the model object:
    files hold the patched weights alone.

    Weights that something else has changed since, such as training, are
    found by comparing every bit, and reported as an error; `remove(...,
    force=True)` subtracts from those.

    As a context manager it removes all patches at the end, also those that
    were there before.

    Args:
        model: A built Keras model.

    Raises:
        ValueError: If `model` is no model, or not built.

    Example:

    ```python
    import keras
    from keras_weightmods import Patches, WeightSignature

    def dense():
        return keras.Sequential([keras.Input((8,)), keras.layers.Dense(2)])

    model = dense()
    noise, blur = (
        WeightSignature.extract(None, model, dense(), depth=1) for _ in "ab"
    )
    with Patches(model) as patches:
        patches.add(noise, name="noise")
        patches.add(blur, scale=0.5, name="blur")
        patches.rescale("noise", 0.7)
        assert patches.scales == {"noise": 0.7, "blur": 0.5}
    assert len(Patches(model)) == 0
    ```
    """

    def __init__(self, model):
        if isinstance(model, (list, tuple)):
            raise ValueError(
                "`model` must be a built Keras model; lists of arrays go into "
                "`WeightSignature.apply`. Received: "
                f"model={type(model).__name__}"
            )
        Checkpoint("model", model)
        self.model = model
        self._state = _STATES.setdefault(model, _State())

    @property
    def scales(self):
        """Dict from the names of the patches to their scales."""
        return {name: p.scale for name, p in self._state.patches.items()}

    @property
    def kept_nbytes(self):
        """Int, the bytes of the clean tensors that are kept."""
        return sum(tensor.nbytes for tensor in self._state.clean.values())

    def add(self, signature, scale=1.0, name=None):
        """Puts a signature on the model.

        Args:
            signature: A `WeightSignature` of the model's architecture.
            scale: Float. Defaults to 1.
            name: String. Defaults to the signature's name, and to
                `"patch_{number}"` where it has none.

        Returns:
            A `PatchReport`.

        Raises:
            ValueError: If the name is taken, the signature is on the model
                already, weights were changed since they were patched, or as
                in `WeightSignature.apply`. The model is unchanged then.
        """
        _check_signature(signature)
        check_number("scale", scale)
        patches = self._state.patches
        if name is None:
            name = signature.name or _free_name(patches)
        if not isinstance(name, str) or not name or name in patches:
            raise ValueError(
                "`name` must be a string that no patch on the model has. "
                f"Received: name={name!r}, and there are {list(patches)}. "
                "`rescale` changes the scale of one that is there."
            )
        present = self._find(signature)
        if present is not None:
            raise ValueError(
                "The signature is on the model already. Received: a signature "
                f"that is there as {present!r}. `rescale` changes its scale."
            )
        after = {**patches, name: Patch(signature, float(scale))}
        return self._update("add", name, float(scale), after, False)

    def rescale(self, name, scale):
        """Changes the scale of a patch.

        Args:
            name: String, the patch.
            scale: Float, the new scale.

        Returns:
            A `PatchReport`.

        Raises:
            ValueError: If there is no such patch, weights were changed since
                they were patched, or the result is not finite. The model is
                unchanged then.
        """
        self._check_name(name)
        check_number("scale", scale)
        patches = self._state.patches
        patch = dataclasses.replace(patches[name], scale=float(scale))
        after = {**patches, name: patch}
        return self._update("rescale", name, float(scale), after, False)

    def remove(self, name, force=False):
        """Takes a patch off.

        Args:
            name: String, the patch.
            force: Bool, whether to subtract it from weights that were changed
                since they were patched. Statistics that were changed are left
                as they are: what they were before cannot be told.

        Returns:
            A `PatchReport`.

        Raises:
            ValueError: If there is no such patch, or weights were changed
                since they were patched and `force` is not set; all of them
                are listed. The model is unchanged then.
        """
        self._check_name(name)
        after = dict(self._state.patches)
        scale = after.pop(name).scale
        return self._update("remove", name, scale, after, force)

    def clear(self, force=False):
        """Takes all patches off, or none if one of them cannot be.

        Args:
            force: As in `remove`.

        Returns:
            List of `PatchReport`, one for each patch.

        Raises:
            ValueError: As in `remove`.
        """
        if not force:
            self._check_unchanged(sorted(self._state.clean))
        return [self.remove(name, force) for name in list(self.scales)]

    def name_of(self, signature):
        """The name under which a signature is on the model.

        Args:
            signature: A `WeightSignature`.

        Returns:
            String.

        Raises:
            ValueError: If it is not on the model.
        """
        _check_signature(signature)
        name = self._find(signature)
        if name is None:
            raise ValueError(
                "The signature is not on this model object. Received: "
                f"{signature!r}, and there are {list(self.scales)}"
            )
        return name

    def __len__(self):
        return len(self._state.patches)

    def __iter__(self):
        return iter(self.scales)

    def __getitem__(self, name):
        """The `Patch` of this name: its `signature` and `scale`."""
        return self._state.patches[name]

    def __contains__(self, name):
        return name in self._state.patches

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.clear()

    def __repr__(self):
        return f"<Patches on {self.model.name!r}: {self.scales}>"

    def _find(self, signature):
        for name, patch in self._state.patches.items():
            if patch.signature is signature:
                return name
        for name, patch in self._state.patches.items():
            if patch.signature.digest == signature.digest:
                return name
        return None

    def _check_name(self, name):
        if name not in self._state.patches:
            raise ValueError(
                "`name` must be that of a patch on the model. Received: "
                f"name={name!r}, and there are {list(self.scales)}"
            )

    def _check_unchanged(self, positions):
        model = Checkpoint("model", self.model)
        terms = _terms(self._state.patches)
        changed = [
            model.infos[position].key
            for position in positions
            if not self._is_unchanged(model, position, terms)
        ]
        checkpoints.raise_all(
            "Weights were changed since they were patched, by training for "
            "instance; `remove(..., force=True)` subtracts from those.",
            changed,
        )

    def _is_unchanged(self, model, position, terms):
        clean = self._state.clean[position]
        return tensors.is_rebuilt(model.read(position), clean, terms[position])

    def _plan(self, model, terms_before, terms, position, force):
        """What to write to one weight, and what is clean and in it now."""
        key = model.infos[position].key
        kind, clean = "changed", self._state.clean.get(position)
        if clean is None:
            clean = model.copy(position)
        before = clean, terms_before.get(position)
        if (
            force
            and before[1]
            and not self._is_unchanged(model, position, terms_before)
        ):
            if any(pull for _, _, pull in before[1]):
                return _Plan("left", clean, before, before, [])
            kind, before = "subtracted", (model.copy(position), None)
            clean = tensors.rebuild(
                before[0],
                [
                    (-scale, each, 0.0)
                    for scale, each, _ in terms_before[position]
                ],
            )
        new = clean, terms.get(position)
        problems = result_problems(key, clean, _pieces(*new))
        return _Plan(kind, clean, before, new, problems)

    def _update(self, action, name, scale, after, force):
        """Brings the model from the present patches to those in `after`."""
        state = self._state
        signature = {**state.patches, **after}[name].signature
        model = Checkpoint("model", self.model)
        checkpoints.raise_all(
            "The signature does not fit the model:",
            model_problems(signature, model),
        )
        positions = [entry.info.position for entry in signature]
        if not force:
            self._check_unchanged([p for p in positions if p in state.clean])
        terms_before, terms = _terms(state.patches), _terms(after)
        plan = functools.partial(
            self._plan, model, terms_before, terms, force=force
        )
        plans = dict(zip(positions, _parallel(plan, positions)))
        checkpoints.raise_all(
            "The patch cannot be written:",
            [problem for plan in plans.values() for problem in plan.problems],
        )
        left = [p for p in positions if plans[p].kind == "left"]
        subtracted = [p for p in positions if plans[p].kind == "subtracted"]
        new = {p: plans[p] for p in positions if p not in left}
        _write(model, new)
        state.patches = after
        state.clean.update({p: plans[p].clean for p in new})
        for position in positions:
            if position not in terms or position in left:
                del state.clean[position]
        return PatchReport(
            action=action,
            name=name,
            scale=scale,
            changed=tuple(
                model.infos[p].key for p in new if p not in subtracted
            ),
            subtracted=tuple(model.infos[p].key for p in subtracted),
            left=tuple(model.infos[p].key for p in left),
            active=self.scales,
            kept_nbytes=self.kept_nbytes,
        )


def patched_list(weights, signature, scale):
    """`WeightSignature.apply` on a list of arrays: a new list."""
    check_number("scale", scale)
    return _changed_list(weights, signature, lambda pull: float(scale))


def unpatched_list(weights, signature, scale, force):
    """`WeightSignature.remove` on a list of arrays: a new list."""
    check_number("scale", scale)
    if not force:
        raise ValueError(
            "Of a list the clean values are not known: keep the list that you "
            "gave to `apply`, which it did not change. `force=True` subtracts "
            "the signature, which rounds. Received: force=False"
        )
    checkpoints.raise_all(
        "Statistics that were replaced as a whole cannot be subtracted:",
        [e.key for e in signature if scale * e.pull == 1.0],
    )
    # Solves new = old + scale * (tensor - pull * old) for the old one.
    return _changed_list(
        weights, signature, lambda pull: -scale / (1.0 - scale * pull)
    )


def _changed_list(weights, signature, scale_for):
    given = Checkpoint("weights", weights)
    problems = model_problems(signature, given)
    checkpoints.raise_all("The signature does not fit the weights:", problems)
    new = list(given.arrays)
    for entry in signature:
        position = entry.info.position
        array = given.arrays[position]
        new[position] = tensors.rebuild(
            array, [(scale_for(entry.pull), entry.tensor, entry.pull)]
        )
        problems += result_problems(entry.key, array, [new[position]])
    checkpoints.raise_all("The patch cannot be written:", problems)
    return new


def model_problems(signature, checkpoint):
    """What keeps a signature from fitting a model, as a list of strings."""
    infos = checkpoint.infos
    problems = checkpoints.architecture_problems(
        signature.architecture, infos, f"`{checkpoint.argument}`"
    )
    for entry in signature:
        if entry.info.position >= len(infos):
            continue
        found = infos[entry.info.position]
        if found.shape != entry.info.shape:
            problems.append(
                f"{entry.key}: shape {found.shape}, and {entry.info.shape} is "
                "expected"
            )
        if found.dtype not in checkpoints.FLOATS:
            problems.append(
                f"{entry.key}: dtype {found.dtype}, and one of "
                f"{', '.join(checkpoints.FLOATS)} is expected"
            )
    return problems


def result_problems(key, clean, pieces):
    """What is wrong with values that are about to be written.

    Args:
        key: String, the weight's.
        clean: Array.
        pieces: Iterable of arrays, all of the values.

    Returns:
        List of strings, empty if nothing is wrong.
    """
    is_variance = key.endswith("moving_variance")
    for values in pieces:
        if not tensors.is_finite(values):
            if not tensors.is_finite(clean):
                return [f"{key}: values that are not finite"]
            return [f"{key}: the result is not finite in {clean.dtype}"]
        if is_variance and (values < 0).any():
            return [f"{key}: the result is a negative variance"]
    return []


def _check_signature(signature):
    if not isinstance(signature, WeightSignature):
        raise ValueError(
            "`signature` must be a `WeightSignature`. Received: "
            f"signature={type(signature).__name__}"
        )


def _free_name(patches):
    number = len(patches)
    while f"patch_{number}" in patches:
        number += 1
    return f"patch_{number}"


def _terms(patches):
    """{position: [(scale, tensor, pull), ...]} in an order of its own.

    The sum of two does not depend on their order; that of more does.
    """
    ordered = list(patches.values())
    if len(ordered) > 2:
        ordered.sort(key=lambda patch: patch.signature.digest)
    found: dict[int, list] = {}
    for patch in ordered:
        for entry in patch.signature:
            found.setdefault(entry.info.position, []).append(
                (patch.scale, entry.tensor, entry.pull)
            )
    return found


def _pieces(array, terms):
    """Yields what `_values` gives, piece by piece."""
    if not terms:
        return iter([array])
    return (values for _, values in tensors.rebuilt_pieces(array, terms))


def _values(array, terms, out):
    if not terms:
        return array
    if out is None:
        out = tensors.empty_aligned(array.shape, array.dtype)
    return tensors.rebuild(array, terms, out)


def _write(model, plans):
    """Does the plans, by position; all or, on an error, none."""
    started = []

    def write(position):
        started.append(position)
        model.write(position, functools.partial(_values, *plans[position].new))

    try:
        for _ in _parallel(write, plans):
            pass
    except BaseException:
        for position in started:
            before = plans[position].before
            model.write(position, functools.partial(_values, *before))
        raise


def _parallel(function, items):
    """Yields `function(item)` for each; NumPy lets other threads run."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        yield from pool.map(function, items)
