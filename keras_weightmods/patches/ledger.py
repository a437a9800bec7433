"""The changes on a model, and what its weights are without them."""

import dataclasses
import functools
import itertools
import threading
import weakref
from typing import Any, NamedTuple

import numpy as np

from keras_weightmods.patches import tensors
from keras_weightmods.patches.checkpoint import Checkpoint, Snapshot
from keras_weightmods.patches.entry import Replacing, Sparse
from keras_weightmods.utils.checks import raise_all


class Applied(NamedTuple):
    """A patch on a model, and its scale.

    Attributes:
        patch: `Patch`.
        scale: Float.
    """

    patch: Any
    scale: float


@dataclasses.dataclass(frozen=True, eq=False)
class _Sum:
    """What a weight is to be.

    Attributes:
        key: String, the weight's key.
        clean: `Snapshot` of what to add to.
        terms: List of triples as in `tensors.rebuilt_pieces`; may be empty.
        places: Array of the places of `clean` in the weight flattened; `None`
            where `clean` is all of it.
    """

    key: str
    clean: Snapshot
    terms: list[Any] = dataclasses.field(default_factory=list)
    places: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class _Weight:
    """What the ledger holds of one weight.

    Attributes:
        clean: `Snapshot` of what it is without any change.
        places: Array, the places of `clean` in the weight flattened; `None`
            where `clean` is all of it.
        entries: Dict from the names of the patches on it to their entries.
    """

    clean: Snapshot
    places: np.ndarray | None
    entries: dict[str, Any]


class Ledger:
    """The patches on a model by name, and the clean values of its weights.

    A changed weight is always computed anew, `clean + sum of scale * change`.
    Clean values are kept of changed weights alone: of all entries, or, where
    all that changes a weight is `Sparse`, of the entries at its places.

    Attributes:
        patches: Dict from names to `Applied`.
        lock: To be held from the look at `patches` to the end of a change.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.patches: dict[str, Applied] = {}
        self._weights: dict[int, _Weight] = {}

    @property
    def nbytes(self) -> int:
        """Int, the bytes of the clean values."""
        return sum(each.clean.array.nbytes for each in self._weights.values())

    def name_of(self, patch: Any) -> str | None:
        """Return the name under which a patch, or its equal, is on the model.

        `None` if it is not.
        """
        for name, applied in self.patches.items():
            if applied.patch is patch or applied.patch.digest == patch.digest:
                return name
        return None

    def free_name(self, name: str | None) -> str:
        """Return a name that no patch has, like the one given if any."""
        if name is not None and name not in self.patches:
            return name
        numbered = (f"{name or 'patch'}_{i}" for i in itertools.count(1))
        return next(each for each in numbered if each not in self.patches)

    def fingerprint(self, model: Checkpoint, without: Any = ()) -> str:
        """Return that of a `Checkpoint` of the model without its patches.

        Args:
            model: `Checkpoint` of the model.
            without: Positions of weights that do not count.

        Raises:
            ValueError: If weights were changed since they were patched.
        """
        self._changed(model, self._weights)

        def read(position):
            present = model.read(position)
            weight = self._weights.get(position)
            return present if weight is None else _with_clean(present, weight)

        return model.fingerprint(read, without)

    def _changed(self, model, weights, force=False):
        """Return the positions of weights that something else has changed.

        Args:
            model: `Checkpoint` of the model.
            weights: Dict from positions to `_Weight`, where to look.
            force: Bool, whether such weights are fine.

        Raises:
            ValueError: If there are any and `force` is not set; lists all.
        """
        arrays, terms = {}, {}
        for p, weight in sorted(weights.items()):
            terms[p] = _terms(self.patches, weight.entries, weight.places)
            arrays[p] = model.read(p).reshape(-1)
            if weight.places is not None:
                arrays[p] = arrays[p][weight.places]
        unchanged = tensors.over_parts(
            lambda p, part: tensors.is_rebuilt(
                arrays[p], weights[p].clean.array.reshape(-1), terms[p], part
            ),
            arrays,
        )
        changed = [p for p, parts in unchanged.items() if not all(parts)]
        if not force:
            raise_all(
                "Weights were changed since they were patched, by training "
                "for instance; `kwm.Patch.clear(model, force=True)` takes "
                "the patches off all the same.",
                [model.infos[p].key for p in changed],
            )
        return changed

    def update(self, model, after, force=False):
        """Bring a model from the present patches to those in `after`.

        Args:
            model: `Checkpoint` of the model.
            after: Dict from names to `Applied`.
            force: Bool, whether to take patches off weights that were changed
                since: off their clean values where these are kept of a few
                entries, and off what they are now where of all of them.

        Returns:
            Three lists of positions: of the weights that were written from
            clean values, of those from which patches were subtracted, and of
            changed statistics, which are left as they are.

        Raises:
            ValueError: Listing all weights that were changed since, or whose
                result is not finite. The model is unchanged then.
        """
        entries = self._entries_after(after)
        known = {p: self._weights[p] for p in entries if p in self._weights}
        changed = self._changed(model, known, force)
        left = [
            p
            for p in changed
            if any(
                entry.replaced
                or (
                    known[p].places is None
                    and isinstance(entry.tensor, Replacing)
                )
                for entry in known[p].entries.values()
            )
        ]
        subtracted = [
            p for p in changed if p not in left and known[p].places is None
        ]
        written = [p for p in entries if p not in left]
        places = {
            p: _union({**_entries(known.get(p)), **entries[p]}) for p in written
        }
        present = self._present(model, places, subtracted)
        clean, before, opposite = {}, {}, {}
        for p in written:
            key = model.infos[p].key
            weight: Any = known.get(p)
            terms = _terms(self.patches, _entries(weight), places[p])
            if p not in present:
                before[p] = _Sum(key, weight.clean, terms)
                clean[p] = weight.clean
                continue
            before[p] = _Sum(key, present[p], [], places[p])
            if weight is None:
                clean[p] = present[p]
            elif p in subtracted:
                negated = [(-scale, *tensor) for scale, *tensor in terms]
                opposite[p] = _Sum(key, present[p], negated)
            else:
                array = _with_clean(present[p].array, weight, places[p])
                clean[p] = Snapshot(array)
        clean |= _compute(opposite)
        new = {}
        for p in written:
            terms = _terms(after, entries[p], places[p])
            new[p] = _Sum(model.infos[p].key, clean[p], terms, places[p])
        _write(model, new, before)
        self.patches = after
        for p in entries:
            self._weights.pop(p, None)
            if p in new and entries[p]:
                kept, values = _union(entries[p]), clean[p]
                if kept is not None:
                    where = _within(places[p], kept)
                    values = Snapshot(values.array.reshape(-1)[where])
                self._weights[p] = _Weight(values, kept, entries[p])
        return [p for p in written if p not in subtracted], subtracted, left

    def subtract(self, model, patch, scale):
        """Subtract a patch that a model without patches was saved with.

        Args:
            model: `Checkpoint` of the model.
            patch: `Patch`.
            scale: Float, of the patch.

        Returns:
            Tuple of the keys of the weights that were written.

        Raises:
            ValueError: If there are patches on the model, or what was there
                before is not known. The model is unchanged then.
        """
        raise_all("Patches must be taken off first:", self.patches)
        unknown = [
            entry.key
            for entry in patch
            if isinstance(entry.tensor, Replacing)
            or scale * entry.replaced >= 1
        ]
        summary = (
            "What was replaced is not known from the patch: use the base "
            "model's own file."
        )
        raise_all(summary, unknown)
        present = model.snapshots(entry.position for entry in patch)
        before = {e.position: _Sum(e.key, present[e.position]) for e in patch}
        # Solves new = old + scale * (tensor - replaced * old) for the old one.
        after = {
            entry.position: dataclasses.replace(
                before[entry.position],
                terms=[
                    (
                        -scale / (1 - scale * entry.replaced),
                        entry.tensor,
                        entry.replaced,
                    )
                ],
            )
            for entry in patch
        }
        _write(model, after, before)
        return tuple(entry.key for entry in patch)

    def _present(self, model, places, subtracted):
        """Return {position: `Snapshot`} of the present values at `places`.

        Less those that are kept whole, and still there: they are computed.
        """
        computed = {
            p
            for p, weight in self._weights.items()
            if weight.places is None and p not in subtracted
        }
        whole = [p for p, where in places.items() if where is None]
        present = model.snapshots(p for p in whole if p not in computed)
        for p, where in places.items():
            if where is not None:
                present[p] = Snapshot(model.read(p).reshape(-1)[where])
        return present

    def _entries_after(self, after):
        """Return {position: {name: entry}} of the weights that change."""
        found: dict[int, dict[str, Any]] = {}
        for name, applied in {**self.patches, **after}.items():
            if self.patches.get(name) is after.get(name):
                continue
            for entry in applied.patch:
                present = _entries(self._weights.get(entry.position))
                # A statistic that was left as it is has no patch any more.
                if name in self.patches and name not in present:
                    continue
                entries = found.setdefault(entry.position, dict(present))
                if name in after:
                    entries[name] = entry
                else:
                    del entries[name]
        return dict(sorted(found.items()))


# One for each model, so that two callers never take each other's changes for
# the clean model. Not in the model, which would save and copy it.
_LEDGERS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def ledger_of(model: Any) -> Ledger:
    """Return the `Ledger` of a model."""
    return _LEDGERS.setdefault(model, Ledger())


def _entries(weight):
    return {} if weight is None else weight.entries


def _terms(patches, entries, places):
    """Return the terms of a weight's sum, in an order of their own.

    The sum of two does not depend on their order; that of more does.
    """
    names = list(entries)
    if len(names) > 2:
        names.sort(key=lambda name: patches[name].patch.digest)
    found = []
    for name in names:
        tensor, replaced = entries[name].tensor, entries[name].replaced
        if places is not None:
            tensor = tensor.at(places)
        found.append((patches[name].scale, tensor, replaced))
    return found


def _union(entries):
    """Return the places of all entries, or None if one is not `Sparse`."""
    found = [entry.tensor for entry in entries.values()]
    if not all(isinstance(tensor, Sparse) for tensor in found):
        return None
    return functools.reduce(np.union1d, [tensor.places for tensor in found])


def _with_clean(present, weight, places=None):
    """Return `present` with the clean values of a `_Weight` in their places.

    Args:
        present: Array, the present values at `places`.
        weight: `_Weight`.
        places: Array, or `None` for all.
    """
    if weight.places is None:
        return weight.clean.array
    whole = np.array(present, order="C")
    whole.reshape(-1)[_within(places, weight.places)] = weight.clean.array
    return whole


def _within(places, some):
    """Return where `some` of the `places`, `None` for all, are among them."""
    return some if places is None else np.searchsorted(places, some)


def changed_list(weights, patch, scale):
    """Return the arrays of a list with a patch on them.

    Args:
        weights: `Checkpoint` of a list, which is not touched.
        patch: `Patch`.
        scale: Float.
    """
    sums = {}
    for entry in patch:
        clean = Snapshot(weights.arrays[entry.position])
        term = scale, entry.tensor, entry.replaced
        sums[entry.position] = _Sum(entry.key, clean, [term])
    values = {p: snapshot.array for p, snapshot in _compute(sums).items()}
    return [values.get(p, array) for p, array in enumerate(weights.arrays)]


def _compute(sums, memories=None, check=True):
    """Compute sums, in one pass with the check of the results.

    Args:
        sums: Dict from positions to `_Sum`.
        memories: Dict from positions to arrays, where to write these sums.
            Defaults to `None`, for new arrays.
        check: Bool, whether to look for what is not finite, and the like.

    Returns:
        Dict from positions to `Snapshot`.

    Raises:
        ValueError: Listing all that `check` has found.
    """
    memories = memories or {}
    values, targets = {}, {}
    for position, each in sums.items():
        clean = each.clean.array
        if position not in memories and not each.terms:
            values[position] = each.clean
            continue
        out = memories.get(position)
        if out is None:
            out = tensors.empty_aligned(clean.shape, clean.dtype)
        values[position] = Snapshot(out)
        targets[position] = out.reshape(-1)

    def compute_part(position, part):
        each, target = sums[position], targets[position]
        source = each.clean.array.reshape(-1)
        if not each.terms:
            target[part] = source[part]
            return None
        pieces = tensors.rebuilt_pieces(source, each.terms, part, target)
        problems = (_problem(each.key, source, piece) for _, piece in pieces)
        return next(filter(None, problems), None)

    found = tensors.over_parts(compute_part, targets).values()
    first = [next(filter(None, parts), None) for parts in found]
    if check:
        raise_all("The change cannot be written:", filter(None, first))
    return values


def _write(model, new, before):
    """Bring weights to the sums `new`; all or, on an error, none.

    Args:
        model: `Checkpoint` of a model.
        new, before: Dicts from positions to `_Sum`, what to write and what is
            there.
    """
    memories = {p: model.memory(p) for p in new if new[p].places is None}
    memories = {p: m for p, m in memories.items() if m is not None}
    started = list(memories)
    try:
        values = _compute(new, memories)
        for p in new:
            if p not in memories:
                started.append(p)
                model.assign(p, values[p], new[p].places)
    except BaseException:
        values = _compute({p: before[p] for p in started}, memories, False)
        for p in started:
            if p not in memories:
                model.assign(p, values[p], before[p].places)
        raise


def _problem(key, clean, result):
    """Return what is wrong with a part of the result for a weight, or None."""
    if not tensors.is_finite(result):
        if not tensors.is_finite(clean):
            return f"{key}: values that are not finite"
        return f"{key}: the result is not finite in {clean.dtype}"
    if key.endswith("moving_variance") and (result < 0).any():
        return (
            f"{key}: the result is a negative variance; take a scale nearer "
            'to 0, or a signature made with `statistics="keep"`'
        )
    return None
