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
        "humaneval",
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


def test_seeds_are_put_together_and_the_law_is_judged(tmp_path):
    write(tmp_path, [run(t) for t in BUDGETS] + [run(1000, seed=1, loss=6.0)])
    page = results_page.make_page(tmp_path)
    first, second = math.exp(3 + 20 * 1000**-0.3), math.exp(6.0)
    mean, spread = (first + second) / 2, abs(first - second) / 2**0.5
    row = f"| 1,000 | 40.0 ± 0.0 | {mean:.1f} ± {spread:.1f} "
    assert row + f"| {mean / 20:.2f} | 70.0 ± 0.0 | 2 | 1.0 |" in page
    assert "within the bar of 3%" in page
    assert "16,000 tokens held out" in page


def test_the_logs_of_the_repository_make_a_page():
    page = results_page.make_page(results_page.LOGS)
    assert "| CAST |" in page
