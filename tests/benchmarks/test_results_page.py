import json
import math

import pytest

from benchmarks import results_page

pytestmark = pytest.mark.one_backend

pytest.importorskip("scipy")

BUDGETS = [1000, 2000, 4000, 8000, 16000]


def run(tokens, seed=0, loss=None):
    loss = 3 + 20 * tokens**-0.3 if loss is None else loss
    after = {"held_out": math.exp(loss), "unrelated": 70.0}
    return {
        "model": "small",
        "pattern": "2:4",
        "seed": seed,
        "tokens": tokens,
        "seconds": 60.0,
        "batch_size": 1,
        "length": 256,
        "recipe": {"learning_rate": 1e-4},
        "evaluated_tokens": 512,
        "dtype": "float32",
        "backend": "torch",
        "machine": {"cpu": "one", "threads": "1", "accelerator": None},
        "perplexity": {
            "dense": {"held_out": 20.0, "unrelated": 10.0},
            "before_prune": {"held_out": 40.0, "unrelated": 60.0},
            "after_prune": after,
            "packed_int8": after,
        },
    }


def write(folder, runs):
    (folder / "cast_llm").mkdir()
    for index, each in enumerate(runs):
        (folder / "cast_llm" / f"{index}.json").write_text(json.dumps(each))


def test_parts_without_logs_name_the_program(tmp_path):
    page = results_page.make_page(tmp_path)
    for program in (
        "quality",
        "cast_llm",
        "packed_llm",
        "runtimes",
        "sparse_matmul",
        "one_shot",
        "lift_quality",
        "lift_step",
        "principal_mask",
        "lift_large",
        "compander_quality",
        "merge",
    ):
        assert f"python -m benchmarks.{program}" in page


def test_four_texts_and_their_seeds(tmp_path):
    def row(seed, x_dense):
        perplexity = {"held_out": 40.0, "reference": 20.0, "news": 30.0}
        return {
            "method": "CAST",
            "seed": seed,
            "tokens": 2560,
            "seconds": 60.0,
            "perplexity": perplexity,
            "x_dense": x_dense,
            "divergence": dict.fromkeys(perplexity, 0.5),
        }

    log = {
        "model": "small",
        "machine": "one",
        "steps": 10,
        "tokens_per_step": 256,
        "self_share": 0.5,
        "dtype": "float32",
        "backend": "torch",
        "rows": [row(0, 2.0), row(1, 3.0)],
    }
    (tmp_path / "quality.json").write_text(json.dumps(log))
    page = results_page.make_page(tmp_path)
    assert "| method | tokens | held out | reference | news | x dense" in page
    assert "| CAST | 2,560 | 40.0 ± 0.0 | 20.0 ± 0.0 | 30.0 ± 0.0 " in page
    assert "| 2.50 ± 0.71 | 0.50 | 2 | 1.0 |" in page


def test_seeds_are_put_together_and_the_law_is_judged(tmp_path):
    write(tmp_path, [run(t) for t in BUDGETS] + [run(1000, seed=1, loss=6.0)])
    page = results_page.make_page(tmp_path)
    first, second = math.exp(3 + 20 * 1000**-0.3), math.exp(6.0)
    mean, spread = (first + second) / 2, abs(first - second) / 2**0.5
    row = f"| 1,000 | 40.0 ± 0.0 | {mean:.1f} ± {spread:.1f} "
    assert row + f"| {mean / 20:.2f} | 70.0 ± 0.0 | 2 | 1.0 |" in page
    assert "within the bar of 3%" in page
    assert "16,000 tokens held out" in page


def test_a_law_that_fails_is_said_to_fail(tmp_path):
    write(tmp_path, [*map(run, BUDGETS[:-1]), run(16000, loss=2.0)])
    assert "above the bar of 3%" in results_page.make_page(tmp_path)


def test_runs_evaluated_on_other_tokens_are_kept_apart(tmp_path):
    runs = [*map(run, BUDGETS)]
    runs[2]["evaluated_tokens"] = 1024
    write(tmp_path, runs)
    page = results_page.make_page(tmp_path)
    assert "on 1,024 held-out tokens" in page
    assert "at five budgets" in page


def test_the_logs_of_the_repository_make_a_page():
    page = results_page.make_page(results_page.LOGS)
    assert "| CAST |" in page
