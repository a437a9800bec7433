"""Several signatures on one model, and off it again bit for bit."""

import dataclasses
import weakref

from keras_weightmods.patches import checkpoint as checkpoints
from keras_weightmods.patches import tensors
from keras_weightmods.patches.checkpoint import Checkpoint, Kept
from keras_weightmods.patches.weight_signature import (
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
    """What is on a model: patches by name, clean values by position."""

    patches: dict[str, Patch] = dataclasses.field(default_factory=dict)
    clean: dict[int, Kept] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class _Sum:
    """What a weight is to be: `clean`, and terms to add, if any."""

    key: str
    clean: Kept
    terms: list | None


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
        return sum(kept.array.nbytes for kept in self._state.clean.values())

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
            model = Checkpoint("model", self.model)
            self._changed(model, sorted(self._state.clean), force)
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

    def _changed(self, model, positions, force):
        """Those weights that were changed since they were patched, a list.

        Raises an error if there are any and `force` is not set.
        """
        terms = _terms(self._state.patches)
        arrays = {p: model.read(p).reshape(-1) for p in positions}
        clean = {p: self._state.clean[p].array.reshape(-1) for p in positions}
        unchanged = tensors.over_parts(
            lambda p, part: tensors.is_rebuilt(
                arrays[p], clean[p], terms[p], part
            ),
            arrays,
        )
        changed = [p for p in positions if not all(unchanged[p])]
        if not force:
            checkpoints.raise_all(
                "Weights were changed since they were patched, by training "
                "for instance; `remove(..., force=True)` subtracts from those.",
                [model.infos[position].key for position in changed],
            )
        return changed

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
        changed = self._changed(
            model, [p for p in positions if p in state.clean], force
        )
        terms_before, terms = _terms(state.patches), _terms(after)
        left = [p for p in changed if any(pull for *_, pull in terms_before[p])]
        subtracted = [p for p in changed if p not in left]
        written = [p for p in positions if p not in left]
        keys = {p: model.infos[p].key for p in positions}
        present = model.kept(
            [p for p in written if p not in state.clean or p in subtracted]
        )
        clean = {**state.clean, **present}
        before = {
            p: _Sum(
                keys[p], clean[p], None if p in present else terms_before[p]
            )
            for p in written
        }
        opposite = {
            p: _Sum(
                keys[p], present[p], [(-s, t, u) for s, t, u in terms_before[p]]
            )
            for p in subtracted
        }
        values, problems = _computed(opposite, {})
        checkpoints.raise_all("The patch cannot be written:", problems)
        clean.update(values)
        new = {p: _Sum(keys[p], clean[p], terms.get(p)) for p in written}
        _write(model, new, before)
        state.patches = after
        for position in positions:
            state.clean.pop(position, None)
            if position in written and position in terms:
                state.clean[position] = clean[position]
        return PatchReport(
            action=action,
            name=name,
            scale=scale,
            changed=tuple(keys[p] for p in written if p not in subtracted),
            subtracted=tuple(keys[p] for p in subtracted),
            left=tuple(keys[p] for p in left),
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
    sums = {}
    for entry in signature:
        clean = Kept(given.arrays[entry.info.position])
        terms = [(scale_for(entry.pull), entry.tensor, entry.pull)]
        sums[entry.info.position] = _Sum(entry.key, clean, terms)
    values, problems = _computed(sums, {})
    checkpoints.raise_all("The patch cannot be written:", problems)
    new = list(given.arrays)
    for position, kept in values.items():
        new[position] = kept.array
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


def _write(model, new, before):
    """Brings weights to the sums `new`; all or, on an error, none.

    Args:
        model: `Checkpoint` of a model.
        new, before: Dicts from positions to `_Sum`, what to write and what
            is there.
    """
    memories = {p: model.memory(p) for p in new}
    memories = {p: m for p, m in memories.items() if m is not None}
    started = list(memories)
    try:
        values, problems = _computed(new, memories)
        checkpoints.raise_all("The patch cannot be written:", problems)
        for position in new:
            if position not in memories:
                started.append(position)
                model.assign(position, values[position])
    except BaseException:
        values, _ = _computed({p: before[p] for p in started}, memories)
        for position in started:
            if position not in memories:
                model.assign(position, values[position])
        raise


def _computed(sums, memories):
    """Computes sums in one pass, and checks the results.

    Args:
        sums: Dict from positions to `_Sum`.
        memories: Dict from positions to arrays, where to write these sums.

    Returns:
        Dict from positions to `Kept`, and a list of strings, what is wrong.
    """
    values = {}
    for position, each in sums.items():
        clean = each.clean.array
        if position in memories:
            values[position] = Kept(memories[position])
        elif each.terms:
            out = tensors.empty_aligned(clean.shape, clean.dtype)
            values[position] = Kept(out)
        else:
            values[position] = each.clean
    sources = {p: each.clean.array.reshape(-1) for p, each in sums.items()}
    targets = {
        p: values[p].array.reshape(-1)
        for p, each in sums.items()
        if values[p] is not each.clean
    }

    def compute(position, part):
        each, source = sums[position], sources[position]
        target = targets[position]
        if not each.terms:
            target[part] = source[part]
            return None
        pieces = tensors.rebuilt_pieces(source, each.terms, part, target)
        problems = (_problem(each.key, source, piece) for _, piece in pieces)
        return next(filter(None, problems), None)

    found = tensors.over_parts(compute, targets).values()
    first = [next(filter(None, parts), None) for parts in found]
    return values, [problem for problem in first if problem is not None]


def _problem(key, clean, result):
    """What is wrong with the result for a weight, or None.

    Args:
        key: String, the weight's.
        clean: Array, what the result was computed from.
        result: Array, all of the result or a part.
    """
    if not tensors.is_finite(result):
        if not tensors.is_finite(clean):
            return f"{key}: values that are not finite"
        return f"{key}: the result is not finite in {clean.dtype}"
    if key.endswith("moving_variance") and (result < 0).any():
        return f"{key}: the result is a negative variance"
    return None
