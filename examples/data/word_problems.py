"""Arithmetic word problems of two and three steps, made by a seeded generator.

    Question: Ana has 12 apples. She buys 7 more and then gives away 5. ...
    Answer: 12 + 7 = 19. 19 - 5 = 14. The answer is 14.

A problem is a story and its numbers. Which of the splits `"train"`, `"valid"`
and `"test"` it belongs to is settled by a hash of these, so the splits are
disjoint whatever the seeds and counts.
"""

import hashlib
import json
import pathlib

import numpy as np

SPLITS = ("train", "valid", "test")
# 8 of 10 problems are for training.
_SPLIT_OF = ("train",) * 8 + ("valid", "test")

_NAMES = (
    ("Ana", "She"),
    ("Ben", "He"),
    ("Clara", "She"),
    ("David", "He"),
    ("Emma", "She"),
    ("Felix", "He"),
    ("Grace", "She"),
    ("Hugo", "He"),
)
_THINGS = (
    "apples",
    "books",
    "coins",
    "eggs",
    "marbles",
    "pencils",
    "shells",
    "stamps",
)


def make_problems(split, count, seed=0):
    """Makes problems of one split, all different.

    Args:
        split: `"train"`, `"valid"` or `"test"`.
        count: int, 1 or more.
        seed: int.

    Returns:
        A list of pairs of strings, question and answer.

    Raises:
        ValueError: if `split` is none of the three, or `count` is below 1.

    Example:

    ```python
    problems = make_problems("train", 1000)
    ```
    """
    if split not in SPLITS:
        raise ValueError(
            f"Expected `split` to be one of {SPLITS}. Received: split={split!r}"
        )
    if not isinstance(count, int) or count < 1:
        raise ValueError(
            f"Expected `count` to be an int of 1 or more. Received: {count!r}"
        )
    random = np.random.default_rng([seed, SPLITS.index(split)])
    found: dict[str, str] = {}
    while len(found) < count:
        story = _STORIES[random.integers(len(_STORIES))]
        question, answer = story(_Draw(random))
        if _split_of(question) == split:
            found.setdefault(question, answer)
    return list(found.items())


def load_problems(split, path, seed=0):
    """Reads problems of one split from a file of the user's.

    Args:
        split: `"train"`, `"valid"` or `"test"`.
        path: str. A file with a JSON object on each line, with the strings
            `question` and `answer`.
        seed: int, of the order.

    Returns:
        A list of pairs of strings, question and answer.

    Raises:
        ValueError: if the file is of another form, or has no problem that
            falls into the split.
    """
    problems = {}
    lines = pathlib.Path(path).read_text("utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            each = json.loads(line)
            question, answer = each["question"], each["answer"]
            if not isinstance(question, str) or not isinstance(answer, str):
                raise TypeError("must be strings")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                "Expected a JSON object with the strings `question` and "
                f"`answer` on each line. Received: path={str(path)!r}, line "
                f"{number}: {error}"
            ) from error
        if _split_of(question) == split:
            problems.setdefault(question, answer)
    if not problems:
        raise ValueError(
            f"Expected problems that fall into the split {split!r}, one in "
            f"ten or so. Received: path={str(path)!r}, {len(lines)} lines"
        )
    items = list(problems.items())
    return [
        items[i] for i in np.random.default_rng(seed).permutation(len(items))
    ]


def encode(problems, tokenizer, length):
    """Rows of tokens with the places of the answers.

    Args:
        problems: list of pairs, question and answer.
        tokenizer: a KerasHub tokenizer.
        length: int. Longer rows are left out.

    Returns:
        Dict of arrays of shape `(rows, length)`, int32 `token_ids`, bool
        `padding_mask`, and of shape `(rows, length - 1)`: int32 `labels` and
        float32 `weights`, 1 for the tokens of an answer and for the end.

    Raises:
        ValueError: if no row is short enough.
    """
    end = tokenizer.end_token_id
    ids, starts = [], []
    for question, answer in problems:
        prompt = list(map(int, tokenizer(prompt_of(question))))
        row = prompt + list(map(int, tokenizer(f" {answer}"))) + [end]
        if len(row) <= length:
            ids.append(row)
            starts.append(len(prompt))
    if not ids:
        raise ValueError(
            f"Expected problems of at most {length} tokens; all are longer. "
            "Raise `length`."
        )
    tokens = np.full((len(ids), length), end, "int32")
    mask = np.zeros((len(ids), length), bool)
    answers = np.zeros((len(ids), length), "float32")
    for place, (row, start) in enumerate(zip(ids, starts)):
        tokens[place, : len(row)] = row
        mask[place, : len(row)] = True
        answers[place, start : len(row)] = 1
    return {
        "token_ids": tokens,
        "padding_mask": mask,
        "labels": tokens[:, 1:],
        "weights": answers[:, 1:],
    }


def prompt_of(question):
    """What the model is given of a problem."""
    return f"Question: {question}\nAnswer:"


def _split_of(question):
    digest = hashlib.sha256(question.encode()).digest()
    return _SPLIT_OF[digest[0] % len(_SPLIT_OF)]


class _Draw:
    """Names, things and numbers for a story."""

    def __init__(self, random):
        self.random = random
        self.name, self.pronoun = self.one_of(_NAMES)
        self.things = self.one_of(_THINGS)

    def one_of(self, choices):
        return choices[self.random.integers(len(choices))]

    def number(self, low, high):
        return int(self.random.integers(low, high + 1))


def _solution(*steps):
    """Steps such as (12, "+", 7), worked out."""
    results = {"+": int.__add__, "-": int.__sub__, "x": int.__mul__}
    texts = []
    for a, sign, b in steps:
        result = results[sign](a, b)
        texts.append(f"{a} {sign} {b} = {result}.")
    return f"{' '.join(texts)} The answer is {result}."


def _bought_and_gave(d):
    a, b = d.number(5, 60), d.number(3, 40)
    c = d.number(2, a + b - 1)
    return (
        f"{d.name} has {a} {d.things}. {d.pronoun} buys {b} more and then "
        f"gives away {c}. How many {d.things} does {d.name} have now?",
        _solution((a, "+", b), (a + b, "-", c)),
    )


def _boxes(d):
    a, b, c = d.number(2, 9), d.number(3, 12), d.number(2, 30)
    return (
        f"{d.name} has {a} boxes with {b} {d.things} in each, and {c} loose "
        f"ones. How many {d.things} does {d.name} have in all?",
        _solution((a, "x", b), (a * b, "+", c)),
    )


def _shop(d):
    a, b, c = d.number(2, 9), d.number(2, 12), d.number(1, 9)
    paid = a * b + c
    return (
        f"{d.name} buys {a} {d.things} for {b} dollars each and pays with "
        f"{paid} dollars. How many dollars does {d.name} get back?",
        _solution((a, "x", b), (paid, "-", a * b)),
    )


def _three_days(d):
    a, b = d.number(4, 30), d.number(2, 20)
    return (
        f"{d.name} finds {a} {d.things} on Monday and {b} more than that on "
        f"Tuesday. How many {d.things} does {d.name} find on both days?",
        _solution((a, "+", b), (a, "+", a + b)),
    )


def _shelves(d):
    a, b, c = d.number(2, 6), d.number(4, 12), d.number(2, 6)
    sold = d.number(1, a * b + c - 1)
    return (
        f"A shop has {a} shelves with {b} {d.things} each and {c} in the "
        f"window. It sells {sold}. How many {d.things} are left?",
        _solution((a, "x", b), (a * b, "+", c), (a * b + c, "-", sold)),
    )


_STORIES = (_bought_and_gave, _boxes, _shop, _three_days, _shelves)
