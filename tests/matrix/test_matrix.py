"""A few cells of the matrix; all of it is in `make matrix`."""

import json
import os
import signal
import time

import keras
import numpy as np
import pytest

pytest.importorskip("keras_hub")

import keras_weightmods as kwm
from keras_weightmods.calibration import inputs as calibration
from keras_weightmods.calibration.walk import Walk
from tests import models
from tests.matrix import __main__ as matrix
from tests.matrix import methods, page
from tests.matrix.families import families

pytestmark = [
    pytest.mark.one_backend,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
DENSE = families()["Dense"]


def test_a_few_cells(tmp_path, monkeypatch):
    def here(family, method, limit):
        return matrix.outcome(family, method)

    # A fork of a process that has computed may hang.
    monkeypatch.setattr(matrix, "in_a_process", here)
    monkeypatch.setenv("XLA_FLAGS", "")
    file = tmp_path / "matrix.jsonl"
    cells = "^(Conv3D|nested models|MobileNetBackbone): (pack|save)$"
    arguments = ["--only", cells, "--results", str(file)]
    monkeypatch.setattr("sys.argv", ["matrix", *arguments])
    with pytest.raises(SystemExit, match="0"):
        matrix.main()
    rows = page.read(file).values()
    assert [row["state"] for row in rows] == ["passed"] * 6


def fails(family):
    raise ValueError("by Keras itself")


def is_wrong(family):
    assert family is None, "not as it should be"


def test_how_a_cell_ends(monkeypatch):
    for method, state, note in (
        (lambda family: "fine", "passed", "fine"),
        (is_wrong, "wrong", "not as it should be"),
        (lambda family: {}[family.name], "wrong", "KeyError"),
        (lambda f: methods.kwm.sparsify(f.make(), "5:4"), "refused", "5:4"),
    ):
        monkeypatch.setitem(methods.METHODS, "own", method)
        received = matrix.outcome(DENSE, "own")
        assert received[0] == state
        assert note in received[1]
        # What Keras fails at is not ours.
        monkeypatch.setitem(methods.PLAIN, method, fails)
        assert matrix.outcome(DENSE, "own")[0] in ("passed", "keras")


def test_a_cell_has_a_limit_and_may_crash(monkeypatch):
    for function, limit, expected in (
        (lambda family: time.sleep(60), 0.2, ("limit", "over 0.2 s")),
        (
            lambda family: os.kill(os.getpid(), signal.SIGTERM),
            60,
            ("wrong", "the process ended with status 15"),
        ),
    ):
        monkeypatch.setitem(methods.METHODS, "own", function)
        received = matrix.in_a_process(DENSE, "own", limit)
        assert tuple(received) == expected


# Keras cannot call these at all.
NEVER_CALLED = "Gemma4AssistantCausalLM", "SAM3PromptableConceptBackbone"


@pytest.mark.heavy
def test_the_walk_of_every_family_is_its_forward_pass(recwarn):
    """Whatever the order of its inputs: none takes the place of another."""
    (unreached, *_) = kwm.find_targets(models.mlp())
    for name, family in families().items():
        if family.kind == "pair" or name in NEVER_CALLED:
            continue
        model = family.make()
        x = keras.tree.map_structure(
            keras.ops.convert_to_tensor, family.inputs(model)
        )
        expected = numpy_of(model(x, training=False))
        for order in (1, -1) if isinstance(x, dict) else (0,):
            if order:
                x = {key: x[key] for key in sorted(x)[::order]}
            targets = [*kwm.find_targets(model), unreached]
            walk = Walk(model, targets, [(x, None)], lambda *arguments: None)
            with calibration.eager_forward():
                (found,) = walk.run(model, [((x,), {})])
            for y, other in zip(numpy_of(found), expected, strict=True):
                size = max(1, np.abs(other).max(initial=0))
                np.testing.assert_allclose(
                    y, other, atol=1e-4 * size, err_msg=name
                )
    assert not [w for w in recwarn if "structure of" in str(w.message)]


def numpy_of(outputs):
    return [models.numpy(y) for y in keras.tree.flatten(outputs)]


def test_a_run_goes_on_and_a_cell_is_made_again(tmp_path, monkeypatch):
    file = tmp_path / "matrix.jsonl"
    wanted = {("Dense", "forward"), ("Dense", "targets")}
    calls = []

    def in_a_process(family, method, limit):
        calls.append((family.name, method))
        return "wrong" if method == "targets" else "passed", f"no. {len(calls)}"

    monkeypatch.setattr(matrix, "in_a_process", in_a_process)
    for _ in range(2):
        assert matrix.run(wanted, page.read(file), file) == 1
    assert calls == sorted(wanted)
    matrix.run({("Dense", "targets")}, page.read(file), file, again=True)
    notes = [row["note"] for row in page.read(file).values()]
    assert notes == ["no. 1", "no. 3"]


def test_the_page_is_written_from_the_results(tmp_path, monkeypatch):
    rows = [
        ("GPT2CausalLM", "forward", "passed", "9 weights"),
        ("GPT2CausalLM", "targets", "passed", "12, 2 left"),
        ("GPT2CausalLM", "lift", "refused", "ValueError: a | b"),
        ("VGG16", "share", "passed", ["16, 15 of them", "54.5 M", "99%"]),
        ("Dense, packed", "pack", "refused", "ValueError: packed"),
        ("Dense, packed", "delta", "passed", ""),
        ("Dense, sparse", "save", "wrong", "KeyError: 5"),
    ]
    keys = "family", "method", "state", "note"
    text = "".join(
        json.dumps({**dict(zip(keys, row)), "versions": {"keras": "3"}}) + "\n"
        for row in rows
    )
    monkeypatch.setattr(page, "cells", lambda: [row[:2] for row in rows])
    file = tmp_path / "page.md"
    names = ("versions", "language", "nets", "methods", "pairs", "others")
    marks = [f"<!-- {name} -->\nold\n<!-- end -->\n" for name in names]
    file.write_text("".join(marks))
    results = tmp_path / "matrix_torch.jsonl"
    results.write_text(text.partition("\n")[2])
    with pytest.raises(ValueError, match=r"torch \(1\)"):
        page.write(file, tmp_path)
    assert file.read_text() == "".join(marks)
    results.write_text(text)
    page.write(file, tmp_path)
    written = file.read_text()
    assert "old" not in written
    for line in (
        "Made with keras 3.",
        "| `GPT2CausalLM` | 12, 2 left |",
        "| `VGG16` | 16, 15 of them | 54.5 M | 99% |",
        "| all | 3, 1 refused |",
        "| packed | `delta` | `pack` |  |",
        "| sparse |  |  | `save` (wrong: Dense, torch) |",
        r"torch, refused, `lift`: a \| b (`GPT2CausalLM`)",
    ):
        assert line in written
