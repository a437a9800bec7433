"""The changes on a model, and its weights without them."""

import functools
import itertools
import threading
import time
import weakref
from typing import Any, NamedTuple

import numpy as np

from keras_weightmods.patches import tensors
from keras_weightmods.patches.checkpoint import Checkpoint, mismatches
from keras_weightmods.patches.entry import Replacing, Sparse
from keras_weightmods.patches.report import PatchReport
from keras_weightmods.utils.checks import raise_all, shown
from keras_weightmods.utils.parallel import map_ahead
from keras_weightmods.utils.report import Skipped

_UNWRITABLE = "The change cannot be written:"


class Applied(NamedTuple):
    """A patch on a model, and its scale.

    Attributes:
        patch: `Patch`.
        scale: Float.
    """

    patch: Any
    scale: float


class _Sum(NamedTuple):
    """The value of a weight, present or planned.

    Attributes:
        values: Array of what to add to.
        terms: List of triples as in `tensors.rebuilt_pieces`; may be empty.
        places: Array of the places of `values` in the weight flattened; `None`
            where they are all of it.
    """

    values: np.ndarray
    terms: Any = ()
    places: np.ndarray | None = None


class _State(NamedTuple):
    """The state of a ledger, replaced as a whole.

    Attributes:
        patches: Dict from names to `Applied`.
        clean: Dict from positions to clean values and their places, `None` for
            all.
        lost: Set of names of patches and positions of weights that they are
            lost on.
    """

    patches: dict[str, Applied]
    clean: dict[int, tuple[np.ndarray, np.ndarray | None]]
    lost: set[tuple[str, int]]


class Ledger:
    """The patches on a model by name, and the clean values of its weights.

    A changed weight is always computed from scratch, `clean + sum of scale *
    change`. Only changed weights have clean values. These cover all entries, or
    only the changed ones if all changes of the weight are `Sparse`.

    Attributes:
        lock: To be held from the look at `patches` to the end of a change.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._state = _State({}, {}, set())

    @property
    def patches(self) -> dict[str, Applied]:
        """Dict from names to `Applied`."""
        return self._state.patches

    @property
    def _clean(self):
        return self._state.clean

    def name_of(self, patch: Any) -> str | None:
        """Return the name of a patch on the model, or its equal, if any."""
        for name, applied in self.patches.items():
            if applied.patch is patch or applied.patch.digest == patch.digest:
                return name
        return None

    def free_name(self, name: str | None) -> str:
        """Return a name that no patch has, like the one given if any."""
        numbered = (f"{name or 'patch'}_{i}" for i in itertools.count(1))
        names = itertools.chain([name] if name else [], numbered)
        return next(each for each in names if each not in self.patches)

    def check(self, patch: Any, model: Checkpoint, force: bool = True) -> None:
        """Raise ValueError unless a patch fits a model.

        Args:
            patch: `Patch`.
            model: `Checkpoint` of the model with the patches of this ledger.
            force: Bool, whether the base of the patch does not matter. If it
                does, patched weights must not have been changed since.
        """
        raise_all(
            f"The patch does not fit the {model.argument}:",
            mismatches(
                patch.architecture,
                model.infos,
                f"`{model.argument}`",
                {entry.position for entry in patch},
            ),
        )
        if force or patch.base is None:
            return
        self._changed(model, self._clean)

        def read(position):
            return self._with_clean(position, model.read(position))

        if model.fingerprint(read, patch.whole) != patch.base:
            name = getattr(model.model, "name", "a list")
            raise ValueError(
                "The model must be the base that the patch was made for, but "
                "its weights differ. Load the base model, or pass "
                "`force=True` to put the changes on this one. Received: "
                f"patch={patch!r}, model={name!r}"
            )

    def _changed(self, model, positions, force=False):
        """Return the positions of weights that other code has changed.

        Args:
            model: `Checkpoint` of the model.
            positions: Those of weights with patches, where to look.
            force: Bool, whether such weights are fine.

        Raises:
            ValueError: If there are any and `force` is not set; lists all.
        """
        present = self._entries(self.patches)

        def is_unchanged(position):
            clean, places = self._clean[position]
            array = model.read(position)
            if places is not None:
                array = array.reshape(-1)[places]
            terms = _terms(present[position], places)
            return tensors.is_rebuilt(array, clean, terms)

        positions = sorted(positions)
        unchanged = [*map_ahead(is_unchanged, positions)]
        changed = [p for p, is_same in zip(positions, unchanged) if not is_same]
        if not force:
            raise_all(
                "Weights were changed since they were patched, by training "
                "for instance; `kwm.Patch.clear(model, force=True)` takes "
                "the patches off all the same.",
                [model.infos[p].key for p in changed],
            )
        return changed

    def update(
        self, model, after, action, name=None, scale=None, force=False
    ) -> PatchReport:
        """Replace the present patches of a model by those in `after`.

        Args:
            model: `Checkpoint` of the model.
            after: Dict from names to `Applied`.
            action, name, scale: As in the report.
            force: Bool, whether to take patches off weights that were changed
                since: off their clean values where these are kept of a few
                entries, and off what they are now where of all of them.

        Raises:
            ValueError: Listing all weights that were changed since, or whose
                result is not finite. The model is unchanged then.
        """
        for applied in {**self.patches, **after}.values():
            self.check(applied.patch, model)
        # Patches that get the same scale again count too, so that the present
        # weights are checked.
        moved = {
            name: applied
            for name, applied in {**self.patches, **after}.items()
            if self.patches.get(name) is not after.get(name)
        }
        old, new = self._entries(self.patches), self._entries(after)
        touched = sorted(self._entries(moved))
        known = [p for p in touched if p in old]
        changed = self._changed(model, known, force)
        whole = [p for p in changed if self._clean[p][1] is None]
        left = [
            p
            for p in whole
            if any(
                e.replaced or isinstance(e.tensor, Replacing)
                for e, *_ in old[p]
            )
        ]
        subtracted = [p for p in whole if p not in left]
        written = [p for p in touched if p not in left]

        def planned(position):
            """Return the sums before and after the change."""
            before, then = old.get(position, []), new.get(position, [])
            places = _union(before + then)
            terms = _terms(then, places)
            clean, kept = self._clean.get(position, (None, None))
            if position in subtracted:
                now = model.snapshot(position)
                key = model.infos[position].key
                negated = [(-x, *rest) for x, *rest in _terms(before)]
                clean, problem = _computed(_Sum(now, negated), key)
                raise_all(_UNWRITABLE, filter(None, [problem]))
                return _Sum(now), _Sum(clean, terms)
            if clean is not None and kept is None:
                return _Sum(clean, _terms(before)), _Sum(clean, terms)
            now = model.snapshot(position, places)
            clean = self._with_clean(position, now, places)
            return _Sum(now, (), places), _Sum(clean, terms, places)

        sums = dict(zip(written, [*map_ahead(planned, written)]))
        clean = {p: x for p, x in self._clean.items() if p not in touched}
        for position, (_, each) in sums.items():
            if position in new:
                values, places = each.values, _union(new[position])
                if places is not None:
                    within = _within(each.places, places)
                    values = values.reshape(-1)[within]
                clean[position] = values, places
        lost = self._state.lost.union(itertools.product(after, left))
        lost = {each for each in lost if each[0] in after}
        self._write(model, sums, _State(after, clean, lost))
        reason = "changed since, and not known from before"
        keys = {p: model.infos[p].key for p in touched}
        return PatchReport(
            action=action,
            name=name,
            scale=scale,
            changed=tuple(keys[p] for p in written if p not in subtracted),
            subtracted=tuple(keys[p] for p in subtracted),
            active={each: applied.scale for each, applied in after.items()},
            clean_nbytes=sum(array.nbytes for array, _ in clean.values()),
            skipped=tuple(Skipped(keys[p], reason) for p in left),
        )

    def subtract(self, model, patch, scale) -> PatchReport:
        """Subtract a patch that a model without patches was saved with.

        Args:
            model: `Checkpoint` of the model.
            patch: `Patch`.
            scale: Float, of the patch.

        Raises:
            ValueError: If there are patches on the model, or what was there
                before is not known. The model is unchanged then.
        """
        self.check(patch, model)
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
            values = model.snapshot(entry.position)
            # Solves new = old + scale * (tensor - replaced * old) for the old.
            scaled = -scale / (1 - scale * entry.replaced)
            terms = _terms([(entry, scaled)])
            sums[entry.position] = _Sum(values), _Sum(values, terms)
        self._write(model, sums, self._state)
        keys = tuple(entry.key for entry in patch)
        return PatchReport("subtract", patch.name, scale, subtracted=keys)

    def _entries(self, patches):
        """Return {position: [(entry, scale, patch)]} of some patches."""
        found: dict[int, list[Any]] = {}
        for name, (patch, scale) in patches.items():
            for entry in patch:
                if (name, entry.position) not in self._state.lost:
                    row = entry, scale, patch
                    found.setdefault(entry.position, []).append(row)
        for rows in found.values():
            # A sum of two does not depend on their order; a sum of more does.
            if len(rows) > 2:
                rows.sort(key=lambda row: row[-1].digest)
        return found

    def _with_clean(self, position, present, places=None):
        """Return the values of a weight with clean ones filled in.

        Args:
            position: Int, of the weight.
            present: Array, the present values at `places`.
            places: Array, or `None` for all.
        """
        if position not in self._clean:
            return present
        clean, kept = self._clean[position]
        if kept is None:
            return clean
        whole = np.array(present, order="C")
        whole.reshape(-1)[_within(places, kept)] = clean
        return whole

    def _write(self, model, sums, state):
        """Set weights to new sums, and the ledger to the matching state.

        On an error nothing changes.

        Args:
            model: `Checkpoint` of a model.
            sums: Dict from positions to pairs of `_Sum`, what is there and
                what to write.
            state: `_State`.
        """
        present, started, ended = self._state, [], []
        own = {
            position: model.memory(position) if new.places is None else None
            for position, (_, new) in sums.items()
        }
        # This thread allocates, because it can reuse freed memory and workers
        # cannot.
        memories = {
            position: _memory(new) if own[position] is None else own[position]
            for position, (_, new) in sums.items()
        }
        is_stopped = threading.Event()

        def compute(position):
            started.append(position)
            try:
                if is_stopped.is_set():
                    return None, None
                key, (_, new) = model.infos[position].key, sums[position]
                return _computed(new, key, memories[position])
            finally:
                ended.append(position)

        try:
            found = dict(zip(sums, [*map_ahead(compute, sums)]))
            problems = [problem for _, problem in found.values() if problem]
            raise_all(_UNWRITABLE, problems)
            for position, (values, _) in found.items():
                if own[position] is None:
                    model.assign(position, values, sums[position][1].places)
            self._state = state
        except BaseException:
            self._state = present
            # No thread may run on when the weights are restored, not even one
            # that Ctrl-C hid from its pool as it started.
            is_stopped.set()
            while len(ended) < len(started):
                time.sleep(0.001)
            for position in started:
                before, _ = sums[position]
                values, _ = _computed(before, "", own[position])
                if own[position] is None:
                    model.assign(position, values, before.places)
            raise


# One for each model, so that two callers never mistake each other's changes for
# the clean model. An attribute of the model would be saved and copied with it.
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
            f"{argument}={model.name!r} with {shown(on_model)}"
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
        each = _Sum(values[entry.position], _terms([(entry, scale)]))
        values[entry.position], problem = _computed(each, entry.key)
        problems.append(problem)
    raise_all("The change cannot be made:", filter(None, problems))
    return values


def _terms(rows, places=None):
    """Return the terms of a `_Sum` of entries and scales."""
    return [
        (
            scale,
            entry.tensor if places is None else entry.tensor.at(places),
            entry.replaced,
        )
        for entry, scale, *_ in rows
    ]


def _union(rows):
    """Return the places of all entries; None if one is not `Sparse`."""
    found = [entry.tensor for entry, *_ in rows]
    if not all(isinstance(tensor, Sparse) for tensor in found):
        return None
    return functools.reduce(np.union1d, [tensor.places for tensor in found])


def _within(places, some):
    """Return where `some` of the `places`, `None` for all, are among them."""
    return some if places is None else np.searchsorted(places, some)


def _memory(each):
    """Return new memory for a `_Sum`."""
    return tensors.empty_aligned(each.values.shape, each.values.dtype)


def _computed(each, key, memory=None):
    """Compute a `_Sum`, in one pass with the check of the result.

    Args:
        each: `_Sum`.
        key: String, of the weight.
        memory: Array to write it to. Defaults to `None`, for a new one.

    Returns:
        Pair of that array and of what is wrong with it, or `None`.
    """
    values, terms, _ = each
    memory = _memory(each) if memory is None else memory
    if not terms:
        memory[...] = values
        return memory, None
    found = None
    for _, piece in tensors.rebuilt_pieces(values, terms, memory):
        found = found or _problem(key, values, piece)
    return memory, found


def _problem(key, clean, result):
    """Return the error in a part of the result for a weight, or None."""
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
