"""Word problems of primary school, from the templates of `reasoning-gym`.

    Question: Richard is 24 years old. In 7 years his cousin Patricia ...
    Answer: 7 years from now Patricia will be 24*3=72.
    Right now Patricia is 72-7=65 years old.
    #### 65

GSM-Symbolic (arXiv 2410.05229) as the PyPI package `reasoning-gym` makes it:
85 templates, whose names and numbers a seed draws. Those below 50 are for
`"train"`, `"valid"` and `"test"`; a hash of a problem settles which of the
three it belongs to, so these are disjoint whatever the seeds. The others are
for `"unseen"`, problems of a kind that was never trained on.
"""

import dataclasses
import hashlib
import re
from typing import Any

INSTALL = "pip install 'reasoning-gym>=0.1.25'"
NAME = "gsm_symbolic"
SPLITS = ("train", "valid", "test", "unseen")
# Templates below are for the first three.
SEEN = 50
# 8 of 10 problems from these are for training.
_SPLIT_OF = ("train",) * 8 + ("valid", "test")
# It is the same for all problems.
_REQUEST = " Give the result as your final answer. Do not include units."
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A problem with its worked answer.

    Attributes:
        template: Int, the number of its template.
        question: String.
        answer: String, the worked answer; `#### ` and the result end it.
        entry: Dict, what `reasoning-gym` scores answers by.
    """

    template: int
    question: str
    answer: str
    entry: Any


def make_problems(split, count, seed=0, keep=None):
    """Makes problems of one split, all different.

    Args:
        split: `"train"`, `"valid"`, `"test"` or `"unseen"`.
        count: int, 1 or more.
        seed: int, 0 or more.
        keep: function of a `Problem` to whether it is wanted, for instance
            whether it is short enough. Defaults to all.

    Returns:
        A list of `Problem`s, in random order.

    Raises:
        ImportError: if the package `reasoning-gym` is not installed.
        ValueError: if an argument is none of the above, or `keep` leaves less
            than one problem in 200.

    Example:

    ```python
    problems = make_problems("train", 1000)
    ```
    """
    if split not in SPLITS:
        raise ValueError(
            f"Expected `split` to be one of {SPLITS}. Received: split={split!r}"
        )
    for name, value, least in (("count", count, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(
                f"Expected `{name}` to be an int of {least} or more. "
                f"Received: {name}={value!r}"
            )
    limit = 200 * count + 1000
    # Problem i of a data set is drawn with the seed plus i.
    first = (len(SPLITS) * seed + SPLITS.index(split)) * 10**7
    data = _package().create_dataset(NAME, seed=first, size=limit)
    found: dict[str, Problem] = {}
    for template, index in zip(data.task_indices, range(limit)):
        if (template < SEEN) == (split == "unseen"):
            continue
        entry = data[index]
        question = entry["question"].removesuffix(_REQUEST)
        if split != "unseen" and _split_of(question) != split:
            continue
        answer = entry["metadata"]["answer_cot"]
        problem = Problem(template, question, answer, entry)
        if keep is None or keep(problem):
            found.setdefault(question, problem)
        if len(found) == count:
            return list(found.values())
    raise ValueError(
        f"Expected `keep` to leave more of the problems: {len(found)} of "
        f"{count} were found in {limit}. Let it keep longer ones, or lower "
        f"`count`. Received: split={split!r}, count={count}"
    )


def is_solved(text, problem):
    """Whether the last number of a text is the result of the problem.

    Args:
        text: str, what a model has written.
        problem: a `Problem`.

    Returns:
        Bool, whether the scorer of `reasoning-gym` gives all points.
    """
    numbers = _NUMBER.findall(text)
    if not numbers:
        return False
    # The scorer itself takes the first number.
    result = numbers[-1].replace(",", "")
    score = _package().get_score_answer_fn(NAME)
    return score(result, problem.entry) == 1.0


def _package():
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(
            "The problems are made by the package `reasoning-gym`. Install it "
            f"with: {INSTALL}"
        ) from error
    return reasoning_gym


def _split_of(question):
    digest = hashlib.sha256(question.encode()).digest()
    return _SPLIT_OF[digest[0] % len(_SPLIT_OF)]
