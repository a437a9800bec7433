import argparse

import numpy as np
import pytest
from rich.console import Console

from examples import sparsify_llm
from tests.models import causal_lm, gpt2_preprocessor, make_sparse

pytest.importorskip("keras_hub")

pytestmark = pytest.mark.one_backend


@pytest.mark.parametrize("pattern", ["16:32", "2:4"])
def test_each_form_is_rounded_packed_and_measured(
    pattern, tmp_path, monkeypatch
):
    monkeypatch.setattr(sparsify_llm, "PROMPT", "ab")
    sizes = {"hidden_dim": 64, "intermediate_dim": 64, "num_heads": 2}
    sizes["max_sequence_length"] = 64
    model, other = (
        causal_lm("gpt2", gpt2_preprocessor(), **sizes) for _ in range(2)
    )
    model.compile(sampler="greedy")
    trained = make_sparse(other, pattern)
    rows = np.random.default_rng(0).integers(1, 12, (4, 9)).astype("int32")
    rows[:, 0] = 0  # the start token
    texts = dict.fromkeys(sparsify_llm.TEXTS, rows)
    args = argparse.Namespace(
        pattern=pattern,
        output=tmp_path / "sparse.keras",
        rounding=None,
        init_rows=4,
        steps=1,
        batch_size=1,
        smoke=False,
    )
    console = Console(quiet=True)
    results = sparsify_llm.compare(
        model, trained, 1e6, texts, rows, args, console
    )
    forms = {row["form"]: row for row in results}
    assert list(forms) == [
        *(f"dense {form}" for form in ("float32", "int4", "int3")),
        *(["2:4 float32"] if pattern == "2:4" else []),
        *(f"{pattern} {form}" for form in ("int8", "int4")),
    ]
    for name, row in forms.items():
        assert (row["seconds"] > 1e6) == name.startswith(pattern)
    assert (
        forms["dense int3"]["file_bytes"]
        < forms["dense int4"]["file_bytes"]
        < forms["dense float32"]["file_bytes"]
    )
    table = sparsify_llm.make_table(results, args)
    assert table.row_count == len(forms)


def test_an_unknown_rounding_is_refused_before_the_training(
    monkeypatch, capsys
):
    words = ["sparsify_llm", "--rounding", "scales,bloks"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit):
        sparsify_llm.parse_arguments()
    assert "Received: bloks" in capsys.readouterr().err
