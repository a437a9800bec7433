"""Write the tutorials as notebooks, each beside its page.

    python docs/notebooks.py           # of what the pages have now
    python docs/notebooks.py --run ship_llm

`--run` runs a page first, from top to bottom, in an empty folder. The `text`
block behind a block of code is then what the code has printed.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import re
import sys
import tempfile

TUTORIALS = pathlib.Path(__file__).absolute().parent / "tutorials"
# A block of code, and the block of text behind it: what it prints.
STEP = re.compile(
    r"^```(py|python)\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    pages = {path.stem: path for path in sorted(TUTORIALS.glob("*.md"))}
    parser.add_argument("--run", choices=pages, help="a page to run first")
    name = parser.parse_args().run
    if name:
        pages[name].write_text(run(pages[name].read_text("utf-8")), "utf-8")
    for page in pages.values():
        notebook = notebook_of(page.read_text("utf-8"))
        page.with_suffix(".ipynb").write_text(notebook, "utf-8")


def run(text):
    """Return a page with what its code prints now."""
    names = {}

    def step(match):
        fence, code, _ = match.groups()
        print(code.splitlines()[-1], file=sys.stderr, flush=True)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "page", "exec"), names)
        block = f"```{fence}\n{code}```\n"
        if printed.getvalue():
            block += f"\n```text\n{printed.getvalue().strip()}\n```\n"
        return block

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        return STEP.sub(step, text)


def notebook_of(text):
    """Return the notebook of a page: a cell for each block of code."""
    cells, end = [], 0

    def add_prose(prose):
        if prose.strip():
            source = prose.strip().splitlines(keepends=True)
            cells.append(
                {"cell_type": "markdown", "metadata": {}, "source": source}
            )

    for match in STEP.finditer(text):
        add_prose(text[end : match.start()])
        _, code, printed = match.groups()
        output = {"name": "stdout", "output_type": "stream"}
        lines = (printed or "").splitlines(keepends=True)
        cells.append(
            {
                "cell_type": "code",
                "execution_count": None,
                "metadata": {},
                "outputs": [{**output, "text": lines}] if printed else [],
                "source": code.rstrip("\n").splitlines(keepends=True),
            }
        )
        end = match.end()
    add_prose(text[end:])
    kernel = {"display_name": "Python 3", "language": "python"}
    notebook = {
        "cells": cells,
        "metadata": {"kernelspec": {**kernel, "name": "python3"}},
        "nbformat": 4,
        "nbformat_minor": 4,
    }
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    main()
