"""The changes on a model, and what its weights are without them."""

import contextlib
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
from keras_weightmods.utils.parallel import map_ahead


class Applied(NamedTuple):
    """A patch on a model, and its scale.

    Attributes:
        patch: `Patch`.
        scale: Float.
    """

    patch: Any
    scale: float


class _Sum(NamedTuple):
    """What a weight is, or is to be.

    Attributes:
        clean: `Snapshot` of what to add to.
        terms: List of triples as in `tensors.rebuilt_pieces`; may be empty.
        places: Array of the places of `clean` in the weight flattened; `None`
            where `clean` is all of it.
    """

    clean: Snapshot
    terms: list[Any]
    places: np.ndarray | None = None


class _Weight(NamedTuple):
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
        """Return the name of a patch on the model, or its equal, if any."""
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

        def is_unchanged(position):
            clean, places, entries = weights[position]
            array = model.read(position)
            if places is not None:
                array = array.reshape(-1)[places]
            terms = _terms(self.patches, entries, places)
            return tensors.is_rebuilt(array, clean.array, terms)

        positions = sorted(weights)
        unchanged = map_ahead(is_unchanged, positions)
        changed = [p for p, is_same in zip(positions, unchanged) if not is_same]
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
        left = [p for p in changed if _is_lost(known[p])]
        subtracted = [
            p for p in changed if p not in left and known[p].places is None
        ]
        written = [p for p in entries if p not in left]

        def planned(position):
            """Return the sums before and after."""
            weight: Any = known.get(position)
            old = weight.entries if weight else {}
            places = _union({**old, **entries[position]})
            terms = _terms(self.patches, old, places)
            is_kept = weight is not None and weight.places is None
            if is_kept and position not in subtracted:
                clean = weight.clean
                before = _Sum(clean, terms)
            else:
                clean = model.snapshot(position, places)
                before = _Sum(clean, [], places)
                if is_kept:
                    negated = [(-scale, *rest) for scale, *rest in terms]
                    key = model.infos[position].key
                    clean, problem = _computed(_Sum(clean, negated), key)
                    problems = filter(None, [problem])
                    raise_all("The change cannot be written:", problems)
                elif weight is not None:
                    clean = Snapshot(_with_clean(clean.array, weight, places))
            terms = _terms(after, entries[position], places)
            return before, _Sum(clean, terms, places)

        sums = dict(zip(written, map_ahead(planned, written)))
        weights = {p: w for p, w in self._weights.items() if p not in entries}
        for position, (_, new) in sums.items():
            if entries[position]:
                places, clean = _union(entries[position]), new.clean
                if places is not None:
                    within = _within(new.places, places)
                    clean = Snapshot(clean.array.reshape(-1)[within])
                weights[position] = _Weight(clean, places, entries[position])
        _write(model, sums)
        self.patches, self._weights = after, weights
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
        sums = {}
        for entry in patch:
            before = _Sum(model.snapshot(entry.position), [])
            # Solves new = old + scale * (tensor - replaced * old) for the old.
            scaled = -scale / (1 - scale * entry.replaced)
            term = scaled, entry.tensor, entry.replaced
            sums[entry.position] = before, before._replace(terms=[term])
        _write(model, sums)
        return tuple(entry.key for entry in patch)

    def _entries_after(self, after):
        """Return {position: {name: entry}} of the weights that change."""
        found: dict[int, dict[str, Any]] = {}
        for name, applied in {**self.patches, **after}.items():
            if self.patches.get(name) is after.get(name):
                continue
            for entry in applied.patch:
                weight = self._weights.get(entry.position)
                present = weight.entries if weight else {}
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


def check_unpatched(argument: str, model: Any) -> None:
    """Raise ValueError if there are patches on a model."""
    if on_model := [*ledger_of(model).patches]:
        raise ValueError(
            f"`{argument}` must be without patches. Call "
            "`kwm.Patch.clear(model)` first. Received: "
            f"{argument}={model.name!r} with {on_model}"
        )


def changed_list(weights, patch, scale):
    """Return the arrays of a list with a patch on them.

    Args:
        weights: `Checkpoint` of a list, which is not touched.
        patch: `Patch`.
        scale: Float.
    """
    values, problems = list(weights.arrays), []
    for entry in patch:
        term = scale, entry.tensor, entry.replaced
        each = _Sum(Snapshot(values[entry.position]), [term])
        found, problem = _computed(each, entry.key)
        values[entry.position] = found.array
        problems.append(problem)
    raise_all("The change cannot be made:", filter(None, problems))
    return values


def _is_lost(weight):
    """Return whether the patches cannot be subtracted from a weight."""
    is_whole = weight.places is None
    return any(
        entry.replaced or (is_whole and isinstance(entry.tensor, Replacing))
        for entry in weight.entries.values()
    )


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


def _write(model, sums):
    """Bring weights to new sums; all or, on an error, none.

    Args:
        model: `Checkpoint` of a model.
        sums: Dict from positions to pairs of `_Sum`, what is there and what
            to write.
    """
    started = []
    own = {
        position: model.memory(position) if new.places is None else None
        for position, (_, new) in sums.items()
    }
    # This thread allocates: it uses freed memory again, and workers would not.
    memories = {
        position: _new_memory(new) if own[position] is None else own[position]
        for position, (_, new) in sums.items()
    }

    def compute(position):
        started.append(position)
        key, (_, new) = model.infos[position].key, sums[position]
        return _computed(new, key, memories[position])

    try:
        # So that no thread goes on when the weights are restored.
        results: Any = map_ahead(compute, sums)
        with contextlib.closing(results):
            found = dict(zip(sums, results))
        problems = [problem for _, problem in found.values() if problem]
        raise_all("The change cannot be written:", problems)
        for position, (values, _) in found.items():
            if own[position] is None:
                model.assign(position, values, sums[position][1].places)
    except BaseException:
        for position in started:
            before, _ = sums[position]
            values, _ = _computed(before, "", own[position])
            if own[position] is None:
                model.assign(position, values, before.places)
        raise


def _new_memory(each):
    """Return memory for a `_Sum`, or `None` where it is its clean values."""
    clean = each.clean.array
    if each.terms:
        return tensors.empty_aligned(clean.shape, clean.dtype)
    return None


def _computed(each, key, memory=None):
    """Compute a `_Sum`, in one pass with the check of the result.

    Args:
        each: `_Sum`.
        key: String, of the weight.
        memory: Array, where to write it. Defaults to `None`, for a new one
            where there are terms.

    Returns:
        Pair of a `Snapshot` and of what is wrong with it, or `None`.
    """
    clean, terms, _ = each
    if memory is None:
        memory = _new_memory(each)
    if memory is None:
        return clean, None
    if not terms:
        memory[...] = clean.array
        return Snapshot(memory), None
    found = None
    for _, values in tensors.rebuilt_pieces(clean.array, terms, memory):
        found = found or _problem(key, clean.array, values)
    return Snapshot(memory), found


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
