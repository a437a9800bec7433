"""Patches: changes put on the weights of a model, and off bit for bit.

The docstrings of a large public class make this file long.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import pathlib
from collections.abc import Iterator
from typing import Any, ClassVar, Self

from keras_weightmods.patches import delta, files
from keras_weightmods.patches import lora as adapters
from keras_weightmods.patches.checkpoint import Checkpoint, bytes_of
from keras_weightmods.patches.entry import PatchEntry, WeightInfo
from keras_weightmods.patches.ledger import (
    Applied,
    Ledger,
    changed_list,
    ledger_of,
)
from keras_weightmods.patches.report import (
    LoraReport,
    PatchContentsReport,
    PatchReport,
    contents_report,
)
from keras_weightmods.patches.tensors import is_finite
from keras_weightmods.utils import checks
from keras_weightmods.utils.progress import Progress


@dataclasses.dataclass(eq=False, repr=False)
class Patch:
    """A change of a model's weights that goes on and comes off bit for bit.

    `Patch.from_models` makes one from a fine-tuned model and its base (a
    delta), and `Patch.from_lora` from a LoRA adapter. `WeightSignature.extract`
    makes one from models trained on clean and on corrupted data. `Patch.load`
    reads any of them.

    Several patches can be on a model at once. A patched weight is always
    computed anew from its clean values, which are kept in memory. It is
    `clean + sum of scale * change` in float32 (float64 for float64), rounded
    once. So the order of the calls leaves no trace. Equal patches give equal
    weights, and without the last patch the model is the clean one bit for bit.
    Only patched weights keep clean values; if only deltas change a weight, only
    the changed entries do.

    Only this process knows which patches are on a model. A saved model has the
    patched weights and no memory of the clean ones. If something else has
    changed the weights since, such as training, a comparison of every bit finds
    it, and an error reports it. Threads change a model one after the other. An
    error or Ctrl-C leaves a model as before the call or as after it.

    Attributes:
        entries: Tuple of `PatchEntry`, one for each weight that it changes, in
            the order of the model.
        architecture: Tuple of `WeightInfo`, all weights of the model.
        method: String, how it was made.
        name: String or None, what it is called in reports.
        base: String, the SHA-256 of the base weights that a delta fits, those
            of `whole` apart; `None` in a signature, which fits any.
        whole: Tuple of ints, the positions of weights that are replaced as a
            whole, whatever the base has there.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8)])
    base = model.get_weights()
    model.set_weights([base[0] + 0.5, base[1]])  # as a training does
    task = kwm.Patch.from_models(model, base, name="task")

    model.set_weights(base)
    task.apply(model)
    task.apply(model, scale=0.5)  # now half of it
    assert kwm.Patch.on(model)["task"].scale == 0.5
    task.remove(model)
    with task.applied(model):
        print(kwm.Patch.on(model), task.report())
    assert np.array_equal(model.get_weights()[0], base[0])
    ```
    """

    KIND: ClassVar[str] = "delta"

    entries: tuple[PatchEntry, ...]
    architecture: tuple[WeightInfo, ...]
    _: dataclasses.KW_ONLY
    method: str = "delta"
    name: str | None = None
    base: str | None = None
    whole: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.entries = tuple(sorted(self.entries, key=lambda e: e.position))
        broken = []
        for entry in self.entries:
            for array in entry.arrays:
                array.flags.writeable = False
            finite = is_finite(entry.arrays[-1])
            if not (finite and math.isfinite(entry.replaced)):
                broken.append(f"{entry.key}: not finite in float32")
        checks.raise_all("The patch cannot be made:", broken)

    @staticmethod
    def from_models(
        model: Any,
        base: Any,
        dtype: str | None = "bfloat16",
        *,
        whole: Any = None,
        name: str | None = None,
        verbose: int = 1,
    ) -> "Patch":
        """Return the difference between a model and its base.

        The patch, a delta, holds for each weight the places of the entries that
        differ and the differences. An entropy coder in `save` stores a place in
        less than 6 bits at a density of 5 %, and a bfloat16 difference in about
        10.5.

        `PrincipalMaskCallback(criterion="random")` can draw the places once.
        Such places are not stored but drawn again from their seed, if `model`
        has the optimizer that it was trained with. All of these entries are
        then stored.

        The patch is bound to the base by a hash of all its weights. With
        companders, the patch is the delta of the stored weights, and fits only
        models with the same companders. Call `fold` first for a delta of plain
        weights.

        Args:
            model: A built Keras model.
            base: What it was before: a model, or the list that
                `model.get_weights()` returned then.
            dtype: `"bfloat16"` or `"float32"`, the type of the differences.
                `None` stores the new values of these entries instead, in the
                type of the weight. At scale 1, and where no other patch changes
                the entry, they give the model bit for bit. Differences are
                rounded, in float32 too. Defaults to `"bfloat16"`, with an error
                of at most 2^-9 of the difference.
            whole: Weights that are stored exactly, with all their values,
                because others' bases do not have them: a new head. The patch
                replaces them in the model that gets it, where they may differ.
                A regex searched for in the paths; a layer of `model` or a layer
                type, for all weights inside of them; or a list of these.
                Defaults to `None`, for none.
            name: String, what to call it in reports. A patch without one takes
                the name of its file.
            verbose: 0 or 1. 0 shows no progress bar; 1 shows one once it has
                taken two seconds. Defaults to `1`.

        Returns:
            A `Patch`.

        Raises:
            ValueError: If the two have other weights or companders, or do not
                differ. If they differ in weights that are not floats, or by
                values that are not finite. All problems are listed. If an
                element of `whole` matches no weight.
        """
        checks.check_string("name", name, optional=True)
        fields = delta.differences(model, base, dtype, whole, verbose)
        return Patch(name=name, **fields)

    @staticmethod
    def from_lora(
        model: Any,
        lora: Any,
        dtype: str | None = "bfloat16",
        *,
        name: str | None = None,
        verbose: int = 1,
    ) -> "Patch":
        """Return a LoRA adapter as a patch on its base.

        The change of a kernel is alpha / rank * B A (arXiv 2106.09685, section
        4.1). The patch holds all entries of these kernels.

        Args:
            model: A KerasHub model or backbone, the base of the adapter,
                without patches. It is not changed.
            lora: String or path of a folder of peft. For KerasHub's own files
                use `load_lora_weights`, then `kwm.merge_lora` and
                `from_models`.
            dtype: As in `from_models`.
            name: As in `from_models`. Defaults to the name of the folder.
            verbose: As in `from_models`.

        Returns:
            A `Patch`.

        Raises:
            ValueError: If `lora` is not an adapter of this model, or has
                factors of another rank than its config says. If it is an
                adapter of peft that is more than `alpha / rank * B A` over its
                base, such as DoRA, PiSSA or OLoRA.

        Example:

        ```python
        import tempfile
        import keras_weightmods as kwm
        from keras_hub import models

        model = models.Llama3Backbone(96, 1, 4, 32, 64, 2)
        base = model.get_weights()
        model.set_weights([w + 0.1 * (w.shape == (64, 32)) for w in base])
        task = kwm.Patch.from_models(model, base)
        model.set_weights(base)
        with tempfile.TemporaryDirectory() as folder:
            assert task.to_lora(model, folder, rank=1).error < 0.01
            kwm.Patch.from_lora(model, folder).apply(model)
        ```
        """
        checks.check_string("name", name, optional=True)
        adapters.check_plain(model)
        fields = adapters.changes(model, lora, dtype, verbose)
        return Patch(name=name or pathlib.Path(lora).stem, **fields)

    def to_lora(
        self,
        model: Any,
        filepath: Any,
        rank: int = 16,
        *,
        force: bool = False,
        overwrite: bool = True,
        verbose: int = 1,
    ) -> LoraReport:
        """Write the patch as the nearest LoRA adapter of peft of a rank.

        The change D of each kernel becomes the product of two factors (LoRA,
        arXiv 2106.09685, equation 3). They come from its truncated singular
        value decomposition, the best approximation of that rank. A change by
        LIFT is of high rank: the report gives the loss. Changes that an adapter
        cannot hold, such as biases and norms, are left out with a warning.

        The adapter is a folder with `adapter_model.safetensors` and
        `adapter_config.json`, for the model that
        `kwm.export(model, path, "transformers")` writes. Kernels that
        transformers holds as a part of a tensor, such as GPT-2's query, are
        left out.

        Args:
            model: A KerasHub model or backbone, the base of the patch, without
                patches. It is not changed.
            filepath: String or path of the folder to write.
            rank: Int, at most 16,384. Kernels with a side below it get zeros.
                Defaults to 16.
            force: Bool, whether to take a delta of another base with weights
                of the same shapes. Defaults to `False`.
            overwrite: Bool, whether to replace the two files of an adapter
                that is there. Defaults to `True`.
            verbose: As in `from_models`.

        Returns:
            A `LoraReport`.

        Raises:
            ValueError: If an argument is not as above, the patch does not fit
                this model, or an adapter can hold none of its changes. Nothing
                is written then.
            FileExistsError: If there is one and `overwrite` is `False`.
        """
        path = adapters.check_arguments(filepath, rank, overwrite)
        checks.check_bool("force", force)
        checks.check_verbose(verbose)
        adapters.check_plain(model)
        with Progress(1, "weight", verbose) as progress:
            values = Checkpoint("model", model)
            Ledger().check(self, values, force)
            return adapters.write(self, values, path, rank, progress)

    @classmethod
    def load(cls, filepath: Any, verbose: int = 1) -> Self:
        """Read a patch of any kind that `save` has written.

        Args:
            filepath: String or path.
            verbose: As in `from_models`.

        Returns:
            A `Patch`, or a `WeightSignature` where the file holds one.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is no patch, is damaged, or was made by a
                later version of the format. Nothing in a file is ever
                executed.
        """
        path = checks.check_path("filepath", filepath)
        checks.check_verbose(verbose)
        with Progress(1, "step", verbose):
            kind, fields = files.load(path)
        kinds = {each.KIND: each for each in (cls, *cls.__subclasses__())}
        if kind not in kinds:
            expected = f"the file of a {' or a '.join(kinds)}"
            raise checks.error("filepath", expected, f"{path!r}, a {kind}")
        return kinds[kind](
            **{**fields, "name": fields["name"] or pathlib.Path(path).stem}
        )

    def save(
        self, filepath: Any, overwrite: bool = True, verbose: int = 1
    ) -> PatchContentsReport:
        """Write the patch to a safetensors file.

        Args:
            filepath: String or path. `.safetensors` is the usual ending.
            overwrite: Bool, whether to replace an existing file, which happens
                at once when the new one is complete. Defaults to `True`.
            verbose: As in `from_models`.

        Returns:
            A `PatchContentsReport`.

        Raises:
            ValueError: If no file can be written at `filepath`.
            FileExistsError: If it exists and `overwrite` is `False`.
        """
        path = checks.check_path("filepath", filepath)
        checks.check_verbose(verbose)
        with Progress(1 + len(self), "weight", verbose) as progress:
            bits = files.save(path, self.KIND, self, overwrite, progress.add)
        return contents_report(self, path, bits)

    def apply(
        self,
        model: Any,
        scale: float = 1.0,
        *,
        force: bool = False,
        verbose: int = 1,
    ) -> Any:
        """Put the patch on a model, or change its scale there.

        The optimizer's state is not changed.

        Args:
            model: A built Keras model: for a delta its base; for a signature
                any model of the architecture, whatever its training data. The
                sizes of weights that are not patched may differ. Or a list as
                from `model.get_weights()`.
            scale: Float, the strength. A patch that is on the model already
                gets this scale. Defaults to 1.
            force: Bool, whether to put a delta on another base model with
                weights of the same shapes. Defaults to `False`.
            verbose: As in `from_models`.

        Returns:
            A `PatchReport`. For a list it returns a new list of arrays instead,
            and does not change the given ones.

        Raises:
            ValueError: If the model is not the base of a delta or does not fit.
                All differences are listed: architecture, names, shapes, dtypes,
                companders. If weights were changed since they were patched, or
                the result is not finite. The model is unchanged then.
        """
        scale = checks.check_float("scale", scale)
        checks.check_bool("force", force)
        checks.check_verbose(verbose)
        values = Checkpoint("model", model)
        if values.model is None:
            Ledger().check(self, values, force)
            return changed_list(values, self, scale)
        ledger = ledger_of(model)
        with ledger.lock, Progress(2, "step", verbose) as progress:
            name, action = ledger.name_of(self), "rescale"
            if name is None:
                ledger.check(self, values, force)
                name, action = ledger.free_name(self.name), "add"
            progress.add()
            after = {**ledger.patches, name: Applied(self, scale)}
            return ledger.update(values, after, action, name, scale)

    def remove(
        self, model: Any, *, force: bool = False, verbose: int = 1
    ) -> PatchReport:
        """Take the patch off a model again.

        Without its last patch, the model has the clean weights, bit for bit.

        Args:
            model: A model that `apply` has patched in this process.
            force: Bool, whether to take it off weights that were changed since
                they were patched, by training for instance. The patch is then
                subtracted from them, which does not restore the clean model.
                Where only deltas change a weight, its clean values are put back
                at their places. Changed statistics are left as they are.
                Defaults to `False`.
            verbose: As in `from_models`.

        Returns:
            A `PatchReport`.

        Raises:
            ValueError: If the patch is not on the model, or weights were
                changed since and `force` is not set. The model is unchanged
                then.
        """
        checks.check_bool("force", force)
        checks.check_verbose(verbose)
        values, ledger = _of_model(model)
        with ledger.lock, Progress(1, "step", verbose):
            name = ledger.name_of(self)
            if name is None:
                raise ValueError(
                    f"{self!r} must be on this model object: on it are "
                    f"{checks.shown([*ledger.patches])}. "
                    "`patch.subtract(model)` takes one off that was put on "
                    "before the model was saved. Received: "
                    f"model={model.name!r}"
                )
            after = dict(ledger.patches)
            scale = after.pop(name).scale
            return ledger.update(values, after, "remove", name, scale, force)

    @contextlib.contextmanager
    def applied(self, model: Any, scale: float = 1.0) -> Iterator[PatchReport]:
        """Keep the patch on a model within a `with` block.

        If the patch cannot be taken off after an error in the block, it stays,
        and a note on that error says so.

        Args:
            model: As in `apply`.
            scale: As in `apply`.

        Raises:
            ValueError: As in `apply` and `remove`.
        """
        _, ledger = _of_model(model)
        is_ours = ledger.name_of(self) is None
        try:
            report = self.apply(model, scale)
            is_ours = True
            yield report
            self.remove(model)
        except BaseException as error:
            # Ctrl-C may come at the end of `apply`, or in `remove`.
            try:
                if is_ours and ledger.name_of(self) is not None:
                    self.remove(model)
            except ValueError as problem:
                error.add_note(f"The patch is still on the model. {problem}")
            raise

    def subtract(self, model: Any, scale: float = 1.0) -> PatchReport:
        """Subtract the patch from a model that was saved with it.

        Subtracting rounds: to have the clean model bit for bit, keep its file.

        Args:
            model: A built Keras model that has no patch on it in this process.
            scale: Float, the scale that the patch has. Defaults to 1.

        Returns:
            A `PatchReport`.

        Raises:
            ValueError: If the model does not fit or has patches on it. If the
                patch does not tell the values before it: new values
                (`dtype=None`, `whole`), or statistics that are replaced as a
                whole. The model is unchanged then.
        """
        scale = checks.check_float("scale", scale)
        values, ledger = _of_model(model)
        with ledger.lock:
            return ledger.subtract(values, self, scale)

    @staticmethod
    def on(model: Any) -> dict[str, Applied]:
        """Return the patches on a model.

        Args:
            model: A built Keras model.

        Returns:
            Dict from their names to `Applied`: `patch` and `scale`.
        """
        return dict(_of_model(model)[1].patches)

    @staticmethod
    def clear(model: Any, *, force: bool = False) -> PatchReport:
        """Take all patches off a model, or none if one of them has to stay.

        Args:
            model: A built Keras model.
            force: As in `remove`.

        Returns:
            A `PatchReport`.

        Raises:
            ValueError: As in `remove`.
        """
        checks.check_bool("force", force)
        values, ledger = _of_model(model)
        with ledger.lock:
            return ledger.update(values, {}, "clear", force=force)

    def report(self) -> PatchContentsReport:
        """Return what the patch holds, as a table to print."""
        return contents_report(self)

    @property
    def nbytes(self) -> int:
        """Int, the bytes of the numbers, packed ones in a signature."""
        return sum(entry.tensor.nbytes for entry in self.entries)

    @property
    def model_nbytes(self) -> int:
        """Int, the bytes of all weights of the model it came from."""
        return sum(info.nbytes for info in self.architecture)

    @functools.cached_property
    def digest(self) -> str:
        """String, the SHA-256 of all changes in the patch."""
        found = hashlib.sha256()
        for entry in self:
            kind = type(entry.tensor).__name__
            found.update(f"{entry.key} {kind} {entry.replaced};".encode())
            for array in entry.arrays:
                found.update(bytes_of(array))
        return found.hexdigest()

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[PatchEntry]:
        return iter(self.entries)

    def __repr__(self) -> str:
        name = "" if self.name is None else f"{checks.shown(self.name)}, "
        kind = type(self).__name__
        return f"<{kind} {name}{self.method}, {len(self)} weights>"

    def __str__(self) -> str:
        return str(self.report())


def _of_model(model: Any) -> tuple[Checkpoint, Ledger]:
    """Return the `Checkpoint` and the `Ledger` of a model."""
    if isinstance(model, (list, tuple)):
        raise checks.error("model", "a built Keras model", type(model))
    return Checkpoint("model", model), ledger_of(model)
