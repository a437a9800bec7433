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


def test_too_few_budgets(tmp_path):
    write(tmp_path, [run(1000), run(2000)])
    assert "at five budgets" in results_page.make_page(tmp_path)


def test_runs_evaluated_on_other_tokens_are_kept_apart(tmp_path):
    runs = [*map(run, BUDGETS)]
    runs[2]["evaluated_tokens"] = 1024
    write(tmp_path, runs)
    page = results_page.make_page(tmp_path)
    assert "on 1,024 held-out tokens" in page
    assert "at five budgets" in page


def test_runs_of_another_recipe_are_kept_out_of_the_law(tmp_path):
    other = {**run(64000, loss=5.0), "batch_size": 4}
    write(tmp_path, [*map(run, BUDGETS), other])
    page = results_page.make_page(tmp_path)
    assert "batches of 4 x 256" in page
    assert "16,000 tokens held out" in page
    said = 3 + 20 * 64000**-0.3
    assert "A run of 64,000 tokens with another recipe" in page
    assert f"{(5 - said) / 5:.1%} off" in page


def test_the_logs_of_the_repository_make_a_page():
    page = results_page.make_page(results_page.LOGS)
    assert "| CAST |" in page


def test_masks_and_steps_of_lift(tmp_path):
    rows = [
        {"rank": 32, "default": d, "randomized": 0.5, "magnitude": 0.2}
        for d in (1.0, 0.99, 0.995)
    ]
    time = {"seconds": {"exact": [12.0], "auto": [1.0]}, "ratio": 12.0}
    machine = {"cpu": "one", "cores": 2}
    masks = {
        "machine": machine,
        "density": 0.05,
        "backends": {
            "torch": {"agreement": rows, "time": {**time, "share": 0.99}}
        },
    }
    memory = {"trained": 5000, "state_bytes": 64e6, "peak_bytes": 3e9}
    steps = {
        "machine": machine,
        "batch": [4, 128],
        "dtype": "float32",
        "backends": {
            "jax": {
                "memory": {"AdamW": memory, "LIFT": memory, "LoRA": memory},
                "medians": {"AdamW": 2.0, "LIFT": 1.9},
                "ratio_with_refresh": 0.96,
            }
        },
    }
    (tmp_path / "principal_mask.json").write_text(json.dumps(masks))
    (tmp_path / "lift_step.json").write_text(json.dumps(steps))
    large = {"first_masks": 4.0, "refresh": None, "index_bits": 0.0}
    large |= {"file_bytes": 5e6, "x_lora": 0.7, "write": 1.0, "apply": 0.5}
    large |= {"read": 0.04, "read_mb_s": 250.0}
    about = {"machine": machine, "density": 0.05}
    about["backends"] = {"jax": {"kernels": 9, "masks": {"random": large}}}
    (tmp_path / "lift_large.json").write_text(json.dumps(about))
    page = results_page.make_page(tmp_path)
    assert "| torch | 32 | 3 | 0.9900 | 0.9950 | 0.5000 | 0.2000 |" in page
    assert "| torch | 12.0 | 1.00 | 12.0 | 0.9900 |" in page
    assert "| jax | LIFT | 5,000 | 1.90 | 0.96 | 64 | 3000 |" in page
    assert "| jax | LoRA | 5,000 |  |  | 64 | 3000 |" in page
    assert (
        "| jax | random | 9 | 4.0 |  | 5.0 | 0.00 | 0.70 | 1.00 | 0.50 | 0.04 "
        "| 250 |"
    ) in page


def test_merging(tmp_path):
    ties = {"seconds": 4.0, "of_copy": 0.35, "peak_bytes": 6.6e8}
    log = {
        "machine": {"cpu": "a", "cores": 2, "cores_used": 1},
        "megabytes": 500,
        "rounds": 3,
        "enough_seconds": 30,
        "backends": {
            "torch": {"imported_bytes": 5.9e8, "methods": {"ties": ties}}
        },
    }
    (tmp_path / "merge.json").write_text(json.dumps(log))
    both = {
        "ours": {"seconds": [9, 4, 5], "peak_bytes": [6e8] * 3},
        "mergekit": {"seconds": [8, 10, 20], "peak_bytes": [2e9] * 3},
    }
    log |= {"versions": {"torch": "2"}, "methods": {"ties": both}}
    (tmp_path / "merge_command.json").write_text(json.dumps(log))
    page = results_page.make_page(tmp_path)
    assert "| torch | ties | 4.0 | 0.35 | 660 | 590 |" in page
    assert "| ties | 5.0 | 10.0 | 0.50 | 600 | 2000 | 0.30 |" in page


def test_products_by_shape_and_rows(tmp_path):
    def row(shape, batch):
        times = {"dense": 4.0, "b int8": 1.0, "a float32": 2.0, "a int8": 0.5}
        return {"shape": shape, "batch": batch, "milliseconds": times}

    log = {
        "machine": {"cpu": "one"},
        "results": [
            {
                "peer": "jax",
                "threads": "1",
                "isas": ["a", "b"],
                "rows": [row([32, 16], 1), row([32, 16], 8)],
            }
        ],
    }
    (tmp_path / "sparse_matmul.json").write_text(json.dumps(log))
    page = results_page.make_page(tmp_path)
    assert "jax, one core, a:" in page
    assert "| kernel | values | B=1 | B=8 |" in page
    assert "| 32x16 | float32 | 2.00 | 2.00 |" in page
    assert "| 32x16 | int8 | 8.00 | 8.00 |" in page
