"""Lint the English of the pages and the package: `make lint` runs it.

    python docs/prose.py [FILE ...]

A sentence of more than 30 words or 6 numbers fails, and one that begins with a
hanging "Of", "As" or "That". So does a page whose sentences have more than 18
words in the mean, or that has more than 5 numbers in 100 words. Code, tables
and headings do not count, and names like `2:4` or int8 are words, not numbers.

CHANGELOG.md, and the package's comments and docstrings up to their "Args:", are
read for their sentences alone.
"""

import ast
import pathlib
import re
import sys
import tokenize

ROOT = pathlib.Path(__file__).absolute().parent.parent
PACKAGE = ROOT / "keras_weightmods"
LONGEST, MOST, MEAN, NUMBERS = 30, 6, 18, 5
# Made by commands.
EXEMPT = {"api.md", "results.md"}
# Code, comments, and what a command writes into a page.
NOT_PROSE = re.compile(
    r"```.*?^\s*```|<!-- \w+ -->.*?<!-- end -->|<!--.*?-->",
    re.DOTALL | re.MULTILINE,
)
# Headings, rows of tables, titles of notes.
NOT_SENTENCES = re.compile(r"^\s*(#|\||!!!|--8<--).*$", re.MULTILINE)
IMAGE = re.compile(r"!\[[^\]]*\]\([^)]*\)")
LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)", re.DOTALL)
CODE = re.compile(r"`[^`]*`")
# An empty line ends a paragraph, and so does the next point of a list.
PARAGRAPH = re.compile(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )")
MARKER = re.compile(r"^\s*(?:[-*]|\d+\.) +")
SENTENCE = re.compile(r"(?<=[.!?])[)\"*]*\s+(?=[\"(*]*[A-Z\d])")
WORD = re.compile(r"\S*\w\S*")
NUMBER = re.compile(r"(?<![\w:.-])\d[\d.,]*(?![\w:]|-\w)")
HANGING = re.compile(r"[\"(*]*(Of|As|That)\b")
DOCUMENTED = ast.Module, ast.ClassDef, ast.FunctionDef
SECTION = re.compile(r"^[A-Z]\w+:$", re.MULTILINE)


def sentences(text):
    """Yield the line and the text of each sentence, code as one word."""
    keep_lines = lambda match: "\n" * match[0].count("\n")  # noqa: E731
    for pattern in (NOT_PROSE, NOT_SENTENCES, IMAGE):
        text = pattern.sub(keep_lines, text)
    text = CODE.sub(lambda match: "Code" + keep_lines(match), text)
    text = LINK.sub(lambda match: match[1], text)
    text = re.sub(r"arXiv[ \n]\d+\.\d+", "arXiv", text)
    place = 0
    for paragraph in [*PARAGRAPH.split(text)]:
        place = text.index(paragraph, place)
        start = place
        for sentence in SENTENCE.split(MARKER.sub("", paragraph)):
            start = text.index(sentence, start)
            line = text[:start].count("\n") + 1
            if sentence.strip():
                yield line, " ".join(sentence.split())


def package_texts():
    """Yield each file of the package, and its prose at its lines."""
    for page in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(page.read_text("utf-8"))):
            text = isinstance(node, DOCUMENTED) and ast.get_docstring(node)
            if text:
                lines = node.body[0].lineno - 1
                yield page, "\n" * lines + SECTION.split(text)[0]
        with tokenize.open(page) as file:
            comments = {
                token.start[0]: token.string.lstrip("# ")
                for token in tokenize.generate_tokens(file.readline)
                if token.type == tokenize.COMMENT
            }
        # Comments on lines below each other are one paragraph.
        lines = range(1, max(comments, default=0) + 1)
        yield page, "\n".join(comments.get(line, "") for line in lines)


def problems(text, is_page=True):
    """Return what is wrong with a text, as a list of strings."""
    found, words, numbers, count = [], 0, 0, 0
    for line, sentence in sentences(text):
        length = len(WORD.findall(sentence))
        count, words = count + 1, words + length
        own = len(NUMBER.findall(sentence))
        numbers += own
        begin = f"{line}: {sentence[:60]!r}..."
        if length > LONGEST:
            found.append(f"{begin} has {length} words, {LONGEST} at most")
        if own > MOST:
            found.append(f"{begin} has {own} numbers, {MOST} at most")
        if hanging := HANGING.match(sentence):
            found.append(f"{begin} begins with a hanging {hanging[1]!r}")
    if not is_page:
        return found
    if words > MEAN * count:
        mean = words / count
        found.append(f"1: sentences have {mean:.1f} words, {MEAN} at most")
    if 100 * numbers > NUMBERS * words:
        share = 100 * numbers / words
        found.append(f"1: {share:.1f} numbers in 100 words, {NUMBERS} at most")
    return found


def main():
    pages = [pathlib.Path(name) for name in sys.argv[1:]] or [
        page
        for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
        if page.name not in EXEMPT
    ]
    texts = [(page, page.read_text("utf-8"), True) for page in pages]
    if not sys.argv[1:]:
        changes = ROOT / "CHANGELOG.md"
        others = (changes, changes.read_text("utf-8")), *package_texts()
        texts += [(page, text, False) for page, text in others]
    failed = False
    for page, text, is_page in texts:
        for problem in problems(text, is_page):
            failed = True
            print(f"{page}:{problem}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
