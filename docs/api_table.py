"""Write docs/api.md, the table of all public names.

python docs/api_table.py
"""

import inspect
import pathlib

import keras_weightmods as kwm

PAGE = pathlib.Path(__file__).with_name("api.md")

HEAD = """\
<!-- Made by `python docs/api_table.py` from the docstrings: do not edit. -->

# Public names

`kwm` is `import keras_weightmods as kwm`. Each docstring has the arguments,
what is returned and raised, and an example.

"""


def public_names():
    """Return a dict from public names to classes and functions."""
    return {
        f"{prefix}{name}": value
        for prefix, module in {
            "": kwm,
            "ops.": kwm.ops,
            "plot.": kwm.plot,
            "reports.": kwm.reports,
        }.items()
        for name, value in sorted(names_of(module).items(), key=by_name)
        if not name.startswith("_") and is_documented(value)
    }


def names_of(module):
    return {name: getattr(module, name) for name in dir(module)}


def by_name(item):
    return item[0].casefold()


def is_documented(value):
    return inspect.isclass(value) or inspect.isroutine(value)


def make_page(has_modules=True):
    """Return the page as a string, with links to the files or without."""
    columns = ("name", "what it is", "module")[: 2 + has_modules]
    rows = [columns, ["---"] * len(columns)]
    for name, value in public_names().items():
        row = f"`kwm.{name}`", first_line(value), module_link(value)
        rows.append(row[: len(columns)])
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def first_line(value):
    paragraph = (inspect.getdoc(value) or "").partition("\n\n")[0]
    return " ".join(paragraph.split()).replace("|", r"\|")


def module_link(value):
    path = value.__module__.replace(".", "/")
    text = value.__module__.removeprefix("keras_weightmods.")
    return f"[{text}](../{path}.py)"


if __name__ == "__main__":
    PAGE.write_text(make_page())
