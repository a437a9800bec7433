"""Sentences of film reviews, and how positive people find them.

10,605 sentences from rotten.tomatoes.com (Pang & Lee), each rated from -4 to 4
by 20 people for VADER (Hutto & Gilbert, ICWSM 2014). The source distribution
of the PyPI package `vaderSentiment` carries them (MIT licence); its wheel does
not, so it is downloaded and not installed.
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

_INNER = "hutto_ICWSM_2014.tar.gz"
_TABLE = "movieReviewSnippets_GroundTruth.txt"


def load_reviews(path=ARCHIVE, rating=1.0, words=(5, 18)):
    """Return sentences, and whether they praise.

    Args:
        path: The source distribution of `vaderSentiment`.
        rating: Float. Sentences whose mean rating is nearer to 0 are left out.
        words: Pair of ints, the fewest and most words of a sentence.

    Returns:
        Pair of a list of strings, each one once, in random order that is
        always the same, and int32 labels: 1 for praise, 0 for blame. There
        are as many of one as of the other.

    Raises:
        FileNotFoundError: If the file is missing; the message says how to
            get it.
        ValueError: If the table is not in it.
    """
    ratings = {
        text.strip(): float(mean)
        for _, mean, text in (
            line.split("\t") for line in _table(path).splitlines()
        )
    }
    few, many = words
    sides = [[], []]
    for text, mean in ratings.items():
        if abs(mean) >= rating and few <= len(text.split()) <= many:
            sides[mean > 0].append(text)
    count = min(map(len, sides))
    random = np.random.default_rng(0)
    blame, praise = (random.permutation(side)[:count] for side in sides)
    texts = np.concatenate([blame, praise])
    order = random.permutation(2 * count)
    return texts[order].tolist(), (order >= count).astype("int32")


def _table(path):
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"Expected the reviews in {str(file)!r}. Received: no file there. "
            f"Get it with: {DOWNLOAD}, or give its path."
        )
    try:
        inner = _member(file.read_bytes(), _INNER)
        return _member(inner, _TABLE).decode("utf-8")
    except (tarfile.TarError, StopIteration) as error:
        raise ValueError(
            f"Expected {file} to hold {_INNER}, and that to hold {_TABLE}. "
            f"Get it again with: {DOWNLOAD}"
        ) from error


def _member(content, name):
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        found = (m for m in archive if pathlib.Path(m.name).name == name)
        return archive.extractfile(next(found)).read()
