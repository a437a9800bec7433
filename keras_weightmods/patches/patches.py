"""Several changes on one model, and off it again bit for bit."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

from keras_weightmods.patches.checkpoint import Checkpoint
from keras_weightmods.patches.entry import Change
from keras_weightmods.patches.ledger import Patch, ledger_of
from keras_weightmods.patches.report import PatchReport
from keras_weightmods.utils import checks
from keras_weightmods.utils.report import Skipped

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _one_at_a_time(method: _Method) -> _Method:
    """Let no two threads change a model at once."""

    @functools.wraps(method)
    def locked(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._ledger.lock:
            return method(self, *args, **kwargs)

    return locked  # type: ignore[return-value]


class Patches:
    """The changes on a model: add, rescale and remove them in any order.

    Signatures and deltas (`apply_delta`) lie on a model together. A patched
    weight is always computed anew, `clean + sum of scale * change` in float32
    (float64 for float64) and rounded once, from its clean values, which are
    kept. So the order of the calls leaves no trace: equal patches give equal
    weights, and without the last one the model is the clean one bit for bit.
    Kept are the values of patched weights alone (of deltas, those of the
    entries that they change), until the last patch on them is gone.

    All `Patches(model)` of one model are the same patches, those of
    `WeightSignature.apply` and `apply_delta` too; threads change them one
    after the other. They live in memory, with
    the model object: files hold the patched weights alone.

    Weights that something else has changed since, such as training, are
    found by comparing every bit, and reported as an error; `remove(...,
    force=True)` subtracts from those.

    As a context manager it removes all patches at the end, also those that
    were there before. Where that fails after an error in the block, they stay,
    and a note on that error says so.

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

    def __init__(self, model: Any) -> None:
        if isinstance(model, (list, tuple)):
            expected = "a model; lists of arrays go into `signature.apply`"
            raise checks.error("model", expected, type(model))
        Checkpoint("model", model)
        self.model = model
        self._ledger = ledger_of(model)

    @property
    def scales(self) -> dict[str, float]:
        """Dict from the names of the patches to their scales."""
        return {name: p.scale for name, p in self._ledger.patches.items()}

    @property
    def clean_nbytes(self) -> int:
        """Int, the bytes of the clean values that are kept."""
        return self._ledger.nbytes

    @_one_at_a_time
    def clean_fingerprint(self, without: Collection[int] = ()) -> str:
        """Return the SHA-256 of the weights as they are without patches.

        Args:
            without: Positions in `model.weights` of those that do not count.
                Defaults to none.

        Raises:
            ValueError: If weights were changed since they were patched, or are
                others, as after `enable_lora`.
        """
        model = self._checked_model(self._ledger.patches)
        return self._ledger.fingerprint(model, without)

    @_one_at_a_time
    def add(
        self, signature: Change, scale: float = 1.0, name: str | None = None
    ) -> PatchReport:
        """Put a signature on the model.

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
        present = self._find(signature)
        scale = checks.check_float("scale", scale)
        patches = self._ledger.patches
        if name is None:
            free = map("patch_{}".format, itertools.count(len(patches)))
            unused = next(each for each in free if each not in patches)
            name = getattr(signature, "name", None) or unused
        if checks.check_string("name", name) in patches:
            expected = "one that no patch has; `rescale` changes their scale"
            raise checks.error("name", expected, name)
        if present is not None:
            raise ValueError(
                f"The change is on the model already, as {present!r}. "
                "`rescale` changes its scale."
            )
        after = {**patches, name: Patch(signature, scale)}
        return self._update("add", name, scale, after)

    @_one_at_a_time
    def rescale(self, name: str, scale: float) -> PatchReport:
        """Change the scale of a patch.

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
        scale = checks.check_float("scale", scale)
        patch = dataclasses.replace(self._named(name), scale=scale)
        after = {**self._ledger.patches, name: patch}
        return self._update("rescale", name, scale, after)

    @_one_at_a_time
    def remove(self, name: str, force: bool = False) -> PatchReport:
        """Take a patch off.

        Args:
            name: String, the patch.
            force: Bool, whether to subtract it from weights that were changed
                since they were patched. Of a weight that deltas alone change,
                the clean values are put back at their places. Statistics that
                were changed are left as they are: what they were before is
                not known. Defaults to `False`.

        Returns:
            A `PatchReport`.

        Raises:
            ValueError: If there is no such patch, or weights were changed
                since they were patched and `force` is not set; all of them
                are listed. The model is unchanged then.
        """
        scale = self._named(name).scale
        after = dict(self._ledger.patches)
        del after[name]
        return self._update("remove", name, scale, after, force)

    @_one_at_a_time
    def clear(self, force: bool = False) -> PatchReport:
        """Take all patches off, or none if one of them cannot be.

        Args:
            force: As in `remove`.

        Returns:
            A `PatchReport`.

        Raises:
            ValueError: As in `remove`.
        """
        return self._update("clear", None, None, {}, force)

    @_one_at_a_time
    def name_of(self, signature: Change) -> str:
        """Return the name under which a signature is on the model.

        Args:
            signature: A `WeightSignature`.

        Raises:
            ValueError: If it is not on the model.
        """
        name = self._find(signature)
        if name is None:
            raise ValueError(
                f"{signature!r} is not on this model object, but {list(self)}"
            )
        return name

    def __len__(self) -> int:
        return len(self._ledger.patches)

    def __iter__(self) -> Iterator[str]:
        return iter(self.scales)

    def __getitem__(self, name: str) -> Patch:
        """Return the `Patch` of this name: its `change` and `scale`."""
        return self._ledger.patches[name]

    def __enter__(self) -> "Patches":
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            self.clear()
        except ValueError as problem:
            if error is None:
                raise
            error.add_note(f"The patches are still on the model. {problem}")

    def __repr__(self) -> str:
        return f"<Patches on {self.model.name!r}: {self.scales}>"

    def _named(self, name: str) -> Patch:
        checks.check_string("name", name)
        if name not in self:
            expected = f"that of a patch on the model: there are {list(self)}"
            raise checks.error("name", expected, name)
        return self[name]

    def _find(self, signature: Change) -> str | None:
        if not isinstance(signature, Change):
            raise checks.error("signature", "a `WeightSignature`", signature)
        for name in self:
            present = self[name].change
            if present is signature or present.digest == signature.digest:
                return name
        return None

    def _checked_model(self, patches: dict[str, Patch]) -> Checkpoint:
        """Return the model's `Checkpoint`, which these patches fit."""
        model = Checkpoint("model", self.model)
        problems = []
        for patch in patches.values():
            problems += patch.change.problems(model)
        checks.raise_all("The change does not fit the model:", problems)
        return model

    def _update(
        self, action: str, name: Any, scale: Any, after: Any, force: Any = False
    ) -> PatchReport:
        ledger = self._ledger
        model = self._checked_model({**ledger.patches, **after})
        checks.check_bool("force", force)
        written, subtracted, left = (
            tuple(model.infos[position].key for position in positions)
            for positions in ledger.update(model, after, force)
        )
        reason = "changed since, and not known from before"
        return PatchReport(
            action=action,
            name=name,
            scale=scale,
            changed=written,
            subtracted=subtracted,
            active=self.scales,
            clean_nbytes=self.clean_nbytes,
            skipped=tuple(Skipped(key, reason) for key in left),
        )
