import json
import re

import numpy as np
import pytest

from examples.data import word_problems

pytestmark = pytest.mark.one_backend


class Tokenizer:
    """One token a character; 0 ends a text."""

    end_token_id = 0

    def __call__(self, text):
        return np.array([ord(each) for each in text])


def test_splits_are_disjoint_whatever_the_seeds():
    found = []
    for split in word_problems.SPLITS:
        made = word_problems.make_problems(split, 300, 0)
        made += word_problems.make_problems(split, 300, 1)
        found.append({question for question, _ in made})
    assert len(set.union(*found)) == sum(map(len, found))


def test_seeds_and_counts():
    first = word_problems.make_problems("train", 200, 1)
    assert first[:50] == word_problems.make_problems("train", 50, 1)
    assert first != word_problems.make_problems("train", 200, 2)
    assert len({question for question, _ in first}) == 200


def test_answers_are_right():
    for question, answer in word_problems.make_problems("train", 400):
        steps = re.findall(r"(\d+) ([-+x]) (\d+) = (\d+)\.", answer)
        assert 2 <= len(steps) <= 3
        results = []
        for a, sign, b, result in steps:
            a, b = int(a), int(b)
            expected = {"+": a + b, "-": a - b, "x": a * b}[sign]
            assert int(result) == expected >= 0
            results.append(int(result))
        assert answer.endswith(f"The answer is {results[-1]}.")
        # Each number worked with is told, or is a result.
        told = {int(n) for n in re.findall(r"\d+", question)}
        for a, _, b, _ in steps:
            assert {int(a), int(b)} <= told | set(results)


def test_rows_mark_the_answers():
    problems = [("One?", "1."), ("A longer one?", "22."), ("x" * 50, "3.")]
    rows = word_problems.encode(problems, Tokenizer(), 40)
    assert rows["token_ids"].shape == (2, 40)
    for (question, answer), *row in zip(problems, *rows.values()):
        row = dict(zip(rows, row))
        text = "".join(map(chr, row["token_ids"][row["padding_mask"]]))
        assert text == f"Question: {question}\nAnswer: {answer}\0"
        scored = row["labels"][row["weights"] > 0]
        assert "".join(map(chr, scored)) == f" {answer}\0"
    with pytest.raises(ValueError, match="all are longer"):
        word_problems.encode(problems, Tokenizer(), 5)


def test_problems_of_a_file(tmp_path):
    path = tmp_path / "problems.jsonl"
    lines = [
        json.dumps({"question": f"What is {i}?", "answer": str(i)})
        for i in range(100)
    ]
    path.write_text("\n".join(lines) + "\n\n")
    found = [word_problems.load_problems(x, path) for x in word_problems.SPLITS]
    assert sum(map(len, found)) == 100
    assert len({question for part in found for question, _ in part}) == 100
    assert len(found[0]) > len(found[1]) > 0
