"""Write the addresses of a release into its files, before it is built.

    python .github/release_links.py https://github.com/OWNER/NAME v1.2.3

The files name no address, as a clone may lie anywhere. PyPI shows the README
alone, where a link to another file leads nowhere; so its links become those to
the files at the tag, and `pyproject.toml` gets `[project.urls]`.
"""

import pathlib
import re
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main(repository, tag, root=ROOT):
    project = root / "pyproject.toml"
    text = project.read_text("utf-8")
    if "urls" in tomllib.loads(text)["project"]:
        raise SystemExit("pyproject.toml has [project.urls] already")
    files = f"{repository}/blob/{tag}"
    urls = {
        "Repository": repository,
        "Documentation": f"{files}/README.md",
        "Changelog": f"{files}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }
    lines = [f'{name} = "{url}"' for name, url in urls.items()]
    table = "\n".join(["[project.urls]", *lines])
    before = "[project.optional-dependencies]"
    project.write_text(text.replace(before, f"{table}\n\n{before}"), "utf-8")
    readme = root / "README.md"
    # Neither an address nor a place on the page.
    link = re.compile(r"\]\((?!\w+:|#)([^)\s]+)\)")
    text = readme.read_text("utf-8")
    readme.write_text(link.sub(rf"]({files}/\1)", text), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
