import io
import tarfile

import pytest

from examples.data.sentences import SOURCES, load_praise, load_sources

pytestmark = pytest.mark.one_backend

FILMS = {
    "a warm and funny film": 2.5,
    "a dull and endless film": -1.2,
    "bad in every single way": -3.0,
    "it lasts for two hours": 0.4,
    "wonderful": 3.9,
}


def write_tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"folder/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def path(tmp_path):
    tables = {}
    for source in SOURCES:
        rows = {f"{i} is a {source} sentence": i for i in range(3)}
        rows["it lasts for two hours"] = 0.4  # as in the first
        rows = FILMS if source == SOURCES[0] else rows
        lines = [f"{i}\t{rows[text]}\t{text}" for i, text in enumerate(rows)]
        # Some lines come twice, and ratings that are not the mean.
        name = f"{source}Snippets"
        tables[f"{name}_GroundTruth.txt"] = "\r\n".join(2 * lines).encode()
        tables[f"{name}_anonDataRatings.txt"] = b"0\t1\t[1, 2]"
    write_tar(tmp_path / "inner.tar.gz", tables)
    inner = (tmp_path / "inner.tar.gz").read_bytes()
    write_tar(tmp_path / "outer.tar.gz", {"hutto_ICWSM_2014.tar.gz": inner})
    return tmp_path / "outer.tar.gz"


def test_sources(path):
    texts, labels = load_sources(path, words=(5, 6))
    assert sorted(labels) == [label for label in range(4) for _ in range(3)]
    assert len(set(texts)) == len(texts)
    for text, label in zip(texts, labels):
        source = next((s for s in SOURCES if s in text), SOURCES[0])
        assert SOURCES[label] == source
    assert load_sources(path, words=(5, 6))[0] == texts


def test_praise_that_people_agree_on(path):
    texts, labels = load_praise(path, words=(5, 6))
    assert sorted(labels) == [0, 1]
    for text, label in zip(texts, labels):
        assert abs(FILMS[text]) >= 1
        assert label == (FILMS[text] > 0)
