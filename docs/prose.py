"""Lint the English of README.md and of the pages: `make lint` runs it.

    python docs/prose.py [FILE ...]

A sentence of more than 35 words fails, and one that begins with a hanging "Of",
"As" or "That". So does a page whose sentences have more than 18 words in the
mean, or that has more than 5 numbers in 100 words. Code, tables, headings and
comments do not count, and names like `2:4` or int8 are words, not numbers.
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).absolute().parent.parent
LONGEST, MEAN, NUMBERS = 35, 18, 5
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


def problems(text):
    """Return what is wrong with a page, as a list of strings."""
    found, words, numbers, count = [], 0, 0, 0
    for line, sentence in sentences(text):
        length = len(WORD.findall(sentence))
        count, words = count + 1, words + length
        numbers += len(NUMBER.findall(sentence))
        begin = f"{line}: {sentence[:60]!r}..."
        if length > LONGEST:
            found.append(f"{begin} has {length} words, {LONGEST} at most")
        if hanging := HANGING.match(sentence):
            found.append(f"{begin} begins with a hanging {hanging[1]!r}")
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
    failed = False
    for page in pages:
        for problem in problems(page.read_text("utf-8")):
            failed = True
            print(f"{page}:{problem}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
