import dataclasses

import pytest

from examples.data import gsm_symbolic

pytestmark = pytest.mark.one_backend

pytest.importorskip("reasoning_gym")


def test_splits_share_no_problem_and_unseen_no_template():
    questions, templates = [], {}
    for split in gsm_symbolic.SPLITS:
        made = gsm_symbolic.make_problems(split, 200, 0)
        made += gsm_symbolic.make_problems(split, 200, 1)
        questions.append({problem.question for problem in made})
        templates[split] = {problem.template for problem in made}
    assert len(set.union(*questions)) == sum(map(len, questions))
    assert max(templates["train"]) < 50 <= min(templates["unseen"])
    assert len(templates["train"]) > 40 < len(templates["test"])


def test_seeds_and_what_is_kept():
    def short(problem):
        return len(problem.answer) < 150

    first = gsm_symbolic.make_problems("train", 60, 1, short)
    assert first[:20] == gsm_symbolic.make_problems("train", 20, 1, short)
    assert first[:20] != gsm_symbolic.make_problems("train", 20, 2, short)
    assert all(map(short, first))
    with pytest.raises(ValueError, match="`keep` to leave more"):
        gsm_symbolic.make_problems("test", 1, keep=lambda problem: False)


def test_the_last_number_counts():
    for problem in gsm_symbolic.make_problems("unseen", 100):
        assert gsm_symbolic.is_solved(problem.answer, problem)
        wrong = f"{problem.answer}1"
        assert not gsm_symbolic.is_solved(wrong, problem)
    known = dataclasses.replace(problem, entry={"answer": "1200"})
    for text, solved in (
        ("3 * 400 = 1,200", True),
        ("#### 1200.", True),
        ("1200 of 3", False),
        ("none", False),
        ("", False),
    ):
        assert gsm_symbolic.is_solved(text, known) == solved
