import io
import tarfile

import pytest

from examples.data.reviews import load_reviews

pytestmark = pytest.mark.one_backend

ROWS = [
    ("2.5", "a warm and funny film"),
    ("-1.2", "a dull and endless film"),
    ("-3.0", "bad in every single way"),
    ("0.4", "it lasts for two hours"),
    ("3.9", "wonderful"),
    ("2.5", "a warm and funny film"),
]


def tar(path, name, content):
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))


def test_sentences_that_people_are_clear_about(tmp_path):
    lines = (f"{i}\t{m}\t{text}\r\n" for i, (m, text) in enumerate(ROWS))
    inner = tmp_path / "inner.tar.gz"
    name = "a/movieReviewSnippets_GroundTruth.txt"
    tar(inner, name, "".join(lines).encode())
    path = tmp_path / "outer.tar.gz"
    tar(path, "b/hutto_ICWSM_2014.tar.gz", inner.read_bytes())
    texts, labels = load_reviews(path, words=(5, 6))
    assert sorted(labels) == [0, 1]
    ratings = {text: float(mean) for mean, text in ROWS}
    for text, label in zip(texts, labels):
        assert abs(ratings[text]) >= 1
        assert label == (ratings[text] > 0)
    assert load_reviews(path, words=(5, 6))[0] == texts
    with pytest.raises(ValueError, match="to hold hutto_ICWSM_2014"):
        load_reviews(inner)


def test_missing_file_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="pip download --no-deps"):
        load_reviews(tmp_path / "none.tar.gz")
