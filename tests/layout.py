"""Reads the imports of a package, and how long its files are."""

import ast
import pathlib
import re

# From the top: a file imports from floors below its own and from its folder.
# Those of one row do not import each other.
FLOORS = (
    ("", "cli"),
    (
        *("sparsity", "quantization", "packing", "lift", "reparameterize"),
        *("merging", "plot"),
    ),
    ("calibration", "patches", "exporting"),
    ("saving", "evaluation", "generation"),
    ("core", "ops"),
    ("backend",),
    ("native",),
    ("utils",),
)
# A longer file says in its docstring, in these words, why.
MAX_LINES = 520
REASON = " make this file long."
_RANK = {folder: -i for i, row in enumerate(FLOORS) for folder in row}


def imports(root):
    """Return {module: set of the package's modules that it imports}.

    Lazy imports count, and so do strings that name a module, as for
    `importlib`; one of a backend counts as all modules of the name.

    Args:
        root: Path of the package's folder.
    """
    root = pathlib.Path(root)
    modules = {}
    for file in sorted(root.rglob("*.py")):
        parts = (root.name, *file.relative_to(root).with_suffix("").parts)
        modules[".".join(parts).removesuffix(".__init__")] = file
    found = {}
    for module, file in modules.items():
        names = set()
        package = ".".join((root.name, *file.parent.relative_to(root).parts))
        for node in ast.walk(ast.parse(file.read_text())):
            names.update(_names(node, package, root.name, modules))
        found[module] = names - {"", module}
    return found


def _names(node, package, root, modules):
    """Yield the modules of the package that a node of the syntax names."""
    if isinstance(node, ast.Import):
        yield from (_known(alias.name, modules) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = package.split(".")[: len(package.split(".")) + 1 - node.level]
        start = [*base, node.module] if node.level else [node.module]
        start = ".".join(filter(None, start))
        for alias in node.names:
            yield _known(f"{start}.{alias.name}", modules)
    elif isinstance(node, (ast.JoinedStr, ast.Constant)):
        text = _pattern(node)
        if text.startswith(rf"{root}\."):
            yield from (m for m in modules if re.fullmatch(text, m))


def _known(name, modules):
    """Return the module that `name`, or what it is an attribute of, is."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def _pattern(node):
    """Return a string, or an f-string, as a regular expression."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(
        re.escape(part.value)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
        else r"\w+"
        for part in parts
    )


def problems(root, allowed=()):
    """Return what is wrong with the imports of a package, as strings.

    Args:
        root: Path of the package's folder.
        allowed: Names of modules that all may import.
    """
    root = pathlib.Path(root)
    arrows = imports(root)
    found = []
    for module, names in arrows.items():
        for name in sorted(names - set(allowed)):
            here, there = _folder(module, arrows), _folder(name, arrows)
            if name == root.name:
                if here != "cli":
                    found.append(f"{module} imports the whole package")
            elif here != there and _RANK[there] >= _RANK[here]:
                found.append(f"{module} imports {name}, not below it")
    return found + [f"circle: {' > '.join(way)}" for way in circles(arrows)]


def _folder(module, arrows):
    parts = module.split(".")
    is_folder = len(parts) > 2 or any(
        other.startswith(f"{module}.") for other in arrows if len(parts) == 2
    )
    return parts[1] if is_folder else ""


def circles(arrows):
    """Return the circles of imports, each as a list of modules."""
    found, done = [], set()

    def visit(module, way):
        if module in way:
            found.append([*way[way.index(module) :], module])
        elif module not in done:
            for name in sorted(arrows.get(module, ())):
                visit(name, [*way, module])
            done.add(module)

    for module in arrows:
        visit(module, [])
    return found


def too_long(root):
    """Return the files that are too long and do not say why, as strings."""
    texts = {file: file.read_text() for file in sorted(root.rglob("*.py"))}
    return [
        f"{file.relative_to(root)} has {len(text.splitlines())} lines"
        for file, text in texts.items()
        if len(text.splitlines()) > MAX_LINES
        and REASON not in " ".join(_docstring(text).split())
    ]


def _docstring(text):
    return ast.get_docstring(ast.parse(text)) or ""
