import types

import numpy as np
import pytest

import keras_weightmods as kwm
from benchmarks import humaneval, sandbox
from benchmarks.pages import packed
from examples.data import prose, qwen_coder
from tests import models

pytestmark = pytest.mark.one_backend

PROBLEM = {
    "prompt": 'import math\n\n\ndef half(x):\n    """Half of x."""\n',
    "test": "def check(candidate):\n    assert candidate(3) == 1\n",
    "entry_point": "half",
}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Here:\n```python\nx = 1\n```\nIt is\n```\ny = 2\n```", "x = 1"),
        # Cut off by the number of tokens.
        (
            "```python\ndef f():\n    return 1\n\ndef g(",
            "def f():\n    return 1",
        ),
        ("def f():\n    return 1\nassert f() == 2", "def f():\n    return 1"),
        ("import re\nprint(input())\nA: int = 1", "import re\nA: int = 1"),
        ("```python\nx = '\\d'\n```", "x = '\\\\d'"),
        ("```python\nx = 1\n``", "x = 1"),
        ("There is none.", ""),
    ],
)
def test_code_of_an_answer(answer, expected):
    assert humaneval.code_of(answer) == expected


@pytest.mark.parametrize(
    ("body", "result"),
    [
        ("return math.floor(x / 2)", "passed"),
        ("import numpy; return int(numpy.floor(x / 2))", "passed"),
        ("return x / 2", "AssertionError: "),
        ("while True: pass", "killed by signal 9"),
        ("return 'a' * 10**10", "MemoryError: "),
        ("import socket; socket.socket()", "PermissionError: socket.__new__ "),
        ("import os; os.system('true')", "PermissionError: os.system "),
        ("open('file', 'w')", "PermissionError: open "),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "ended itself"),
    ],
)
def test_answers_run_within_limits(body, result):
    answer = f"```python\ndef half(x):\n    {body}\n```"
    program = humaneval.program_of(PROBLEM, answer)
    assert sandbox.run(program, seconds=1).startswith(result)


def test_answers_that_wait_are_ended():
    program = "import time\ntime.sleep(9)"
    assert sandbox.run(program, wall=0.1) == "out of time"


def test_answers_have_no_network():
    program = "lines = open('/proc/net/dev').readlines()\nassert len(lines) < 4"
    if not sandbox.without_network():
        pytest.skip("no network namespaces here")
    assert sandbox.run(program) == "passed"


def test_a_batch_has_the_tokens_of_its_prompts_alone():
    model = models.randomize(models.causal_lm())
    model.compile(sampler="greedy")
    kwm.compile_generate(model, verbose=0)
    random = np.random.default_rng(0)
    prompts = [random.integers(1, 20, n).tolist() for n in (3, 9)]
    together = humaneval.answer(model, prompts, 12, None)
    alone = [humaneval.answer(model, [each], 12, None)[0] for each in prompts]
    assert together == alone
    # One of them ends, and the others go on.
    stop = together[1][4]
    ended = [
        row[: row.index(stop) + 1] if stop in row else row for row in alone
    ]
    assert min(map(len, ended)) < 12
    assert humaneval.answer(model, prompts, 12, [stop]) == ended


def test_a_log_goes_on_after_its_last_whole_line(tmp_path):
    path = tmp_path / "logs" / "row.jsonl"
    assert humaneval.read_log(path, {"row": "int8"}) == {}
    record = {"task_id": "HumanEval/0", "answer": "\u2028\n"}
    humaneval.append(path, record)
    with path.open("a") as file:
        file.write('{"task_id": "HumanEval/1", "ans')
    for _ in range(2):
        found = humaneval.read_log(path, {"row": "int8"})
        assert found == {"HumanEval/0": record}
    with pytest.raises(SystemExit, match="Remove it"):
        humaneval.read_log(path, {"row": "int4"})


def test_report_and_page():
    assert humaneval.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    settings = {"runtime": "torch", "file_bytes": 5e8, "cores": 1, "cpu": "one"}
    settings |= {"new_tokens": 512, "batch": 8}
    measured = {"tokens": 100, "seconds": 5.0, "cpu_seconds": 4.0, "load": 2.0}
    rows = [
        humaneval.summary_of(
            [
                {"task_id": i, "result": result, "peak_bytes": i, **measured}
                for i, result in enumerate(results)
            ],
            {"row": name, **settings},
        )
        for name, results in (
            ("float32", ["passed", "passed", "out of time", "ended itself"]),
            ("int8", ["passed", "ended itself", "passed", "passed"]),
        )
    ]
    humaneval.print_report(rows)
    page = packed.humaneval({"rows": rows})
    assert (
        "| torch: int8 | 75.0 | 30 to 95 | +2 -1 | 20.0 | 25.0 | 500 | 0 |"
        in page
    )


def test_tokens_that_end_an_answer():
    class Tokenizer:
        vocabulary = ("a", "``", "```", "```Ċ", "<|im_end|>", "<|endoftext|>")

        def get_vocabulary(self):
            return list(self.vocabulary)

        def token_to_id(self, token):
            return self.vocabulary.index(token)

    assert humaneval.stop_token_ids(Tokenizer()) == [4, 5, 1, 2, 3]


def test_half_of_the_text_to_round_on_are_chats(monkeypatch):
    pytest.importorskip("jinja2")

    class Tokenizer:
        chat_template = "{{ messages[0].content }}"

        def __call__(self, text):
            return np.full(len(text) % 7 + 2, 1, "int32")

        def token_to_id(self, token):
            return 99

    def load(dtype, path):
        model = models.randomize(models.causal_lm())
        model.preprocessor = types.SimpleNamespace(tokenizer=Tokenizer())
        return model

    def load_rows(tokenizer, length, seed, **limits):
        assert limits == {"source": 4, "documentation": 2, "train": 2}
        return [np.full((n, length), -1) for n in limits.values()]

    monkeypatch.setattr(qwen_coder, "load_qwen_coder", load)
    monkeypatch.setattr(prose, "load_functions", lambda: ["f", "g"] * 8)
    monkeypatch.setattr(prose, "load_rows", load_rows)
    rows = humaneval.calibration_rows("model.gguf", 16, 12)
    assert rows.shape == (16, 12)
    own = rows[rows[:, 0] >= 0]
    assert len(own) == 8
    assert (own == 1).any()
