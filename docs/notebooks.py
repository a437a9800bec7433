"""Write the guides as notebooks, each of which has been run.

KERAS_BACKEND=torch python docs/notebooks.py
"""

import pathlib
import re
import tempfile

import jupytext
import nbclient

DOCS = pathlib.Path(__file__).absolute().parent
# Beside the site, so that links to its pages hold.
OUTPUT = DOCS.parent / "build" / "site" / "notebooks"
# What a cell prints stands in its output.
PRINTED = re.compile(
    r"(^```python\n.*?^```\n)\n```text\n.*?^```\n", re.DOTALL | re.MULTILINE
)
LINK = re.compile(r"\]\((?!\w+:|#)(\.\./)?([\w/]+)\.md")
SECONDS = 600


def main():
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for guide in sorted((DOCS / "guides").glob("*.md")):
        notebook = notebook_of(guide.read_text())
        with tempfile.TemporaryDirectory() as folder:
            client = nbclient.NotebookClient(
                notebook,
                timeout=SECONDS,
                kernel_name="python3",
                resources={"metadata": {"path": folder}},
            )
            client.execute()
        path = OUTPUT / f"{guide.stem}.ipynb"
        jupytext.write(notebook, path)
        print(path, flush=True)


def notebook_of(text):
    """Return the notebook of a guide, a cell for each block of Python."""
    text = PRINTED.sub(r"\1", text)
    # Commands are to be read: a cell of `bash` would run them.
    text = text.replace("\n```bash\n", "\n```console\n")
    notebook = jupytext.reads(LINK.sub(page, text), fmt="md")
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    return notebook


def page(match):
    """Return a link to a page, as it is in a guide, from the notebooks."""
    folder = "" if match[1] else "guides/"
    return f"](../{folder}{match[2]}.html"


if __name__ == "__main__":
    main()
