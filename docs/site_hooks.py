"""What MkDocs runs beside its plugins; see mkdocs.yml.

- The pages of the API reference are made from the public names; a name or a
  public method without a docstring ends the build.
- `kwm.name` in the text of a page links to the reference, and must be there.
- README.md is the first page; CHANGELOG.md and CONTRIBUTING.md become pages.
- The code of gallery.md is run, and its pictures put behind it.
"""

import inspect
import io
import itertools
import pathlib
import re
import runpy
import warnings

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

DOCS = pathlib.Path(__file__).absolute().parent
API = runpy.run_path(str(DOCS / "api_table.py"))
PUBLIC = API["public_names"]()
AT_THE_ROOT = ("CHANGELOG.md", "CONTRIBUTING.md")
GALLERY = "gallery.md"
# Pages that the navigation names and that need not be there.
OPTIONAL = ("cli.md", "ship.md")
# Of folders whose pages are not called as they are.
TITLES = {
    "core": "Targets",
    "lift": "Principal weights",
    "ops": "ops",
    "plot": "plot",
    "reports": "Reports",
    "reparameterize": "Reparameterization",
}

CODE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FENCE = re.compile(r"^(```.*?^```$)", re.DOTALL | re.MULTILINE)
PLOT = re.compile(r"kwm\.plot\.(\w+)")
NAME = re.compile(r"(?<!\[)`kwm\.([\w.]+)(\([^`\n]*\))?`")


def on_config(config):
    config.nav = [*existing(config.nav)]
    return config


def reference_entries():
    for path in sorted({page_of(name) for name in PUBLIC}):
        folder = pathlib.PurePosixPath(path).stem
        yield {TITLES.get(folder, folder.capitalize()): path}


def existing(entries):
    for entry in entries:
        if isinstance(entry, dict):
            ((title, value),) = entry.items()
            if value == "reference":
                entry = {title: ["api.md", *reference_entries()]}
            elif isinstance(value, list):
                entry = {title: [*existing(value)]}
            elif value in OPTIONAL and not (DOCS / value).exists():
                continue
        yield entry


def on_files(files, config):
    check_docstrings()
    pages = reference_pages()
    for name in AT_THE_ROOT:
        pages[name.lower()] = (DOCS.parent / name).read_text()
    pages["index.md"] = first_page()
    for path, text in {**pages, **gallery_pictures()}.items():
        files.append(File.generated(config, path, content=text))
    return files


def first_page():
    """Return README.md with its links as they are within the site."""
    text = (DOCS.parent / "README.md").read_text().replace("](docs/", "](")
    for name in AT_THE_ROOT:
        text = text.replace(f"]({name})", f"]({name.lower()})")
    return text


def gallery_pictures():
    """Return a dict from paths to the pictures of the gallery, as bytes."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    found = {}
    text = (DOCS / GALLERY).read_text()
    for number, code in enumerate(CODE.findall(text)):
        with warnings.catch_warnings():
            # What torch says of NumPy, as in the tests.
            warnings.filterwarnings("ignore", "__array__ implementation")
            exec(compile(code, GALLERY, "exec"), {})
        picture = io.BytesIO()
        pyplot.savefig(picture, dpi=110)
        pyplot.close("all")
        found[f"gallery/{number}.png"] = picture.getvalue()
    return found


def with_pictures(markdown):
    numbers = itertools.count()

    def with_picture(match):
        # What the function says that it draws is what the picture shows.
        drawn = PUBLIC[f"plot.{PLOT.search(match[1])[1]}"]
        shown = inspect.getdoc(drawn).split("\n")[0].removeprefix("Draw ")
        return f"{match[0]}\n![{shown}](gallery/{next(numbers)}.png)\n"

    return CODE.sub(with_picture, markdown)


def check_docstrings():
    missing = [name for name in PUBLIC if not inspect.getdoc(PUBLIC[name])]
    for name, value in PUBLIC.items():
        for member in vars(value) if inspect.isclass(value) else ():
            part = getattr(value, member, None)
            if (
                not member.startswith("_")
                and (inspect.isroutine(part) or isinstance(part, property))
                and not inspect.getdoc(part)
            ):
                missing.append(f"{name}.{member}")
    if missing:
        raise PluginError(f"Public names without a docstring: {missing}")


def reference_pages():
    """Return a dict from paths to pages, one for each folder of the package."""
    pages = {}
    for name, value in PUBLIC.items():
        if name.rpartition(".")[2] != value.__name__:  # an alias, as `LIFT`
            continue
        path = page_of(name)
        pages[path] = pages.get(path, "") + (
            f"\n::: {full_name(value)}\n"
            f"    options:\n"
            f"      heading: kwm.{name}\n"
            f"      toc_label: {name}\n"
        )
    return pages


def page_of(name):
    folder = PUBLIC[name].__module__.split(".")[1]
    return f"reference/{name.partition('.')[0] if '.' in name else folder}.md"


def full_name(value):
    return f"{value.__module__}.{value.__qualname__}"


def on_page_markdown(markdown, page, config, files):
    path = page.file.src_uri
    if path == "api.md":
        # The reference is sorted by modules; a phone has no room for them.
        markdown = API["make_page"](has_modules=False)
    if path.startswith("reference/"):
        return markdown
    if path == GALLERY:
        markdown = with_pictures(markdown)
    parts = FENCE.split(markdown)
    parts[::2] = [
        NAME.sub(lambda match: link(match, path), part) for part in parts[::2]
    ]
    return "".join(parts)


def link(match, path):
    """Return the link of a name, or of what is called on it."""
    name = match[1]
    while name not in PUBLIC and "." in name:
        name = name.rpartition(".")[0]
    if name not in PUBLIC:
        if inspect.ismodule(getattr(API["kwm"], name, None)):
            return match[0]
        raise PluginError(f"{path}: {match[0]} is no public name")
    return f"[{match[0]}][{full_name(PUBLIC[name])}]"
