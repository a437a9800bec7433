"""A part of the matrix; all of it is in `make matrix`."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("keras_hub")

from tests.matrix import __main__ as matrix
from tests.matrix import hub, methods, page
from tests.matrix.families import families

pytestmark = [
    pytest.mark.one_backend,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
DENSE = families()["Dense"]
PART = 40  # one in so many


def test_a_part_of_the_matrix(tmp_path):
    # In a process that has computed nothing yet: it is forked.
    file = tmp_path / "matrix.jsonl"
    command = [sys.executable, "-m", "tests.matrix", "--results", str(file)]
    command += ["--part", str(PART)]
    done = subprocess.run(command, capture_output=True, text=True)
    rows = page.read(file)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    # Without a model, or one that Keras itself can call, there is no more.
    unmade = {
        family
        for (family, method), row in rows.items()
        if row["state"] == "unmade"
        or (method == "forward" and row["state"] == "keras")
    }
    assert {f for f, _ in set(page.cells(PART)) - set(rows)} <= unmade
    made = [row["state"] for row in rows.values() if row["state"] != "unmade"]
    assert made.count("passed") > 0.8 * len(made) > 2, done.stdout


def passes(family):
    return "fine"


def is_wrong(family):
    assert family is None, "not as it should be"


def is_obscure(family):
    return {}[family.name]


def is_refused(family):
    methods.kwm.sparsify(family.make(), "5:4")


def fails(family):
    raise ValueError("by Keras itself")


@pytest.mark.parametrize(
    ("method", "state", "note"),
    [
        (passes, "passed", "fine"),
        (is_wrong, "wrong", "not as it should be"),
        (is_obscure, "wrong", "KeyError"),
        (is_refused, "refused", "5:4"),
    ],
)
def test_how_a_cell_ends(method, state, note, monkeypatch):
    monkeypatch.setitem(methods.METHODS, "own", method)
    received = matrix.outcome(DENSE, "own")
    assert received[0] == state
    assert note in received[1]


def test_what_is_said_of_an_error_in_a_layer():
    for text, expected in (
        ("one\ntwo", "one"),
        ("", ""),
        (
            "Exception encountered when calling A.call().\n\n"
            "\x1b[1mno such file\x1b[0m\n\nArguments received by A.call():",
            "no such file",
        ),
    ):
        assert matrix.line(OSError(text)) == f"OSError: {expected}"


def test_a_model_of_parts_and_what_its_inputs_do_not_tell():
    made = [hub.make("SegFormerBackbone") for _ in range(2)]
    assert made[0].image_encoder is not made[1].image_encoder
    assert made[0].image_encoder.hidden_dims == [16, 32]
    named = hub.make("CLIPTextEncoder", num_layers=1, name="one")
    assert (named.name, named.num_layers, named.hidden_dim) == ("one", 1, 32)
    sound = hub.given("MoonshineBackbone", 3)
    shapes = {key: value.shape for key, value in sound.items()}
    assert shapes == {
        "encoder_input_values": (3, 2048, 1),
        "encoder_padding_mask": (3, 2048),
    }
    assert hub.given("SegFormerBackbone", 3) == {}


def test_what_keras_fails_at_is_not_ours(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "own", is_wrong)
    monkeypatch.setitem(methods.PLAIN, is_wrong, fails)
    assert matrix.outcome(DENSE, "own")[0] == "keras"


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


def test_a_run_goes_on_and_a_cell_is_made_again(tmp_path, monkeypatch):
    file = tmp_path / "matrix.jsonl"
    wanted = {("Dense", "forward"), ("Dense", "targets")}
    calls = []

    def in_a_process(family, method, limit):
        calls.append((family.name, method))
        return "wrong" if method == "targets" else "passed", f"no. {len(calls)}"

    monkeypatch.setattr(matrix, "in_a_process", in_a_process)
    assert matrix.run(wanted, page.read(file), file) == 1
    assert matrix.run(wanted, page.read(file), file) == 1
    assert calls == sorted(wanted)
    matrix.run({("Dense", "targets")}, page.read(file), file, again=True)
    rows = page.read(file)
    assert {key: row["note"] for key, row in rows.items()} == {
        ("Dense", "forward"): "no. 1",
        ("Dense", "targets"): "no. 3",
    }


def test_the_page_is_written_from_the_results(tmp_path, monkeypatch):
    rows = [
        ("GPT2CausalLM", "forward", "passed", "9 weights"),
        ("GPT2CausalLM", "targets", "passed", "12, 2 left"),
        ("GPT2CausalLM", "lift", "refused", "ValueError: a | b"),
        ("VGG16", "share", "passed", ["16, 15 of them", "54.5 M", "99%"]),
        ("BertBackbone", "forward", "unmade", "TypeError: none"),
        ("Dense, packed", "pack", "refused", "ValueError: packed"),
        ("Dense, packed", "delta", "passed", ""),
        ("Dense, packed", "save", "passed", ""),
        ("Dense, sparse", "save", "wrong", "KeyError: 5"),
    ]
    keys = "family", "method", "state", "note"
    text = "".join(
        json.dumps({**dict(zip(keys, row)), "versions": {"keras": "3"}}) + "\n"
        for row in rows
    )
    done = [row[:2] for row in rows]
    monkeypatch.setattr(page, "cells", lambda: [*done, ("BertBackbone", "fit")])
    file = tmp_path / "page.md"
    names = ("versions", "language", "nets", "methods", "others")
    names += ("pairs", "devices")
    marks = [f"<!-- {name} -->\nold\n<!-- end -->\n" for name in names]
    file.write_text("".join(marks))
    with pytest.raises(ValueError, match="no file"):
        page.write(file, tmp_path)
    results = tmp_path / "matrix_torch.jsonl"
    results.write_text(text.partition("\n")[2])
    with pytest.raises(ValueError, match=r"torch \(1\)"):
        page.write(file, tmp_path)
    assert file.read_text() == "".join(marks)
    results.write_text(text)
    devices = tmp_path / "devices.json"
    devices.write_text(json.dumps({"2 processes": ["LIFT: equal: yes"]}))
    page.write(file, tmp_path)
    written = file.read_text()
    assert "old" not in written
    assert "Made with keras 3." in written
    assert "| `GPT2CausalLM` | 12, 2 left |" in written
    assert "| `VGG16` | 16, 15 of them | 54.5 M | 99% |" in written
    assert "| `forward` | 1, 1 unmade |" in written
    assert "| all | 3, 1 refused, 1 unmade |" in written
    assert "| 2 processes | LIFT | equal: yes |" in written
    assert "| packed | `delta`, `save` | `pack` |  |" in written
    assert "| sparse |  |  | `save` (wrong: Dense, torch) |" in written
    assert r"torch, refused, `lift`: a \| b (`GPT2CausalLM`)" in written
    assert "torch, unmade, `forward`: none (`BertBackbone`)" in written
