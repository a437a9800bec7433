"""Sentences from four sources, and how positive people find those of one.

VADER was measured with these sentences (Hutto & Gilbert, ICWSM 2014). They come
from film reviews (Pang & Lee), product reviews (Hu & Liu), editorials of the
New York Times, and tweets. 20 people rated each from -4 to 4. The source
distribution of the PyPI package `vaderSentiment` has them (MIT licence), but
not its wheel. So it is downloaded and not installed.
"""

import io
import pathlib
import tarfile

import numpy as np

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
DOWNLOAD = (
    "pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 "
    "(it writes the file into the working directory)"
)
SOURCES = ("movieReview", "amazonReview", "nytEditorial", "tweets")

_INNER = "hutto_ICWSM_2014.tar.gz"


def load_sources(path=ARCHIVE, words=(5, 18)):
    """Return sentences, and which of the four sources each is from.

    Args:
        path: The source distribution of `vaderSentiment`.
        words: Pair of ints, the fewest and most words of a sentence.

    Returns:
        Pair of a list of strings and their int32 labels, the places in
        `SOURCES`; no string occurs twice. The order is random and always the
        same, and there are as many of one label as of the other.

    Raises:
        FileNotFoundError: If the file is missing; the message says how to
            get it.
        ValueError: If the tables are not in it.
    """
    tables = _tables(path, words)
    return _balanced([list(tables[source]) for source in SOURCES])


def load_praise(path=ARCHIVE, words=(5, 18), rating=1.0):
    """Return sentences of film reviews, and whether they praise.

    Args:
        path, words: As in `load_sources`.
        rating: Float. Sentences whose mean rating is nearer to 0 are left out.

    Returns:
        As `load_sources`; the label is 1 for praise and 0 for blame.

    Raises:
        FileNotFoundError, ValueError: As `load_sources`.
    """
    sides = [[], []]
    for text, mean in _tables(path, words)[SOURCES[0]].items():
        if abs(mean) >= rating:
            sides[mean > 0].append(text)
    return _balanced(sides)


TASKS = {"source": load_sources, "praise": load_praise}


def _balanced(groups):
    count = min(map(len, groups))
    random = np.random.default_rng(0)
    texts = [t for group in groups for t in random.permutation(group)[:count]]
    labels = np.repeat(np.arange(len(groups), dtype="int32"), count)
    order = random.permutation(len(texts))
    return [str(texts[i]) for i in order], labels[order]


def _tables(path, words):
    """Return {source: {text: mean rating}}, each text in one source alone."""
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"Expected the sentences in {str(file)!r}. Received: no file "
            f"there. Get it with: {DOWNLOAD}, or give its path."
        )
    few, many = words
    tables = {}
    seen = set()
    try:
        inner = _member(file.read_bytes(), _INNER)
        for source in SOURCES:
            table = {}
            content = _member(inner, f"{source}*_GroundTruth.txt")
            for line in content.decode("utf-8").splitlines():
                _, mean, text = line.split("\t")
                text = text.strip()
                if few <= len(text.split()) <= many and text not in seen:
                    table[text] = float(mean)
            seen.update(table)
            tables[source] = table
    except (tarfile.TarError, StopIteration) as error:
        raise ValueError(
            f"Expected {file} to hold {_INNER}, and that to hold tables of "
            f"{SOURCES}. Get it again with: {DOWNLOAD}"
        ) from error
    return tables


def _member(content, pattern):
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        found = (m for m in archive if pathlib.Path(m.name).match(pattern))
        return archive.extractfile(next(found)).read()
